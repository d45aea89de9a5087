"""Order in which training reads cells: a pure function of (seed, epoch, step), whatever the number of processes.

Two ways, of which a recipe chooses one:

- :class:`WindowShuffle`: every cell once per epoch. Blocks of neighbouring cells are shuffled and mixed in windows, so
  that a corpus on disk is read in pieces while a batch has cells of many of them.
- :class:`BalancedSampler`: cells drawn with replacement, by study, cell type and organ.
"""

from collections.abc import Sequence

import numpy as np

from scmulan.data.store import CellSource
from scmulan.vocab.vocabulary import Family

_BLOCKS, _WINDOW = 0, 1  # keys of the random streams


class WindowShuffle:
    """Shuffle the cells of an epoch in windows of whole blocks of neighbouring cells.

    Parameters
    ----------
    n_cells : int
        Number of cells.
    seed : int
        Seed of the order.
    block : int
        Number of neighbouring cells that stay in one window, and so are read from disk together.
    window : int
        Approximate number of cells of a window; it is rounded to a multiple of ``block``. The last window also holds
        the remainder, and is less than twice as large.

    Notes
    -----
    Memory: the shuffled blocks of one epoch, 8 bytes each (12 MB for 100 million cells in blocks of 64). Any window of
    any epoch can be asked for at once; nothing is replayed.
    """

    def __init__(self, n_cells: int, seed: int, *, block: int = 64, window: int = 65_536) -> None:
        self.n_cells = n_cells
        self.seed = seed
        self.block = block
        self._blocks_per_window = max(1, round(window / block))
        self._windows = max(1, n_cells // (self._blocks_per_window * block))
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._windows

    def size(self, window: int) -> int:
        """Return the number of cells of a window, the same in every epoch."""
        full = self._blocks_per_window * self.block
        return full if window < len(self) - 1 else self.n_cells - full * (len(self) - 1)

    def cells(self, epoch: int, window: int) -> np.ndarray:
        """Return the indices of a window's cells, int64, shuffled."""
        first = window * self._blocks_per_window
        last_window = window == len(self) - 1
        blocks = self._blocks(epoch)[first : None if last_window else first + self._blocks_per_window]
        cells = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        if last_window:  # cells after the last whole block
            cells = np.concatenate([cells, np.arange(self.n_cells // self.block * self.block, self.n_cells)])
        return np.random.default_rng([self.seed, epoch, _WINDOW, window]).permutation(cells)

    def _blocks(self, epoch: int) -> np.ndarray:
        kept = self._shuffled  # a local name: another thread may replace it by another epoch's
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, _BLOCKS])
            kept = self._shuffled = epoch, rng.permutation(self.n_cells // self.block)
        return kept[1]


class BalancedSampler:
    """Sample cells with replacement, so that large studies, common cell types and common organs weigh less.

    The probability of a study is proportional to its number of cells to the power ``study_power``; within a study, that
    of a cell type to its number of cells to the power ``label_power``; then the total probability of each organ is
    raised to ``organ_power``. With powers of 1 all cells are equally probable; with 0 all studies, types or organs are.

    Parameters
    ----------
    cells : CellSource
        Where the cells are.
    eligible : numpy.ndarray, uint8 [cells]
        Purposes (training tasks) that each cell can be drawn for, one bit each.
    purposes : int
        Number of bits used.
    study_power, label_power, organ_power : float
        See above.

    Notes
    -----
    Cells of one group (study, type, organ, purposes) have the same probability, so memory is 4 bytes per cell (8 above
    two billion) and a few numbers per group. The cells are sorted by group once: 5 s for 10 million cells.
    """

    def __init__(
        self,
        cells: CellSource,
        eligible: np.ndarray,
        purposes: int,
        *,
        study_power: float = 0.5,
        label_power: float = 0.5,
        organ_power: float = 1.0,
    ) -> None:
        label = np.where(cells.tokens(Family.FINE) >= 0, cells.tokens(Family.FINE), cells.tokens(Family.COARSE))
        columns = (np.asarray(cells.study), label, cells.tokens(Family.ORGAN), eligible)
        self._order, (study, label, organ, eligible), self._sizes = _group_cells(columns)
        self._start = np.concatenate(([0], np.cumsum(self._sizes)[:-1]))
        self._weights = []
        for purpose in range(purposes):
            n = np.where(eligible >> purpose & 1, self._sizes, 0).astype(np.float64)
            weight = n * _sum_within((study, label), n) ** (label_power - 1.0)
            weight *= np.nan_to_num(_sum_within((study,), n) ** study_power / _sum_within((study,), weight))
            weight *= _sum_within((organ,), weight) ** (organ_power - 1.0)
            self._weights.append(np.where(n > 0, weight, 0.0) / max(weight[n > 0].sum(), 1e-300))
        self._cumulative = [np.cumsum(weight) for weight in self._weights]

    def any(self, purpose: int) -> bool:
        """Return whether any cell is eligible for a purpose."""
        return bool(self._weights[purpose].any())

    def draw(self, purpose: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw ``n`` cells that are eligible for a purpose: indices, int64, with replacement."""
        cumulative = self._cumulative[purpose]
        group = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
        within = (rng.random(n) * self._sizes[group]).astype(np.int64)
        return self._order[self._start[group] + within].astype(np.int64)

    def probabilities(self, purpose: int) -> np.ndarray:
        """Return the probability of each cell to be drawn for a purpose, float64 ``[cells]``."""
        out = np.zeros(len(self._order))
        out[self._order] = np.repeat(self._weights[purpose] / self._sizes, self._sizes)
        return out


def _group_cells(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Group cells by a combination of integer columns.

    Returns
    -------
    order : numpy.ndarray
        Indices of the cells, sorted by group; int32 below two billion cells.
    values : tuple of numpy.ndarray
        Value of each column in each group.
    sizes : numpy.ndarray
        Number of cells of each group.
    """
    key = np.zeros(len(columns[0]), dtype=np.int64)
    ranges, lows = [], []
    for column in columns:
        low = int(column.min(initial=0))
        n_values = int(column.max(initial=0)) - low + 1
        key *= n_values
        key += column
        key -= low
        ranges.append(n_values)
        lows.append(low)
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key, prepend=key[0] - 1 if len(key) else 0))
    sizes = np.diff(np.append(first, len(key)))
    values, rest = [], key[first]
    for n_values, low in zip(reversed(ranges), reversed(lows), strict=True):
        values.append(rest % n_values + low)
        rest = rest // n_values
    if len(order) < 2**31:
        order = order.astype(np.int32)
    return order, tuple(reversed(values)), sizes


def _sum_within(keys: tuple[np.ndarray, ...], weight: np.ndarray) -> np.ndarray:
    """Sum the weights of all groups that share a group's keys; 1 where nothing has weight."""
    _, inverse = np.unique(np.stack(keys), axis=1, return_inverse=True)
    sums = np.bincount(inverse.ravel(), weight)
    return np.where(sums > 0, sums, 1.0)[inverse.ravel()]

"""In which order cells are read: a pure function of (seed, epoch, step), whatever the number of ranks and workers.

An epoch reads every cell once. Blocks of neighbouring cells are shuffled and mixed in windows, so that a corpus on
disk is read in pieces while a batch has cells of many of them; within a window, cells of similar length share a
batch. Nothing of the order is kept but the shuffled blocks of one epoch: 8 bytes per block, 12 MB for 100 million
cells; any batch of any epoch can be asked for at once.

Where classes or tissues should be balanced, cells are drawn with weights instead (:class:`BalancedSampler`): with
replacement, so an "epoch" of such batches holds some cells twice and others not at all.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import lcm

import numpy as np

from scmulan.data.store import CellSource
from scmulan.errors import RecipeError
from scmulan.vocab.vocabulary import Family

_BLOCKS, _WINDOW = 0, 1  # what a random stream is for


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerState:
    """Where a run stands: all that resuming needs."""

    seed: int
    """Of the order."""
    epoch: int
    """Epochs done."""
    step: int
    """Batches of this epoch done."""
    cells: int
    """Cells of an epoch: a state of another corpus is refused."""

    def to_json(self) -> dict[str, int]:
        """The four integers by name."""
        return asdict(self)


class WindowShuffle:
    """Cells of an epoch in windows: shuffled blocks of neighbouring cells.

    Parameters
    ----------
    cells
        Number of cells.
    seed
        Of the order.
    block
        Neighbouring cells that are read together.
    window
        About the number of cells that are mixed: a multiple of ``block`` and ``multiple``. The last window also has
        what is left over, and is less than twice as large.
    multiple
        Number of cells of a batch, so that only the last window has one that is not full.
    """

    def __init__(self, cells: int, seed: int, *, block: int = 64, window: int = 65_536, multiple: int = 1) -> None:
        self.cells = cells
        self.seed = seed
        self.block = block
        unit = lcm(block, multiple)
        self.size = max(1, round(window / unit)) * unit
        self.number = max(1, cells // self.size)
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.number

    def cells_of(self, window: int) -> int:
        """Number of cells of a window, the same in every epoch."""
        return self.size if window < self.number - 1 else self.cells - self.size * (self.number - 1)

    def read(self, epoch: int, window: int) -> np.ndarray:
        """Cells of a window of an epoch, int64, shuffled."""
        per_window = self.size // self.block
        last = window == self.number - 1
        blocks = self._blocks(epoch)[window * per_window : None if last else (window + 1) * per_window]
        found = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        if last:  # cells after the last whole block
            found = np.concatenate([found, np.arange(self.cells // self.block * self.block, self.cells)])
        return np.random.default_rng([self.seed, epoch, _WINDOW, window]).permutation(found)

    def _blocks(self, epoch: int) -> np.ndarray:
        kept = self._shuffled  # a local name: another thread may put another epoch in its place
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, _BLOCKS])
            kept = epoch, rng.permutation(self.cells // self.block)
            self._shuffled = kept
        return kept[1]


class EpochOrder:
    """Batches of a fixed number of cells of similar length; every cell once per epoch.

    Parameters
    ----------
    lengths
        Words of each cell, ``[cells]``; may be memory-mapped.
    seed
        Everything random follows from it, the epoch and the step.
    batch
        Cells per batch.
    block, window
        See :class:`WindowShuffle`.
    """

    def __init__(
        self, lengths: np.ndarray, seed: int = 0, *, batch: int = 256, block: int = 64, window: int = 65_536
    ) -> None:
        self.lengths = lengths
        self.seed = seed
        self.size = batch
        self.windows = WindowShuffle(len(lengths), seed, block=block, window=window, multiple=batch)
        self._read: tuple[tuple[int, int], list[np.ndarray]] | None = None

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        last = self.windows.cells_of(len(self.windows) - 1)
        return (len(self.windows) - 1) * (self.windows.size // self.size) + -(-last // self.size)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Cells of a batch, int64, ascending.

        Raises
        ------
        IndexError
            If an epoch has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps}")
        per_window = self.windows.size // self.size
        window = min(step // per_window, len(self.windows) - 1)
        return self._window(epoch, window)[step - window * per_window]

    def _window(self, epoch: int, window: int) -> list[np.ndarray]:
        kept = self._read  # a local name, as above
        if kept is None or kept[0] != (epoch, window):
            cells = self._cells(epoch, window)
            cells = cells[np.argsort(self.lengths[cells], kind="stable")]
            parts = [np.sort(cells[i : i + self.size]) for i in range(0, len(cells), self.size)]
            rng = np.random.default_rng([self.seed, epoch, _WINDOW, window, self.size])
            kept = (epoch, window), [parts[i] for i in rng.permutation(len(parts))]
            self._read = kept
        return kept[1]

    def _cells(self, epoch: int, window: int) -> np.ndarray:
        return self.windows.read(epoch, window)

    def state(self, epoch: int, step: int) -> SamplerState:
        """Four integers from which the order continues with batch ``step``."""
        return SamplerState(seed=self.seed, epoch=epoch, step=step, cells=len(self.lengths))

    def check(self, state: SamplerState) -> None:
        """Refuse a state of another order.

        Raises
        ------
        RecipeError
            If it was made with another seed or number of cells.
        """
        if (state.seed, state.cells) != (self.seed, len(self.lengths)):
            raise RecipeError(
                f"this state is of seed {state.seed} and {state.cells:,} cells, found seed {self.seed} and "
                f"{len(self.lengths):,} cells: resume with the corpus and the seed that the run began with"
            )


class BalancedSampler:
    """Cells drawn with replacement, so that large studies, common types and common organs get less than their share.

    A study's chance is its number of cells to the power ``study_power``, within it a cell type's is its number of
    cells to ``label_power``; then each organ's whole chance is raised to ``organ_power``. With powers of 1 every cell
    has the same chance, with 0 every study, type or organ.

    Cells of one group (study, type, organ, what they can serve) have the same chance: kept are 4 bytes per cell (8
    above two billion), and a few numbers per group.

    Parameters
    ----------
    cells
        Where they are.
    serves
        uint8 ``[cells]``: what each cell can be drawn for, a bit each.
    kinds
        Number of bits used.
    study_power, label_power, organ_power
        See above.
    """

    def __init__(
        self,
        cells: CellSource,
        serves: np.ndarray,
        kinds: int,
        *,
        study_power: float = 0.5,
        label_power: float = 0.5,
        organ_power: float = 1.0,
    ) -> None:
        label = np.where(cells.words(Family.FINE) >= 0, cells.words(Family.FINE), cells.words(Family.COARSE))
        columns = (np.asarray(cells.study), label, cells.words(Family.ORGAN), serves)
        self._order, (study, label, organ, served), self._number = _groups(columns)
        self._start = np.concatenate(([0], np.cumsum(self._number)[:-1]))
        self._weights = []
        for kind in range(kinds):
            number = np.where(served >> kind & 1, self._number, 0).astype(np.float64)
            weight = number * _sums((study, label), number) ** (label_power - 1.0)
            weight *= np.nan_to_num(_sums((study,), number) ** study_power / _sums((study,), weight))
            weight *= _sums((organ,), weight) ** (organ_power - 1.0)
            self._weights.append(np.where(number > 0, weight, 0.0) / max(weight[number > 0].sum(), 1e-300))
        self._cumulated = [np.cumsum(w) for w in self._weights]

    def any(self, kind: int) -> bool:
        """Whether any cell serves a kind."""
        return bool(self._weights[kind].any())

    def draw(self, kind: int, number: int, rng: np.random.Generator) -> np.ndarray:
        """``number`` cells that serve a kind, int64, with replacement."""
        cumulated = self._cumulated[kind]
        group = np.searchsorted(cumulated, rng.random(number) * cumulated[-1], side="right")
        within = (rng.random(number) * self._number[group]).astype(np.int64)
        return self._order[self._start[group] + within].astype(np.int64)

    def chances(self, kind: int) -> np.ndarray:
        """Chance of each cell, float64 ``[cells]``."""
        out = np.zeros(len(self._order))
        out[self._order] = np.repeat(self._weights[kind] / self._number, self._number)
        return out


class BalancedOrder(EpochOrder):
    """Batches of cells drawn with the weights of :class:`BalancedSampler`, of similar length; as many as an epoch has.

    Cells are drawn with replacement: some come several times in an epoch and others not at all.

    Parameters
    ----------
    cells
        Where they are; those without words are never drawn.
    seed, batch
        See :class:`EpochOrder`.
    window
        Cells that are drawn together and sorted by length.
    powers
        ``study_power``, ``label_power``, ``organ_power``: see :class:`BalancedSampler`.
    """

    def __init__(
        self, cells: CellSource, seed: int = 0, *, batch: int = 256, window: int = 65_536, **powers: float
    ) -> None:
        super().__init__(cells.lengths, seed, batch=batch, block=1, window=window)
        self.balance = BalancedSampler(cells, (np.asarray(cells.lengths) > 0).astype(np.uint8), 1, **powers)

    def _cells(self, epoch: int, window: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, _WINDOW, window])
        return self.balance.draw(0, self.windows.cells_of(window), rng)


def _groups(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Cells sorted by the combination of columns, the columns' values of each combination, and its number of cells."""
    key = np.zeros(len(columns[0]), dtype=np.int64)
    sizes, lows = [], []
    for column in columns:
        low = int(column.min(initial=0))
        size = int(column.max(initial=0)) - low + 1
        key *= size
        key += column
        key -= low
        sizes.append(size)
        lows.append(low)
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key, prepend=key[0] - 1 if len(key) else 0))
    number = np.diff(np.append(first, len(key)))
    values, rest = [], key[first]
    for size, low in zip(reversed(sizes), reversed(lows), strict=True):
        values.append(rest % size + low)
        rest = rest // size
    if len(order) < 2**31:
        order = order.astype(np.int32)
    return order, tuple(reversed(values)), number


def _sums(keys: tuple[np.ndarray, ...], weight: np.ndarray) -> np.ndarray:
    """Sum of the weights of all groups that share a group's keys; 1 where nothing has weight."""
    _, inverse = np.unique(np.stack(keys), axis=1, return_inverse=True)
    sums = np.bincount(inverse.ravel(), weight)
    return np.where(sums > 0, sums, 1.0)[inverse.ravel()]

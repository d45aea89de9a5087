"""What is decided about training sentences before any cell is read: which words their prompts and targets may have.

Everything here follows from tables with a few numbers per cell, so every rank can decide it for all rows of a batch
and read only its own cells; and the length of each sentence is known while batches are put together.

Which sentences a step's batch has: tables alone decide it, so every rank can for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal

import numpy as np

from scmulan._rng import uniforms
from scmulan._settings import Meta, OneOf
from scmulan.data.sampling import BalancedSampler, WindowShuffle
from scmulan.data.store import CellSource
from scmulan.train.sentence_kernels import ALL_GENES, RANDOM_PANEL
from scmulan.vocab.tasks import TASKS, Task
from scmulan.vocab.vocabulary import METADATA, Family

FEWEST = 20
"""A panel or depth never leaves a cell with fewer genes, unless it has no more."""
SEEN = 0.5
"""Genes seen at a share s of a cell's depth are taken to be s ** SEEN of all: s if each had one count, 1 if many."""


@dataclass(kw_only=True, frozen=True, slots=True)
class BatchConfig:
    """Batches of training sentences: their size, their order, and how sentences vary."""

    cells: Annotated[int, Meta(ge=1)] = 32
    """Largest number of cells in a batch whose prompts hold the genes."""
    generate_cells: Annotated[int, Meta(ge=1)] = 128
    """Largest number of cells in a batch of the task "generate"."""
    tokens: Annotated[int, Meta(ge=1)] = 8_192
    """Largest number of padded tokens in a batch: batches of long sentences have fewer cells, down to ``min_cells``."""
    min_cells: Annotated[int, Meta(ge=1)] = 4
    """Smallest number of cells in a batch; at least the number of ranks."""
    order: Literal["weighted", "epoch"] = "weighted"
    """"weighted": cells are drawn with replacement, by the powers below; "epoch": every cell once per epoch, for one of
    the tasks that it is eligible for, in batches of about ``cells`` and ``tokens``."""
    tasks: Annotated[dict[Annotated[str, OneOf(TASKS)], Annotated[float, Meta(gt=0)]], Meta(min_length=1)] = field(
        default_factory=lambda: {"annotate": 0.45, "generate": 0.45, "locate": 0.1}
    )
    """Relative number of batches of each task (of cells, with order "epoch")."""
    max_prompt_genes: Annotated[int, Meta(ge=1)] = 448
    """Largest number of genes in a prompt; longer cells are cut to a random subset."""
    min_prompt_genes: Annotated[int, Meta(ge=1)] = 48
    """A prompt's limit is drawn between this number and ``max_prompt_genes``."""
    max_target_genes: Annotated[int, Meta(ge=1)] = 1024
    """Largest number of genes read of a target; the set that is left to generate is still the whole cell's."""
    min_target_genes: Annotated[int, Meta(ge=1)] = 16
    """A target's limit is drawn between this number and ``max_target_genes``, uniform in its logarithm: the beginning
    of a sentence, where the cell is decided, is learned from more cells than its end."""
    positions: Annotated[int, Meta(ge=0)] = 48
    """Positions per generated cell at which the loss is computed (0: all)."""
    max_positions: Annotated[int, Meta(ge=1)] = 1536
    """Largest number of such positions per batch (but at least four per cell)."""
    study_power: Annotated[float, Meta(ge=0)] = 0.5
    """Studies are drawn in proportion to their number of cells to this power."""
    label_power: Annotated[float, Meta(ge=0)] = 0.5
    """Within a study, cell types are drawn in proportion to their number of cells to this power."""
    organ_power: Annotated[float, Meta(ge=0)] = 1.0
    """Each organ's probability, as it follows from the two above, is raised to this power (0: all organs alike)."""
    panel: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Probability that a prompt's genes are cut to those of another study or to a random fraction."""
    downsample: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Probability that a prompt's counts are down-sampled."""
    pool: Annotated[int, Meta(ge=1)] = 128
    """Batches that are drawn together and sorted by length, with order "weighted"."""
    block: Annotated[int, Meta(ge=1)] = 64
    """Neighbouring cells that are read together, with order "epoch"."""
    window: Annotated[int, Meta(ge=1)] = 131_072
    """Cells that are shuffled and sorted by length, with order "epoch"."""
    prefetch: Annotated[int, Meta(ge=0)] = 2
    """Batches made in the background while one is used (0: none)."""


@dataclass(frozen=True)
class Drawn:
    """Sentences to be written, of one task.

    Parameters
    ----------
    cells
        int64 ``[n]``: whose.
    words
        int64 ``[n]``: length.
    read
        int64 ``[n]``: most gene words in the sentence.
    hint_size
        int64 ``[n]``: number of hints.
    thin
        float ``[n]``: share of the depth that is kept; 1 for all.
    panel
        int64 ``[n]``: study whose genes are kept, or ``ALL_GENES``, or ``RANDOM_PANEL``.
    share
        float ``[n]``: chance of each gene to be kept with ``RANDOM_PANEL``.
    """

    task: Task
    cells: np.ndarray
    words: np.ndarray
    read: np.ndarray
    hint_size: np.ndarray
    thin: np.ndarray
    panel: np.ndarray
    share: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)

    def take(self, rows: np.ndarray) -> "Drawn":
        """Chosen sentences in the order given."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "task"}
        return replace(self, **arrays)


class Drawing:
    """Draws sentences of cells.

    Parameters
    ----------
    cells
        Training cells.
    config
        How sentences vary.
    """

    def __init__(self, cells: CellSource, config: BatchConfig) -> None:
        self.cells = cells
        self.lengths = cells.lengths
        self.config = config
        measured = np.asarray(cells.measured, dtype=np.float32)
        # Share of a study's genes that another study measured, too.
        self.overlap = measured @ measured.T / np.maximum(measured.sum(1, keepdims=True), 1.0)

    def draw(self, task: Task, cells: np.ndarray, rng: np.random.Generator) -> Drawn:
        """Sentences of given cells."""
        n = len(cells)
        config = self.config
        seen = np.asarray(self.lengths[cells], dtype=np.int64)
        metadata = self.cells.metadata[cells]
        hint_size = (rng.random(n) * (packed(metadata, task.hints)[1] + 1)).astype(np.int64)
        thin, panel, share = np.ones(n), np.full(n, ALL_GENES), np.ones(n)
        if Family.GENE not in task.prompt:
            least = np.log(min(config.min_target_genes, config.max_target_genes))
            read = np.rint(np.exp(rng.uniform(least, np.log(config.max_target_genes), n))).astype(np.int64)
            words = hint_size + 1 + np.minimum(seen + 1, read)
            return Drawn(task, cells, words, read, hint_size, thin, panel, share)
        read = rng.integers(min(config.min_prompt_genes, config.max_prompt_genes), config.max_prompt_genes + 1, n)
        thinned = (rng.random(n) < config.downsample) & ~self.cells.logged[cells]
        thin[thinned] = np.exp(rng.uniform(np.log(0.1), 0.0, n))[thinned]
        cut = rng.random(n) < config.panel
        other = rng.integers(len(self.cells.studies), size=n)
        by_study = rng.random(n) < 0.5
        panel[cut] = np.where(by_study, other, RANDOM_PANEL)[cut]
        share[cut] = rng.uniform(0.1, 1.0, n)[cut]
        left = thin**SEEN * np.where(cut & by_study, self.overlap[self.cells.study[cells], other], share)
        read = np.minimum(read, np.maximum((seen * left).astype(np.int64), np.minimum(FEWEST, seen)))
        words = read + hint_size + packed(metadata, task.target)[1] + 2
        return Drawn(task, cells, words, read, hint_size, thin, panel, share)


def packed(metadata: np.ndarray, families: Sequence[Family]) -> tuple[np.ndarray, np.ndarray]:
    """Known words of some families, each once.

    Parameters
    ----------
    metadata
        int32 ``[n, families of METADATA]``, −1 where unknown.
    families
        Which, in order; genes are none of them.

    Returns
    -------
    words : numpy.ndarray
        int32 ``[n, most]``: known words first, then −1.
    number : numpy.ndarray
        int64 ``[n]``: known words.
    """
    words = np.array(metadata[:, [METADATA.index(f) for f in families if f is not Family.GENE]], dtype=np.int32)
    for j in range(1, words.shape[1]):  # a word of two families is said once
        words[(words[:, :j] == words[:, j, None]).any(1), j] = -1
    order = np.argsort(words < 0, axis=1, kind="stable")
    return np.take_along_axis(words, order, axis=1), (words >= 0).sum(1)


_POOL, _DRAWN, _WINDOW, _TASK, _SIZE = range(5)  # what a random stream is for


def most_cells(config: BatchConfig, task: Task) -> int:
    """Most cells of a batch of a task."""
    return config.cells if Family.GENE in task.prompt else config.generate_cells


class WeightedPlan:
    """Batches of cells drawn with weights: in a pool of many, sentences of one length share a batch.

    Of each task, as many sentences are drawn as a whole pool of its batches needs, sorted, and divided into batches;
    a step's is one of those at random, cut to the words that it has room for.
    """

    steps = 0

    def __init__(self, cells: CellSource, serves: np.ndarray, drawing: Drawing, config: BatchConfig, seed: int) -> None:
        powers = {p: getattr(config, p) for p in ("study_power", "label_power", "organ_power")}
        self.balance = BalancedSampler(cells, serves, len(config.tasks), **powers)
        self.drawing = drawing
        self.config = config
        self.seed = seed
        self._kept: tuple[int, list[Drawn]] | None = None

    def batch(self, step: int) -> Drawn:
        """Sentences of a step."""
        pool, place = divmod(step, self.config.pool)
        kept = self._kept  # a local name: another thread may put another pool in its place
        if kept is None or kept[0] != pool:
            kept = self._kept = pool, self._pool(pool)
        return kept[1][place]

    def _pool(self, pool: int) -> list[Drawn]:
        config = self.config
        shares = np.array(list(config.tasks.values()))
        rng = np.random.default_rng([self.seed, _POOL, pool])
        tasks = rng.choice(len(shares), size=config.pool, p=shares / shares.sum())
        out: dict[int, Drawn] = {}
        for k, name in enumerate(config.tasks):
            places = np.flatnonzero(tasks == k)
            if not len(places):
                continue
            rng = np.random.default_rng([self.seed, _DRAWN, pool, k])
            most = most_cells(config, TASKS[name])
            drawn = self.drawing.draw(TASKS[name], self.balance.draw(k, config.pool * most, rng), rng)
            order = np.argsort(drawn.words, kind="stable").reshape(config.pool, most)
            for place, group in zip(places, rng.permutation(config.pool), strict=False):
                room = config.tokens // int(drawn.words[order[group]].max())
                out[int(place)] = drawn.take(rng.permutation(order[group])[: max(config.min_cells, room)])
        return [out[place] for place in range(config.pool)]


class EpochPlan:
    """Batches in which every cell comes once per epoch, for one of the tasks that it can serve.

    A window of cells always makes the same number of batches, so that a step's window is known at once; how many of
    each task follows from its cells.
    """

    def __init__(self, serves: np.ndarray, drawing: Drawing, config: BatchConfig, seed: int) -> None:
        self.serves = serves
        # Cells without words, or of which no task can ask anything, are left out.
        self.usable = None if serves.all() else np.flatnonzero(serves)
        number = len(serves) if self.usable is None else len(self.usable)
        self.windows = WindowShuffle(number, seed, block=config.block, window=config.window)
        self.drawing = drawing
        self.config = config
        self.seed = seed
        cost = self._mean_cost(number)
        self._batches = [self._number(self.windows.cells_of(w), cost) for w in (0, len(self.windows) - 1)]
        self.steps = self._batches[0] * (len(self.windows) - 1) + self._batches[1]
        self._kept: tuple[tuple[int, int], list[Drawn]] | None = None

    def _number(self, cells: int, cost: float) -> int:
        """Batches of a window: what its cells need, but no more than leave each task's ``min_cells``."""
        tasks, least = len(self.config.tasks), self.config.min_cells
        room = (cells - tasks * (least - 1)) // least
        return min(cells, max(tasks, min(room, int(np.ceil(1.02 * cells * cost)))))

    def _mean_cost(self, number: int) -> float:
        """Mean share of a batch that a cell takes, of up to 16,384 cells."""
        cells = self._cells(np.unique(np.linspace(0, number - 1, min(number, 16_384)).astype(np.int64)))
        drawn = self._draw(cells, 0, np.random.default_rng([self.seed, _SIZE]))
        return float(sum(self._costs(d).sum() for d in drawn) / number) * number / len(cells)

    def _cells(self, places: np.ndarray) -> np.ndarray:
        return places if self.usable is None else self.usable[places]

    def _costs(self, drawn: Drawn) -> np.ndarray:
        most = most_cells(self.config, drawn.task)
        return np.clip(drawn.words / self.config.tokens, 1 / most, max(1 / most, 1 / self.config.min_cells))

    def _draw(self, cells: np.ndarray, epoch: int, rng: np.random.Generator) -> list[Drawn]:
        """Sentences of cells, each for one task, task by task."""
        shares = np.array(list(self.config.tasks.values()))
        can = self.serves[cells][:, None] >> np.arange(len(shares), dtype=np.uint8) & 1
        cumulated = np.cumsum(can * shares, axis=1)
        key = np.random.SeedSequence([self.seed, _TASK, epoch]).generate_state(1, np.uint64)[0]
        chosen = (uniforms(key, cells)[:, None] * cumulated[:, -1:] >= cumulated).sum(1)
        for k, number in enumerate(np.bincount(chosen, minlength=len(shares))):
            if 0 < number < self.config.min_cells:  # too few for a batch: another task, where they can serve one
                few = np.flatnonzero(chosen == k)
                others = can[few] * np.where(np.arange(len(shares)) == k, 0.0, shares)
                chosen[few] = np.where(others.any(1), others.argmax(1), k)
        tasks = [TASKS[name] for name in self.config.tasks]
        return [self.drawing.draw(task, cells[chosen == k], rng) for k, task in enumerate(tasks) if (chosen == k).any()]

    def batch(self, step: int) -> Drawn:
        """Sentences of a step."""
        epoch, step = divmod(step, self.steps)
        window = min(step // self._batches[0], len(self.windows) - 1)
        kept = self._kept  # a local name, as above
        if kept is None or kept[0] != (epoch, window):
            kept = self._kept = (epoch, window), self._window(epoch, window)
        return kept[1][step - window * self._batches[0]]

    def _window(self, epoch: int, window: int) -> list[Drawn]:
        rng = np.random.default_rng([self.seed, _WINDOW, epoch, window])
        drawn = self._draw(self._cells(self.windows.read(epoch, window)), epoch, rng)
        number = self._batches[0 if window < len(self.windows) - 1 else 1]
        costs = [self._costs(d) for d in drawn]
        out = []
        for d, cost, parts in zip(drawn, costs, _apportion(number, costs, self.config.min_cells), strict=True):
            order = np.argsort(d.words, kind="stable")
            done = np.cumsum(cost[order]) - cost[order] / 2
            cuts = np.searchsorted(done, np.arange(1, parts) * (done[-1] + cost[order[-1]] / 2) / parts)
            if (np.diff(cuts, prepend=0, append=len(order)) == 0).any():  # a few cells, each as large as a batch
                cuts = np.arange(1, parts) * len(order) // parts
            out += [d.take(rng.permutation(rows)) for rows in np.split(order, cuts)]
        return [out[i] for i in rng.permutation(number)]


def _apportion(number: int, costs: list[np.ndarray], least: int) -> list[int]:
    """Batches of each task: in proportion to its cells' costs, of ``least`` cells or more if that can be."""
    wanted = np.array([c.sum() for c in costs])
    cells = np.array([len(c) for c in costs])
    parts = np.ones(len(costs), dtype=np.int64)
    while parts.sum() < number:
        for most in (cells // least, cells):
            if (parts < most).any():
                parts[np.argmax(np.where(parts < most, wanted / (parts + 0.5), -1.0))] += 1
                break
    return parts.tolist()

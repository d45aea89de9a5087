"""Plan training sentences from per-cell tables, without reading the cells.

Which sentences a step's batch has, and how many genes each may read, follows from tables with a few numbers per cell.
So every rank plans the whole batch and reads only its own cells, and sentences of one length share a batch.
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

MIN_GENES = 20
"""Genes that a panel and down-sampling leave of a cell, at least, unless it has fewer."""
MIN_COUNT_FRACTION, MIN_PANEL_FRACTION = 0.1, 0.1
"""Smallest fractions of counts and of genes that are kept where they are reduced."""
DEPTH_EXPONENT = 0.5
"""A fraction f of a cell's counts is taken to show f ** DEPTH_EXPONENT of its genes (1: one count each; 0: many)."""
WINDOW_SLACK = 1.02
"""Batches of a window, relative to what its cells need on average."""
COST_SAMPLE = 16_384
"""Cells from which the mean cost of a cell is estimated."""

_POOL, _POOL_TASK, _WINDOW, _TASK_OF_CELL, _COST = range(5)  # keys of the random streams; batches.py has the next


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


# -- sentences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedSentences:
    """Sentences of one task, before their cells are read.

    Parameters
    ----------
    task
        Task of all of them.
    cells
        int64 ``[n]``: index of each sentence's cell.
    lengths
        int64 ``[n]``: tokens of each sentence.
    max_genes
        int64 ``[n]``: largest number of gene tokens read.
    n_hints
        int64 ``[n]``: number of hints.
    count_fraction
        float ``[n]``: fraction of the cell's counts that is kept; 1 for all.
    panel
        int64 ``[n]``: study whose genes are kept, or ``ALL_GENES``, or ``RANDOM_PANEL``.
    panel_fraction
        float ``[n]``: probability of each gene to be kept with ``RANDOM_PANEL``.
    """

    task: Task
    cells: np.ndarray
    lengths: np.ndarray
    max_genes: np.ndarray
    n_hints: np.ndarray
    count_fraction: np.ndarray
    panel: np.ndarray
    panel_fraction: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)

    def take(self, rows: np.ndarray) -> "PlannedSentences":
        """Return chosen sentences, in the order given."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "task"}
        return replace(self, **arrays)


class SentencePlanner:
    """Plans how sentences of given cells vary: how many genes they read, of which panel and at which depth.

    Parameters
    ----------
    cells
        Training cells.
    config
        How sentences vary.
    """

    def __init__(self, cells: CellSource, config: BatchConfig) -> None:
        self.cells = cells
        self.config = config
        measured = np.asarray(cells.measured, dtype=np.float32)
        # Fraction of a study's genes that another study measured, too.
        self.overlap = measured @ measured.T / np.maximum(measured.sum(1, keepdims=True), 1.0)

    def plan(self, task: Task, cells: np.ndarray, rng: np.random.Generator) -> PlannedSentences:
        """Plan one sentence for each of some cells (int64 ``[n]``, may repeat)."""
        n = len(cells)
        n_genes = np.asarray(self.cells.lengths[cells], dtype=np.int64)
        metadata = self.cells.metadata[cells]
        n_hints = (rng.random(n) * (known_tokens(metadata, task.hints)[1] + 1)).astype(np.int64)
        if Family.GENE not in task.prompt:
            return self._plan_targets(task, cells, n_genes, n_hints, rng)
        return self._plan_prompts(task, cells, n_genes, n_hints, known_tokens(metadata, task.target)[1], rng)

    def _plan_targets(
        self, task: Task, cells: np.ndarray, n_genes: np.ndarray, n_hints: np.ndarray, rng: np.random.Generator
    ) -> PlannedSentences:
        """Plan sentences whose target is the cell, all of it as it is."""
        n, config = len(cells), self.config
        low = np.log(min(config.min_target_genes, config.max_target_genes))
        max_genes = np.rint(np.exp(rng.uniform(low, np.log(config.max_target_genes), n))).astype(np.int64)
        lengths = n_hints + 1 + np.minimum(n_genes + 1, max_genes)
        return PlannedSentences(task, cells, lengths, max_genes, n_hints, np.ones(n), np.full(n, ALL_GENES), np.ones(n))

    def _plan_prompts(
        self,
        task: Task,
        cells: np.ndarray,
        n_genes: np.ndarray,
        n_hints: np.ndarray,
        n_targets: np.ndarray,
        rng: np.random.Generator,
    ) -> PlannedSentences:
        """Plan sentences whose prompt has the genes, as another study might have seen them."""
        n, config = len(cells), self.config
        low = min(config.min_prompt_genes, config.max_prompt_genes)
        max_genes = rng.integers(low, config.max_prompt_genes + 1, n)
        downsampled = (rng.random(n) < config.downsample) & ~self.cells.logged[cells]
        count_fraction = np.where(downsampled, np.exp(rng.uniform(np.log(MIN_COUNT_FRACTION), 0.0, n)), 1.0)
        reduced = rng.random(n) < config.panel
        other = rng.integers(len(self.cells.studies), size=n)
        by_study = rng.random(n) < 0.5
        panel = np.where(reduced, np.where(by_study, other, RANDOM_PANEL), ALL_GENES)
        panel_fraction = np.where(reduced, rng.uniform(MIN_PANEL_FRACTION, 1.0, n), 1.0)
        # What is left of the genes is only an estimate: the kernels leave so many, and cut the rest at random.
        overlap = self.overlap[self.cells.study[cells], other]
        left = count_fraction**DEPTH_EXPONENT * np.where(reduced & by_study, overlap, panel_fraction)
        max_genes = np.minimum(max_genes, np.maximum((n_genes * left).astype(np.int64), np.minimum(MIN_GENES, n_genes)))
        lengths = max_genes + n_hints + n_targets + 2
        return PlannedSentences(task, cells, lengths, max_genes, n_hints, count_fraction, panel, panel_fraction)


def known_tokens(metadata: np.ndarray, families: Sequence[Family]) -> tuple[np.ndarray, np.ndarray]:
    """Select the known metadata tokens of some families, each once.

    Parameters
    ----------
    metadata
        int32 ``[n, families of METADATA]``, −1 where unknown.
    families
        Which, in order; genes are ignored.

    Returns
    -------
    tokens : numpy.ndarray
        int32 ``[n, families]``: known tokens first, then −1.
    number : numpy.ndarray
        int64 ``[n]``: number of known tokens.
    """
    tokens = np.array(metadata[:, [METADATA.index(f) for f in families if f is not Family.GENE]], dtype=np.int32)
    for j in range(1, tokens.shape[1]):  # two families can have the same token (coarse and fine "B cell")
        tokens[(tokens[:, :j] == tokens[:, j, None]).any(1), j] = -1
    order = np.argsort(tokens < 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), (tokens >= 0).sum(1)


def eligible_tasks(cells: CellSource, tasks: Sequence[str]) -> np.ndarray:
    """Find the tasks that each cell is eligible for: it has genes, and knows a family that the task asks for.

    Returns
    -------
    numpy.ndarray
        uint8 ``[cells]``: bit k for the k-th task.
    """
    eligible = np.zeros(len(cells), dtype=np.uint8)
    has_genes = np.asarray(cells.lengths) > 0
    for k, name in enumerate(tasks):
        target = TASKS[name].target
        known = True if Family.GENE in target else np.any([cells.tokens(f) >= 0 for f in target], axis=0)
        eligible |= (has_genes & known).astype(np.uint8) << k
    return eligible


# -- batches ---------------------------------------------------------------------------------------------------------


def max_cells(config: BatchConfig, task: Task) -> int:
    """Return the largest number of cells of a task's batch."""
    return config.cells if Family.GENE in task.prompt else config.generate_cells


class WeightedBatchSampler:
    """Batches of cells that are drawn with weights; sentences of one length share a batch.

    Of each task, as many sentences are planned as a whole pool of its batches needs, sorted by length and divided into
    batches. A step's batch is one of those at random, cut to the tokens that it has room for.

    Parameters
    ----------
    cells
        Training cells.
    eligible
        uint8 ``[cells]``, see :func:`eligible_tasks`.
    planner, config
        How sentences and batches are made.
    seed
        All random numbers follow from it and the step.
    """

    epoch_steps = 0

    def __init__(
        self, cells: CellSource, eligible: np.ndarray, planner: SentencePlanner, config: BatchConfig, seed: int
    ) -> None:
        powers = {p: getattr(config, p) for p in ("study_power", "label_power", "organ_power")}
        self.cell_sampler = BalancedSampler(cells, eligible, len(config.tasks), **powers)
        self.planner = planner
        self.config = config
        self.seed = seed
        self._kept: tuple[int, list[PlannedSentences]] | None = None

    def batch(self, step: int) -> PlannedSentences:
        """Return the sentences of a step."""
        pool, index = divmod(step, self.config.pool)
        kept = self._kept  # a local name: another thread may put another pool in its place
        if kept is None or kept[0] != pool:
            kept = self._kept = pool, self._plan_pool(pool)
        return kept[1][index]

    def _plan_pool(self, pool: int) -> list[PlannedSentences]:
        config = self.config
        fractions = np.array(list(config.tasks.values()))
        rng = np.random.default_rng([self.seed, _POOL, pool])
        tasks = rng.choice(len(fractions), size=config.pool, p=fractions / fractions.sum())
        batches: dict[int, PlannedSentences] = {}
        for k, name in enumerate(config.tasks):
            steps = np.flatnonzero(tasks == k)
            if not len(steps):
                continue
            rng = np.random.default_rng([self.seed, _POOL_TASK, pool, k])
            size = max_cells(config, TASKS[name])
            planned = self.planner.plan(TASKS[name], self.cell_sampler.draw(k, config.pool * size, rng), rng)
            rows = np.argsort(planned.lengths, kind="stable").reshape(config.pool, size)
            for step, group in zip(steps, rng.permutation(config.pool), strict=False):
                room = config.tokens // int(planned.lengths[rows[group]].max())
                batches[int(step)] = planned.take(rng.permutation(rows[group])[: max(config.min_cells, room)])
        return [batches[step] for step in range(config.pool)]


class EpochBatchSampler:
    """Batches in which every cell comes once per epoch, for one of the tasks that it is eligible for.

    A window of cells always makes the same number of batches, so that a step's window is known at once; how many of
    them each task gets follows from the window's cells.

    Parameters
    ----------
    eligible
        uint8 ``[cells]``, see :func:`eligible_tasks`. Cells that no task can use are left out.
    planner, config
        How sentences and batches are made.
    seed
        All random numbers follow from it and the step.
    """

    def __init__(self, eligible: np.ndarray, planner: SentencePlanner, config: BatchConfig, seed: int) -> None:
        self.eligible = eligible
        self.planner = planner
        self.config = config
        self.seed = seed
        self._usable = None if eligible.all() else np.flatnonzero(eligible)
        number = len(eligible) if self._usable is None else len(self._usable)
        self.windows = WindowShuffle(number, seed, block=config.block, window=config.window)
        cost = self._mean_cost(number)
        first, last = (self._n_batches(self.windows.size(w), cost) for w in (0, len(self.windows) - 1))
        self._per_window, self._in_last_window = first, last
        self.epoch_steps = first * (len(self.windows) - 1) + last
        self._kept: tuple[tuple[int, int], list[PlannedSentences]] | None = None

    def batch(self, step: int) -> PlannedSentences:
        """Return the sentences of a step."""
        epoch, step = divmod(step, self.epoch_steps)
        window = min(step // self._per_window, len(self.windows) - 1)
        kept = self._kept  # a local name, as above
        if kept is None or kept[0] != (epoch, window):
            kept = self._kept = (epoch, window), self._plan_window(epoch, window)
        return kept[1][step - window * self._per_window]

    def _plan_window(self, epoch: int, window: int) -> list[PlannedSentences]:
        rng = np.random.default_rng([self.seed, _WINDOW, epoch, window])
        by_task = self._plan_cells(self._cells(self.windows.cells(epoch, window)), epoch, rng)
        number = self._per_window if window < len(self.windows) - 1 else self._in_last_window
        costs = [self._costs(planned) for planned in by_task]
        batches = []
        for planned, cost, parts in zip(by_task, costs, _apportion(number, costs, self.config.min_cells), strict=True):
            order = np.argsort(planned.lengths, kind="stable")
            done = np.cumsum(cost[order]) - cost[order] / 2
            cuts = np.searchsorted(done, np.arange(1, parts) * (done[-1] + cost[order[-1]] / 2) / parts)
            if (np.diff(cuts, prepend=0, append=len(order)) == 0).any():  # a few cells, each as large as a batch
                cuts = np.arange(1, parts) * len(order) // parts
            batches += [planned.take(rng.permutation(rows)) for rows in np.split(order, cuts)]
        return [batches[i] for i in rng.permutation(number)]

    def _plan_cells(self, cells: np.ndarray, epoch: int, rng: np.random.Generator) -> list[PlannedSentences]:
        """Plan a sentence for each cell, of one task, which follows from the epoch and the cell; task by task."""
        fractions = np.array(list(self.config.tasks.values()))
        eligible = self.eligible[cells][:, None] >> np.arange(len(fractions), dtype=np.uint8) & 1
        cumulative = np.cumsum(eligible * fractions, axis=1)
        key = np.random.SeedSequence([self.seed, _TASK_OF_CELL, epoch]).generate_state(1, np.uint64)[0]
        chosen = (uniforms(key, cells)[:, None] * cumulative[:, -1:] >= cumulative).sum(1)
        for k, number in enumerate(np.bincount(chosen, minlength=len(fractions))):
            if 0 < number < self.config.min_cells:  # too few for a batch: another task, where they are eligible
                few = np.flatnonzero(chosen == k)
                others = eligible[few] * np.where(np.arange(len(fractions)) == k, 0.0, fractions)
                chosen[few] = np.where(others.any(1), others.argmax(1), k)
        tasks = [TASKS[name] for name in self.config.tasks]
        return [self.planner.plan(task, cells[chosen == k], rng) for k, task in enumerate(tasks) if (chosen == k).any()]

    def _cells(self, indices: np.ndarray) -> np.ndarray:
        return indices if self._usable is None else self._usable[indices]

    def _costs(self, planned: PlannedSentences) -> np.ndarray:
        """Compute the fraction of a batch that each sentence takes."""
        smallest = 1 / max_cells(self.config, planned.task)
        return np.clip(planned.lengths / self.config.tokens, smallest, max(smallest, 1 / self.config.min_cells))

    def _mean_cost(self, number: int) -> float:
        cells = self._cells(np.unique(np.linspace(0, number - 1, min(number, COST_SAMPLE)).astype(np.int64)))
        planned = self._plan_cells(cells, 0, np.random.default_rng([self.seed, _COST]))
        return float(sum(self._costs(p).sum() for p in planned) / number) * number / len(cells)

    def _n_batches(self, cells: int, cost: float) -> int:
        """Count the batches of a window: what its cells need, but no more than leave each task's ``min_cells``."""
        tasks, min_cells = len(self.config.tasks), self.config.min_cells
        room = (cells - tasks * (min_cells - 1)) // min_cells
        return min(cells, max(tasks, min(room, int(np.ceil(WINDOW_SLACK * cells * cost)))))


def _apportion(number: int, costs: list[np.ndarray], min_cells: int) -> list[int]:
    """Divide batches among tasks in proportion to their cells' costs, of ``min_cells`` cells or more if that can be."""
    wanted = np.array([c.sum() for c in costs])
    cells = np.array([len(c) for c in costs])
    parts = np.ones(len(costs), dtype=np.int64)
    while parts.sum() < number:
        for limit in (cells // min_cells, cells):
            if (parts < limit).any():
                parts[np.argmax(np.where(parts < limit, wanted / (parts + 0.5), -1.0))] += 1
                break
    return parts.tolist()

"""Training batches: a pure function of (seed, step), on any number of ranks.

A batch sampler plans which cells a step has, for which task and how they vary (:mod:`scmulan.train.sentence_plan`);
then each rank reads its own cells and writes their sentences (:mod:`scmulan.train.sentence_kernels`).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from scmulan._rng import stream_keys
from scmulan.data.store import CellSource
from scmulan.errors import RecipeError
from scmulan.train.losses import Targets
from scmulan.train.sentence_kernels import (
    CellRows,
    Genes,
    Labels,
    RowPlan,
    SentenceArrays,
    TaskTokens,
    write_sentences,
)
from scmulan.train.sentence_plan import (
    BatchConfig,
    EpochBatchSampler,
    PlannedSentences,
    SentencePlanner,
    WeightedBatchSampler,
    eligible_tasks,
    known_tokens,
)
from scmulan.vocab.tasks import Task
from scmulan.vocab.vocabulary import Family, Vocabulary

__all__ = ["Batch", "BatchConfig", "Batches"]

MIN_POSITIONS = 4
"""Loss positions that a generated cell has at least, however many cells share a batch."""

_ROWS = 5  # key of the random streams of rows; sentence_plan.py has those before


@dataclass
class Batch:
    """One step's sentences and their targets, or one rank's rows of them.

    Parameters
    ----------
    task
        Name of the task of all sentences.
    entity, value
        int64 ``[B, T]``: tokens and their levels; padding is 0.
    positions
        int64 ``[N]``: target positions as indices into the flattened ``[B × T]`` hidden states.
    targets
        What comes next at each of them. Weights are those of the whole batch: losses of ranks add up to its loss.
    tokens
        Number of tokens of this rank, without padding.
    cells
        int64 ``[B]``: cell of each sentence.
    all_cells, all_tokens
        Numbers of sentences and planned tokens of all ranks.
    """

    task: str
    entity: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    targets: Targets
    tokens: int
    cells: np.ndarray
    all_cells: int
    all_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in ("entity", "value", "positions")}
        return replace(self, targets=self.targets.to(device), **tensors)

    def micro_batch(self, index: int, number: int) -> "Batch":
        """Return one of ``number`` micro-batches: every ``number``-th sentence from ``index`` on.

        Where there is none, the first one without weight, as all processes do the same work.
        """
        if number == 1:
            return self
        n, width = self.entity.shape
        rows = torch.arange(min(index, n), n, number)
        empty = len(rows) == 0
        rows = rows if not empty else torch.zeros(1, dtype=torch.int64)
        new_row = torch.full((n,), -1)
        new_row[rows] = torch.arange(len(rows))
        old = self.targets
        mine = new_row[old.row] >= 0
        targets = replace(
            old,
            row=new_row[old.row[mine]],
            index=old.index[mine],
            weight=old.weight[mine] * (not empty),
            order=old.order[rows],
            level=old.level[rows],
            allowed=None if old.allowed is None else old.allowed[rows],
            labelled=None if old.labelled is None else old.labelled[rows],
        )
        return replace(
            self,
            entity=self.entity[rows],
            value=self.value[rows],
            positions=self.positions[mine] - old.row[mine] * width + targets.row * width,
            targets=targets,
            tokens=0 if empty else int(self.tokens * len(rows) / n),
        )


class Batches:
    """Training batches by step.

    Parameters
    ----------
    store
        Training cells, in memory or on disk.
    vocabulary
        Tokens.
    config
        Size, order and variation of batches.
    seed
        All random numbers follow from it and the step.
    satisfies
        Bool ``[V, V]``, or None: ``[v, u]`` where the finer label u satisfies the label v.

    Raises
    ------
    RecipeError
        If no cell is eligible for a task, or the order is unknown.
    """

    def __init__(
        self,
        store: CellSource,
        vocabulary: Vocabulary,
        config: BatchConfig,
        seed: int,
        satisfies: np.ndarray | None = None,
    ) -> None:
        self.store = store
        self.vocabulary = vocabulary
        self.config = config
        self.seed = seed
        self.satisfies = None if satisfies is None else torch.from_numpy(satisfies)
        self.genes = Genes(vocabulary.ids(Family.GENE).astype(np.int32), np.ascontiguousarray(store.measured))
        self.planner = SentencePlanner(store, config)
        eligible = eligible_tasks(store, list(config.tasks))
        for k, name in enumerate(config.tasks):
            if not (eligible >> k & 1).any():
                raise RecipeError(f"no training cell has what task {name!r} asks for: leave it out of batches.tasks")
        self.sampler: WeightedBatchSampler | EpochBatchSampler
        if config.order == "weighted":
            self.sampler = WeightedBatchSampler(store, eligible, self.planner, config, seed)
        elif config.order == "epoch":
            self.sampler = EpochBatchSampler(eligible, self.planner, config, seed)
        else:
            raise RecipeError(f"batches.order is {config.order!r}: expected 'weighted' or 'epoch'")
        self._prefetched: dict[tuple[int, int, int], Future[Batch]] = {}
        self._thread: ThreadPoolExecutor | None = None

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Probability of each cell for each task, float64 ``[cells]``, with order "weighted"."""
        if not isinstance(self.sampler, WeightedBatchSampler):
            raise RecipeError("cells have weights only with batches.order = 'weighted'")
        return {name: self.sampler.cell_sampler.probabilities(k) for k, name in enumerate(self.config.tasks)}

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch; with order "weighted" there is no end, and this is 0."""
        return self.sampler.epoch_steps

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the batch of a step (0, 1, …), or one rank's rows of it, and begin to make the next in the background.

        Parameters
        ----------
        step
            Number of the step.
        rank, world
            Rows ``rank::world`` of the batch; those of all ranks make up the batch.

        Raises
        ------
        RecipeError
            If there are more ranks than cells in a batch.
        """
        if self.config.prefetch == 0:
            return self._batch(step, rank, world)
        prefetched = self._prefetched.pop((step, rank, world), None)
        ahead = {(step + 1 + i, rank, world) for i in range(self.config.prefetch)}
        for key in set(self._prefetched) - ahead:
            self._prefetched.pop(key).cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        batch = self._batch(step, rank, world) if prefetched is None else prefetched.result()
        for key in sorted(ahead - set(self._prefetched)):
            self._prefetched[key] = self._thread.submit(self._batch, *key)
        return batch

    def make(self, task: Task, cells: np.ndarray, rng: np.random.Generator) -> Batch:
        """Return one sentence of each of some cells for a task."""
        planned = self.planner.plan(task, np.asarray(cells), rng)
        return self._write(planned, rng.integers(2**64, dtype=np.uint64), np.arange(len(cells)))

    def _batch(self, step: int, rank: int, world: int) -> Batch:
        planned = self.sampler.batch(step)
        key = np.random.SeedSequence([self.seed, _ROWS, step]).generate_state(1, np.uint64)[0]
        return self._write(planned, key, np.arange(len(planned))[rank::world])

    def _write(self, planned: PlannedSentences, key: np.uint64, rows: np.ndarray) -> Batch:
        """Read the cells of some rows of a batch, and write their sentences."""
        if len(rows) == 0:
            raise RecipeError(
                f"a batch of {len(planned)} cells cannot be shared by more ranks: set batches.min_cells to at least "
                "the number of ranks, and batches.tokens high enough"
            )
        mine, task = planned.take(rows), planned.task
        genes_in_prompt = Family.GENE in task.prompt
        positions = min(self.config.positions, max(MIN_POSITIONS, self.config.max_positions // len(planned)))
        width = int(mine.lengths.max())
        out = _empty_sentences(
            len(rows), width, len(self.vocabulary), positions if not genes_in_prompt and positions else width + 1
        )
        metadata = self.store.metadata[mine.cells]
        write_sentences(
            self._expression(mine.cells),
            self.genes,
            RowPlan(
                stream_keys(key, rows),
                mine.max_genes,
                mine.count_fraction,
                mine.panel,
                mine.panel_fraction,
                mine.n_hints,
            ),
            Labels(*known_tokens(metadata, task.hints), *known_tokens(metadata, task.target)),
            TaskTokens(genes_in_prompt, self.vocabulary.prompts[task.name], self.vocabulary.end, positions),
            out,
        )
        row, column = np.nonzero(np.arange(out.target_index.shape[1]) < out.n_positions[:, None])
        index = out.target_index[row, column]
        allowed = np.tile(task.allowed(self.vocabulary), (len(rows), 1))
        if not genes_in_prompt:
            allowed[:, self.vocabulary.is_gene] = self.genes.measured[self.store.study[mine.cells]]
        return Batch(
            task=task.name,
            entity=torch.from_numpy(out.entity),
            value=torch.from_numpy(out.value),
            positions=torch.from_numpy(row * width + out.prompt_length[row] - 1 + index),
            targets=Targets(
                row=torch.from_numpy(row),
                index=torch.from_numpy(index),
                weight=torch.from_numpy((out.weight[row, column] / len(planned)).astype(np.float32)),
                order=torch.from_numpy(out.order),
                level=torch.from_numpy(out.level),
                end=self.vocabulary.end,
                allowed=torch.from_numpy(allowed),
                satisfies=self.satisfies if genes_in_prompt else None,
                labelled=torch.full((len(rows),), genes_in_prompt),
            ),
            tokens=int(out.length.sum()),
            cells=mine.cells,
            all_cells=len(planned),
            all_tokens=int(planned.lengths.sum()),
        )

    def _expression(self, cells: np.ndarray) -> CellRows:
        rows = self.store.rows(cells)
        return CellRows(
            rows.data,
            rows.indices,
            rows.indptr.astype(np.int64, copy=False),
            np.asarray(self.store.total[cells], dtype=np.float64),
            np.asarray(self.store.logged[cells]),
        )


def _empty_sentences(n: int, width: int, vocabulary: int, max_positions: int) -> SentenceArrays:
    return SentenceArrays(
        entity=np.zeros((n, width), dtype=np.int64),
        value=np.zeros((n, width), dtype=np.int64),
        prompt_length=np.zeros(n, dtype=np.int64),
        length=np.zeros(n, dtype=np.int64),
        order=np.full((n, vocabulary), -1, dtype=np.int16),
        level=np.zeros((n, vocabulary), dtype=np.uint8),
        n_positions=np.zeros(n, dtype=np.int64),
        target_index=np.zeros((n, max_positions), dtype=np.int64),
        weight=np.zeros((n, max_positions)),
    )

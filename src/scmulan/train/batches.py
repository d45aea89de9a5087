"""Training batches: which cells, which task, which words; a pure function of (seed, step), on any number of ranks.

Cells are drawn with weights (large studies and common types less than their share), or every cell comes once per
epoch. Their genes are varied the way studies vary (panels, depth). What a sentence will be is decided for many
batches at once, from tables alone, and sentences of one length share a batch; then each rank reads its cells.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from scmulan._rng import stream_keys
from scmulan.data.sampling import SamplerState
from scmulan.data.store import CellSource
from scmulan.errors import RecipeError
from scmulan.train.losses import Targets
from scmulan.train.sentence_kernels import (
    Expression,
    Genes,
    Labels,
    RowPlan,
    Sentences,
    TaskTokens,
    write_sentences,
)
from scmulan.train.sentence_plan import BatchConfig, Drawing, Drawn, EpochPlan, WeightedPlan, packed
from scmulan.vocab.tasks import TASKS, Task
from scmulan.vocab.vocabulary import Family, Vocabulary

__all__ = ["Batch", "BatchConfig", "Batches"]

_ROWS = 5  # what a random stream is for; those of plan.py are below


@dataclass
class Batch:
    """One step's sentences and what they are asked for, or one rank's share of them.

    ``cells`` are the places of this rank's cells, ``tokens`` counts its tokens without padding; ``all_cells`` and
    ``all_tokens`` count those of all ranks. Loss weights are those of the whole batch: losses of ranks add up to its.
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


class Batches:
    """Training batches by number.

    Parameters
    ----------
    store
        Training cells, in memory or on disk.
    vocabulary
        Words.
    config
        How sentences are made.
    seed
        Everything random follows from it and the batch's number.
    satisfies
        Bool ``[V, V]``: finer words that satisfy a coarser one, or None.

    Raises
    ------
    RecipeError
        If a task has a share but no cell can serve it, or the order is unknown.
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
        self.gene_ids = vocabulary.ids(Family.GENE).astype(np.int32)
        self.measured = np.ascontiguousarray(store.measured)
        self.sayable = {name: TASKS[name].allowed(vocabulary) for name in config.tasks}
        self.drawing = Drawing(store, config)
        serves = self._serves()
        for k, name in enumerate(config.tasks):
            if not (serves >> k & 1).any():
                raise RecipeError(f"no training cell has what task {name!r} asks for: leave it out of batches.tasks")
        self._plan: WeightedPlan | EpochPlan
        if config.order == "weighted":
            self._plan = WeightedPlan(store, serves, self.drawing, config, seed)
        elif config.order == "epoch":
            self._plan = EpochPlan(serves, self.drawing, config, seed)
        else:
            raise RecipeError(f"batches.order is {config.order!r}: expected 'weighted' or 'epoch'")
        self._waiting: dict[tuple[int, int, int], Future[Batch]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def _serves(self) -> np.ndarray:
        """Tasks that each cell can serve, a bit each, uint8: where it knows what the task asks for."""
        serves = np.zeros(len(self.store), dtype=np.uint8)
        some = np.asarray(self.store.lengths) > 0
        for k, name in enumerate(self.config.tasks):
            asked = TASKS[name].target
            usable = some if Family.GENE in asked else some & np.any([self.store.words(f) >= 0 for f in asked], axis=0)
            serves |= usable.astype(np.uint8) << k
        return serves

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Chance of each cell for each task, with order "weighted"."""
        if not isinstance(self._plan, WeightedPlan):
            raise RecipeError("cells have weights only with batches.order = 'weighted'")
        return {name: self._plan.balance.chances(k) for k, name in enumerate(self.config.tasks)}

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch; with order "weighted" there is no end, and this is 0."""
        return self._plan.steps

    def state(self, step: int) -> SamplerState:
        """Four integers from which training continues with batch ``step``."""
        epoch, step = divmod(step, self.epoch_steps) if self.epoch_steps else (0, step)
        return SamplerState(seed=self.seed, epoch=epoch, step=step, cells=len(self.store))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Batch of a step (0, 1, …), or the rows of one rank: all ranks' rows are those of the whole batch.

        The next steps' are then made in the background.

        Raises
        ------
        RecipeError
            If there are more ranks than cells in a batch.
        """
        if self.config.prefetch == 0:
            return self._batch(step, rank, world)
        made = self._waiting.pop((step, rank, world), None)
        ahead = {(step + 1 + i, rank, world) for i in range(self.config.prefetch)}
        for key in set(self._waiting) - ahead:
            self._waiting.pop(key).cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        batch = self._batch(step, rank, world) if made is None else made.result()
        for key in sorted(ahead - set(self._waiting)):
            self._waiting[key] = self._thread.submit(self._batch, *key)
        return batch

    def _batch(self, step: int, rank: int, world: int) -> Batch:
        drawn = self._plan.batch(step)
        return self._write(drawn, self._key(step), np.arange(len(drawn))[rank::world])

    def _key(self, *numbers: int) -> np.uint64:
        return np.random.SeedSequence([self.seed, _ROWS, *numbers]).generate_state(1, np.uint64)[0]

    def make(self, task: Task, cells: np.ndarray, rng: np.random.Generator) -> Batch:
        """Sentences of given cells for one task."""
        drawn = self.drawing.draw(task, np.asarray(cells), rng)
        return self._write(drawn, rng.integers(2**64, dtype=np.uint64), np.arange(len(cells)))

    def _write(self, drawn: Drawn, key: np.uint64, rows: np.ndarray) -> Batch:
        """Sentences of some rows of a batch."""
        if len(rows) == 0:
            raise RecipeError(
                f"a batch of {len(drawn)} cells cannot be shared by more ranks: set batches.min_cells to at least "
                "the number of ranks, and batches.tokens high enough"
            )
        task, mine, store = drawn.task, drawn.take(rows), self.store
        given = Family.GENE in task.prompt
        n, words = len(rows), len(self.vocabulary)
        values = store.rows(mine.cells)
        metadata = store.metadata[mine.cells]
        study = store.study[mine.cells]
        hints, hint_number = packed(metadata, task.hints)
        asked, asked_number = packed(metadata, task.target)
        sampled = min(self.config.positions, max(4, self.config.max_positions // len(drawn)))
        entity = np.zeros((n, int(mine.words.max())), dtype=np.int64)
        value = np.zeros_like(entity)
        prompt, length, number = (np.zeros(n, dtype=np.int64) for _ in range(3))
        place = np.full((n, words), -1, dtype=np.int16)
        level = np.zeros((n, words), dtype=np.uint8)
        most = sampled if not given and sampled else entity.shape[1] + 1
        said = np.zeros((n, most), dtype=np.int64)
        weight = np.zeros((n, most))
        write_sentences(
            Expression(
                values.data,
                values.indices,
                values.indptr.astype(np.int64, copy=False),
                np.asarray(store.total[mine.cells], dtype=np.float64),
                np.asarray(store.logged[mine.cells]),
            ),
            Genes(self.gene_ids, self.measured),
            RowPlan(stream_keys(key, rows), mine.read, mine.thin, mine.panel, mine.share, mine.hint_size),
            Labels(hints, hint_number, asked, asked_number),
            TaskTokens(given, self.vocabulary.prompts[task.name], self.vocabulary.end, sampled),
            Sentences(entity, value, prompt, length, place, level, number, said, weight),
        )
        row, column = np.nonzero(np.arange(most) < number[:, None])
        said = said[row, column]
        allowed = np.tile(self.sayable[task.name], (n, 1))
        if not given:
            allowed[:, self.vocabulary.is_gene] = self.measured[study]
        return Batch(
            task=task.name,
            entity=torch.from_numpy(entity),
            value=torch.from_numpy(value),
            positions=torch.from_numpy(row * entity.shape[1] + prompt[row] - 1 + said),
            targets=Targets(
                row=torch.from_numpy(row),
                index=torch.from_numpy(said),
                weight=torch.from_numpy((weight[row, column] / len(drawn)).astype(np.float32)),
                order=torch.from_numpy(place),
                level=torch.from_numpy(level),
                end=self.vocabulary.end,
                allowed=torch.from_numpy(allowed),
                satisfies=self.satisfies if given else None,
                labelled=torch.full((n,), given),
            ),
            tokens=int(length.sum()),
            cells=mine.cells,
            all_cells=len(drawn),
            all_tokens=int(drawn.words.sum()),
        )

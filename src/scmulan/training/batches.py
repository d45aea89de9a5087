"""Training batches: which cells, which task, which words; a pure function of (seed, step).

Cells are drawn with weights (large studies and common types less than their share), their genes are varied the way
studies vary (panels, depth), and pools of batches are sorted by length so that padding stays small.
"""

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch

from scmulan.corpus.memory import CellStore
from scmulan.errors import RecipeError
from scmulan.language.expression import CellWords, tokenize
from scmulan.language.sentence import Sentences, compose
from scmulan.language.tasks import TASKS, Task, draw_hints
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.training.objective import Targets


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """How training sentences are made."""

    cells: int = 32
    """Most cells per batch of prompts that give the genes."""
    generate_cells: int = 128
    """Most cells per batch of cells to write."""
    words: int = 8_192
    """Most padded words per batch: batches of long sentences have fewer cells (but at least four)."""
    tasks: dict[str, float] = field(default_factory=lambda: {"annotate": 0.45, "generate": 0.45, "locate": 0.1})
    """Share of batches of each task."""
    prompt_words: int = 448
    """Most gene words in a prompt; longer cells are cut to a random subset."""
    prompt_words_least: int = 48
    """A batch's limit is drawn between this number and ``prompt_words``."""
    target_words: int = 1024
    """Most gene words read of a target; the set left to say is still the whole cell's."""
    target_words_least: int = 16
    """A batch's limit is drawn between this number and ``target_words``, uniform in its logarithm: the beginning of
    a sentence, where the cell is decided, is learned from more cells than its end."""
    positions: int = 48
    """Positions per generated cell at which the loss is taken (0: all)."""
    positions_total: int = 1536
    """Positions per batch of generated cells, at most (but at least four per cell)."""
    study_power: float = 0.5
    """Studies are drawn in proportion to their number of cells to this power."""
    label_power: float = 0.5
    """Within a study, cell types are drawn in proportion to their number of cells to this power."""
    panel: float = 0.5
    """Chance that a prompt's genes are cut to those of another study or to a random share."""
    thin: float = 0.5
    """Chance that a prompt's counts are down-sampled."""
    pool: int = 16
    """Batches that are drawn together and sorted by length."""


@dataclass
class Batch:
    """One step's sentences and what they are asked for."""

    task: str
    entity: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    targets: Targets
    words: int


class Batches:
    """Training batches by number.

    Parameters
    ----------
    store
        Training cells.
    vocabulary
        Words.
    config
        How sentences are made.
    seed
        Everything random follows from it and the batch's number.
    satisfies
        Bool ``[V, V]``: finer words that satisfy a coarser one, or None.
    """

    def __init__(
        self,
        store: CellStore,
        vocabulary: Vocabulary,
        config: BatchConfig,
        seed: int,
        satisfies: np.ndarray | None = None,
    ) -> None:
        self.store = store
        self.lengths = store.lengths
        self.vocabulary = vocabulary
        self.config = config
        self.seed = seed
        self.satisfies = None if satisfies is None else torch.from_numpy(satisfies)
        self.gene_ids = vocabulary.ids(Family.GENE).astype(np.int32)
        self.sayable = {name: TASKS[name].sayable(vocabulary) for name in config.tasks}
        self.weights = {name: self._cell_weights(TASKS[name]) for name in config.tasks}
        for name, weights in self.weights.items():
            if not weights.any():
                raise RecipeError(f"no training cell has what task {name!r} asks for: leave it out of batches.tasks")

    def _cell_weights(self, task: Task) -> np.ndarray:
        """Chance of each cell for a task: zero where it does not know what the task asks for."""
        store, config = self.store, self.config
        usable = self.lengths > 0
        if Family.GENE not in task.asked:
            usable &= np.any([store.words(f) >= 0 for f in task.asked], axis=0)
        label = np.where(store.words(Family.FINE) >= 0, store.words(Family.FINE), store.words(Family.COARSE))
        key = store.study * (len(self.vocabulary) + 1) + label + 1
        weights = np.zeros(len(store))
        for study in np.unique(store.study[usable]):
            inside = usable & (store.study == study)
            _, group, number = np.unique(key[inside], return_inverse=True, return_counts=True)
            w = number[group] ** (config.label_power - 1.0)
            weights[inside] = w / w.sum() * inside.sum() ** config.study_power
        return weights / weights.sum() if weights.any() else weights

    def batch(self, step: int) -> Batch:
        """Batch of a step (0, 1, …)."""
        pool, place = divmod(step, self.config.pool)
        rng = np.random.default_rng([self.seed, pool])
        names = list(self.config.tasks)
        shares = np.array([self.config.tasks[n] for n in names])
        tasks = rng.choice(names, size=self.config.pool, p=shares / shares.sum())
        name = str(tasks[place])
        order = np.flatnonzero(tasks == name)
        drawn = np.random.default_rng([self.seed, pool, self.config.pool + names.index(name)])
        cells = drawn.choice(len(self.store), size=(len(order), self._most_cells(name)), p=self.weights[name])
        lengths = self.lengths[cells]
        by_length = cells.ravel()[np.argsort(lengths.ravel(), kind="stable")].reshape(cells.shape)
        mine = by_length[drawn.permutation(len(order))[np.searchsorted(order, place)]]
        return self.make(TASKS[name], mine, np.random.default_rng([self.seed, pool, place]))

    def _most_cells(self, task: str) -> int:
        return self.config.cells if Family.GENE in TASKS[task].given else self.config.generate_cells

    def make(self, task: Task, cells: np.ndarray, rng: np.random.Generator) -> Batch:
        """Sentences of given cells for one task: of as many of them as ``words`` has room for."""
        config = self.config
        given = Family.GENE in task.given
        read = self._limit(given, rng)
        longest = min(int(self.lengths[cells].max()), read)
        cells = rng.permutation(cells)[: max(4, config.words // max(1, longest))]
        words = self._vary(cells, rng) if given else self._plain(cells)
        parts, place, level = [], [], []
        for i, cell in enumerate(cells):
            known = {f: int(w) for f, w in zip(METADATA, self.store.metadata[cell], strict=True) if w >= 0}
            part = slice(words.indptr[i], words.indptr[i + 1])
            order = rng.permutation(words.indptr[i + 1] - words.indptr[i])
            genes = self.gene_ids[words.gene[part]][order], words.level[part][order]
            asked: list[int] = []
            if given:
                genes = genes[0][:read], genes[1][:read]
                asked = list(dict.fromkeys(known[f] for f in task.asked if f in known))
                asked = [asked[k] for k in rng.permutation(len(asked))]
            hints = draw_hints(task, known, rng)
            entity, value, prompt = compose(self.vocabulary, task, genes, hints, asked, rng)
            place.append(entity[prompt:])
            level.append(value[prompt:])
            if not given:
                entity, value = entity[: prompt + read], value[: prompt + read]
            parts.append((entity, value, prompt))
        sentences = Sentences.join(parts)
        entity, value, lengths = sentences.padded()
        rows, said, weight = self._positions(sentences, [len(p) for p in place], given, rng)
        allowed = np.tile(self.sayable[task.name], (len(cells), 1))
        if not given:
            allowed[:, self.vocabulary.is_gene] = self.store.measured[self.store.study[cells]]
        return Batch(
            task=task.name,
            entity=torch.from_numpy(entity),
            value=torch.from_numpy(value),
            positions=torch.from_numpy(rows * entity.shape[1] + sentences.prompt[rows] - 1 + said),
            targets=Targets(
                row=torch.from_numpy(rows),
                said=torch.from_numpy(said),
                weight=torch.from_numpy(weight),
                place=torch.from_numpy(self._table(place, [np.arange(len(p)) for p in place], -1, np.int16)),
                level=torch.from_numpy(self._table(place, level, 0, np.uint8)),
                end=self.vocabulary.end,
                allowed=torch.from_numpy(allowed),
                satisfies=self.satisfies if given else None,
                labelled=torch.full((len(cells),), given),
            ),
            words=int(lengths.sum()),
        )

    def _limit(self, given: bool, rng: np.random.Generator) -> int:
        """Most gene words that a batch reads of a cell."""
        config = self.config
        if given:
            return int(rng.integers(min(config.prompt_words_least, config.prompt_words), config.prompt_words + 1))
        least = min(config.target_words_least, config.target_words)
        return round(float(np.exp(rng.uniform(np.log(least), np.log(config.target_words)))))

    def _positions(
        self, sentences: Sentences, target_words: list[int], given: bool, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which target positions the loss is taken at: sentence, words said before, weight.

        All where the target is a few labels. Of a long target a random sample, in which the last position (where the
        end is due) is always present with its own share of the weight: an unbiased estimate with less noise.
        """
        rows, said, weight = [], [], []
        k = min(self.config.positions, max(4, self.config.positions_total // len(target_words)))
        for i, number in enumerate(target_words):
            read = int(sentences.lengths[i] - sentences.prompt[i] + 1)
            t = np.arange(min(number, read))
            w = np.full(len(t), 1.0 / len(t))
            if not given and 0 < k < len(t):
                last = len(t) - 1
                if read >= number:
                    t = np.append(rng.choice(last, size=k - 1, replace=False), last)
                    w = np.append(np.full(k - 1, last / number / (k - 1)), 1.0 / number)
                else:
                    t = rng.choice(len(t), size=k, replace=False)
                    w = np.full(k, 1.0 / k)
            rows.append(np.full(len(t), i))
            said.append(t)
            weight.append(w / len(target_words))
        return np.concatenate(rows), np.concatenate(said), np.concatenate(weight).astype(np.float32)

    def _table(self, words: list[np.ndarray], numbers: list[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        table: np.ndarray = np.full((len(words), len(self.vocabulary)), fill, dtype=dtype)
        for i, (w, n) in enumerate(zip(words, numbers, strict=True)):
            table[i, w] = n
        return table

    def _plain(self, cells: np.ndarray) -> CellWords:
        rows = self.store.rows(cells)
        return self._tokenize(rows, rows.data.copy(), self.store.total[cells], self.store.logged[cells])

    def _vary(self, cells: np.ndarray, rng: np.random.Generator) -> CellWords:
        """Words of cells as other panels and depths would have shown them."""
        store, config = self.store, self.config
        rows = self.store.rows(cells)
        data = rows.data.copy()
        total = store.total[cells].copy()
        for i, cell in enumerate(cells):
            part = slice(rows.indptr[i], rows.indptr[i + 1])
            genes = rows.indices[part]
            if rng.random() < config.thin and not store.logged[cell]:
                share = float(np.exp(rng.uniform(np.log(0.1), 0.0)))
                counts = rng.binomial(np.rint(data[part]).astype(np.int64), share)
                if (counts > 0).sum() >= 20:
                    data[part] = counts
                    total[i] *= share
            if rng.random() < config.panel:
                if rng.random() < 0.5:
                    keep = store.measured[rng.integers(len(store.studies))][genes]
                else:
                    drawn = rng.random(len(self.vocabulary.genes)) < rng.uniform(0.1, 1.0)
                    keep = drawn[genes]
                if (keep & (data[part] > 0)).sum() >= 20:
                    data[part] = np.where(keep, data[part], 0)
        return self._tokenize(rows, data, total, store.logged[cells])

    def _tokenize(self, rows: sp.csr_matrix, data: np.ndarray, total: np.ndarray, logged: np.ndarray) -> CellWords:
        number = np.diff(rows.indptr)
        scale = np.repeat(1e4 / np.maximum(total, 1e-9), number)
        data = np.where(np.repeat(logged, number), data, np.log1p(data * scale)).astype(np.float32)
        genes = rows.shape[1]
        matrix = sp.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape)
        return tokenize(matrix, np.arange(genes, dtype=np.int32), genes, state="log1p")

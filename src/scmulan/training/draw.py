"""What is decided about training sentences before any cell is read: which words their prompts and targets may have.

Everything here follows from tables with a few numbers per cell, so every rank can decide it for all rows of a batch
and read only its own cells; and the length of each sentence is known while batches are put together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from scmulan.corpus.cells import Cells
from scmulan.language.tasks import Task
from scmulan.language.vocabulary import METADATA, Family
from scmulan.training.rows import NO_PANEL, SHARE_PANEL

FEWEST = 20
"""A panel or depth never leaves a cell with fewer genes, unless it has no more."""
SEEN = 0.5
"""Genes seen at a share s of a cell's depth are taken to be s ** SEEN of all: s if each had one count, 1 if many."""


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """How training sentences are made."""

    cells: int = 32
    """Most cells per batch of prompts that give the genes."""
    generate_cells: int = 128
    """Most cells per batch of cells to write."""
    words: int = 8_192
    """Most padded words per batch: batches of long sentences have fewer cells (but at least ``least_cells``)."""
    least_cells: int = 4
    """Fewest cells per batch; no more ranks than these can share it."""
    order: str = "weighted"
    """"weighted": cells are drawn with replacement, by the powers below; "epoch": every cell once per epoch, for one of
    the tasks that it can serve, in batches of about ``cells`` and ``words``."""
    tasks: dict[str, float] = field(default_factory=lambda: {"annotate": 0.45, "generate": 0.45, "locate": 0.1})
    """Share of batches of each task (of cells, with order "epoch")."""
    prompt_words: int = 448
    """Most gene words in a prompt; longer cells are cut to a random subset."""
    prompt_words_least: int = 48
    """A prompt's limit is drawn between this number and ``prompt_words``."""
    target_words: int = 1024
    """Most gene words read of a target; the set left to say is still the whole cell's."""
    target_words_least: int = 16
    """A target's limit is drawn between this number and ``target_words``, uniform in its logarithm: the beginning of
    a sentence, where the cell is decided, is learned from more cells than its end."""
    positions: int = 48
    """Positions per generated cell at which the loss is taken (0: all)."""
    positions_total: int = 1536
    """Positions per batch of generated cells, at most (but at least four per cell)."""
    study_power: float = 0.5
    """Studies are drawn in proportion to their number of cells to this power."""
    label_power: float = 0.5
    """Within a study, cell types are drawn in proportion to their number of cells to this power."""
    organ_power: float = 1.0
    """Each organ's chance, as it follows from the two above, is raised to this power (0: all organs alike)."""
    panel: float = 0.5
    """Chance that a prompt's genes are cut to those of another study or to a random share."""
    thin: float = 0.5
    """Chance that a prompt's counts are down-sampled."""
    pool: int = 128
    """Batches that are drawn together and sorted by length, with order "weighted"."""
    block: int = 64
    """Neighbouring cells that are read together, with order "epoch"."""
    window: int = 131_072
    """Cells that are mixed and sorted by length, with order "epoch"."""
    ahead: int = 2
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
        int64 ``[n]``: study whose genes are kept, or ``NO_PANEL``, or ``SHARE_PANEL``.
    share
        float ``[n]``: chance of each gene to be kept with ``SHARE_PANEL``.
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

    def __init__(self, cells: Cells, config: BatchConfig) -> None:
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
        hint_size = (rng.random(n) * (packed(metadata, task.hinted)[1] + 1)).astype(np.int64)
        thin, panel, share = np.ones(n), np.full(n, NO_PANEL), np.ones(n)
        if Family.GENE not in task.given:
            least = np.log(min(config.target_words_least, config.target_words))
            read = np.rint(np.exp(rng.uniform(least, np.log(config.target_words), n))).astype(np.int64)
            words = hint_size + 1 + np.minimum(seen + 1, read)
            return Drawn(task, cells, words, read, hint_size, thin, panel, share)
        read = rng.integers(min(config.prompt_words_least, config.prompt_words), config.prompt_words + 1, n)
        thinned = (rng.random(n) < config.thin) & ~self.cells.logged[cells]
        thin[thinned] = np.exp(rng.uniform(np.log(0.1), 0.0, n))[thinned]
        cut = rng.random(n) < config.panel
        other = rng.integers(len(self.cells.studies), size=n)
        by_study = rng.random(n) < 0.5
        panel[cut] = np.where(by_study, other, SHARE_PANEL)[cut]
        share[cut] = rng.uniform(0.1, 1.0, n)[cut]
        left = thin**SEEN * np.where(cut & by_study, self.overlap[self.cells.study[cells], other], share)
        read = np.minimum(read, np.maximum((seen * left).astype(np.int64), np.minimum(FEWEST, seen)))
        words = read + hint_size + packed(metadata, task.asked)[1] + 2
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

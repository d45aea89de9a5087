"""Ragged batches of sentences: from cells to words and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.tasks import Task
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


@dataclass(frozen=True)
class Sentences:
    """Sentences of different lengths, one after the other.

    Parameters
    ----------
    indptr
        int64 ``[sentences + 1]``.
    entity
        int32: word ids.
    value
        uint8: bin 1…10 of a gene word, 0 of any other.
    prompt
        int64 ``[sentences]``: number of prompt words, the task's prompt word included.
    """

    indptr: np.ndarray
    entity: np.ndarray
    value: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def lengths(self) -> np.ndarray:
        """Number of words of each sentence, int64."""
        return np.diff(self.indptr)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Words and values of sentence ``i``."""
        part = slice(self.indptr[i], self.indptr[i + 1])
        return self.entity[part], self.value[part]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Sentences":
        """Chosen sentences in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        at = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return Sentences(indptr, self.entity[at], self.value[at], self.prompt[rows])

    def padded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right-padded int64 words and values ``[sentences, longest]`` (padding 0) and lengths."""
        lengths = self.lengths
        shape = (len(self), int(lengths.max(initial=0)))
        inside = np.arange(shape[1]) < lengths[:, None]
        entity = np.zeros(shape, dtype=np.int64)
        value = np.zeros(shape, dtype=np.int64)
        entity[inside] = self.entity
        value[inside] = self.value
        return entity, value, lengths

    @classmethod
    def join(cls, sentences: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> "Sentences":
        """Batch from (words, values, prompt length) of each sentence."""
        indptr = np.zeros(len(sentences) + 1, dtype=np.int64)
        np.cumsum([len(s[0]) for s in sentences], out=indptr[1:])
        empty = np.zeros(0, dtype=np.int32)
        return cls(
            indptr,
            np.concatenate([empty, *(s[0] for s in sentences)]).astype(np.int32),
            np.concatenate([empty, *(s[1] for s in sentences)]).astype(np.uint8),
            np.array([s[2] for s in sentences], dtype=np.int64),
        )


def gene_prompts(
    words: GeneTokens, vocabulary: Vocabulary, task: Task, metadata: Sequence[Mapping[Family, int]] | None = None
) -> Sentences:
    """Prompts that give the genes and ask for the rest, as inference uses them.

    Genes come in reverse vocabulary order, as in the release, then the metadata words, then the task's prompt word.
    """
    gene_ids = vocabulary.ids(Family.GENE).astype(np.int32)
    ask = vocabulary.prompts[task.name]
    parts = []
    for i in range(len(words)):
        part = slice(words.indptr[i], words.indptr[i + 1])
        said = [] if metadata is None else list(metadata[i].values())
        tail = np.array([*said, ask], dtype=np.int32)
        entity = np.concatenate([gene_ids[words.gene[part]][::-1], tail])
        value = np.concatenate([words.level[part][::-1], np.zeros(len(tail), dtype=np.uint8)])
        parts.append((entity, value, len(entity)))
    return Sentences.join(parts)


def encode(
    words: GeneTokens,
    vocabulary: Vocabulary,
    task: Task,
    metadata: Sequence[Mapping[Family, int]],
    rng: np.random.Generator,
) -> Sentences:
    """Whole training sentences of one task, genes and hints in random order.

    Parameters
    ----------
    words
        Gene words of the cells.
    metadata
        Word id of each known metadata family, per cell. All known hints are used; see
        :func:`scmulan.vocab.tasks.draw_hints` for random subsets of them.
    """
    gene_ids = vocabulary.ids(Family.GENE).astype(np.int32)
    parts = []
    for i in range(len(words)):
        part = slice(words.indptr[i], words.indptr[i + 1])
        order = rng.permutation(int(words.indptr[i + 1] - words.indptr[i]))
        genes = gene_ids[words.gene[part]][order], words.level[part][order]
        hints = [metadata[i][f] for f in task.hinted if f in metadata[i]]
        asked = list(dict.fromkeys(metadata[i][f] for f in task.asked if f in metadata[i]))
        parts.append(compose(vocabulary, task, genes, hints, asked, rng))
    return Sentences.join(parts)


def compose(
    vocabulary: Vocabulary,
    task: Task,
    genes: tuple[np.ndarray, np.ndarray],
    hints: Sequence[int],
    asked: Sequence[int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, int]:
    """One sentence: hints (and given genes, shuffled together), prompt word, target, end.

    Parameters
    ----------
    genes
        Word ids and bins of the gene words, in the order wanted.
    hints, asked
        Metadata word ids of prompt and target.
    """
    entity, value = genes
    given = Family.GENE in task.given
    head = np.array(hints, dtype=np.int32)
    head_value = np.zeros(len(head), dtype=np.uint8)
    if given:
        mixed = rng.permutation(len(head) + len(entity))
        head = np.concatenate([head, entity])[mixed]
        head_value = np.concatenate([head_value, value])[mixed]
    said = np.array([*(asked if given else ()), vocabulary.end], dtype=np.int32)
    body = (said,) if given else (entity, said)
    body_value = (np.zeros(len(said), np.uint8),) if given else (value, np.zeros(1, np.uint8))
    ask = np.array([vocabulary.prompts[task.name]], dtype=np.int32)
    return (
        np.concatenate([head, ask, *body]).astype(np.int32),
        np.concatenate([head_value, np.zeros(1, np.uint8), *body_value]).astype(np.uint8),
        len(head) + 1,
    )


@dataclass(frozen=True)
class DecodedCells:
    """What a batch of sentences says: gene words, and the metadata words of each cell by family."""

    indptr: np.ndarray
    gene: np.ndarray
    level: np.ndarray
    metadata: list[dict[Family, int]]
    complete: np.ndarray


def decode(sentences: Sentences, vocabulary: Vocabulary) -> DecodedCells:
    """Read sentences back.

    Returns
    -------
    Cells
        Gene words ascending within a cell; ``metadata`` of each cell by family (a word of several families
        counts for the first that has none yet); ``complete`` (bool) where the end word was said.
    """
    row = np.repeat(np.arange(len(sentences)), sentences.lengths)
    is_gene = vocabulary.is_gene[sentences.entity]
    gene_row = vocabulary.gene_row[sentences.entity[is_gene]]
    order = np.lexsort((gene_row, row[is_gene]))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(row[is_gene], minlength=len(sentences)))))
    families: dict[int, list[Family]] = {}
    for family in METADATA:
        for i in vocabulary.families.get(family, ()):
            families.setdefault(i, []).append(family)
    metadata: list[dict[Family, int]] = [{} for _ in range(len(sentences))]
    for r, e in zip(row[~is_gene], sentences.entity[~is_gene], strict=True):
        free = [f for f in families.get(int(e), ()) if f not in metadata[r]]
        if free:
            metadata[r][free[0]] = int(e)
    complete = np.zeros(len(sentences), dtype=bool)
    complete[row[sentences.entity == vocabulary.end]] = True
    return DecodedCells(indptr, gene_row[order].astype(np.int32), sentences.value[is_gene][order], metadata, complete)

"""Ragged batches of c-sentences: gene and metadata tokens of cells, and back."""

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
        int64 ``[sentences + 1]``: sentence ``i`` has the tokens ``indptr[i]:indptr[i + 1]``.
    entity
        int32 ``[tokens]``: token ids.
    value
        uint8 ``[tokens]``: level 1…10 of a gene, 0 of any other token.
    prompt
        int64 ``[sentences]``: length of each prompt, the task's prompt token included.
    """

    indptr: np.ndarray
    entity: np.ndarray
    value: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sentence, int64."""
        return np.diff(self.indptr)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return entities and values of sentence ``i``."""
        part = slice(self.indptr[i], self.indptr[i + 1])
        return self.entity[part], self.value[part]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Sentences":
        """Return the sentences ``rows``, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        source = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return Sentences(indptr, self.entity[source], self.value[source], self.prompt[rows])

    def padded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return entities and values, int64 ``[sentences, longest]`` right-padded with 0, and lengths."""
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
        """Make a batch from (entities, values, prompt length) of each sentence."""
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
    cells: GeneTokens, vocabulary: Vocabulary, task: Task, metadata: Sequence[Mapping[Family, int]] | None = None
) -> Sentences:
    """Make the prompts of a task whose prompt is the genes, as inference uses them.

    Genes come in reverse vocabulary order, as in the release, then the metadata tokens, then the task's prompt token.

    Parameters
    ----------
    cells
        Gene tokens of the cells.
    vocabulary
        Of the model.
    task
        The task; its prompt token ends each prompt.
    metadata
        Token id of each known family, per cell.
    """
    gene_ids = vocabulary.ids(Family.GENE).astype(np.int32)
    prompts = []
    for i in range(len(cells)):
        part = slice(cells.indptr[i], cells.indptr[i + 1])
        known = [] if metadata is None else list(metadata[i].values())
        tail = np.array([*known, vocabulary.prompts[task.name]], dtype=np.int32)
        entity = np.concatenate([gene_ids[cells.gene[part]][::-1], tail])
        value = np.concatenate([cells.level[part][::-1], np.zeros(len(tail), dtype=np.uint8)])
        prompts.append((entity, value, len(entity)))
    return Sentences.join(prompts)


@dataclass(frozen=True)
class DecodedCells:
    """Contents of a batch of sentences.

    Parameters
    ----------
    indptr, gene, level
        Gene tokens, as in :class:`~scmulan.vocab.binning.GeneTokens`.
    metadata
        Token id by family, per cell.
    complete
        Bool ``[sentences]``: whether the sentence has an end token.
    """

    indptr: np.ndarray
    gene: np.ndarray
    level: np.ndarray
    metadata: list[dict[Family, int]]
    complete: np.ndarray


def decode(sentences: Sentences, vocabulary: Vocabulary) -> DecodedCells:
    """Read genes and metadata back from sentences; their order does not matter.

    A metadata token of several families counts for the first that has none yet.
    """
    row = np.repeat(np.arange(len(sentences)), sentences.lengths)
    is_gene = vocabulary.is_gene[sentences.entity]
    gene = vocabulary.gene_index[sentences.entity[is_gene]]
    order = np.lexsort((gene, row[is_gene]))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(row[is_gene], minlength=len(sentences)))))
    families: dict[int, list[Family]] = {}
    for family in METADATA:
        for i in vocabulary.families.get(family, ()):
            families.setdefault(i, []).append(family)
    metadata: list[dict[Family, int]] = [{} for _ in range(len(sentences))]
    for r, token in zip(row[~is_gene], sentences.entity[~is_gene], strict=True):
        free = [f for f in families.get(int(token), ()) if f not in metadata[r]]
        if free:
            metadata[r][free[0]] = int(token)
    complete = np.zeros(len(sentences), dtype=bool)
    complete[row[sentences.entity == vocabulary.end]] = True
    return DecodedCells(indptr, gene[order].astype(np.int32), sentences.value[is_gene][order], metadata, complete)

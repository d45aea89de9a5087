"""Training cells of a few studies, held in memory: what a laptop run needs.

Values stay as they were measured (counts, or log1p values where a study has no counts), so that down-sampling, gene
dropout and binning happen while loading, by the same kernel as everywhere.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from scmulan.corpus.imports import import_cells, importer
from scmulan.corpus.readers import hash_input, matrix_of, opened
from scmulan.corpus.select import GeneScores
from scmulan.corpus.spec import StudySpec
from scmulan.language.genes import GeneTable, choose_names
from scmulan.language.vocabulary import METADATA, Family, Vocabulary


@dataclass
class StudyCells:
    """Cells of one file with harmonised genes.

    Parameters
    ----------
    spec
        Where they come from.
    genes
        Approved symbols of the columns; unresolved genes are not among them.
    matrix
        CSR float32 ``[cells, genes]``: counts, or log1p values.
    total
        float32 ``[cells]``: the cell's total over all genes of the file (counts, or counts per 10,000).
    state
        ``"counts"`` or ``"log1p"``.
    metadata
        Words of each family per cell; empty where unknown.
    sha256
        Hash of the file.
    """

    spec: StudySpec
    genes: list[str]
    matrix: sp.csr_matrix
    total: np.ndarray
    state: str
    metadata: dict[Family, np.ndarray]
    sha256: str

    @classmethod
    def read(cls, spec: StudySpec, table: GeneTable) -> "StudyCells":
        """Read one file of any format: choose its matrix, rename its genes, sum duplicates on counts."""
        with tempfile.TemporaryDirectory(prefix="scmulan-") as scratch, contextlib.ExitStack() as stack:
            imported = None
            if importer(spec.file) is not None:
                imported = Path(scratch) / "cells.h5ad"
                import_cells(spec.file, imported, spec.where)
            adata = stack.enter_context(opened(spec, imported))
            chosen = matrix_of(adata, spec)
            matrix = sp.vstack([chunk for _, chunk in chosen.chunks(4096)], format="csr")
            metadata = {f: words.to_numpy(dtype=object) for f, words in spec.metadata(adata.obs).items()}
        if chosen.state == "log1p":
            matrix.data = np.expm1(matrix.data)
        total = np.asarray(matrix.sum(1)).ravel().astype(np.float32)
        symbols = table.resolve(choose_names(chosen.var)[0])
        names = sorted({s for s in symbols if s is not None})
        place = {name: i for i, name in enumerate(names)}
        known = [(i, place[s]) for i, s in enumerate(symbols) if s is not None]
        rows, columns = np.array(known, dtype=np.int64).reshape(-1, 2).T
        fold = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(symbols), len(names)))
        matrix = (matrix @ fold).tocsr().astype(np.float32)
        matrix.sort_indices()
        if chosen.state == "log1p":
            matrix.data = np.log1p(matrix.data)
        return cls(spec, names, matrix, total, chosen.state, metadata, hash_input(spec.file))


@dataclass
class CellStore:
    """All training cells in the genes of one vocabulary.

    Parameters
    ----------
    matrix
        CSR float32 ``[cells, vocabulary genes]``: counts, or log1p values where ``logged``.
    total
        float32 ``[cells]``: total over all genes of the cell's file.
    logged
        Bool ``[cells]``.
    study
        int64 ``[cells]``: place in ``studies``; every file counts as a study of its own, as it has its own genes.
    studies
        Study names.
    measured
        Bool ``[studies, vocabulary genes]``.
    metadata
        int32 ``[cells, families]``: word id of each family of ``METADATA``, −1 where unknown.
    """

    matrix: sp.csr_matrix
    total: np.ndarray
    logged: np.ndarray
    study: np.ndarray
    studies: list[str]
    measured: np.ndarray
    metadata: np.ndarray

    def __len__(self) -> int:
        return len(self.total)

    @property
    def lengths(self) -> np.ndarray:
        """Vocabulary genes seen in each cell, int64."""
        return np.diff(self.matrix.indptr).astype(np.int64)

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Measured values of some cells: CSR float32 ``[cells, vocabulary genes]``."""
        return self.matrix[cells]

    def words(self, family: Family) -> np.ndarray:
        """Word id of a family per cell, −1 where unknown."""
        return self.metadata[:, METADATA.index(family)]

    def covered(self) -> float:
        """Mean share of a cell's total that lies in the vocabulary's genes."""
        amounts = self.matrix.copy()
        logged = np.repeat(self.logged, np.diff(amounts.indptr))
        amounts.data[logged] = np.expm1(amounts.data[logged])
        return float(np.mean(np.asarray(amounts.sum(1)).ravel() / np.maximum(self.total, 1e-9)))


def read_studies(specs: Sequence[StudySpec]) -> list[StudyCells]:
    """Read every file of a spec."""
    table = GeneTable.load()
    return [StudyCells.read(spec, table) for spec in specs]


def build_vocabulary(studies: Sequence[StudyCells], genes: int) -> Vocabulary:
    """Vocabulary of the most variable genes over all studies and of every metadata word that occurs.

    Parameters
    ----------
    studies
        Cells to choose from.
    genes
        Number of gene words.
    """
    scores = GeneScores()
    for study in studies:
        scores.add(study.genes, study.matrix, study.total, study.state)
    words: dict[Family, list[str]] = {}
    for family in METADATA:
        found = {w for s in studies for w in s.metadata.get(family, ()) if w}
        words[family] = sorted(found)
    return Vocabulary.build(scores.best(genes), words)


def build_store(studies: Sequence[StudyCells], vocabulary: Vocabulary) -> CellStore:
    """Put all cells into the genes and words of a vocabulary; words it lacks become unknown."""
    genes = {name: i for i, name in enumerate(vocabulary.genes)}
    matrices, metadata = [], []
    measured = np.zeros((len(studies), len(genes)), dtype=bool)
    for i, s in enumerate(studies):
        column = np.array([genes.get(g, -1) for g in s.genes], dtype=np.int64)
        inside = np.flatnonzero(column >= 0)
        pick = sp.csr_matrix(
            (np.ones(len(inside), np.float32), (inside, column[inside])), shape=(len(column), len(genes))
        )
        part = (s.matrix @ pick).tocsr()
        part.sort_indices()
        matrices.append(part)
        measured[i, column[inside]] = True
        codes = np.full((len(s.total), len(METADATA)), -1, dtype=np.int32)
        for j, family in enumerate(METADATA):
            for word in set(s.metadata.get(family, ())) - {""}:
                found = vocabulary.find(family, word)
                codes[s.metadata[family] == word, j] = -1 if found is None else found
        metadata.append(codes)
    matrix = sp.vstack(matrices, format="csr").astype(np.float32)
    study = np.repeat(np.arange(len(studies)), [len(s.total) for s in studies])
    logged = np.concatenate([np.full(len(s.total), s.state == "log1p") for s in studies])
    total = np.concatenate([s.total for s in studies])
    names = [s.spec.name for s in studies]
    return CellStore(matrix, total, logged, study, names, measured, np.concatenate(metadata))

"""Training cells of a few studies, held in memory: what a laptop run needs.

Values stay as they were measured (counts, or log1p values where a study has no counts), so that down-sampling, gene
dropout and binning happen while loading, by the same kernel as everywhere.

Cells of one AnnData in the words of a vocabulary that exists, as fine-tuning needs them.

Genes are matched as they are when the model is used, so that a model reads in training what it will read later.
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scmulan.data.gene_selection import GeneScores
from scmulan.data.readers import convert_to_h5ad, find_converter, hash_input, matrix_of, open_study
from scmulan.data.spec import StudySpec
from scmulan.data.store import CellSource
from scmulan.vocab.genes import GeneMatch, GeneTable, choose_names, match_genes
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


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
    matrix_kind
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
    matrix_kind: str
    metadata: dict[Family, np.ndarray]
    sha256: str

    @classmethod
    def read(cls, spec: StudySpec, table: GeneTable) -> "StudyCells":
        """Read one file of any format: choose its matrix, rename its genes, sum duplicates on counts."""
        with tempfile.TemporaryDirectory(prefix="scmulan-") as scratch, contextlib.ExitStack() as stack:
            imported = None
            if find_converter(spec.file) is not None:
                imported = Path(scratch) / "cells.h5ad"
                convert_to_h5ad(spec.file, imported, spec.where)
            adata = stack.enter_context(open_study(spec, imported))
            chosen = matrix_of(adata, spec)
            matrix = sp.vstack([chunk for _, chunk in chosen.chunks(4096)], format="csr")
            metadata = {f: words.to_numpy(dtype=object) for f, words in spec.metadata(adata.obs).items()}
        if chosen.matrix_kind == "log1p":
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
        if chosen.matrix_kind == "log1p":
            matrix.data = np.log1p(matrix.data)
        return cls(spec, names, matrix, total, chosen.matrix_kind, metadata, hash_input(spec.file))


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
        scores.add(study.genes, study.matrix, study.total, study.matrix_kind)
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
    logged = np.concatenate([np.full(len(s.total), s.matrix_kind == "log1p") for s in studies])
    total = np.concatenate([s.total for s in studies])
    names = [s.spec.name for s in studies]
    return CellStore(matrix, total, logged, study, names, measured, np.concatenate(metadata))


def read_cells(
    adata: ad.AnnData,
    vocabulary: Vocabulary,
    metadata: Mapping[Family, np.ndarray],
    *,
    name: str,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    min_genes: int = 20,
) -> tuple[CellStore, ExpressionMatrix, GeneMatch]:
    """Read all cells of an AnnData as one study.

    Parameters
    ----------
    adata
        Cells × genes, in memory or backed.
    vocabulary
        Words; its genes are looked for as in annotation (symbols, aliases, Ensembl ids; duplicates summed on counts).
    metadata
        Words of each family, one string per cell; empty, or not in the vocabulary: unknown.
    name
        Name of the study.
    layer, matrix_kind
        Which matrix, and what it holds; found by looking unless given.
    min_genes
        Fewest genes of the vocabulary that the input must have.

    Returns
    -------
    tuple
        The cells, the matrix that was chosen, and the account of its genes.

    Raises
    ------
    MatrixError, GeneError
        If no matrix holds usable expression, or too few genes are known.
    """
    chosen = choose_matrix(adata, layer=layer, matrix_kind=matrix_kind)
    genes = len(vocabulary.genes)
    match = match_genes(chosen.var, vocabulary.genes, minimum=min_genes, source=name)
    inside = np.flatnonzero(match.columns >= 0)
    ones = np.ones(len(inside), dtype=np.float32)
    fold = sp.csr_matrix((ones, (inside, match.columns[inside])), shape=(chosen.n_genes, genes))
    logged = chosen.matrix_kind == "log1p"
    blocks, totals = [], []
    for _, block in chosen.chunks(4096):
        if logged:
            block.data = np.expm1(block.data)
        totals.append(np.asarray(block.sum(1)).ravel())
        part = (block @ fold).tocsr()
        part.sort_indices()
        if logged:
            part.data = np.log1p(part.data)
        blocks.append(part)
    measured = np.zeros((1, genes), dtype=bool)
    measured[0, match.columns[inside]] = True
    store = CellStore(
        matrix=sp.vstack(blocks, format="csr").astype(np.float32),
        total=np.concatenate(totals).astype(np.float32),
        logged=np.full(adata.n_obs, logged),
        study=np.zeros(adata.n_obs, dtype=np.int64),
        studies=[name],
        measured=measured,
        metadata=word_codes(adata.n_obs, vocabulary, metadata),
    )
    return store, chosen, match


def word_codes(cells: int, vocabulary: Vocabulary, metadata: Mapping[Family, np.ndarray]) -> np.ndarray:
    """Word id of each family per cell, int32 ``[cells, families]``; −1 where unknown or not in the vocabulary."""
    codes = np.full((cells, len(METADATA)), -1, dtype=np.int32)
    for column, family in enumerate(METADATA):
        for word in set(metadata.get(family, ())) - {""}:
            found = vocabulary.find(family, word)
            if found is not None:
                codes[metadata[family] == word, column] = found
    return codes


def take(store: CellSource, rows: np.ndarray) -> CellStore:
    """Some cells of others, held in memory (int64 rows)."""
    rows = np.asarray(rows)
    return CellStore(
        matrix=store.rows(rows),
        total=store.total[rows],
        logged=store.logged[rows],
        study=store.study[rows],
        studies=store.studies,
        measured=store.measured,
        metadata=store.metadata[rows],
    )

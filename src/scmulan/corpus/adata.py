"""Cells of one AnnData in the words of a vocabulary that exists, as fine-tuning needs them.

Genes are matched as they are when the model is used, so that a model reads in training what it will read later.
"""

from collections.abc import Mapping
from typing import Literal

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scmulan.corpus.cells import Cells
from scmulan.corpus.memory import CellStore
from scmulan.language.genes import GeneMatch, match_genes
from scmulan.language.matrix import ExpressionMatrix, choose_matrix
from scmulan.language.vocabulary import METADATA, Family, Vocabulary


def read_cells(
    adata: ad.AnnData,
    vocabulary: Vocabulary,
    metadata: Mapping[Family, np.ndarray],
    *,
    name: str,
    layer: str | None = None,
    state: Literal["counts", "log1p"] | None = None,
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
    layer, state
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
    chosen = choose_matrix(adata, layer=layer, state=state)
    genes = len(vocabulary.genes)
    match = match_genes(chosen.var, vocabulary.genes, minimum=min_genes, source=name)
    inside = np.flatnonzero(match.columns >= 0)
    ones = np.ones(len(inside), dtype=np.float32)
    fold = sp.csr_matrix((ones, (inside, match.columns[inside])), shape=(chosen.n_genes, genes))
    logged = chosen.state == "log1p"
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


def take(store: Cells, rows: np.ndarray) -> CellStore:
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

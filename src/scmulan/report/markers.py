"""Marker genes of the predicted types, found in the user's own values."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import rankdata

from scmulan.report.layout import SEED
from scmulan.vocab.binning import log1p_normalised
from scmulan.vocab.gene_table import GeneTable
from scmulan.vocab.genes import choose_names
from scmulan.vocab.matrix import ExpressionMatrix

MAX_CELLS_PER_TYPE = 500
MIN_CELLS_PER_TYPE = 10
MAX_GENES_PER_TYPE = 3
MIN_AUROC = 0.6
N_CANDIDATES = 30
MIN_DETECTED = 0.1
# Mitochondrial and ribosomal-protein genes differ between cells of one type more than between types.
EXCLUDED_GENES = re.compile(r"(MT-|RP[LS]\d|MRP[LS]\d|RPLP\d|RPSA$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Markers:
    """Marker genes of the predicted types."""

    types: list[str]
    """Types with enough cells, in the order given."""
    cells: list[int]
    """Cells of each type that were used."""
    genes: list[str]
    """Marker genes as symbols, those of the first type first, best first."""
    marked_type: list[str]
    """Type that each gene marks."""
    auroc: np.ndarray
    """``[genes]``: area under the ROC curve of the gene for the type against all other cells used; 0.5 is chance."""
    mean: np.ndarray
    """``[genes, types]``: mean log1p of counts per 10,000."""
    detected: np.ndarray
    """``[genes, types]``: fraction of the type's cells with a value above zero."""

    @property
    def by_type(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """Each type with its genes and their AUROC."""
        rows = list(zip(self.marked_type, self.genes, self.auroc.tolist(), strict=True))
        return [(name, [(gene, auroc) for marked, gene, auroc in rows if marked == name]) for name in self.types]


def find_markers(
    matrix: ExpressionMatrix, label: np.ndarray, types: Sequence[str], *, max_cells: int = MAX_CELLS_PER_TYPE
) -> Markers | None:
    """Find the genes that mark each type best.

    Of the genes whose mean in a type is furthest above the mean of the other types' means, those with the largest
    area under the ROC curve are taken (type against all other cells); a gene marks one type only. Mitochondrial genes
    and those of ribosomal proteins are left out.

    Parameters
    ----------
    matrix
        Expression of the cells.
    label
        Type of each cell.
    types
        Types to find markers of; those with fewer than ten cells are left out.
    max_cells
        Maximum number of cells per type, drawn at random.

    Returns
    -------
    Markers or None
        None where fewer than two types have enough cells.
    """
    types = [name for name in types if (label == name).sum() >= MIN_CELLS_PER_TYPE]
    if len(types) < 2:
        return None
    rng = np.random.default_rng(SEED)
    per_type = [np.flatnonzero(label == name) for name in types]
    per_type = [rng.choice(rows, max_cells, replace=False) if len(rows) > max_cells else rows for rows in per_type]
    cells = np.sort(np.concatenate(per_type))
    values = read_log1p(matrix, cells)
    is_type = (label[cells][:, None] == np.array(types, dtype=object)).astype(np.float64)
    n = is_type.sum(0)
    mean = np.asarray(values.T @ is_type) / n
    detected = np.asarray((values > 0).astype(np.float64).T @ is_type) / n
    symbols = gene_symbols(matrix.var)
    usable = np.array([bool(name) and not EXCLUDED_GENES.match(name) for name in symbols])
    excess = mean - (mean.sum(1, keepdims=True) - mean) / (len(types) - 1)
    excess[~usable[:, None] | (detected < MIN_DETECTED)] = -np.inf
    columns = np.unique(np.concatenate([_highest(excess[:, t], N_CANDIDATES) for t in range(len(types))]))
    if not len(columns):
        return None
    auroc = _auroc(values[:, columns].toarray(), is_type)
    rows, marked = _choose(auroc, [symbols[c] for c in columns])
    return Markers(
        types=list(types),
        cells=n.astype(int).tolist(),
        genes=[symbols[columns[row]] for row in rows],
        marked_type=[types[t] for t in marked],
        auroc=auroc[rows, marked],
        mean=mean[columns[rows]],
        detected=detected[columns[rows]],
    )


def read_log1p(matrix: ExpressionMatrix, cells: np.ndarray) -> sp.csr_matrix:
    """Read log1p values (of counts per 10,000) of some cells, in one pass over a matrix.

    Parameters
    ----------
    matrix
        Counts or log1p values.
    cells
        Rows of the cells, ascending.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32 ``[len(cells), n_genes]``.
    """
    parts = []
    for rows, block in matrix.chunks():
        part = block[cells[(cells >= rows.start) & (cells < rows.stop)] - rows.start]
        if matrix.matrix_kind == "counts":
            total = np.asarray(part.sum(1)).ravel()
            part.data = log1p_normalised(part.data, part.indptr, total)
        parts.append(part)
    return sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.float32)


def gene_symbols(var: pd.DataFrame) -> list[str]:
    """Return the name of each gene for readers: the approved symbol of an Ensembl id, otherwise the name as it is."""
    table = GeneTable.load()
    return [
        (table.explain(name).symbol or name) if name.upper().startswith("ENSG") else name
        for name in choose_names(var)[0]
    ]


def _highest(scores: np.ndarray, n: int) -> np.ndarray:
    """Return the indices of the highest positive scores."""
    indices = np.argsort(-scores, kind="stable")[:n]
    return indices[scores[indices] > 0]


def _auroc(values: np.ndarray, is_type: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each gene for each type against all other cells, ``[genes, types]``."""
    ranks = rankdata(values, axis=0)
    n = is_type.sum(0)
    return ((ranks.T @ is_type) - n * (n + 1) / 2) / (n * (len(values) - n))


def _choose(auroc: np.ndarray, symbols: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the marker genes, best first for each type, and the index of the type that each marks."""
    rows: list[int] = []
    marked: list[int] = []
    best = auroc.argmax(1)
    used: set[str] = set()
    for t in range(auroc.shape[1]):
        own = [g for g in np.argsort(-auroc[:, t], kind="stable") if best[g] == t and auroc[g, t] >= MIN_AUROC]
        for gene in own:
            if symbols[gene] not in used and marked.count(t) < MAX_GENES_PER_TYPE:
                used.add(symbols[gene])
                rows.append(int(gene))
                marked.append(t)
    return np.array(rows, dtype=np.int64), np.array(marked, dtype=np.int64)

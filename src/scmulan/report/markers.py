"""Genes that tell the predicted types apart, found in the user's own values."""

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

CELLS_PER_TYPE = 500
FEWEST_CELLS = 10
GENES_PER_TYPE = 3
LEAST_AUROC = 0.6
_CANDIDATES = 30
_LEAST_DETECTED = 0.1
# They differ between cells of the same type more than between types.
_LEFT_OUT = re.compile(r"(MT-|RP[LS]\d|MRP[LS]\d|RPLP\d|RPSA$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Markers:
    """Marker genes of the predicted types."""

    types: list[str]
    """Types with enough cells, in the order given."""
    cells: list[int]
    """Cells of each type that were looked at."""
    genes: list[str]
    """Marker genes as symbols, those of the first type first, best first."""
    of: list[str]
    """Type that each gene marks."""
    auroc: np.ndarray
    """``[genes]``: how well the gene alone tells the type from all other cells looked at; 0.5 is chance."""
    mean: np.ndarray
    """``[genes, types]``: mean log1p of counts per 10,000."""
    detected: np.ndarray
    """``[genes, types]``: share of the type's cells with a value above zero."""

    @property
    def by_type(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """Each type with its genes and their AUROC."""
        rows = list(zip(self.of, self.genes, self.auroc.tolist(), strict=True))
        return [(name, [(gene, auroc) for of, gene, auroc in rows if of == name]) for name in self.types]


def find_markers(matrix: ExpressionMatrix, label: np.ndarray, types: Sequence[str]) -> Markers | None:
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
        Types to find markers of; those with few cells are left out.

    Returns
    -------
    Markers or None
        None where fewer than two types have enough cells.
    """
    types = [name for name in types if (label == name).sum() >= FEWEST_CELLS]
    if len(types) < 2:
        return None
    rng = np.random.default_rng(SEED)
    chosen = [np.flatnonzero(label == name) for name in types]
    chosen = [np.sort(rng.choice(c, CELLS_PER_TYPE, replace=False)) if len(c) > CELLS_PER_TYPE else c for c in chosen]
    cells = np.sort(np.concatenate(chosen))
    values = read_log1p(matrix, cells)
    member = (label[cells][:, None] == np.array(types, dtype=object)).astype(np.float64)
    n = member.sum(0)
    mean = np.asarray(values.T @ member) / n
    detected = np.asarray((values > 0).astype(np.float64).T @ member) / n
    symbols = gene_symbols(matrix.var)
    usable = np.array([bool(name) and not _LEFT_OUT.match(name) for name in symbols])
    lead = mean - (mean.sum(1, keepdims=True) - mean) / (len(types) - 1)
    lead[~usable[:, None] | (detected < _LEAST_DETECTED)] = -np.inf
    columns = np.unique(np.concatenate([_highest(lead[:, t], _CANDIDATES) for t in range(len(types))]))
    if not len(columns):
        return None
    auroc = _auroc(values[:, columns].toarray(), member)
    rows, of = _choose(auroc, [symbols[c] for c in columns])
    return Markers(
        types=list(types),
        cells=[int(k) for k in n],
        genes=[symbols[columns[row]] for row in rows],
        of=[types[t] for t in of],
        auroc=auroc[rows, of],
        mean=mean[columns[rows]],
        detected=detected[columns[rows]],
    )


def read_log1p(matrix: ExpressionMatrix, cells: np.ndarray) -> sp.csr_matrix:
    """Log1p values (counts per 10,000) of some cells, in one pass over a matrix.

    Parameters
    ----------
    matrix
        Counts or log1p values.
    cells
        Ascending numbers of the cells.

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
    """Name of each gene as people know it: the approved symbol of an Ensembl id, otherwise the name as given."""
    table = GeneTable.load()
    return [
        (table.explain(name).symbol or name) if name.upper().startswith("ENSG") else name
        for name in choose_names(var)[0]
    ]


def _highest(scores: np.ndarray, n: int) -> np.ndarray:
    """Places of the highest positive scores."""
    places = np.argsort(-scores, kind="stable")[:n]
    return places[scores[places] > 0]


def _auroc(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each gene for each type against all other cells, ``[genes, types]``."""
    ranks = rankdata(values, axis=0)
    n = member.sum(0)
    return ((ranks.T @ member) - n * (n + 1) / 2) / (n * (len(values) - n))


def _choose(auroc: np.ndarray, symbols: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Genes of each type, best first, and the place of the type that each marks."""
    rows: list[int] = []
    of: list[int] = []
    best = auroc.argmax(1)
    used: set[str] = set()
    for t in range(auroc.shape[1]):
        own = [g for g in np.argsort(-auroc[:, t], kind="stable") if best[g] == t and auroc[g, t] >= LEAST_AUROC]
        for gene in own:
            if symbols[gene] not in used and of.count(t) < GENES_PER_TYPE:
                used.add(symbols[gene])
                rows.append(int(gene))
                of.append(t)
    return np.array(rows, dtype=np.int64), np.array(of, dtype=np.int64)

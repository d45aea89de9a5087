"""Sets of cells as expression levels, and the similarity of two sets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from scmulan.evaluate.inputs import optional_packages

__all__ = ["CellSet", "Similarity", "compare", "shuffle_genes"]

N_NEIGHBOURS = 10
N_VARIABLE_GENES = 50  # genes whose co-expression is compared
N_TREES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class CellSet:
    """Cells of known types, as expression levels."""

    level: sp.csr_matrix
    """uint8 ``[cells, genes]``: level 1…10, 0 where the cell lacks the gene."""
    types: np.ndarray
    """Type of each cell."""

    def of(self, name: str) -> np.ndarray:
        """Return the levels of one type's cells, dense float64 ``[cells, genes]``."""
        return self.level[np.flatnonzero(self.types == name)].toarray().astype(np.float64)

    @property
    def n_genes(self) -> np.ndarray:
        """Number of genes that each cell has."""
        return np.diff(self.level.indptr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """Similarity of a set of cells to the reference, each figure a mean over the types unless it says otherwise."""

    words_mean: float
    """Mean number of genes per cell, over all cells."""
    words_sd: float
    """Standard deviation of the number of genes within a type."""
    words_ratio: float
    """Mean number of genes per cell over that of the reference."""
    words_ratio_by_type: dict[str, float]
    """The same for each type."""
    mean_pearson: float | None
    """Pearson's r over genes of the mean level (0 where a cell lacks the gene)."""
    mean_spearman: float | None
    """The same of ranks."""
    mean_difference: float
    """Mean over genes of the absolute difference of the mean level."""
    detection_pearson: float | None
    """Pearson's r over genes of the fraction of cells that have the gene."""
    detection_spearman: float | None
    """The same of ranks."""
    detection_difference: float
    """Mean over genes of the absolute difference of this fraction."""
    coexpression: float | None
    """Pearson's r of the gene–gene correlations of the reference's most variable genes: structure within a type."""
    type_accuracy: float
    """Fraction of cells whose type is that of most of their ten nearest cells in the reference, by the cosine of their
    levels."""
    type_accuracy_reverse: float
    """The same of the reference's cells by those of the set."""
    told_apart: float
    """Fraction of cells of both sets that a random forest, which sees each cell's levels and number of genes, assigns
    to the correct set: about 0.5 where the sets cannot be told apart, 1 where always."""


def shuffle_genes(cells: CellSet, n: dict[str, int], rng: np.random.Generator) -> CellSet:
    """Make cells with independent genes: within a type, the level of each gene is drawn from another real cell.

    Parameters
    ----------
    cells
        Real cells.
    n
        Number of new cells of each type.
    rng
        Source of the draws.

    Returns
    -------
    CellSet
        Cells with the marginal distributions of the real ones and no co-expression within a type.
    """
    levels, types = [], []
    for name, number in n.items():
        real = cells.of(name)
        rows = rng.integers(len(real), size=(number, real.shape[1]))
        levels.append(sp.csr_matrix(np.take_along_axis(real, rows, 0).astype(np.uint8)))
        types += [name] * number
    return CellSet(level=sp.vstack(levels, format="csr"), types=np.array(types, dtype=object))


def compare(cells: CellSet, reference: CellSet) -> Similarity:
    """Compare a set of cells with real ones.

    Parameters
    ----------
    cells, reference
        The same types and genes in both; about the same number of cells, for ``told_apart``.
    """
    names = sorted(set(reference.types))
    levels = [(cells.of(name), reference.of(name)) for name in names]
    means = [(a.mean(0), b.mean(0)) for a, b in levels]
    detection = [((a > 0).mean(0), (b > 0).mean(0)) for a, b in levels]
    n_genes = [((a > 0).sum(1), (b > 0).sum(1)) for a, b in levels]
    return Similarity(
        words_mean=float(cells.n_genes.mean()),
        words_sd=float(np.mean([a.std() for a, _ in n_genes])),
        words_ratio=_ratio(cells.n_genes.mean(), reference.n_genes.mean()),
        words_ratio_by_type={name: _ratio(a.mean(), b.mean()) for name, (a, b) in zip(names, n_genes, strict=True)},
        mean_pearson=_mean_over_types([_pearson(a, b) for a, b in means]),
        mean_spearman=_mean_over_types([_pearson(rankdata(a), rankdata(b)) for a, b in means]),
        mean_difference=float(np.mean([np.abs(a - b).mean() for a, b in means])),
        detection_pearson=_mean_over_types([_pearson(a, b) for a, b in detection]),
        detection_spearman=_mean_over_types([_pearson(rankdata(a), rankdata(b)) for a, b in detection]),
        detection_difference=float(np.mean([np.abs(a - b).mean() for a, b in detection])),
        coexpression=_mean_over_types([_coexpression(a, b) for a, b in levels]),
        type_accuracy=float((_types_by_neighbours(cells, reference) == cells.types).mean()),
        type_accuracy_reverse=float((_types_by_neighbours(reference, cells) == reference.types).mean()),
        told_apart=_forest_accuracy(cells, reference),
    )


def _ratio(one: float, other: float) -> float:
    return float(one / other) if other else float("nan")


def _mean_over_types(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _pearson(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Pearson's r, or None where one of the two does not vary."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else None


def _coexpression(cells: np.ndarray, reference: np.ndarray) -> float | None:
    """Return Pearson's r of the upper triangles of two gene × gene correlation matrices."""
    spread = reference.std(0)
    genes = np.argsort(-spread, kind="stable")[:N_VARIABLE_GENES]
    correlations = []
    for x in (cells[:, genes], reference[:, genes]):
        x = x - x.mean(0)
        norm = np.sqrt((x**2).sum(0))
        # A gene that does not vary in one of the sets has correlation 0 there.
        x = x / np.where(norm > 0, norm, 1.0)
        correlations.append((x.T @ x)[np.triu_indices(len(genes), 1)])
    return _pearson(*correlations)


def _types_by_neighbours(cells: CellSet, reference: CellSet) -> np.ndarray:
    """Return the type of most of each cell's nearest reference cells; of two equally common types the nearer."""
    types = reference.types[_nearest(cells.level, reference.level, N_NEIGHBOURS)]
    return np.array([_majority(row) for row in types], dtype=object)


def _majority(row: np.ndarray) -> str:
    names, first, n = np.unique(row.astype(str), return_index=True, return_counts=True)
    return str(names[np.lexsort((first, -n))[0]])


def _nearest(cells: sp.csr_matrix, reference: sp.csr_matrix, k: int) -> np.ndarray:
    """Return the rows of the nearest cells of the reference, the nearest first (int ``[cells, k]``)."""
    with optional_packages("evaluating generation"):
        from sklearn.neighbors import NearestNeighbors
    search = NearestNeighbors(n_neighbors=min(k, reference.shape[0]), metric="cosine", algorithm="brute")
    search.fit(reference.astype(np.float32))
    return search.kneighbors(cells.astype(np.float32), return_distance=False)


def _forest_accuracy(cells: CellSet, reference: CellSet) -> float:
    """Return the out-of-bag accuracy of a random forest that predicts the set of each cell."""
    with optional_packages("evaluating generation"):
        from sklearn.ensemble import RandomForestClassifier
    level = sp.vstack([cells.level, reference.level], format="csr").toarray()
    x = np.column_stack([level, (level > 0).sum(1)]).astype(np.float32)
    y = np.repeat([0, 1], [cells.level.shape[0], reference.level.shape[0]])
    forest = RandomForestClassifier(N_TREES, class_weight="balanced", oob_score=True, random_state=0).fit(x, y)
    return float(forest.oob_score_)

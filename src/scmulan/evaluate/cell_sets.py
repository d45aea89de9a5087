"""Sets of cells as bins, and how alike two sets are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from scmulan.evaluate.cells import need

__all__ = ["CellSet", "Likeness", "compare", "resample"]

NEIGHBOURS = 10
VARIABLE = 50  # genes of which co-expression is compared
TREES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class CellSet:
    """Cells of known types, as bins."""

    level: sp.csr_matrix
    """uint8 ``[cells, genes]``: bin 1…10, 0 where the cell does not say the gene."""
    types: np.ndarray
    """Type of each cell."""

    def of(self, name: str) -> np.ndarray:
        """Return the bins of one type's cells, dense float64."""
        return self.level[np.flatnonzero(self.types == name)].toarray().astype(np.float64)

    @property
    def words(self) -> np.ndarray:
        """Number of genes that each cell says."""
        return np.diff(self.level.indptr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How alike a set of cells is to the reference, each figure a mean over the types unless it says otherwise."""

    words_mean: float
    """Mean number of genes per cell, over all cells."""
    words_sd: float
    """Standard deviation of it within a type."""
    words_ratio: float
    """Mean number of genes per cell over that of the reference."""
    words_ratio_by_type: dict[str, float]
    """The same for each type."""
    mean_pearson: float | None
    """Correlation over genes of the mean bin (0 where a cell does not say the gene)."""
    mean_spearman: float | None
    """The same of ranks."""
    mean_difference: float
    """Mean over genes of the absolute difference of the mean bin."""
    detection_pearson: float | None
    """Correlation over genes of the share of cells that say the gene."""
    detection_spearman: float | None
    """The same of ranks."""
    detection_difference: float
    """Mean over genes of the absolute difference of this share."""
    coexpression: float | None
    """Correlation of the gene–gene correlations of the reference's most variable genes: structure within a type."""
    type_accuracy: float
    """Share of cells whose type is that of most of their ten nearest cells in the reference, by their bins' cosine."""
    type_accuracy_reverse: float
    """The same of the reference's cells by those of the set."""
    told_apart: float
    """Share of cells of both sets that a random forest, which knows each cell's bins and number of genes, puts into the
    right one of the two: about 0.5 where the sets cannot be told apart, 1 where always."""


def resample(cells: CellSet, n: dict[str, int], rng: np.random.Generator) -> CellSet:
    """Make cells without structure: of each type every gene's bin is drawn from another real cell of the type.

    Parameters
    ----------
    cells
        Real cells.
    n
        Number of new cells of each type.
    rng
        Source of the draws.
    """
    parts, types = [], []
    for name, number in n.items():
        real = cells.of(name)
        rows = rng.integers(len(real), size=(number, real.shape[1]))
        parts.append(sp.csr_matrix(np.take_along_axis(real, rows, 0).astype(np.uint8)))
        types += [name] * number
    return CellSet(level=sp.vstack(parts, format="csr"), types=np.array(types, dtype=object))


def compare(cells: CellSet, reference: CellSet) -> Likeness:
    """Compare a set of cells with real ones.

    Parameters
    ----------
    cells, reference
        The same types and genes in both; about the same number of cells, for ``told_apart``.
    """
    names = sorted(set(reference.types))
    by_type = [(cells.of(name), reference.of(name)) for name in names]
    means = [(a.mean(0), b.mean(0)) for a, b in by_type]
    seen = [((a > 0).mean(0), (b > 0).mean(0)) for a, b in by_type]
    numbers = [((a > 0).sum(1), (b > 0).sum(1)) for a, b in by_type]
    forth, back = _types_by_neighbours(cells, reference), _types_by_neighbours(reference, cells)
    return Likeness(
        words_mean=float(cells.words.mean()),
        words_sd=float(np.mean([a.std() for a, _ in numbers])),
        words_ratio=_ratio(cells.words.mean(), reference.words.mean()),
        words_ratio_by_type={name: _ratio(a.mean(), b.mean()) for name, (a, b) in zip(names, numbers, strict=True)},
        mean_pearson=_over_types([_correlation(a, b) for a, b in means]),
        mean_spearman=_over_types([_correlation(rankdata(a), rankdata(b)) for a, b in means]),
        mean_difference=float(np.mean([np.abs(a - b).mean() for a, b in means])),
        detection_pearson=_over_types([_correlation(a, b) for a, b in seen]),
        detection_spearman=_over_types([_correlation(rankdata(a), rankdata(b)) for a, b in seen]),
        detection_difference=float(np.mean([np.abs(a - b).mean() for a, b in seen])),
        coexpression=_over_types([_coexpression(a, b) for a, b in by_type]),
        type_accuracy=float((forth == cells.types).mean()),
        type_accuracy_reverse=float((back == reference.types).mean()),
        told_apart=_told_apart(cells, reference),
    )


def _ratio(one: float, other: float) -> float:
    return float(one / other) if other else float("nan")


def _over_types(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's r, None where one of the two does not vary."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else None


def _coexpression(cells: np.ndarray, reference: np.ndarray) -> float | None:
    """Correlation of the upper triangles of two gene × gene correlation matrices."""
    spread = reference.std(0)
    genes = np.argsort(-spread, kind="stable")[:VARIABLE]
    # A gene that never varies in one of the sets correlates with nothing there: zero.
    matrices = []
    for x in (cells[:, genes], reference[:, genes]):
        x = x - x.mean(0)
        norm = np.sqrt((x**2).sum(0))
        x = x / np.where(norm > 0, norm, 1.0)
        matrices.append((x.T @ x)[np.triu_indices(len(genes), 1)])
    return _correlation(*matrices)


def _types_by_neighbours(cells: CellSet, reference: CellSet) -> np.ndarray:
    """Type of most of each cell's nearest reference cells; of two types equally common the nearer."""
    near = reference.types[_nearest(cells.level, reference.level, NEIGHBOURS)]
    return np.array([_majority(row) for row in near], dtype=object)


def _majority(row: np.ndarray) -> str:
    names, first, n = np.unique(row.astype(str), return_index=True, return_counts=True)
    return str(names[np.lexsort((first, -n))[0]])


def _told_apart(cells: CellSet, reference: CellSet) -> float:
    """Accuracy of a random forest on cells that its trees did not see (out of bag)."""
    with need("evaluating generation"):
        from sklearn.ensemble import RandomForestClassifier
    level = sp.vstack([cells.level, reference.level], format="csr").toarray()
    x = np.column_stack([level, (level > 0).sum(1)]).astype(np.float32)
    y = np.repeat([0, 1], [cells.level.shape[0], reference.level.shape[0]])
    forest = RandomForestClassifier(TREES, class_weight="balanced", oob_score=True, random_state=0).fit(x, y)
    return float(forest.oob_score_)


def _nearest(cells: sp.csr_matrix, reference: sp.csr_matrix, k: int) -> np.ndarray:
    """Rows of the nearest cells of the reference, the nearest first."""
    with need("evaluating generation"):
        from sklearn.neighbors import NearestNeighbors
    search = NearestNeighbors(n_neighbors=min(k, reference.shape[0]), metric="cosine", algorithm="brute")
    search.fit(reference.astype(np.float32))
    return search.kneighbors(cells.astype(np.float32), return_distance=False)

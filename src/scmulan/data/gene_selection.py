"""Choose the genes of a new vocabulary: variable within many studies, computed study by study."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from scmulan._io.outputs import atomic_path
from scmulan.vocab.binning import log1p_normalised

MEAN_BINS = 20
"""Bins of genes of similar mean, within which dispersions are compared."""
MIN_EXPRESSING_FRACTION = 0.02
"""Fraction of a study's cells that express a gene, below which its rank is reduced in proportion."""


@dataclass(slots=True)
class Moments:
    """Sums over cells that give the mean and variance of each gene; cells may be added block by block.

    Parameters
    ----------
    cells : int
        Number of cells.
    first, second : numpy.ndarray, float64 [genes]
        Sums of log1p values, and of their squares.
    seen : numpy.ndarray, int64 [genes]
        Number of cells with a value above zero.
    """

    cells: int
    first: np.ndarray
    second: np.ndarray
    seen: np.ndarray

    @classmethod
    def of_none(cls, genes: int) -> "Moments":
        """Return the moments of no cells."""
        return cls(0, np.zeros(genes), np.zeros(genes), np.zeros(genes, np.int64))

    def add(self, matrix: sp.csr_matrix, total: np.ndarray, matrix_kind: str) -> None:
        """Add cells.

        Parameters
        ----------
        matrix : scipy.sparse.csr_matrix [cells, genes]
            Counts, or log1p values.
        total : numpy.ndarray [cells]
            Sum over all genes of the cell's file.
        matrix_kind : {"counts", "log1p"}
            What the matrix holds.
        """
        x = matrix.data.astype(np.float64)
        if matrix_kind == "counts":
            x = log1p_normalised(x, matrix.indptr, total)
        genes = len(self.first)
        self.cells += matrix.shape[0]
        self.first += np.bincount(matrix.indices, x, minlength=genes)
        self.second += np.bincount(matrix.indices, x * x, minlength=genes)
        self.seen += np.bincount(matrix.indices[x > 0], minlength=genes)

    def merge(self, other: "Moments") -> None:
        """Add the cells of other moments, of the same genes."""
        self.cells += other.cells
        self.first += other.first
        self.second += other.second
        self.seen += other.seen

    def save(self, path: Path) -> None:
        """Write the moments as an npz file."""
        with atomic_path(path) as temporary:
            np.savez(temporary, cells=self.cells, first=self.first, second=self.second, seen=self.seen)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Read moments that :meth:`save` wrote."""
        with np.load(path) as sums:
            return cls(int(sums["cells"]), sums["first"], sums["second"], sums["seen"])


class GeneScores:
    """Batch-aware score of highly variable genes over any number of studies, added one at a time.

    Notes
    -----
    Within a study, a gene's dispersion of log1p values is standardised among genes of similar mean (the "seurat"
    flavour of HVG selection; Satija et al. 2015) and ranked. A gene's score is the sum of its squared ranks (0…1) over
    studies: a sum, not a mean, as a gene that only one study measured is worth little.
    """

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}

    def add(self, genes: list[str], matrix: sp.csr_matrix, total: np.ndarray, matrix_kind: str) -> None:
        """Add a study that is in memory.

        Parameters
        ----------
        genes : list of str
            Names of the columns.
        matrix, total, matrix_kind
            See :meth:`Moments.add`.
        """
        moments = Moments.of_none(len(genes))
        moments.add(matrix, total, matrix_kind)
        self.add_moments(genes, moments)

    def add_moments(self, genes: list[str], moments: Moments) -> None:
        """Add a study by its moments."""
        cells = max(moments.cells, 1)
        mean = moments.first / cells
        variance = moments.second / cells - mean**2
        live = np.flatnonzero((mean > 0) & (variance > 1e-12))
        if len(live) < 2:
            return
        dispersion = np.log(variance[live] / mean[live])
        edges = np.quantile(mean[live], np.linspace(0, 1, MEAN_BINS + 1)[1:-1])
        group = np.searchsorted(edges, mean[live])
        z = np.zeros(len(live))
        for b in range(MEAN_BINS):
            inside = group == b
            if inside.any():
                values = dispersion[inside]
                z[inside] = (values - values.mean()) / (values.std() + 1e-6)
        # Rare genes rank high by chance; a gene must be expressed to be worth a token.
        seen = moments.seen[live] / cells
        rank = np.argsort(np.argsort(z)) / (len(live) - 1) * np.minimum(1.0, seen / MIN_EXPRESSING_FRACTION)
        for i, r in zip(live, rank, strict=True):
            self.scores[genes[i]] = self.scores.get(genes[i], 0.0) + float(r) ** 2

    def best(self, number: int) -> list[str]:
        """Return the ``number`` genes with the highest scores, sorted by name."""
        order = sorted(self.scores, key=lambda g: (-self.scores[g], g))
        return sorted(order[:number])

"""Which genes a new vocabulary gets: variable within many studies, study by study."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scmulan.vocab.binning import log1p_normalised

BINS = 20


@dataclass(slots=True)
class Moments:
    """Sums over cells from which the mean and variance of each gene follow: cells may come block by block.

    Parameters
    ----------
    cells
        Cells added so far.
    first, second
        float64 ``[genes]``: sums of log1p values, and of their squares.
    seen
        int64 ``[genes]``: cells with a value above zero.
    """

    cells: int
    first: np.ndarray
    second: np.ndarray
    seen: np.ndarray

    @classmethod
    def of_none(cls, genes: int) -> "Moments":
        """Moments of no cells."""
        return cls(0, np.zeros(genes), np.zeros(genes), np.zeros(genes, np.int64))

    def add(self, matrix: sp.csr_matrix, total: np.ndarray, matrix_kind: str) -> None:
        """Add cells.

        Parameters
        ----------
        matrix
            CSR ``[cells, genes]``: counts, or log1p values.
        total
            Total of each cell over all genes of its file.
        matrix_kind
            ``"counts"`` or ``"log1p"``.
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
        """Add the cells of others, of the same genes."""
        self.cells += other.cells
        self.first += other.first
        self.second += other.second
        self.seen += other.seen


class GeneScores:
    """Batch-aware highly variable genes over any number of studies, one study at a time.

    Within a study a gene's dispersion of log1p values is compared with that of genes of similar mean (as in the
    "seurat" flavour of HVG selection) and ranked; a gene's score is the sum of its squared ranks (0…1) over
    studies. A sum, not a mean: a word that only one study can say is worth little.
    """

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}

    def add(self, genes: list[str], matrix: sp.csr_matrix, total: np.ndarray, matrix_kind: str) -> None:
        """Count one study that is in memory.

        Parameters
        ----------
        genes
            Names of the columns.
        matrix
            CSR ``[cells, genes]``: counts, or log1p values.
        total
            Total of each cell over all genes of its file.
        matrix_kind
            ``"counts"`` or ``"log1p"``.
        """
        moments = Moments.of_none(len(genes))
        moments.add(matrix, total, matrix_kind)
        self.add_moments(genes, moments)

    def add_moments(self, genes: list[str], moments: Moments) -> None:
        """Count one study whose cells were added up block by block."""
        cells = max(moments.cells, 1)
        mean = moments.first / cells
        variance = moments.second / cells - mean**2
        live = np.flatnonzero((mean > 0) & (variance > 1e-12))
        if len(live) < 2:
            return
        dispersion = np.log(variance[live] / mean[live])
        edges = np.quantile(mean[live], np.linspace(0, 1, BINS + 1)[1:-1])
        group = np.searchsorted(edges, mean[live])
        z = np.zeros(len(live))
        for b in range(BINS):
            inside = group == b
            if inside.any():
                values = dispersion[inside]
                z[inside] = (values - values.mean()) / (values.std() + 1e-6)
        # Rare genes rank high by chance; a gene must show up to be worth a word.
        seen = moments.seen[live] / cells
        rank = np.argsort(np.argsort(z)) / (len(live) - 1) * np.minimum(1.0, seen / 0.02)
        for i, r in zip(live, rank, strict=True):
            self.scores[genes[i]] = self.scores.get(genes[i], 0.0) + float(r) ** 2

    def best(self, number: int) -> list[str]:
        """The ``number`` best genes, alphabetical."""
        order = sorted(self.scores, key=lambda g: (-self.scores[g], g))
        return sorted(order[:number])

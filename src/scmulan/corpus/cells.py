"""What training asks of cells, wherever they are: in memory, or on disk."""

from typing import Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from scmulan.language.vocabulary import Family


@runtime_checkable
class Cells(Protocol):
    """Labelled cells in the genes of one vocabulary.

    Attributes
    ----------
    lengths
        int64 ``[cells]``: vocabulary genes seen in each cell.
    total
        float32 ``[cells]``: total over all genes of the cell's file (counts, or counts per 10,000).
    logged
        Bool ``[cells]``: whether values are log1p, not counts.
    study
        Integers ``[cells]``: place in ``studies``; every file counts as a study, as it has its own genes.
    studies
        Study names.
    measured
        Bool ``[studies, vocabulary genes]``: what each study could have seen.
    metadata
        int32 ``[cells, families]``: word id of each family of ``METADATA``, −1 where unknown.
    """

    @property
    def lengths(self) -> np.ndarray: ...  # noqa: D102

    total: np.ndarray
    logged: np.ndarray
    study: np.ndarray
    studies: list[str]
    measured: np.ndarray
    metadata: np.ndarray

    def __len__(self) -> int: ...

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Measured values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order given."""
        ...

    def words(self, family: Family) -> np.ndarray:
        """Word id of a family per cell, −1 where unknown."""
        ...

"""Read rows of an expression matrix in bounded memory, however it is stored.

NumPy arrays and SciPy CSR or CSC in memory, and their counterparts on disk (HDF5 and zarr arrays, AnnData's sparse
datasets). Whatever the source, what comes out is SciPy CSR; a matrix is never read or made dense as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from scmulan.errors import MatrixError

SAMPLE_BLOCKS = 32
"""A sample is so many blocks of rows, spread evenly over the cells."""
SAMPLE_ROWS_PER_BLOCK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadLimits:
    """Most values of a matrix that are in memory at a time."""

    sample: int = 4_000_000
    """Of a sample."""
    transposed: int = 20_000_000
    """Of rows collected from a matrix stored by columns."""
    columns: int = 4_000_000
    """Of the columns that are read for them at a time."""


LIMITS = ReadLimits()


def stored_values(matrix: Any) -> int:
    """Count the values that a matrix stores (all of them where it is dense)."""
    if isinstance(matrix, (CSRDataset, CSCDataset)):
        return int(matrix.group["indices"].shape[0])
    return int(matrix.nnz) if sp.issparse(matrix) else int(np.prod(matrix.shape))


def row_chunks(
    matrix: Any, size: int, *, select: Callable[[slice], bool] = lambda rows: True, limits: ReadLimits = LIMITS
) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Yield a matrix as consecutive blocks of rows.

    Parameters
    ----------
    matrix
        Cells × genes, dense or sparse, in memory or on disk.
    size
        Rows per block; the last block may have fewer.
    select
        Whether to yield a block, given its rows; others are not read if rows are stored together.
    limits
        Bounds of memory.

    Yields
    ------
    tuple of slice and scipy.sparse.csr_matrix
        Rows of the block, and its values in the stored type and in memory of their own.

    Notes
    -----
    A matrix stored by columns (CSC) is transposed in passes, each of which reads the whole matrix once and holds at
    most about ``limits.transposed`` values (20 million: some 400 MB).
    """
    n_rows = int(matrix.shape[0])
    if getattr(matrix, "format", None) != "csc":
        for start in range(0, n_rows, size):
            rows = slice(start, min(start + size, n_rows))
            if select(rows):
                yield rows, read_rows(matrix, rows, limits)
        return
    rows_held = max(limits.transposed * n_rows // max(stored_values(matrix), 1) // size, 1) * size
    for start in range(0, n_rows, rows_held):
        end = min(start + rows_held, n_rows)
        if not any(select(slice(row, min(row + size, end))) for row in range(start, end, size)):
            continue
        held = read_rows(matrix, slice(start, end), limits)
        for rows, block in row_chunks(held, size):
            rows = slice(start + rows.start, start + rows.stop)
            if select(rows):
                yield rows, block
        del held  # before the next pass needs its room


def read_rows(matrix: Any, rows: slice, limits: ReadLimits = LIMITS) -> sp.csr_matrix:
    """Read consecutive rows as CSR, in the stored type and in memory of their own."""
    if isinstance(matrix, CSCDataset):
        parts = [matrix[:, columns][rows] for columns in column_blocks(matrix, limits.columns)]
        by_column = sp.hstack(parts, format="csc")
        parts.clear()
        return sp.csr_matrix(by_column)
    block = matrix[rows]
    if not sp.issparse(block):
        block = np.asarray(block)
        if block.ndim != 2:
            raise MatrixError(f"a matrix of type {type(matrix).__name__} cannot be read: load it first (to_memory())")
        if block.dtype == np.float16:  # SciPy's sparse matrices know no half precision
            block = block.astype(np.float32)
    return sp.csr_matrix(block)


def sample_rows(matrix: Any, limits: ReadLimits = LIMITS) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Read some cells spread evenly over a matrix; if it is stored by columns on disk, all cells of some genes.

    Returns
    -------
    sample : scipy.sparse.csr_matrix
        Some rows (or columns) of the matrix, without stored zeros, own memory.
    rows : numpy.ndarray
        Their indices in the matrix.
    columns : numpy.ndarray
        Indices of the sample's columns in the matrix.
    """
    n_rows, n_columns = (int(n) for n in matrix.shape)
    # Of dense expression hardly more than a quarter is above zero.
    stored = stored_values(matrix) // (1 if hasattr(matrix, "format") else 4)
    if isinstance(matrix, CSCDataset):
        blocks = _spread(n_columns, stored, limits.sample)
        parts = [matrix[:, block] for block in blocks]
        sample = sp.csr_matrix(sp.hstack(parts, format="csr"))
        rows, columns = np.arange(n_rows), np.concatenate([np.arange(n_columns)[block] for block in blocks])
    else:
        blocks = _spread(n_rows, stored, limits.sample)
        parts = [read_rows(matrix, block, limits) for block in blocks]
        sample = sp.csr_matrix(sp.vstack(parts, format="csr"))
        rows, columns = np.concatenate([np.arange(n_rows)[block] for block in blocks]), np.arange(n_columns)
    sample.eliminate_zeros()
    return sample, rows, columns


def _spread(n: int, stored: int, max_values: int) -> list[slice]:
    """Return blocks of rows (or columns) spread evenly over ``n`` that store about ``max_values`` values or fewer."""
    n_rows = int(min(SAMPLE_BLOCKS * SAMPLE_ROWS_PER_BLOCK, max(max_values * n // max(stored, 1), 1)))
    if n_rows >= n:
        return [slice(0, n)]
    n_blocks = min(SAMPLE_BLOCKS, n_rows)
    length = n_rows // n_blocks
    return [slice(int(start), int(start) + length) for start in np.linspace(0, n - length, n_blocks)]


def column_blocks(matrix: CSCDataset, max_values: int) -> list[slice]:
    """Return blocks of consecutive columns that store at most so many values each (one column may have more)."""
    ends = np.asarray(matrix.group["indptr"][...], dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(ends) - 1:
        reach = int(np.searchsorted(ends, ends[cuts[-1]] + max_values, side="right")) - 1
        cuts.append(max(reach, cuts[-1] + 1))
    return [slice(a, b) for a, b in pairwise(cuts)]

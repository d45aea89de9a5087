"""Read rows of an expression matrix in bounded memory, however it is stored.

NumPy arrays and SciPy CSR or CSC in memory, and their counterparts on disk (HDF5 and zarr arrays, AnnData's sparse
datasets). Whatever the source, what comes out is SciPy CSR; a matrix is never read or made dense as a whole.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from scmulan.errors import MatrixError

# A sample is this many blocks of rows spread evenly over the cells, and stops at about so many values.
_BLOCKS = 32
_ROWS_PER_BLOCK = 64
_SAMPLE_VALUES = 4_000_000
# Columns have to be turned into rows: values held at a time, and values of the columns read at a time.
_TURNED_VALUES = 20_000_000
_COLUMN_VALUES = 4_000_000


def stored_values(matrix: Any) -> int:
    """Count the values that a matrix stores (all of them where it is dense)."""
    if isinstance(matrix, (CSRDataset, CSCDataset)):
        return int(matrix.group["indices"].shape[0])
    return int(matrix.nnz) if sp.issparse(matrix) else int(np.prod(matrix.shape))


def row_chunks(
    matrix: Any, size: int, *, wanted: Callable[[slice], bool] = lambda rows: True
) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Yield a matrix as consecutive blocks of rows.

    Parameters
    ----------
    matrix
        Cells × genes, dense or sparse, in memory or on disk.
    size
        Rows per block; the last block may have fewer.
    wanted
        Which blocks to give; the others are not read where rows lie together.

    Yields
    ------
    tuple of slice and scipy.sparse.csr_matrix
        Rows of the block, and its values in the stored type and in memory of their own.

    Notes
    -----
    A matrix stored by columns (CSC) is turned into rows in passes, each of which goes once over the whole matrix and
    holds at most about 20 million values (some 400 MB).
    """
    n_rows = int(matrix.shape[0])
    if getattr(matrix, "format", None) != "csc":
        for start in range(0, n_rows, size):
            rows = slice(start, min(start + size, n_rows))
            if wanted(rows):
                yield rows, read_rows(matrix, rows)
        return
    rows_held = max(_TURNED_VALUES * n_rows // max(stored_values(matrix), 1) // size, 1) * size
    for start in range(0, n_rows, rows_held):
        end = min(start + rows_held, n_rows)
        if not any(wanted(slice(row, min(row + size, end))) for row in range(start, end, size)):
            continue
        held = read_rows(matrix, slice(start, end))
        for rows, block in row_chunks(held, size):
            rows = slice(start + rows.start, start + rows.stop)
            if wanted(rows):
                yield rows, block
        del held  # before the next pass needs its room


def read_rows(matrix: Any, rows: slice) -> sp.csr_matrix:
    """Read consecutive rows as CSR, in the stored type and in memory of their own."""
    if isinstance(matrix, CSCDataset):
        parts = [matrix[:, columns][rows] for columns in _column_blocks(matrix)]
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


def sample_rows(matrix: Any) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Read some cells spread evenly over a matrix; of one stored by columns on disk, all cells of some genes.

    Returns
    -------
    sample : scipy.sparse.csr_matrix
        Some rows (or columns) of the matrix, without stored zeros, own memory.
    rows : numpy.ndarray
        Their places in the matrix.
    columns : numpy.ndarray
        Places of the sample's columns in the matrix.
    """
    n_rows, n_columns = (int(n) for n in matrix.shape)
    # Of dense expression hardly more than a quarter is above zero.
    stored = stored_values(matrix) // (1 if hasattr(matrix, "format") else 4)
    if isinstance(matrix, CSCDataset):
        blocks = _spread(n_columns, stored)
        parts = [matrix[:, block] for block in blocks]
        sample = sp.csr_matrix(sp.hstack(parts, format="csr"))
        rows, columns = np.arange(n_rows), np.concatenate([np.arange(n_columns)[block] for block in blocks])
    else:
        blocks = _spread(n_rows, stored)
        parts = [read_rows(matrix, block) for block in blocks]
        sample = sp.csr_matrix(sp.vstack(parts, format="csr"))
        rows, columns = np.concatenate([np.arange(n_rows)[block] for block in blocks]), np.arange(n_columns)
    sample.eliminate_zeros()
    return sample, rows, columns


def _spread(n: int, stored: int) -> list[slice]:
    """Blocks of rows (or columns) spread evenly over ``n`` that store a bounded number of values."""
    wanted = int(min(_BLOCKS * _ROWS_PER_BLOCK, max(_SAMPLE_VALUES * n // max(stored, 1), 1)))
    if wanted >= n:
        return [slice(0, n)]
    n_blocks = min(_BLOCKS, wanted)
    length = wanted // n_blocks
    return [slice(int(start), int(start) + length) for start in np.linspace(0, n - length, n_blocks)]


def _column_blocks(matrix: CSCDataset) -> list[slice]:
    """Consecutive columns that store a bounded number of values together."""
    ends = np.asarray(matrix.group["indptr"][...], dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(ends) - 1:
        reach = int(np.searchsorted(ends, ends[cuts[-1]] + _COLUMN_VALUES, side="right")) - 1
        cuts.append(max(reach, cuts[-1] + 1))
    return [slice(a, b) for a, b in pairwise(cuts)]

"""From expression values to gene tokens: normalise, log1p and bin, in one compiled pass over a CSR matrix; and back.

The published rule (scMulan release, ``scMulan.py``): counts per 10,000 of the whole cell, log1p, restricted to the
vocabulary's genes, zeros dropped; then ten bins ("levels") of equal width between 0 and the cell's own largest value,
each open below and closed above, numbered 1…10.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse as sp

from scmulan._numba import compiled

LEVELS = 10
TARGET_SUM = 1e4
"""Total of a cell after normalisation."""
SMALL_COUNTS = 64
"""Counts below this have their level computed once per cell: most counts of a cell are the same few numbers."""
EXPM1_SLOTS = 1024
"""Values of ``expm1`` that are remembered; a power of two."""
MAX_EXACT = 2.0**53
"""Whole numbers up to here, and sums of them, have no rounding in float64."""
# De Bruijn's sequence: multiplied by one set bit, its top six bits tell which bit it was.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_INDEX = np.zeros(64, dtype=np.int64)
_BIT_INDEX[[((int(_DE_BRUIJN) << i) & (2**64 - 1)) >> 58 for i in range(64)]] = np.arange(64)


@dataclass(frozen=True)
class GeneTokens:
    """Gene tokens of a batch of cells, ragged.

    Parameters
    ----------
    indptr
        int64 ``[cells + 1]``: cell ``i`` has the tokens ``indptr[i]:indptr[i + 1]``.
    gene
        int32 ``[tokens]``: index among the vocabulary's genes, ascending within a cell.
    level
        uint8 ``[tokens]``: bin 1…10.
    maximum
        float32 ``[cells]``: largest log1p value among the vocabulary's genes; 0 for an empty cell.
    covered
        float32 ``[cells]``: fraction of the cell's total (counts, or counts per 10,000) in the vocabulary's genes.
    """

    indptr: np.ndarray
    gene: np.ndarray
    level: np.ndarray
    maximum: np.ndarray
    covered: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of gene tokens of each cell, int64."""
        return np.diff(self.indptr)


def tokenize(
    matrix: sp.csr_matrix,
    columns: np.ndarray,
    n_genes: int,
    *,
    matrix_kind: str | np.ndarray,
    total: np.ndarray | None = None,
    levels: int = LEVELS,
) -> GeneTokens:
    """Turn expression into gene tokens.

    Parameters
    ----------
    matrix
        CSR ``[cells, input genes]``, non-negative and finite.
    columns
        int32 ``[input genes]``: index among the vocabulary's genes, or −1. Columns of one gene are summed (on counts,
        also where the matrix is log1p).
    n_genes
        Number of the vocabulary's genes.
    matrix_kind
        ``"counts"`` (normalised here over all input genes, then log1p) or ``"log1p"``; or bool ``[cells]``, true where
        a cell's values are log1p.
    total
        Float ``[cells]``: totals of the cells over all genes of their files, where the matrix holds only some of them
        (counts, or counts per 10,000). Default: the sums of the matrix.
    levels
        Number of bins.

    Returns
    -------
    GeneTokens

    Raises
    ------
    ValueError
        If ``matrix_kind`` is another text.

    Notes
    -----
    ``scmulan bench tokenize`` compares with the same rule in whole-matrix operations of scipy, and with the release's
    cell-by-cell code; ``tests/vocab/test_binning.py`` with plain loops, to the last bit.
    """
    n_cells = matrix.shape[0]
    if isinstance(matrix_kind, str):
        if matrix_kind not in ("counts", "log1p"):
            raise ValueError(f"matrix kind is {matrix_kind!r}: expected 'counts' or 'log1p'")
        is_counts = np.full(n_cells, matrix_kind == "counts")
    else:
        is_counts = ~np.asarray(matrix_kind, dtype=bool)
    data = np.ascontiguousarray(matrix.data, dtype=np.float32)
    columns = np.ascontiguousarray(columns, dtype=np.int32)
    inside = np.zeros(-(-len(columns) // 32) * 32, dtype=bool)
    inside[: len(columns)] = columns >= 0
    cells = _Cells(
        data=data,
        bits=data.view(np.uint32),
        indices=matrix.indices.astype(np.int32, copy=False),
        indptr=matrix.indptr.astype(np.int64, copy=False),
        is_counts=is_counts,
        totals=np.zeros(0) if total is None else np.asarray(total, dtype=np.float64),
    )
    genes = _Genes(columns, np.packbits(inside, bitorder="little").view(np.uint32), n_genes)
    indptr = np.zeros(n_cells + 1, dtype=np.int64)
    out = _Tokens(
        ends=indptr[1:],
        gene=np.empty(matrix.nnz, dtype=np.int32),
        level=np.empty(matrix.nnz, dtype=np.uint8),
        maximum=np.zeros(n_cells, dtype=np.float32),
        covered=np.zeros(n_cells, dtype=np.float32),
    )
    _bin_rows(cells, genes, levels, out)
    gene, level, used = out.gene, out.level, int(indptr[-1])
    # Room was made for every entry; the unused rest was never touched, but a view would keep it reserved.
    if used < matrix.nnz:
        gene, level = gene[:used].copy(), level[:used].copy()
    return GeneTokens(indptr, gene, level, out.maximum, out.covered)


class _Cells(NamedTuple):
    """Rows of a CSR matrix."""

    data: np.ndarray
    """float32."""
    bits: np.ndarray
    """uint32: the same bits as ``data``."""
    indices: np.ndarray
    indptr: np.ndarray
    is_counts: np.ndarray
    """Bool ``[cells]``."""
    totals: np.ndarray
    """float64 ``[cells]``, or empty: to be summed."""


class _Genes(NamedTuple):
    """Which column is which gene."""

    columns: np.ndarray
    """int32 ``[input genes]``, −1 for none."""
    inside: np.ndarray
    """uint32: a bit for each column, set where it is a gene."""
    n_genes: int


class _Tokens(NamedTuple):
    """Arrays that the kernel fills, as in :class:`GeneTokens`."""

    ends: np.ndarray
    gene: np.ndarray
    level: np.ndarray
    maximum: np.ndarray
    covered: np.ndarray


@compiled()
def _bin_rows(cells, genes, levels, out):
    # Numba reloads a tuple's arrays at each use; as local names they stay in registers, which saves a third.
    all_data, all_bits, all_indices, indptr, kinds, totals = cells
    columns, inside, n_genes = genes
    ends, gene_out, level_out, maximum, covered_out = out
    longest = 0
    for row in range(len(indptr) - 1):
        longest = max(longest, indptr[row + 1] - indptr[row])
    found = np.empty(longest + 1, dtype=np.int64)
    gene = np.empty(longest + 1, dtype=np.int64)
    values = np.empty(longest + 1, dtype=np.float64)
    scratch = np.zeros(n_genes, dtype=np.float64)
    seen = np.zeros((n_genes + 63) // 64, dtype=np.uint64)
    keys = np.zeros(EXPM1_SLOTS, dtype=np.float64)
    amounts = np.zeros(EXPM1_SLOTS, dtype=np.float64)
    level_of_count = np.zeros(SMALL_COUNTS, dtype=np.uint8)
    at = 0
    for row in range(len(indptr) - 1):
        first, end = indptr[row], indptr[row + 1]
        data, bits, indices = all_data[first:end], all_bits[first:end], all_indices[first:end]
        is_counts = kinds[row]
        if len(totals) > 0:
            total = totals[row]
        elif is_counts:
            total, whole = sum_whole(data)
            if not whole:
                total = _sum_in_order(data)
        else:
            total = _sum_amounts(data, bits, keys, amounts)
        n = _find(indices, inside, found)
        covered = 0.0
        last = -1
        ascending = True
        for j in range(n):
            k = found[j]
            g = columns[indices[k]]
            value = float(data[k])
            ascending &= g > last
            last = g
            gene[j] = g
            values[j] = value
            if is_counts:
                covered += value
            else:
                slot = (np.uint64(bits[k]) * np.uint64(2654435769) >> np.uint64(22)) & np.uint64(EXPM1_SLOTS - 1)
                if keys[slot] != value:
                    keys[slot] = value
                    amounts[slot] = np.expm1(value)
                covered += amounts[slot]
        if not ascending:
            n = _sort_and_sum(gene, values, n, scratch, seen, is_counts)
        scale = TARGET_SUM / total if total > 0 else 1.0
        largest = 0.0
        for k in range(n):
            largest = max(largest, values[k])
        largest = float(np.float32(np.log1p(largest * scale) if is_counts else largest))
        step = largest / levels
        per_step = 1.0 / step if step > 0 else 0.0
        level_of_count[:] = 0
        for k in range(n):
            value = values[k]
            if value > 0:
                gene_out[at] = gene[k]
                if not is_counts:
                    level_out[at] = level_of(value, step, per_step, levels)
                else:
                    count = int(value) if value < SMALL_COUNTS else 0
                    if count != value or level_of_count[count] == 0:
                        level = level_of(float(np.float32(np.log1p(value * scale))), step, per_step, levels)
                        if count == value:
                            level_of_count[count] = level
                        level_out[at] = level
                    else:
                        level_out[at] = level_of_count[count]
                at += 1
        ends[row] = at
        maximum[row] = largest
        covered_out[row] = covered / total if total > 0 else 0.0


@numba.njit(nogil=True, inline="always")
def level_of(x, step, per_step, levels):
    """Return the bin of a value: ``per_step`` = 1 / step finds it up to rounding, the edges decide.

    Edges are those of ``numpy.linspace``: ``step`` times 1…``levels``.
    """
    level = int(np.ceil(x * per_step))
    while level > 1 and x <= (level - 1) * step:
        level -= 1
    while level < levels and x > level * step:
        level += 1
    return min(level, levels)


@numba.njit(nogil=True, fastmath={"reassoc", "nsz"})
def sum_whole(data):
    """Sum values in any order, and tell whether all are whole: then, and only then, the order cannot matter."""
    total = 0.0
    others = np.int32(0)
    for k in range(len(data)):
        total += float(data[k])
        others += np.int32(np.floor(data[k]) != data[k])
    return total, others == 0 and total <= MAX_EXACT


@numba.njit(nogil=True)
def _sum_in_order(data):
    total = 0.0
    for k in range(len(data)):
        total += float(data[k])
    return total


@numba.njit(nogil=True)
def _sum_amounts(data, bits, keys, amounts):
    """Sum ``expm1`` of log1p values, which repeat within a cell as counts do: remembered by a hash of their bits."""
    total = 0.0
    for k in range(len(data)):
        value = float(data[k])
        slot = (np.uint64(bits[k]) * np.uint64(2654435769) >> np.uint64(22)) & np.uint64(EXPM1_SLOTS - 1)
        if keys[slot] != value:
            keys[slot] = value
            amounts[slot] = np.expm1(value)
        total += amounts[slot]
    return total


@numba.njit(nogil=True)
def _find(indices, inside, found):
    """Write the entries in the vocabulary's columns into ``found``; return their number.

    Each entry is written, and kept only if it counts: a branch would be mispredicted at every tenth gene.
    """
    n = np.uint64(0)
    for k in range(len(indices)):
        found[n] = k
        column = np.uint32(indices[k])
        n += np.uint64((inside[column >> np.uint32(5)] >> (column & np.uint32(31))) & np.uint32(1))
    return np.int64(n)


@numba.njit(nogil=True, inline="always")
def _sort_and_sum(gene, values, n, scratch, seen, is_counts):
    """Sort entries by gene and sum those of one gene, in place; return their number.

    ``seen`` has a bit for each gene, so that neither a sort nor a scan of all genes is needed.
    """
    for k in range(n):
        g = gene[k]
        scratch[g] = values[k] if scratch[g] == 0 else _sum(scratch[g], values[k], is_counts)
        seen[g >> 6] |= np.uint64(1) << np.uint64(g & 63)
    n = 0
    for block in range(len(seen)):
        bits = seen[block]
        seen[block] = 0
        while bits != 0:
            low = bits & (~bits + np.uint64(1))
            g = (block << 6) + _BIT_INDEX[(low * _DE_BRUIJN) >> np.uint64(58)]
            bits ^= low
            gene[n] = g
            values[n] = scratch[g]
            scratch[g] = 0.0
            n += 1
    return n


@numba.njit(nogil=True, inline="always")
def _sum(a, b, is_counts):
    return a + b if is_counts else np.log1p(np.expm1(a) + np.expm1(b))


def log1p_normalised(values: np.ndarray, indptr: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Compute log1p of counts per 10,000, for the values of a CSR matrix.

    Parameters
    ----------
    values
        Counts, non-negative; their type decides the precision.
    indptr
        ``[cells + 1]``: cell ``i`` has the values ``indptr[i]:indptr[i + 1]``.
    total
        Float ``[cells]``: totals of the cells.
    """
    return np.log1p(values * np.repeat(TARGET_SUM / np.maximum(total, 1e-9), np.diff(indptr)))


def debin(indptr: np.ndarray, level: np.ndarray, *, covered: float = 1.0, levels: int = LEVELS) -> np.ndarray:
    """Compute log1p values for binned genes.

    A bin says which tenth of the cell's largest value a gene has, not how large that value is. The missing scale is
    fixed by what normalisation means: the vocabulary's genes of a cell hold ``covered`` of its 10,000. Each gene gets
    the middle of its bin times the scale that makes the sum come out.

    Parameters
    ----------
    indptr, level
        Ragged bins, as in :class:`GeneTokens`.
    covered
        Fraction of a cell's total in the vocabulary's genes (of the training cells, from the model's card).
    levels
        Number of bins.

    Returns
    -------
    numpy.ndarray
        float32 ``[tokens]``.
    """
    fraction = (level.astype(np.float64) - 0.5) / levels
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    target = covered * TARGET_SUM
    low = np.zeros(len(indptr) - 1)
    high = np.full(len(indptr) - 1, 40.0)
    for _ in range(50):  # bisection: the sum grows with the scale
        scale = (low + high) / 2
        total = np.bincount(row, np.expm1(fraction * scale[row]), minlength=len(scale))
        high = np.where(total >= target, scale, high)
        low = np.where(total >= target, low, scale)
    return (fraction * high[row]).astype(np.float32)

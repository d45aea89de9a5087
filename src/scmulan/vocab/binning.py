"""Expression values become words: normalise, log1p, bin, in one compiled pass over a CSR matrix.

The published rule (scMulan release, ``scMulan.py``): counts per 10,000 of the whole cell, log1p, restricted to the
vocabulary's genes, zeros dropped; then ten bins of equal width between 0 and the cell's own largest value, each
open below and closed above, numbered 1…10.
"""

from dataclasses import dataclass

import numba
import numpy as np
import scipy.sparse as sp

from scmulan._numba import compiled

LEVELS = 10
TARGET_SUM = 1e4


@dataclass(frozen=True)
class GeneTokens:
    """Gene words of a batch of cells, ragged.

    Parameters
    ----------
    indptr
        int64 ``[cells + 1]``: cell ``i`` has words ``indptr[i]:indptr[i + 1]``.
    gene
        int32: place of each word's gene among the vocabulary's genes, ascending within a cell.
    level
        uint8: bin 1…10.
    maximum
        float32 ``[cells]``: largest log1p value of the cell among the vocabulary's genes; 0 for an empty cell.
    covered
        float32 ``[cells]``: share of the cell's total (counts, or counts per 10,000) that lies in the vocabulary.
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
        """Number of gene words of each cell, int64."""
        return np.diff(self.indptr)


SMALL = 64
"""Counts below this have their bin worked out once per cell: most counts of a cell are the same few numbers."""
MEMO = 1024
"""Values of ``expm1`` that are remembered; a power of two."""
EXACT = 2.0**53
"""Whole numbers up to here, and sums of them, have no rounding in float64."""
# De Bruijn's sequence: multiplied by one set bit, its top six bits say which.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_PLACE = np.zeros(64, dtype=np.int64)
_PLACE[[((int(_DE_BRUIJN) << i) & (2**64 - 1)) >> 58 for i in range(64)]] = np.arange(64)


@numba.njit(nogil=True, inline="always")
def level_of(x, step, per_step, levels):
    """Bin of a value: ``per_step`` = 1 / step finds it up to rounding, the edges (``numpy.linspace``) decide."""
    level = int(np.ceil(x * per_step))
    while level > 1 and x <= (level - 1) * step:
        level -= 1
    while level < levels and x > level * step:
        level += 1
    return min(level, levels)


@numba.njit(nogil=True, inline="always")
def _sum(a, b, counts):
    return a + b if counts else np.log1p(np.expm1(a) + np.expm1(b))


@numba.njit(nogil=True, fastmath={"reassoc", "nsz"})
def _sum_whole(data):
    """Sum of counts and whether all are whole numbers: then, and only then, their order cannot have mattered."""
    total = 0.0
    others = np.int32(0)
    for k in range(len(data)):
        total += float(data[k])
        others += np.int32(np.floor(data[k]) != data[k])
    return total, others == 0 and total <= EXACT


@numba.njit(nogil=True)
def _sum_in_order(data):
    total = 0.0
    for k in range(len(data)):
        total += float(data[k])
    return total


@numba.njit(nogil=True)
def _sum_amounts(data, bits, keys, amounts):
    """Sum of ``expm1`` of log1p values, which repeat within a cell as counts do: remembered by a hash of their bits."""
    total = 0.0
    for k in range(len(data)):
        value = float(data[k])
        slot = (np.uint64(bits[k]) * np.uint64(2654435769) >> np.uint64(22)) & np.uint64(MEMO - 1)
        if keys[slot] != value:
            keys[slot] = value
            amounts[slot] = np.expm1(value)
        total += amounts[slot]
    return total


@numba.njit(nogil=True)
def _find(indices, inside, found):
    """Entries in the vocabulary's columns (a bit each); returns their number.

    Each is written and kept only where it counts: a branch would be guessed wrongly at every tenth gene.
    """
    n = np.uint64(0)
    for k in range(len(indices)):
        found[n] = k
        column = np.uint32(indices[k])
        n += np.uint64((inside[column >> np.uint32(5)] >> (column & np.uint32(31))) & np.uint32(1))
    return np.int64(n)


@numba.njit(nogil=True, inline="always")
def _fold(genes, values, n, scratch, seen, counts):
    """Entries in the order of their genes, those of one gene added up; returns their number.

    A bit per gene says where to look, so neither a sort nor a scan of all genes is needed.
    """
    for k in range(n):
        g = genes[k]
        scratch[g] = values[k] if scratch[g] == 0 else _sum(scratch[g], values[k], counts)
        seen[g >> 6] |= np.uint64(1) << np.uint64(g & 63)
    n = 0
    for block in range(len(seen)):
        bits = seen[block]
        seen[block] = 0
        while bits != 0:
            low = bits & (~bits + np.uint64(1))
            g = (block << 6) + _PLACE[(low * _DE_BRUIJN) >> np.uint64(58)]
            bits ^= low
            genes[n] = g
            values[n] = scratch[g]
            scratch[g] = 0.0
            n += 1
    return n


@compiled()
def _bin_rows(
    data,
    bits,
    indices,
    indptr,
    columns,
    inside,
    genes,
    counts,
    totals,
    target_sum,
    levels,
    words,
    levels_out,
    ends,
    top,
    share,
):
    longest = 0
    for row in range(len(indptr) - 1):
        longest = max(longest, indptr[row + 1] - indptr[row])
    here = np.empty(longest + 1, dtype=np.int64)
    found = np.empty(longest + 1, dtype=np.int64)
    values = np.empty(longest + 1, dtype=np.float64)
    scratch = np.zeros(genes, dtype=np.float64)
    seen = np.zeros((genes + 63) // 64, dtype=np.uint64)
    keys = np.zeros(MEMO, dtype=np.float64)
    amounts = np.zeros(MEMO, dtype=np.float64)
    small = np.zeros(SMALL, dtype=np.uint8)
    at = 0
    for row in range(len(indptr) - 1):
        first, end = indptr[row], indptr[row + 1]
        as_counts = counts[row]
        row_data, row_bits, row_indices = data[first:end], bits[first:end], indices[first:end]
        if len(totals) > 0:
            total = totals[row]
        elif as_counts:
            total, whole = _sum_whole(row_data)
            if not whole:
                total = _sum_in_order(row_data)
        else:
            total = _sum_amounts(row_data, row_bits, keys, amounts)
        n = _find(row_indices, inside, found)
        covered = 0.0
        last = -1
        ascending = True
        for j in range(n):
            k = found[j]
            g = columns[row_indices[k]]
            value = float(row_data[k])
            ascending &= g > last
            last = g
            here[j] = g
            values[j] = value
            if as_counts:
                covered += value
            else:
                slot = (np.uint64(row_bits[k]) * np.uint64(2654435769) >> np.uint64(22)) & np.uint64(MEMO - 1)
                if keys[slot] != value:
                    keys[slot] = value
                    amounts[slot] = np.expm1(value)
                covered += amounts[slot]
        if not ascending:
            n = _fold(here, values, n, scratch, seen, as_counts)
        scale = target_sum / total if total > 0 else 1.0
        largest = 0.0
        for k in range(n):
            largest = max(largest, values[k])
        largest = float(np.float32(np.log1p(largest * scale) if as_counts else largest))
        step = largest / levels
        per_step = 1.0 / step if step > 0 else 0.0
        small[:] = 0
        for k in range(n):
            value = values[k]
            if value > 0:
                words[at] = here[k]
                if not as_counts:
                    levels_out[at] = level_of(value, step, per_step, levels)
                else:
                    place = int(value) if value < SMALL else 0
                    if place != value or small[place] == 0:
                        level = level_of(float(np.float32(np.log1p(value * scale))), step, per_step, levels)
                        if place == value:
                            small[place] = level
                        levels_out[at] = level
                    else:
                        levels_out[at] = small[place]
                at += 1
        ends[row] = at
        top[row] = largest
        share[row] = covered / total if total > 0 else 0.0


def tokenize(
    matrix: sp.csr_matrix,
    columns: np.ndarray,
    genes: int,
    *,
    matrix_kind: str | np.ndarray,
    total: np.ndarray | None = None,
    levels: int = LEVELS,
    target_sum: float = TARGET_SUM,
) -> GeneTokens:
    """Turn expression into gene words.

    Parameters
    ----------
    matrix
        CSR ``[cells, input genes]``, non-negative and finite.
    columns
        int32 ``[input genes]``: place among the vocabulary's genes, or −1; columns that share a place are summed
        (on counts, also where the matrix is log1p).
    genes
        Number of the vocabulary's genes.
    matrix_kind
        ``"counts"`` (normalised here to ``target_sum`` per cell over all input genes, then log1p) or ``"log1p"``; or
        bool ``[cells]``, true where a cell's values are log1p.
    total
        Float ``[cells]``: totals of the cells over all genes of their files, where the matrix holds only some of them
        (counts, or counts per 10,000). Default: what the matrix adds up to.
    levels
        Number of bins.
    target_sum
        Total per cell after normalisation.

    Returns
    -------
    GeneTokens
    """
    cells = matrix.shape[0]
    if isinstance(matrix_kind, str):
        if matrix_kind not in ("counts", "log1p"):
            raise ValueError(f"matrix kind is {matrix_kind!r}: expected 'counts' or 'log1p'")
        counts = np.full(cells, matrix_kind == "counts")
    else:
        counts = ~np.asarray(matrix_kind, dtype=bool)
    gene = np.empty(matrix.nnz, dtype=np.int32)
    level = np.empty(matrix.nnz, dtype=np.uint8)
    indptr = np.zeros(cells + 1, dtype=np.int64)
    maximum = np.zeros(cells, dtype=np.float32)
    covered = np.zeros(cells, dtype=np.float32)
    data = np.ascontiguousarray(matrix.data, dtype=np.float32)
    columns = np.ascontiguousarray(columns, dtype=np.int32)
    inside = np.zeros(-(-len(columns) // 32) * 32, dtype=bool)
    inside[: len(columns)] = columns >= 0
    _bin_rows(
        data,
        data.view(np.uint32),
        matrix.indices.astype(np.int32, copy=False),
        matrix.indptr.astype(np.int64, copy=False),
        columns,
        np.packbits(inside, bitorder="little").view(np.uint32),
        genes,
        counts,
        np.zeros(0) if total is None else np.asarray(total, dtype=np.float64),
        float(target_sum),
        levels,
        gene,
        level,
        indptr[1:],
        maximum,
        covered,
    )
    used = int(indptr[-1])
    # Room was made for every entry; what is not used was never touched, but a view would keep it reserved.
    if used < matrix.nnz:
        gene, level = gene[:used].copy(), level[:used].copy()
    return GeneTokens(indptr, gene, level, maximum, covered)


def debin(
    indptr: np.ndarray, level: np.ndarray, *, covered: float = 1.0, levels: int = LEVELS, target_sum: float = TARGET_SUM
) -> np.ndarray:
    """Log1p values for binned words.

    A bin says which tenth of the cell's largest value a gene has, not how large that value is. The missing scale is
    fixed by what normalisation means: the vocabulary's genes of a cell hold ``covered × target_sum`` of its
    counts per 10,000. Each word gets its bin's middle times the scale that makes the sum come out.

    Parameters
    ----------
    indptr, level
        Ragged bins, as in :class:`GeneTokens`.
    covered
        Share of a cell's total that lies in the vocabulary (of the training cells, from the model's card).

    Returns
    -------
    numpy.ndarray
        float32, one log1p value per word.
    """
    fraction = (level.astype(np.float64) - 0.5) / levels
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    wanted = covered * target_sum
    low = np.zeros(len(indptr) - 1)
    high = np.full(len(indptr) - 1, 40.0)
    for _ in range(50):  # bisection: the sum grows with the scale
        scale = (low + high) / 2
        total = np.bincount(row, np.expm1(fraction * scale[row]), minlength=len(scale))
        high = np.where(total >= wanted, scale, high)
        low = np.where(total >= wanted, low, scale)
    return (fraction * high[row]).astype(np.float32)

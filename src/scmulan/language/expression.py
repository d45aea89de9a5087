"""Expression values become words: normalise, log1p, bin, in one compiled pass over a CSR matrix.

The published rule (scMulan release, ``scMulan.py``): counts per 10,000 of the whole cell, log1p, restricted to the
vocabulary's genes, zeros dropped; then ten bins of equal width between 0 and the cell's own largest value, each
open below and closed above, numbered 1…10.
"""

from dataclasses import dataclass

import numba
import numpy as np
import scipy.sparse as sp

LEVELS = 10
TARGET_SUM = 1e4


@dataclass(frozen=True)
class CellWords:
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


@numba.njit(nogil=True, inline="always")
def _level(x, step, levels):
    # ceil alone can be off by one where x lies on an edge: the edges are what numpy.linspace gives, in float64.
    level = int(np.ceil(x / step))
    while level > 1 and x <= (level - 1) * step:
        level -= 1
    while level < levels and x > level * step:
        level += 1
    return min(level, levels)


@numba.njit(nogil=True, inline="always")
def _sum(a, b, counts):
    return a + b if counts else np.log1p(np.expm1(a) + np.expm1(b))


@numba.njit(nogil=True, cache=True)
def _bin_rows(data, indices, indptr, columns, genes, counts, target_sum, levels, gene, level, length, maximum, covered):
    scratch = np.zeros(genes, dtype=np.float64)
    for row in range(len(indptr) - 1):
        total = 0.0
        inside = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            value = float(data[k])
            amount = value if counts else np.expm1(value)
            total += amount
            g = columns[indices[k]]
            if g >= 0:
                # One column per gene is the rule: its log1p value stays as it is, to the last bit.
                scratch[g] = value if scratch[g] == 0 else _sum(scratch[g], value, counts)
                inside += amount
        scale = target_sum / total if total > 0 else 1.0
        start = indptr[row]
        n = 0
        top = 0.0
        for g in range(genes):
            top = max(top, scratch[g])
        top = float(np.float32(np.log1p(top * scale) if counts else top))
        step = top / levels
        for g in range(genes):
            if scratch[g] > 0:
                x = float(np.float32(np.log1p(scratch[g] * scale) if counts else scratch[g]))
                gene[start + n] = g
                level[start + n] = _level(x, step, levels)
                n += 1
                scratch[g] = 0.0
        length[row] = n
        maximum[row] = top
        covered[row] = inside / total if total > 0 else 0.0


def tokenize(
    matrix: sp.csr_matrix,
    columns: np.ndarray,
    genes: int,
    *,
    state: str,
    levels: int = LEVELS,
    target_sum: float = TARGET_SUM,
) -> CellWords:
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
    state
        ``"counts"`` (normalised here to ``target_sum`` per cell over all input genes, then log1p) or ``"log1p"``.
    levels
        Number of bins.
    target_sum
        Total per cell after normalisation.

    Returns
    -------
    CellWords
    """
    if state not in ("counts", "log1p"):
        raise ValueError(f"state is {state!r}: expected 'counts' or 'log1p'")
    cells = matrix.shape[0]
    gene = np.empty(matrix.nnz, dtype=np.int32)
    level = np.empty(matrix.nnz, dtype=np.uint8)
    length = np.zeros(cells, dtype=np.int64)
    maximum = np.zeros(cells, dtype=np.float32)
    covered = np.zeros(cells, dtype=np.float32)
    indptr = matrix.indptr.astype(np.int64, copy=False)
    _bin_rows(
        matrix.data.astype(np.float32, copy=False),
        matrix.indices.astype(np.int32, copy=False),
        indptr,
        np.ascontiguousarray(columns, dtype=np.int32),
        genes,
        state == "counts",
        float(target_sum),
        levels,
        gene,
        level,
        length,
        maximum,
        covered,
    )
    out = np.zeros(cells + 1, dtype=np.int64)
    np.cumsum(length, out=out[1:])
    if out[-1] != matrix.nnz:
        keep = np.arange(matrix.nnz) - np.repeat(indptr[:-1], np.diff(indptr)) < np.repeat(length, np.diff(indptr))
        gene, level = gene[keep], level[keep]
    return CellWords(out, gene, level, maximum, covered)


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
        Ragged bins, as in :class:`CellWords`.
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

"""Tell from a sample of values whether a matrix holds counts, log1p values or something that cannot be used.

The judgement rests on what the published preparations leave behind: counts are whole numbers; counts that were
normalised are whole multiples of the smallest value of their cell; a complete normalised cell sums to the same total
as every other; a logarithm hides all this, and taking it back shows it again, which also tells the base.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

Kind = Literal["counts", "fractional counts", "normalised", "log1p", "empty", "scaled", "invalid"]

# Nothing measured in a cell reaches these: e^20 is 5·10^8 molecules of one gene, a million is what TPM sum to.
_LARGEST_LOGARITHM = 20.0
_LARGEST_TOTAL = 2e6
# Values that the tests of structure look at: enough to be sure, and quick.
_ENOUGH = 400_000
# Fewer pairs or values than this prove nothing.
_FEW = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a matrix holds, as far as a sample tells.

    Attributes
    ----------
    kind
        ``counts``, ``fractional counts`` and ``normalised`` (CPM, TPM) are usable as counts, ``log1p`` as it is,
        ``empty`` holds no value above zero, ``scaled`` and ``invalid`` cannot be used.
    why
        What in the values says so, for people.
    factor
        Values times this are natural ``log1p`` values: ln 2 for logarithms to base 2, otherwise 1.
    """

    kind: Kind
    why: str
    factor: float = 1.0

    @property
    def state(self) -> Literal["counts", "log1p"] | None:
        """``counts``, ``log1p``, or None if the matrix cannot be used."""
        if self.kind in ("scaled", "invalid"):
            return None
        return "log1p" if self.kind == "log1p" else "counts"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """A scale that values may be on; ``undo`` leads back to values in proportion to counts."""

    name: str
    base: float | None

    def undo(self, values: np.ndarray) -> np.ndarray:
        return values if self.base is None else np.expm1(values * math.log(self.base))


_PLAIN = _Scale(name="as they are", base=None)
_LOGARITHMS = (
    _Scale(name="natural", base=math.e),
    _Scale(name="base 2", base=2.0),
    _Scale(name="base 10", base=10.0),
)


def judge(sample: sp.csr_matrix) -> Verdict:
    """Judge what a matrix holds from some of its rows.

    Parameters
    ----------
    sample
        Cells × genes, in CSR without stored zeros; complete cells where possible.

    Returns
    -------
    Verdict
        Negative values make it ``scaled``, NaN and infinite ones ``invalid``.
    """
    values = np.asarray(sample.data, dtype=np.float64)
    if not values.size:
        return Verdict(kind="empty", why="no value above zero")
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return Verdict(kind="invalid", why="NaN or infinite values")
    if low < 0:
        return Verdict(kind="scaled", why=f"scaled values (below zero, from {low:.4g} to {high:.4g})")
    whole = _is_whole(values)
    if whole.all():
        return Verdict(kind="counts", why=f"whole numbers up to {high:,.0f}")
    return _judge_fractions(_enough_rows(sample), values, float(whole.mean()), high)


def _judge_fractions(rows: sp.csr_matrix, values: np.ndarray, whole: float, high: float) -> Verdict:
    """Judge non-negative values some of which (all but the share ``whole``) are not whole numbers."""
    scales = (_PLAIN, *_LOGARITHMS) if high <= _LARGEST_LOGARITHM else (_PLAIN,)
    hidden = next((scale for scale in scales[1:] if _hides_counts(values, scale)), None)
    if hidden:
        return _logarithm(hidden, "of counts that were not normalised")

    multiples = {scale: _share_of_multiples(rows, scale) for scale in scales}
    best = max(multiples, key=lambda scale: multiples[scale])
    if multiples[best] >= 0.9 and best is not _PLAIN:
        return _logarithm(best, "of normalised counts: taken back, whole multiples of each cell's smallest value")
    if whole > 0.5:
        return Verdict(kind="fractional counts", why=f"{whole:.0%} whole numbers, values up to {high:,.6g}")
    if multiples[best] >= 0.9:
        return Verdict(kind="normalised", why="not logged: whole multiples of each cell's smallest value")

    spread = {scale: _spread_of_totals(rows, scale) for scale in scales}
    best = min(spread, key=lambda scale: spread[scale][0])
    if spread[best][0] <= 0.01:
        total = f"{spread[best][1]:,.6g}"
        if best is _PLAIN:
            return Verdict(kind="normalised", why=f"not logged: every cell sums to {total}")
        return _logarithm(best, f"of normalised values: taken back, every cell sums to {total}")

    if high > _LARGEST_LOGARITHM:
        kind: Kind = "fractional counts" if whole > 0.05 else "normalised"
        return Verdict(kind=kind, why=f"not logged: values up to {high:,.6g}, too large for logarithms")
    if whole > 0.05:
        return Verdict(kind="fractional counts", why=f"{whole:.0%} whole numbers, values up to {high:,.6g}")
    largest = [float(_totals(rows, scale).max()) for scale in _LOGARITHMS[:2]]
    if largest[0] > _LARGEST_TOTAL >= largest[1]:
        return _logarithm(_LOGARITHMS[1], f"up to {high:.4g}: as natural ones a cell would hold {largest[0]:.2g}")
    return _logarithm(_LOGARITHMS[0], f"as hardly any value is whole and none is above {high:.4g}")


def _logarithm(scale: _Scale, why: str) -> Verdict:
    assert scale.base is not None
    name = "" if scale.base == math.e else f"to {scale.name}, brought to natural ones, "
    return Verdict(kind="log1p", why=f"logarithms {name}{why}", factor=math.log(scale.base))


def _is_whole(values: np.ndarray) -> np.ndarray:
    nearest = np.rint(values)
    return (nearest >= 1) & (np.abs(values - nearest) <= 1e-4)


def _enough_rows(sample: sp.csr_matrix) -> sp.csr_matrix:
    """Rows that are not empty, evenly thinned until they hold no more values than needed."""
    filled = sample[np.diff(sample.indptr) > 0]
    return filled[:: -(-filled.nnz // _ENOUGH)].astype(np.float64)


def _hides_counts(values: np.ndarray, scale: _Scale) -> bool:
    """Whether values are logarithms of whole numbers; log2(1 + 1) = 1 is whole itself and says nothing."""
    counts = scale.undo(values[~_is_whole(values)][:_ENOUGH])
    counts = counts[counts < 1000]
    return counts.size >= _FEW and bool(np.mean(np.abs(counts - np.rint(counts)) < 1e-3) >= 0.99)


def _share_of_multiples(rows: sp.csr_matrix, scale: _Scale) -> float:
    """Share of values that are whole multiples of the smallest one of their cell (only clear multiples count)."""
    values = scale.undo(rows.data)
    smallest = np.minimum.reduceat(values, rows.indptr[:-1])
    ratio = values / np.repeat(smallest, np.diff(rows.indptr))
    ratio = ratio[(ratio > 1.5) & (ratio < 50)]
    return float(np.mean(np.abs(ratio - np.rint(ratio)) < 0.01)) if ratio.size >= _FEW else 0.0


def _totals(rows: sp.csr_matrix, scale: _Scale) -> np.ndarray:
    return np.add.reduceat(scale.undo(rows.data), rows.indptr[:-1])


def _spread_of_totals(rows: sp.csr_matrix, scale: _Scale) -> tuple[float, float]:
    """Relative spread (infinite where too few cells tell) and median of the totals of cells."""
    totals = _totals(rows, scale)
    if totals.size < 10:
        return math.inf, math.nan
    return float(totals.std() / totals.mean()), float(np.median(totals))

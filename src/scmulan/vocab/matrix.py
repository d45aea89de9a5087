"""Choose the matrix of an AnnData that holds expression, and classify its values as counts or log1p.

Files in the wild keep counts in ``X``, in ``raw`` or in a layer, and often something that is no expression any more
(scaled values) in ``X``. The choice is made from the values, explained in one line, and can always be overruled.

Classification of a sample rests on what the published preparations leave behind: counts are whole numbers; normalised
counts are whole multiples of the smallest value of their cell; every complete normalised cell sums to the same total;
a logarithm hides all this, and undoing it shows it again, which also tells the base.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scmulan.errors import MatrixError
from scmulan.vocab.storage import LIMITS, ReadLimits, row_chunks, sample_rows

MatrixKind = Literal["counts", "log1p"]
"""Kind of the values of an input: counts, to be normalised and logged, or log1p values."""
ValueKind = Literal["counts", "fractional counts", "normalised", "log1p", "empty", "scaled", "invalid"]
"""What the values of a matrix look like, in finer classes."""

_COUNT_LAYERS = re.compile(r"(raw|umi|read|int|soupx|decontx|corrected)?(counts?|umis?|reads|raw)(raw)?")
# raw.X is preferred over everything else when it has so many times the genes of X, which then is a selection of genes.
_MANY_MORE_GENES = 1.25
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpressionMatrix:
    """Expression values of an AnnData, read in blocks of cells.

    Attributes
    ----------
    where
        Name: ``X``, ``raw.X`` or ``layers['NAME']``.
    matrix_kind
        ``counts`` (also fractional ones, CPM and TPM: to be normalised and logged) or ``log1p`` (used as it is).
    reason
        One line for people: why this matrix, and why this kind.
    var
        Genes of this matrix, (n_genes, ...); ``raw`` has its own.
    n_cells
        Number of rows.
    n_genes
        Number of columns.
    """

    where: str
    matrix_kind: MatrixKind
    reason: str
    var: pd.DataFrame = field(repr=False)
    n_cells: int
    n_genes: int
    _values: Any = field(repr=False)
    _cells: pd.Index = field(repr=False)
    _factor: float = field(repr=False, default=1.0)
    _limits: ReadLimits = field(repr=False, default=LIMITS)

    def chunks(
        self, size: int = 1024, *, select: Callable[[slice], bool] = lambda rows: True
    ) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """Yield the matrix as consecutive blocks of cells, in bounded memory wherever it lies.

        Parameters
        ----------
        size
            Cells per block; the last block may have fewer.
        select
            Whether to yield a block, given its rows (default: all).

        Yields
        ------
        tuple of slice and scipy.sparse.csr_matrix
            Rows of the block, and its values (cells, n_genes) as float32 with int32 indices that are sorted, and
            without duplicates or stored zeros. The block has its own memory.

        Raises
        ------
        MatrixError
            At the first value that is NaN, infinite or negative, naming its cell and gene.
        """
        for rows, block in row_chunks(self._values, size, select=select, limits=self._limits):
            bad = _first_bad(block)
            if bad:
                value, row, column = bad
                cell, gene = self._cells[rows.start + row], self.var.index[column]
                raise MatrixError(f"{self.where}: {value:g} in cell {cell!r}, gene {gene!r}; {_expected(value)}")
            csr = sp.csr_matrix(block, dtype=np.float32)
            csr.sum_duplicates()
            csr.eliminate_zeros()
            csr.indices = csr.indices.astype(np.int32, copy=False)
            csr.indptr = csr.indptr.astype(np.int32, copy=False)
            if self._factor != 1.0:
                csr.data *= np.float32(self._factor)
            yield rows, csr

    def read_amounts(self, columns: np.ndarray, n_genes: int, size: int = 4096) -> tuple[sp.csr_matrix, np.ndarray]:
        """Read all cells in the genes of a vocabulary; columns of one gene are summed, on counts.

        Parameters
        ----------
        columns
            int ``[n_genes of this matrix]``: index of each column's gene, or −1.
        n_genes
            Number of genes of the vocabulary.
        size
            Cells read at a time.

        Returns
        -------
        amounts : scipy.sparse.csr_matrix, float32 [cells, n_genes]
            Counts, or counts per 10,000 where the matrix is log1p. Genes of a cell are in no order.
        total : numpy.ndarray, float32 [cells]
            Sum over all columns.
        """
        to_genes = column_map(columns, n_genes)
        amounts, totals = [], []
        for _, block in self.chunks(size):
            if self.matrix_kind == "log1p":
                block.data = np.expm1(block.data)
            totals.append(np.asarray(block.sum(1)).ravel())
            amounts.append((block @ to_genes).tocsr())
        return sp.vstack(amounts, format="csr"), np.concatenate(totals)


def column_map(columns: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Return the 0/1 matrix ``[columns, n_genes]``, float32, by which a matrix is multiplied to sum columns by gene."""
    matched = np.flatnonzero(columns >= 0)
    ones = np.ones(len(matched), dtype=np.float32)
    return sp.csr_matrix((ones, (matched, columns[matched])), shape=(len(columns), n_genes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """Kind of the values of a matrix, as far as a sample tells.

    Attributes
    ----------
    kind
        ``counts``, ``fractional counts`` and ``normalised`` (CPM, TPM) are usable as counts, ``log1p`` as it is,
        ``empty`` holds no value above zero, ``scaled`` and ``invalid`` cannot be used.
    why
        What in the values tells, for people.
    factor
        Values times this are natural ``log1p`` values: ln 2 for logarithms to base 2, otherwise 1.
    """

    kind: ValueKind
    why: str
    factor: float = 1.0

    @property
    def matrix_kind(self) -> MatrixKind | None:
        """``counts``, ``log1p``, or None if the matrix cannot be used."""
        if self.kind in ("scaled", "invalid"):
            return None
        return "log1p" if self.kind == "log1p" else "counts"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A matrix that may be chosen; its values are fetched late, because those of a view are a copy."""

    where: str
    name: str
    var: pd.DataFrame
    fetch: Callable[[], Any]
    main: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finding:
    """A candidate and its classification; ``bad`` tells where the first unusable value is."""

    candidate: _Candidate
    content: Classification
    n_cells: int
    limits: ReadLimits
    bad: str = ""

    @property
    def text(self) -> str:
        return f"{self.candidate.where} holds {self.content.why}{self.bad}"


def choose_matrix(
    adata: AnnData,
    *,
    layer: str | None = None,
    matrix_kind: MatrixKind | None = None,
    limits: ReadLimits = LIMITS,
) -> ExpressionMatrix:
    """Choose the matrix that holds expression, and classify its values.

    Counts are preferred (a layer named like counts, ``X``, ``raw.X``), then log1p values (``X``, ``raw.X``), then any
    other layer. A ``raw.X`` with many more genes than ``X`` comes first, whether counts or log1p.

    Parameters
    ----------
    adata
        In memory or backed. It is not changed.
    layer
        The matrix to use: ``"X"``, ``"raw"`` or the name of a layer. By default it is chosen.
    matrix_kind
        Kind of the values: ``"counts"`` or ``"log1p"``. By default they are classified from some two thousand cells.
    limits
        Bounds of memory.

    Returns
    -------
    ExpressionMatrix
        The chosen matrix, with the reason of the choice.

    Raises
    ------
    MatrixError
        If there is no such matrix, no cell, or no matrix of values that are zero or above and finite.
    """
    if matrix_kind not in (None, "counts", "log1p"):
        raise MatrixError(f"matrix kind {matrix_kind!r} is not known: expected 'counts' or 'log1p'")
    candidates = _candidates(adata)
    if not adata.n_obs:
        raise MatrixError("the input has no cells (0 rows): nothing can be read from it")
    if not candidates:
        raise MatrixError("the input has no matrix (no X, no raw, no layers): expected counts or log1p values in X")
    if layer is not None:
        requested = _look(adata, _find(candidates, layer), limits)
        if requested.content.matrix_kind is None:
            rest = [_look(adata, other, limits) for other in candidates if other is not requested.candidate]
            raise MatrixError(_refusal([requested], rest))
        return _matrix(adata, requested, matrix_kind, "as asked")

    findings = [_look(adata, candidate, limits) for candidate in candidates if candidate.main]
    if not any(_fits(finding, matrix_kind) for finding in findings):
        findings += [_look(adata, candidate, limits) for candidate in candidates if not candidate.main]
    usable = [finding for finding in findings if finding.content.matrix_kind]
    if not usable:
        raise MatrixError(_refusal(findings, []))
    # Nothing looks like the requested kind: the user knows better, and means X if it can be.
    fitting = [finding for finding in usable if _fits(finding, matrix_kind)]
    if not fitting:
        fitting = [finding for finding in usable if finding.candidate.where == "X"] or usable
    best = min(fitting, key=lambda finding: _rank(finding, adata.n_vars))
    return _matrix(adata, best, matrix_kind, _why_not(best, findings))


def _candidates(adata: AnnData) -> list[_Candidate]:
    """List what may hold expression: layers named like counts, X, raw.X, other layers."""

    def layer(name: str, main: bool) -> _Candidate:
        return _Candidate(
            where=f"layers[{name!r}]", name=name, var=adata.var, fetch=lambda: adata.layers[name], main=main
        )

    counts = [name for name in adata.layers if _COUNT_LAYERS.fullmatch(re.sub(r"[\W_]", "", name.lower()))]
    found = [layer(name, True) for name in counts]
    if adata.X is not None:
        found.append(_Candidate(where="X", name="X", var=adata.var, fetch=lambda: adata.X, main=True))
    if adata.raw is not None:
        raw = adata.raw
        found.append(_Candidate(where="raw.X", name="raw", var=raw.var, fetch=lambda: raw.X, main=True))
    found += [layer(name, False) for name in adata.layers if name not in counts]
    return [candidate for candidate in found if len(candidate.var)]


def _find(candidates: list[_Candidate], layer: str) -> _Candidate:
    """Return the candidate of a name; ``X`` and ``raw`` win over layers of these names."""
    named = [candidate for candidate in candidates if layer in (candidate.where, candidate.name)]
    if not named:
        names = [candidate.name for candidate in candidates]
        close = difflib.get_close_matches(layer, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise MatrixError(f"the input has no matrix {layer!r}: there is {', '.join(map(repr, names))}{hint}")
    return min(named, key=lambda candidate: candidate.where not in ("X", "raw.X"))


def _look(adata: AnnData, candidate: _Candidate, limits: ReadLimits) -> _Finding:
    """Classify a candidate from a sample of its cells."""
    values = candidate.fetch()
    if values.dtype.kind not in "iufb":
        content = Classification(kind="invalid", why=f"values of type {values.dtype}, not numbers")
        return _Finding(candidate=candidate, content=content, n_cells=0, limits=limits)
    sample, rows, columns = sample_rows(values, limits)
    bad = _first_bad(sample)
    where = ""
    if bad:
        value, row, column = bad
        cell, gene = adata.obs_names[rows[row]], candidate.var.index[columns[column]]
        where = f" (first: {value:.4g} in cell {cell!r}, gene {gene!r})"
    return _Finding(candidate=candidate, content=classify(sample), n_cells=len(rows), limits=limits, bad=where)


def _fits(finding: _Finding, matrix_kind: MatrixKind | None) -> bool:
    """Return whether a matrix can be used, as the requested kind."""
    found = finding.content.matrix_kind
    return found is not None and finding.content.kind != "empty" and matrix_kind in (None, found)


def _rank(finding: _Finding, n_genes: int) -> int:
    """Return the rank among usable matrices, lowest first; equals keep the order of the candidates."""
    kind, candidate = finding.content.kind, finding.candidate
    if not candidate.main:
        # A layer of whole numbers with another name may be anything (spliced counts, bins): logarithms are clearer.
        return {"log1p": 4, "counts": 5}.get(kind, 6)
    many = len(candidate.var) > _MANY_MORE_GENES * n_genes
    if candidate.where == "raw.X" and many and kind in ("counts", "fractional counts", "log1p"):
        return 0
    return {"counts": 1, "fractional counts": 1, "log1p": 2}.get(kind, 3)


def _matrix(adata: AnnData, finding: _Finding, matrix_kind: MatrixKind | None, remark: str) -> ExpressionMatrix:
    candidate, content = finding.candidate, finding.content
    found = content.matrix_kind
    assert found is not None
    kind = f"{content.kind}, used as counts" if content.kind in ("fractional counts", "normalised") else found
    reason = f"{candidate.where}: {kind} ({content.why}; {finding.n_cells:,} of {adata.n_obs:,} cells looked at)"
    if matrix_kind not in (None, found):
        reason = (
            f"{candidate.where}: {matrix_kind}, as asked, although the values look like {content.kind} ({content.why})"
        )
    return ExpressionMatrix(
        where=candidate.where,
        matrix_kind=matrix_kind or found,
        reason=f"{reason}; {remark}" if remark else reason,
        var=candidate.var,
        n_cells=adata.n_obs,
        n_genes=len(candidate.var),
        _values=candidate.fetch(),
        _cells=adata.obs_names,
        _factor=content.factor if matrix_kind is None else 1.0,
        _limits=finding.limits,
    )


def _why_not(best: _Finding, findings: list[_Finding]) -> str:
    """Explain why matrices that a user may expect were not used."""
    remarks = []
    for other in findings:
        if other.content.matrix_kind is None:
            remarks.append(f"{other.candidate.where} not used: {other.content.why}")
        elif other.content.kind != "empty" and len(best.candidate.var) > _MANY_MORE_GENES * len(other.candidate.var):
            where, fewer = other.candidate.where, len(other.candidate.var)
            remarks.append(f"{where} ({other.content.kind}) has {fewer:,} genes, raw.X {len(best.candidate.var):,}")
    return "; ".join(remarks)


def _refusal(findings: list[_Finding], others: list[_Finding]) -> str:
    """Return one line on matrices that cannot be used, and the way out."""
    problem = "; ".join(finding.text for finding in findings)
    usable = [other for other in others if other.content.matrix_kind]
    if usable:
        ways = " or ".join(f"layer={other.candidate.name!r} ({other.content.kind})" for other in usable)
        return f"{problem}. Expected counts or log1p values: use {ways}"
    way_out = "replace such values, or drop their cells or genes, first"
    if any(finding.content.kind == "scaled" for finding in findings):
        way_out = "keep the values from before scaling in adata.raw or in a layer"
    return f"{problem}. Expected counts or log1p values, zero or above and finite: {way_out}"


def _first_bad(block: sp.csr_matrix) -> tuple[float, int, int] | None:
    """Return value, row and column of the first value that is NaN, infinite (also as float32) or negative."""
    if not block.nnz or (block.data.min() >= 0 and block.data.max() <= _MAX_FLOAT32):
        return None
    at = int(np.flatnonzero(~((block.data >= 0) & (block.data <= _MAX_FLOAT32)))[0])
    row = int(np.searchsorted(block.indptr, at, side="right")) - 1
    return float(block.data[at]), row, int(block.indices[at])


def _expected(value: float) -> str:
    if value < 0 and np.isfinite(value):
        return "counts and log1p values are never negative: use the values from before scaling (another layer, or raw)"
    return "expected finite values: replace such values, or drop their cells or genes, first"


# Nothing measured in a cell reaches these: e^20 is 5·10^8 molecules of one gene, a million is what TPM sum to.
_MAX_LOGARITHM = 20.0
_MAX_TOTAL = 2e6
# Values that the tests of structure look at: enough to be sure, and quick.
_MAX_TESTED_VALUES = 400_000
# Fewer pairs or values than this prove nothing.
_MIN_TESTED_VALUES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """A scale that values may be on; ``undo`` gives values in proportion to counts."""

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


def classify(sample: sp.csr_matrix) -> Classification:
    """Classify the values of a matrix from some of its rows.

    Parameters
    ----------
    sample
        CSR ``[cells, genes]`` without stored zeros; complete cells where possible.

    Returns
    -------
    Classification
        Negative values make it ``scaled``, NaN and infinite ones ``invalid``.
    """
    values = np.asarray(sample.data, dtype=np.float64)
    if not values.size:
        return Classification(kind="empty", why="no value above zero")
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return Classification(kind="invalid", why="NaN or infinite values")
    if low < 0:
        return Classification(kind="scaled", why=f"scaled values (below zero, from {low:.4g} to {high:.4g})")
    whole = _is_whole(values)
    if whole.all():
        return Classification(kind="counts", why=f"whole numbers up to {high:,.0f}")
    return _classify_fractions(_enough_rows(sample), values, float(whole.mean()), high)


def _classify_fractions(rows: sp.csr_matrix, values: np.ndarray, whole: float, high: float) -> Classification:
    """Classify non-negative values of which a fraction ``whole`` are whole numbers."""
    scales = (_PLAIN, *_LOGARITHMS) if high <= _MAX_LOGARITHM else (_PLAIN,)
    hidden = next((scale for scale in scales[1:] if _hides_counts(values, scale)), None)
    if hidden:
        return _logarithm(hidden, "of counts that were not normalised")

    multiples = {scale: _fraction_of_multiples(rows, scale) for scale in scales}
    best = max(multiples, key=lambda scale: multiples[scale])
    if multiples[best] >= 0.9 and best is not _PLAIN:
        return _logarithm(best, "of normalised counts: taken back, whole multiples of each cell's smallest value")
    if whole > 0.5:
        return Classification(kind="fractional counts", why=f"{whole:.0%} whole numbers, values up to {high:,.6g}")
    if multiples[best] >= 0.9:
        return Classification(kind="normalised", why="not logged: whole multiples of each cell's smallest value")

    spread = {scale: _spread_of_totals(rows, scale) for scale in scales}
    best = min(spread, key=lambda scale: spread[scale][0])
    if spread[best][0] <= 0.01:
        total = f"{spread[best][1]:,.6g}"
        if best is _PLAIN:
            return Classification(kind="normalised", why=f"not logged: every cell sums to {total}")
        return _logarithm(best, f"of normalised values: taken back, every cell sums to {total}")

    if high > _MAX_LOGARITHM:
        kind: ValueKind = "fractional counts" if whole > 0.05 else "normalised"
        return Classification(kind=kind, why=f"not logged: values up to {high:,.6g}, too large for logarithms")
    if whole > 0.05:
        return Classification(kind="fractional counts", why=f"{whole:.0%} whole numbers, values up to {high:,.6g}")
    largest = [float(_totals(rows, scale).max()) for scale in _LOGARITHMS[:2]]
    if largest[0] > _MAX_TOTAL >= largest[1]:
        return _logarithm(_LOGARITHMS[1], f"up to {high:.4g}: as natural ones a cell would hold {largest[0]:.2g}")
    return _logarithm(_LOGARITHMS[0], f"as hardly any value is whole and none is above {high:.4g}")


def _logarithm(scale: _Scale, why: str) -> Classification:
    assert scale.base is not None
    name = "" if scale.base == math.e else f"to {scale.name}, brought to natural ones, "
    return Classification(kind="log1p", why=f"logarithms {name}{why}", factor=math.log(scale.base))


def _is_whole(values: np.ndarray) -> np.ndarray:
    nearest = np.rint(values)
    return (nearest >= 1) & (np.abs(values - nearest) <= 1e-4)


def _enough_rows(sample: sp.csr_matrix) -> sp.csr_matrix:
    """Return evenly spaced rows that are not empty, with no more values than needed."""
    filled = sample[np.diff(sample.indptr) > 0]
    return filled[:: -(-filled.nnz // _MAX_TESTED_VALUES)].astype(np.float64)


def _hides_counts(values: np.ndarray, scale: _Scale) -> bool:
    """Return whether values are logarithms of whole numbers; log2(1 + 1) = 1 is whole itself and tells nothing."""
    counts = scale.undo(values[~_is_whole(values)][:_MAX_TESTED_VALUES])
    counts = counts[counts < 1000]
    return counts.size >= _MIN_TESTED_VALUES and bool(np.mean(np.abs(counts - np.rint(counts)) < 1e-3) >= 0.99)


def _fraction_of_multiples(rows: sp.csr_matrix, scale: _Scale) -> float:
    """Return the fraction of values that are whole multiples of their cell's smallest (of clear multiples only)."""
    values = scale.undo(rows.data)
    smallest = np.minimum.reduceat(values, rows.indptr[:-1])
    ratio = values / np.repeat(smallest, np.diff(rows.indptr))
    ratio = ratio[(ratio > 1.5) & (ratio < 50)]
    return float(np.mean(np.abs(ratio - np.rint(ratio)) < 0.01)) if ratio.size >= _MIN_TESTED_VALUES else 0.0


def _totals(rows: sp.csr_matrix, scale: _Scale) -> np.ndarray:
    return np.add.reduceat(scale.undo(rows.data), rows.indptr[:-1])


def _spread_of_totals(rows: sp.csr_matrix, scale: _Scale) -> tuple[float, float]:
    """Return relative spread (infinite for too few cells) and median of the totals of cells."""
    totals = _totals(rows, scale)
    if totals.size < 10:
        return math.inf, math.nan
    return float(totals.std() / totals.mean()), float(np.median(totals))

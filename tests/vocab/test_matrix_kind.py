"""What values say about themselves, on real cells brought to every scale that files in the wild use."""

import math

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.vocab.matrix import classify


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    """UMI counts of 700 PBMC, taken back from their normalised values."""
    values = sp.csr_matrix(sc.datasets.pbmc68k_reduced().raw.X, dtype=np.float64)
    values.data = np.expm1(values.data)
    smallest = np.minimum.reduceat(values.data, values.indptr[:-1])
    values.data = np.rint(values.data / np.repeat(smallest, np.diff(values.indptr)))
    return values


def normalised(counts: sp.csr_matrix, total: float, depth: np.ndarray | None = None) -> sp.csr_matrix:
    depth = np.ravel(counts.sum(axis=1)) if depth is None else depth
    return sp.csr_matrix(sp.diags(total / depth) @ counts)


def mapped(values: sp.csr_matrix, function) -> sp.csr_matrix:
    return sp.csr_matrix((function(values.data).astype(np.float32), values.indices, values.indptr), values.shape)


def continuous(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Values like those of full-length reads per length of transcript: no whole multiples, no common total."""
    rng = np.random.default_rng(0)
    return mapped(counts, lambda v: v * rng.lognormal(3, 1.0, v.size))


def test_whole_numbers_are_counts_in_every_type(counts):
    for dtype in (np.float32, np.float64, np.int32, np.uint16, np.int64):
        assert classify(counts.astype(dtype)).kind == "counts"
    assert classify(counts > 0).kind == "counts"


def test_counts_that_went_through_a_logarithm_and_back_are_counts(counts):
    assert classify(mapped(mapped(counts, np.log1p), np.expm1)).kind == "counts"


@pytest.mark.parametrize("total", [1e4, 1e6, 2345.0])
@pytest.mark.parametrize("base", [math.e, 2.0, 10.0])
def test_logarithms_of_normalised_counts_and_their_base(counts, total, base):
    values = mapped(normalised(counts, total), lambda v: np.log1p(v) / math.log(base))
    found = classify(values)
    assert found.kind == found.matrix_kind == "log1p"
    assert found.factor == pytest.approx(math.log(base))
    assert "normalised counts" in found.why


@settings(max_examples=30, deadline=None)
@given(
    total=st.floats(100, 2e6),
    fraction=st.floats(0.05, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_normalisation_of_any_selection_of_genes_is_log1p(counts, total, fraction, seed):
    rng = np.random.default_rng(seed)
    genes = rng.permutation(counts.shape[1])[: max(int(fraction * counts.shape[1]), 40)]
    depth = np.ravel(counts.sum(axis=1)) * rng.uniform(1, 5, counts.shape[0])
    found = classify(mapped(normalised(counts, total, depth)[:, genes], np.log1p))
    assert found.kind == "log1p"
    assert found.factor == 1


def test_logarithms_of_plain_counts(counts):
    natural, binary = classify(mapped(counts, np.log1p)), classify(mapped(counts, lambda v: np.log2(1 + v)))
    assert natural.kind == binary.kind == "log1p"
    assert "not normalised" in natural.why
    assert (natural.factor, binary.factor) == (1, pytest.approx(math.log(2)))


def test_normalised_but_not_logged(counts):
    for total in (1e4, 1e6):
        found = classify(mapped(normalised(counts, total), lambda v: v))
        assert (found.kind, found.matrix_kind) == ("normalised", "counts")
    tpm = normalised(continuous(counts), 1e6)
    assert classify(tpm).kind == "normalised"
    assert "sums to 1e+06" in classify(tpm).why


@pytest.mark.parametrize("base", [math.e, 2.0])
def test_logarithms_of_tpm_are_known_by_the_total_of_cells(counts, base):
    found = classify(mapped(normalised(continuous(counts), 1e6), lambda v: np.log1p(v) / math.log(base)))
    assert (found.kind, found.factor) == ("log1p", pytest.approx(math.log(base)))
    assert "every cell sums to 1e+06" in found.why


def test_a_small_normalised_total_is_told_from_logarithms_by_the_totals(counts):
    """Proportions are far below any limit for logarithms."""
    found = classify(normalised(continuous(counts), 1.0))
    assert (found.kind, found.matrix_kind) == ("normalised", "counts")


def test_continuous_values_logged_and_not(counts):
    values = continuous(counts)
    assert classify(values).matrix_kind == "counts"
    assert "too large for logarithms" in classify(values).why
    assert classify(mapped(values, np.log1p)).kind == "log1p"


def test_natural_logarithms_beyond_a_million_molecules_are_to_base_two(counts):
    tpm = normalised(continuous(counts), 1e6)
    # Drop genes, so that no total gives the base away.
    tpm = tpm[:, np.random.default_rng(1).random(tpm.shape[1]) < 0.7]
    found = classify(mapped(tpm, lambda v: np.log2(1 + v)))
    assert found.factor == pytest.approx(math.log(2))
    assert classify(mapped(tpm, np.log1p)).factor == 1


def test_fractional_counts(counts):
    """As ambient RNA is taken away, or reads are shared among genes: some counts keep whole, small ones too."""
    rng = np.random.default_rng(0)
    corrected = mapped(counts, lambda v: np.where(rng.random(v.size) < 0.3, v * rng.uniform(0.2, 1, v.size), v))
    for values in (corrected, corrected[:, np.ravel(corrected.max(axis=0).toarray()) < 15]):
        assert (classify(values).kind, classify(values).matrix_kind) == ("fractional counts", "counts")


def test_hardly_fractional_counts_are_not_mistaken_for_normalised_ones(counts):
    """Most values are whole multiples of the smallest there too, which then is 1."""
    rng = np.random.default_rng(0)
    values = mapped(counts, lambda v: np.where(rng.random(v.size) < 0.02, v * rng.uniform(1, 1.5, v.size), v))
    assert classify(values).kind == "fractional counts"


def test_mostly_fractional_small_counts(counts):
    """Nothing is large and few values are whole, but logarithms are hardly ever whole."""
    rng = np.random.default_rng(0)
    values = mapped(counts, lambda v: np.where(rng.random(v.size) < 0.8, v * rng.uniform(0.2, 1, v.size), v))
    small = values[:, np.ravel(values.max(axis=0).toarray()) < 15]
    assert (classify(small).kind, classify(small).matrix_kind) == ("fractional counts", "counts")


def test_below_zero_is_scaled_and_nan_is_invalid(counts):
    scaled = classify(sp.csr_matrix(sc.datasets.pbmc68k_reduced().X))
    assert (scaled.kind, scaled.matrix_kind) == ("scaled", None)
    assert "-2.032" in scaled.why
    for bad in (np.nan, np.inf):
        values = counts.copy()
        values.data[1234] = bad
        assert (classify(values).kind, classify(values).matrix_kind) == ("invalid", None)


def test_nothing_above_zero(counts):
    assert classify(sp.csr_matrix((5, 7))).kind == "empty"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
def test_any_small_matrix_is_classified(rows):
    """Also where a handful of values proves nothing, and cells are empty."""
    values = sp.csr_matrix(np.array(rows))
    found = classify(values)
    assert found.matrix_kind in ("counts", "log1p")
    assert found.why

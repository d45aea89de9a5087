import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.language.expression import debin, tokenize


def dense_words(x: np.ndarray, columns: np.ndarray, genes: int, state: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The published rule, cell by cell and dense: normalise, log1p, subset, digitise by the cell's own maximum."""
    out = []
    for row in x.astype(np.float64):
        amount = row if state == "counts" else np.expm1(row)
        folded = np.zeros(genes)
        np.add.at(folded, columns[columns >= 0], amount[columns >= 0])
        if state == "counts":
            folded = folded * 1e4 / max(amount.sum(), 1e-300)
        values = np.log1p(folded).astype(np.float32)
        edges = np.linspace(0, values.max(), 11)
        out.append((np.flatnonzero(values > 0), np.digitize(values[values > 0], edges, right=True)))
    return out


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["counts", "log1p"]))
def test_one_pass_over_csr_is_the_dense_rule(seed, state):
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.7, (5, 30)).astype(np.float32)
    x[rng.integers(5)] = 0  # an all-zero cell
    columns = rng.permutation(np.concatenate([np.arange(12), np.full(10, -1), rng.integers(0, 12, 8)])).astype(np.int32)
    if state == "log1p":
        x = np.log1p(x)
    words = tokenize(sp.csr_matrix(x), columns, 12, state=state)
    for i, (gene, level) in enumerate(dense_words(x, columns, 12, state)):
        part = slice(words.indptr[i], words.indptr[i + 1])
        assert np.array_equal(words.gene[part], gene)
        # Sums of duplicated log1p columns may differ in the last bit, which an edge can turn into one bin.
        assert np.abs(words.level[part].astype(int) - level).max(initial=0) <= (state == "log1p")


def test_bins_are_open_below_and_closed_above():
    x = sp.csr_matrix(np.array([[1.0, 0.1, 0.2, 0.30001, 0.95, 0.0]], dtype=np.float32))
    words = tokenize(x, np.arange(6, dtype=np.int32), 6, state="log1p")
    assert words.gene.tolist() == [0, 1, 2, 3, 4]
    assert words.level.tolist() == [10, 2, 3, 4, 10]  # float32(0.1) lies just above the edge 0.1 of float64
    assert words.maximum[0] == 1.0


def test_published_prompts_come_out_to_the_word(shared):
    for name in ("parity_nobias", "parity_bias"):
        z = np.load(shared / "reference" / f"{name}.npz")
        words = tokenize(sp.csr_matrix(z["expression"]), np.arange(2000, dtype=np.int32), 2000, state="log1p")
        for i, ids in enumerate(z["prompt_ids"]):
            n = int((ids >= 0).sum()) - 1
            part = slice(words.indptr[i], words.indptr[i + 1])
            assert np.array_equal(words.gene[part][::-1] + 1, ids[:n])
            assert np.array_equal(words.level[part][::-1], z["prompt_values"][i][:n])


def test_duplicates_are_summed_on_counts_and_total_counts_all_genes():
    x = sp.csr_matrix(np.array([[3.0, 1.0, 4.0, 92.0]], dtype=np.float32))
    words = tokenize(x, np.array([0, 0, 1, -1], dtype=np.int32), 2, state="counts")
    assert words.level.tolist() == [10, 10] and words.covered[0] == pytest.approx(0.08)
    assert words.maximum[0] == pytest.approx(np.log1p(400), rel=1e-6)


def test_unknown_state_is_refused():
    with pytest.raises(ValueError, match="'counts' or 'log1p'"):
        tokenize(sp.csr_matrix((1, 1), dtype=np.float32), np.zeros(1, np.int32), 1, state="cpm")


def test_debinned_cells_have_the_total_that_normalisation_gives():
    level = np.array([10, 3, 1, 7, 7], dtype=np.uint8)
    indptr = np.array([0, 3, 3, 5])
    values = debin(indptr, level, covered=0.4)
    assert values.dtype == np.float32
    assert np.expm1(values[:3].astype(float)).sum() == pytest.approx(4000, rel=1e-3)
    assert np.expm1(values[3:].astype(float)).sum() == pytest.approx(4000, rel=1e-3)
    assert values[0] / values[1] == pytest.approx(9.5 / 2.5, rel=1e-5)


def test_debinned_bins_bin_again_to_themselves():
    rng = np.random.default_rng(0)
    level = np.concatenate([[10], rng.integers(1, 10, 40)]).astype(np.uint8)
    values = debin(np.array([0, 41]), level)
    words = tokenize(sp.csr_matrix(values[None]), np.arange(41, dtype=np.int32), 41, state="log1p")
    # The top word stands at 9.5 tenths of the scale: bins are relative to it, so they may move up by one, in order.
    assert np.all(words.level >= level) and np.all(words.level - level <= 1)

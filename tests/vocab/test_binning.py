"""Gene tokens are those of the published rule, whatever way through the compiled pass a cell takes."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.benchmarks.tokenize import VOCABULARY, as_released, same_tokens, synthetic_cells, with_scipy
from scmulan.vocab.binning import debin, log1p_normalised, sum_whole, tokenize


def dense_tokens(
    x: np.ndarray, columns: np.ndarray, genes: int, matrix_kind: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The published rule, cell by cell and dense: normalise, log1p, subset, digitise by the cell's own maximum."""
    out = []
    for row in x.astype(np.float64):
        amount = row if matrix_kind == "counts" else np.expm1(row)
        folded = np.zeros(genes)
        np.add.at(folded, columns[columns >= 0], amount[columns >= 0])
        if matrix_kind == "counts":
            folded = folded * 1e4 / max(amount.sum(), 1e-300)
        values = np.log1p(folded).astype(np.float32)
        edges = np.linspace(0, values.max(), 11)
        out.append((np.flatnonzero(values > 0), np.digitize(values[values > 0], edges, right=True)))
    return out


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["counts", "log1p"]))
def test_one_pass_over_csr_is_the_dense_rule(seed, matrix_kind):
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.7, (5, 30)).astype(np.float32)
    x[rng.integers(5)] = 0  # an all-zero cell
    columns = rng.permutation(np.concatenate([np.arange(12), np.full(10, -1), rng.integers(0, 12, 8)])).astype(np.int32)
    if matrix_kind == "log1p":
        x = np.log1p(x)
    tokens = tokenize(sp.csr_matrix(x), columns, 12, matrix_kind=matrix_kind)
    for i, (gene, level) in enumerate(dense_tokens(x, columns, 12, matrix_kind)):
        part = slice(tokens.indptr[i], tokens.indptr[i + 1])
        assert np.array_equal(tokens.gene[part], gene)
        # Sums of duplicated log1p columns may differ in the last bit, which an edge can turn into one bin.
        assert np.abs(tokens.level[part].astype(int) - level).max(initial=0) <= (matrix_kind == "log1p")


def test_bins_are_open_below_and_closed_above():
    x = sp.csr_matrix(np.array([[1.0, 0.1, 0.2, 0.30001, 0.95, 0.0]], dtype=np.float32))
    tokens = tokenize(x, np.arange(6, dtype=np.int32), 6, matrix_kind="log1p")
    assert tokens.gene.tolist() == [0, 1, 2, 3, 4]
    assert tokens.level.tolist() == [10, 2, 3, 4, 10]  # float32(0.1) lies just above the edge 0.1 of float64
    assert tokens.maximum[0] == 1.0


def test_published_prompts_come_out_to_the_token(shared):
    for name in ("parity_nobias", "parity_bias"):
        z = np.load(shared / "reference" / f"{name}.npz")
        tokens = tokenize(sp.csr_matrix(z["expression"]), np.arange(2000, dtype=np.int32), 2000, matrix_kind="log1p")
        for i, ids in enumerate(z["prompt_ids"]):
            n = int((ids >= 0).sum()) - 1
            part = slice(tokens.indptr[i], tokens.indptr[i + 1])
            assert np.array_equal(tokens.gene[part][::-1] + 1, ids[:n])
            assert np.array_equal(tokens.level[part][::-1], z["prompt_values"][i][:n])


def test_duplicates_are_summed_on_counts_and_total_counts_all_genes():
    x = sp.csr_matrix(np.array([[3.0, 1.0, 4.0, 92.0]], dtype=np.float32))
    tokens = tokenize(x, np.array([0, 0, 1, -1], dtype=np.int32), 2, matrix_kind="counts")
    assert tokens.level.tolist() == [10, 10] and tokens.covered[0] == pytest.approx(0.08)
    assert tokens.maximum[0] == pytest.approx(np.log1p(400), rel=1e-6)


def plain_tokens(x, columns, genes, matrix_kind, total=None):
    """The rule for one cell, entry by entry: what the compiled pass has to give to the last bit."""
    values, amounts = {}, []
    for column in np.flatnonzero(x):
        value = float(np.float32(x[column]))
        amounts.append(value if matrix_kind == "counts" else np.expm1(value))
        gene = columns[column]
        if gene >= 0 and matrix_kind == "counts":
            values[gene] = values.get(gene, 0.0) + value
        elif gene >= 0:
            values[gene] = value if gene not in values else np.log1p(np.expm1(values[gene]) + np.expm1(value))
    total = float(np.add.accumulate(amounts)[-1]) if total is None else float(total)
    scale = 1e4 / total if matrix_kind == "counts" else 1.0
    logs = {g: np.float32(np.log1p(v * scale) if matrix_kind == "counts" else v) for g, v in values.items()}
    found = sorted(logs)
    edges = np.linspace(0, float(max(logs.values())), 11)
    return found, np.digitize([float(logs[g]) for g in found], edges, right=True).clip(max=10).tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["counts", "log1p"]),
    st.sampled_from(["whole", "fractions", "reads"]),
    st.sampled_from(["ascending", "permuted", "duplicates"]),
    st.booleans(),
)
def test_every_way_through_the_pass_gives_the_rule_to_the_last_bit(seed, matrix_kind, kind, order, known):
    """Whole and other amounts, columns in and out of order, duplicates on counts, totals given; 200 genes."""
    rng = np.random.default_rng(seed)
    columns = np.full(500, -1, dtype=np.int32)
    inside = np.sort(rng.choice(500, 200, replace=False))
    columns[inside] = np.arange(200) if order == "ascending" else rng.permutation(200)
    if order == "duplicates" and matrix_kind == "counts":
        columns[inside[::3]] = columns[inside[0]]
    x = rng.poisson(rng.gamma(0.4, 3.0, (4, 500))).astype(np.float32)
    x[:, inside[:2]] += 1
    if kind == "fractions":
        x *= rng.uniform(0.1, 3.0, x.shape).astype(np.float32)
    elif kind == "reads":
        x *= rng.integers(1, 10**6, x.shape).astype(np.float32)
    if matrix_kind == "log1p":
        x = np.log1p(x * np.float32(0.37)).astype(np.float32)
    total = rng.uniform(500, 5000, 4).astype(np.float32) if known else None
    matrix = sp.csr_matrix(x)
    tokens = tokenize(matrix, columns, 200, matrix_kind=matrix_kind, total=total)
    mixed = tokenize(matrix, columns, 200, matrix_kind=np.full(4, matrix_kind == "log1p"), total=total)
    for i in range(4):
        part = slice(tokens.indptr[i], tokens.indptr[i + 1])
        gene, level = plain_tokens(x[i], columns, 200, matrix_kind, None if total is None else total[i])
        assert tokens.gene[part].tolist() == gene
        assert tokens.level[part].tolist() == level
    assert np.array_equal(mixed.gene, tokens.gene) and np.array_equal(mixed.level, tokens.level)


def test_values_on_an_edge_belong_to_the_bin_below():
    """Also where rounding of value / step would say otherwise."""
    steps = np.arange(1, 400, dtype=np.float32)
    edges = steps[:, None] * np.arange(1, 11, dtype=np.float32)
    for power in (1, 1 / 1024):  # exact in float32
        tokens = tokenize(
            sp.csr_matrix(edges * np.float32(power)),
            np.arange(10, dtype=np.int32),
            10,
            matrix_kind="log1p",
            total=steps,
        )
        assert np.array_equal(tokens.level.reshape(-1, 10), np.tile(np.arange(1, 11), (len(steps), 1)))


def test_only_whole_counts_may_be_added_in_any_order():
    assert sum_whole(np.array([1, 2, 60_000, 0, 2**31], dtype=np.float32)) == (60_003.0 + 2**31, True)
    for other in (0.5, 1e-8, 1e20):
        assert not sum_whole(np.array([1, 2, other, 4], dtype=np.float32))[1]


def test_scipy_and_the_published_way_come_to_the_same_tokens():
    matrix, columns = synthetic_cells(40)
    tokens = tokenize(matrix, columns, VOCABULARY, matrix_kind="counts")
    for other in (
        with_scipy(matrix, columns, VOCABULARY),
        with_scipy(matrix, columns, VOCABULARY, subset_first=True),
        as_released(matrix, columns, VOCABULARY),
    ):
        assert same_tokens(tokens, other)
    tokens.level[3] += 1
    assert not same_tokens(tokens, other)


def test_unsorted_entries_and_stored_zeros_are_no_matter():
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.0, (6, 300)).astype(np.float32)
    columns = np.arange(300, dtype=np.int32)
    plain = sp.csr_matrix(dense)
    data, indices = [], []
    for row in dense:
        entries = rng.permutation(300)
        data.append(row[entries])
        indices.append(entries)
    shuffled = sp.csr_matrix((np.concatenate(data), np.concatenate(indices), np.arange(0, 1801, 300)), shape=(6, 300))
    assert shuffled.nnz == 1800 and not shuffled.has_sorted_indices
    one, two = (tokenize(m, columns, 300, matrix_kind="counts") for m in (plain, shuffled))
    for name in ("indptr", "gene", "level", "maximum", "covered"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_cells_with_every_gene_and_with_none():
    big = sp.random(1, 2000, density=1.0, format="csr", random_state=0, dtype=np.float32)
    matrix = sp.vstack([sp.csr_matrix((1, 2000), dtype=np.float32), big, sp.csr_matrix((1, 2000), dtype=np.float32)])
    tokens = tokenize(matrix.tocsr(), np.arange(2000, dtype=np.int32), 2000, matrix_kind="log1p")
    assert tokens.lengths.tolist() == [0, big.nnz, 0]
    assert tokens.maximum[0] == 0 and tokens.covered.tolist() == pytest.approx([0, 1, 0])


def test_an_unknown_matrix_kind_is_refused():
    with pytest.raises(ValueError, match="'counts' or 'log1p'"):
        tokenize(sp.csr_matrix((1, 1), dtype=np.float32), np.zeros(1, np.int32), 1, matrix_kind="cpm")


def test_counts_are_scaled_to_ten_thousand_and_logged():
    matrix = sp.csr_matrix(np.array([[3.0, 0, 1], [0, 0, 0], [0, 5, 0]], dtype=np.float32))
    found = log1p_normalised(matrix.data, matrix.indptr, np.array([4.0, 0.0, 500.0], dtype=np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log1p([7500, 2500, 100]), rtol=1e-6)


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
    tokens = tokenize(sp.csr_matrix(values[None]), np.arange(41, dtype=np.int32), 41, matrix_kind="log1p")
    # The top gene stands at 9.5 tenths of the scale: bins are relative to it, so they may move up by one, in order.
    assert np.all(tokens.level >= level) and np.all(tokens.level - level <= 1)

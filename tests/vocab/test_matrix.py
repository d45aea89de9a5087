"""Which matrix is chosen, and what is streamed from it."""

import gc
import tracemalloc

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan._io.adata import open_input
from scmulan.errors import MatrixError
from scmulan.vocab.matrix import choose_matrix
from scmulan.vocab.storage import ReadLimits


@pytest.fixture
def pbmc() -> ad.AnnData:
    """700 PBMC as scanpy ships them: X is scaled, raw holds log1p of normalised counts."""
    return sc.datasets.pbmc68k_reduced()


@pytest.fixture
def log1p(pbmc) -> sp.csr_matrix:
    return sp.csr_matrix(pbmc.raw.X)


@pytest.fixture
def counts(log1p) -> sp.csr_matrix:
    """UMI counts, taken back from the normalised values."""
    values = np.expm1(log1p.data.astype(np.float64))
    smallest = np.minimum.reduceat(values, log1p.indptr[:-1])
    whole = np.rint(values / np.repeat(smallest, np.diff(log1p.indptr)))
    return sp.csr_matrix((whole.astype(np.float32), log1p.indices, log1p.indptr), log1p.shape)


def annotated(x, pbmc, **layers) -> ad.AnnData:
    """Build an AnnData of these values with the names of the cells and genes."""
    return ad.AnnData(
        x, obs=pd.DataFrame(index=pbmc.obs_names), var=pd.DataFrame(index=pbmc.var_names), layers=layers or None
    )


def whole(matrix) -> np.ndarray:
    return np.vstack([block.toarray() for _, block in matrix.chunks(100)])


# ---- the choice


def test_scaled_x_is_left_for_raw_and_that_is_said(pbmc, log1p):
    matrix = choose_matrix(pbmc)
    assert (matrix.where, matrix.matrix_kind) == ("raw.X", "log1p")
    assert matrix.reason.startswith("raw.X: log1p (logarithms of normalised counts")
    assert "700 of 700 cells" in matrix.reason
    assert "X not used: scaled values (below zero, from -2.032 to 28.41)" in matrix.reason
    assert "\n" not in matrix.reason
    assert matrix.var is pbmc.raw.var or matrix.var.equals(pbmc.raw.var)
    assert (matrix.n_cells, matrix.n_genes) == (700, 765)
    np.testing.assert_array_equal(whole(matrix), log1p.toarray())


def test_counts_come_before_log1p_wherever_they_are(pbmc, log1p, counts):
    assert choose_matrix(annotated(counts, pbmc, lognorm=log1p)).where == "X"
    assert choose_matrix(annotated(log1p, pbmc, counts=counts)).where == "layers['counts']"
    both = annotated(counts, pbmc, raw_counts=counts)
    assert choose_matrix(both).where == "layers['raw_counts']"
    both.X = log1p
    del both.layers["raw_counts"]
    both.raw = annotated(counts, pbmc)
    assert (choose_matrix(both).where, choose_matrix(both).matrix_kind) == ("raw.X", "counts")
    both.layers["spliced"] = counts
    both.raw = None
    assert choose_matrix(both).where == "X"  # what other layers of whole numbers are, nobody knows


@pytest.mark.parametrize("name", ["counts", "Counts", "raw_counts", "UMI", "umi_counts", "count", "counts_raw", "raw"])
def test_layers_that_are_named_like_counts(pbmc, log1p, counts, name):
    assert choose_matrix(annotated(log1p, pbmc, **{name: counts})).where == f"layers[{name!r}]"


@pytest.mark.parametrize("name", ["logcounts", "normcounts", "scounts", "discount"])
def test_layers_that_are_not(pbmc, log1p, counts, name):
    assert choose_matrix(annotated(log1p, pbmc, **{name: counts})).where == "X"


def test_a_layer_called_counts_that_holds_log1p_is_taken_for_what_it_is(pbmc, log1p, counts):
    adata = annotated(counts, pbmc, counts=log1p)
    assert choose_matrix(adata).where == "X"
    del adata.X
    assert (choose_matrix(adata).where, choose_matrix(adata).matrix_kind) == ("layers['counts']", "log1p")


def test_other_layers_are_the_last_resort(pbmc, log1p, counts):
    adata = annotated(pbmc.X, pbmc, spliced=counts, lognorm=log1p)
    assert choose_matrix(adata).where == "layers['lognorm']"
    del adata.layers["lognorm"]
    assert choose_matrix(adata).where == "layers['spliced']"


def test_normalised_values_that_are_not_logged_count_as_counts_but_come_last(pbmc, log1p, counts):
    cpm = sp.csr_matrix(sp.diags(1e6 / np.ravel(counts.sum(axis=1))) @ counts)
    adata = annotated(cpm, pbmc)
    matrix = choose_matrix(adata)
    assert (matrix.where, matrix.matrix_kind) == ("X", "counts")
    assert "X: normalised, used as counts (not logged" in matrix.reason
    adata.raw = annotated(log1p, pbmc)
    assert choose_matrix(adata).where == "raw.X"


def test_raw_with_many_more_genes_comes_before_a_selection(pbmc, log1p, counts):
    selection = annotated(counts, pbmc, counts=counts)[:, :200].copy()
    selection.raw = annotated(log1p, pbmc)
    matrix = choose_matrix(selection)
    assert (matrix.where, matrix.matrix_kind, matrix.n_genes) == ("raw.X", "log1p", 765)
    assert "X (counts) has 200 genes, raw.X 765" in matrix.reason
    assert list(matrix.var.index) == list(pbmc.var_names)
    nearly = annotated(counts, pbmc)[:, :700].copy()
    nearly.raw = annotated(log1p, pbmc)
    assert choose_matrix(nearly).where == "X"


def test_logarithms_to_base_two_are_brought_to_natural_ones(pbmc, log1p):
    adata = annotated((log1p / np.float32(np.log(2))).astype(np.float32), pbmc)
    matrix = choose_matrix(adata)
    assert matrix.matrix_kind == "log1p"
    assert "base 2" in matrix.reason
    np.testing.assert_allclose(whole(matrix), log1p.toarray(), rtol=1e-6)
    chosen = choose_matrix(adata, matrix_kind="log1p")
    np.testing.assert_array_equal(whole(chosen), adata.X.toarray())


# ---- what the user says


def test_what_the_user_says_wins(pbmc, log1p, counts):
    adata = annotated(log1p, pbmc, counts=counts, other=log1p)
    adata.raw = annotated(counts, pbmc)
    for layer, where in [("X", "X"), ("raw", "raw.X"), ("raw.X", "raw.X"), ("other", "layers['other']")]:
        assert choose_matrix(adata, layer=layer).where == where
    assert choose_matrix(adata, matrix_kind="log1p").where == "X"
    assert choose_matrix(adata, layer="counts", matrix_kind="log1p").matrix_kind == "log1p"
    only = annotated(log1p, pbmc)
    matrix = choose_matrix(only, matrix_kind="counts")
    assert (matrix.where, matrix.matrix_kind) == ("X", "counts")
    assert "X: counts, as asked, although the values look like log1p" in matrix.reason


def test_raw_means_raw_even_if_a_layer_has_the_name(pbmc, log1p, counts):
    adata = annotated(log1p, pbmc, raw=counts)
    assert choose_matrix(adata, layer="raw").where == "layers['raw']"
    adata.raw = adata
    assert choose_matrix(adata, layer="raw").where == "raw.X"
    assert choose_matrix(adata, layer="layers['raw']").where == "layers['raw']"


def test_an_unknown_layer_is_refused_with_what_is_there(pbmc, counts):
    adata = annotated(counts, pbmc, counts=counts)
    with pytest.raises(MatrixError, match=r"no matrix 'cuonts': there is 'counts', 'X'; did you mean 'counts'\?"):
        choose_matrix(adata, layer="cuonts")
    with pytest.raises(MatrixError, match="matrix kind 'log' is not known"):
        choose_matrix(adata, matrix_kind="log")


# ---- refusals


def test_scaled_values_alone_are_refused_with_the_way_out(pbmc):
    pbmc.raw = None
    with pytest.raises(MatrixError) as error:
        choose_matrix(pbmc)
    text = str(error.value)
    assert "X holds scaled values" in text
    assert "cell 'AAAGCCTGGCTAAC-1', gene 'HES4'" in text
    assert "adata.raw or in a layer" in text
    assert "\n" not in text


def test_scaled_values_asked_for_are_refused_naming_what_is_usable(pbmc):
    with pytest.raises(MatrixError, match=r"X holds scaled values.*use layer='raw' \(log1p\)"):
        choose_matrix(pbmc, layer="X")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_bad_values_are_refused_naming_matrix_cell_and_gene(pbmc, counts, bad, form):
    values = counts.toarray()
    values[[500, 3], [4, 17]] = bad
    with pytest.raises(MatrixError) as error:
        choose_matrix(annotated(form(values), pbmc))
    assert str(error.value).startswith("X holds ")
    assert f"cell {pbmc.obs_names[3]!r}, gene {pbmc.var_names[17]!r}" in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_values_that_no_sample_sees_are_met_while_streaming(bad):
    values = sp.random(5000, 30, 0.2, format="csr", random_state=0, data_rvs=lambda n: np.ones(n), dtype=np.float64)
    adata = ad.AnnData(values)
    adata.var_names = [f"gene{i}" for i in range(30)]
    sampled = choose_matrix(adata)
    row = 4901  # between two blocks of the sample
    at = values.indptr[row]
    adata.X.data[at] = bad
    matrix = choose_matrix(adata)
    assert matrix.reason == sampled.reason
    with pytest.raises(MatrixError, match=rf"^X: {bad:g} in cell '{row}', gene 'gene{values.indices[at]}'; "):
        list(matrix.chunks(64))


@pytest.mark.parametrize("matrix_kind", ["counts", "log1p"])
def test_columns_of_a_gene_are_summed_on_counts(matrix_kind):
    counts = np.array([[3, 1, 4, 2], [0, 0, 0, 5], [0, 0, 0, 0]], dtype=np.float32)
    adata = ad.AnnData(counts if matrix_kind == "counts" else np.log1p(counts))
    matrix = choose_matrix(adata, matrix_kind=matrix_kind)
    amounts, total = matrix.read_amounts(np.array([1, 0, 1, -1]), 3, size=2)
    np.testing.assert_allclose(amounts.toarray(), [[1, 7, 0], [0, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(total, [10, 5, 0], rtol=1e-6)
    assert amounts.dtype == total.dtype == np.float32


@pytest.mark.parametrize("form", ["csr", "csc", "csc on disk"])
def test_what_a_sample_finds_is_named_by_its_place_in_the_matrix(form, tmp_path):
    values = sp.random(5000, 30, 0.2, format="lil", random_state=0, data_rvs=lambda n: np.ones(n))
    values[4999, 29] = -3
    adata = ad.AnnData(values.tocsr() if form == "csr" else values.tocsc())
    adata.var_names = [f"gene{i}" for i in range(30)]
    if form == "csc on disk":
        adata.write_h5ad(tmp_path / "x.h5ad")
        adata = open_input(tmp_path / "x.h5ad", backed=True)
    with pytest.raises(MatrixError, match=r"X holds scaled values .*first: -3 in cell '4999', gene 'gene29'"):
        choose_matrix(adata, limits=ReadLimits(sample=4000))
    if form == "csc on disk":
        adata.file.close()


def test_values_too_large_for_float32_are_refused():
    with pytest.raises(MatrixError, match="X: 1e\\+200 in cell '1'"):
        list(choose_matrix(ad.AnnData(np.array([[1.0, 2.0], [1e200, 0.0]]))).chunks())


def test_no_cells_no_matrix_no_genes_no_numbers(pbmc, counts):
    with pytest.raises(MatrixError, match="no cells"):
        choose_matrix(annotated(counts, pbmc)[:0].copy())
    with pytest.raises(MatrixError, match="no matrix"):
        choose_matrix(annotated(None, pbmc))
    with pytest.raises(MatrixError, match="no matrix"):
        choose_matrix(annotated(counts, pbmc)[:, :0].copy())
    with pytest.raises(MatrixError, match=r"values of type .*U"):
        choose_matrix(annotated(counts, pbmc, a=np.full(counts.shape, "x")), layer="a")


def test_a_matrix_of_zeros_is_counts_but_gives_way_to_anything(pbmc, counts, log1p):
    zeros = sp.csr_matrix(counts.shape, dtype=np.float32)
    matrix = choose_matrix(annotated(zeros, pbmc))
    assert (matrix.where, matrix.matrix_kind) == ("X", "counts")
    assert sum(block.nnz for _, block in matrix.chunks()) == 0
    assert choose_matrix(annotated(zeros, pbmc, lognorm=log1p)).where == "layers['lognorm']"


# ---- streaming


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_blocks_are_clean_float32_and_the_input_stays_as_it_is(data):
    """Stored zeros, repeated and unsorted entries, any type of number: blocks are canonical, the input untouched."""
    n_cells, n_genes, n = (data.draw(st.integers(1, high)) for high in (9, 6, 40))
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_]))
    values = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))).astype(dtype)
    rows = np.sort(data.draw(st.lists(st.integers(0, n_cells - 1), min_size=n, max_size=n)))
    columns = np.array(data.draw(st.lists(st.integers(0, n_genes - 1), min_size=n, max_size=n)))
    indptr = np.searchsorted(rows, np.arange(n_cells + 1))
    x = sp.csr_matrix((values, columns, indptr), shape=(n_cells, n_genes))
    before = [array.copy() for array in (x.data, x.indices, x.indptr)]
    adata = ad.AnnData(x)
    blocks = list(choose_matrix(adata, layer="X").chunks(data.draw(st.integers(1, 10))))
    for array, copy in zip((adata.X.data, adata.X.indices, adata.X.indptr), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    for _, block in blocks:
        assert block.dtype == np.float32
        assert block.indices.dtype == block.indptr.dtype == np.int32
        assert block.has_canonical_format
        assert (block.data > 0).all()
    total = np.zeros((n_cells, n_genes))
    np.add.at(total, (rows, columns), values.astype(float))
    np.testing.assert_array_equal(np.vstack([block.toarray() for _, block in blocks]), total)
    assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]


def test_views_are_read_as_what_they_show(pbmc, counts):
    adata = annotated(counts, pbmc, counts=counts)
    cells, genes = np.arange(700) % 7 == 0, np.arange(765) % 3 == 0
    matrix = choose_matrix(adata[cells, genes])
    assert (matrix.n_cells, matrix.n_genes) == (100, 255)
    np.testing.assert_array_equal(whole(matrix), counts[cells][:, genes].toarray())


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("opened", ["ours", "anndata's", "zarr"])
def test_files_are_read_as_what_is_in_memory(pbmc, counts, log1p, form, opened, tmp_path):
    def stored(values):
        return form(values.toarray() if form is np.asarray else values)

    adata = annotated(stored(log1p), pbmc, counts=stored(counts))
    adata.raw = annotated(stored(log1p), pbmc)
    if opened == "zarr":
        with pytest.warns(UserWarning, match="zarr v2"):
            adata.write_zarr(tmp_path / "x.zarr")
        backed = open_input(tmp_path / "x.zarr", backed=True)
    else:
        adata.write_h5ad(tmp_path / "x.h5ad")
        backed = (
            open_input(tmp_path / "x.h5ad", backed=True)
            if opened == "ours"
            else ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
        )
        assert backed.isbacked
    for layer in (None, "X", "raw"):
        here, there = choose_matrix(adata, layer=layer), choose_matrix(backed, layer=layer)
        assert (here.where, here.matrix_kind, here.reason) == (there.where, there.matrix_kind, there.reason)
        np.testing.assert_array_equal(whole(here), whole(there))
    subset = choose_matrix(backed[10:40])
    np.testing.assert_array_equal(whole(subset), counts[10:40].toarray())
    if opened != "zarr":
        backed.file.close()


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_big_backed_file_is_never_read_whole(form, tmp_path):
    """Three matrices of 24 or 80 MB each: what is held while choosing and streaming is far less than one of them."""
    # A fraction of what is allowed in use, as the file is a fraction of what is big.
    limits = ReadLimits(sample=100_000, transposed=600_000, columns=200_000)
    n_cells, n_genes, stored = 10_000, 2_000, 300
    rng = np.random.default_rng(0)
    pattern = np.sort(rng.permuted(np.tile(np.arange(n_genes, dtype=np.int32), (100, 1)), axis=1)[:, :stored], axis=1)
    indices = np.tile(pattern, (n_cells // 100, 1)).ravel()
    values = np.resize(np.float32([1, 1, 2, 1, 5, 1, 1]), len(indices))
    x = sp.csr_matrix((values, indices, np.arange(n_cells + 1) * stored), shape=(n_cells, n_genes))
    x = {"csr": x.tocsr, "csc": x.tocsc, "dense": x.toarray}[form]()
    obs, var = (pd.DataFrame(index=np.arange(n).astype(str)) for n in (n_cells, n_genes))
    with h5py.File(tmp_path / "big.h5ad", "w") as file:
        file.attrs["encoding-type"] = "anndata"
        for key, part in {"X": x, "layers/counts": x, "raw/X": x, "obs": obs, "var": var, "raw/var": var}.items():
            write_elem(file, key, part)
    size, total = (x.nbytes if form == "dense" else x.nnz * 8), float(x.sum())
    del x, indices, values
    gc.collect()
    tracemalloc.start()
    try:
        adata = open_input(tmp_path / "big.h5ad", backed=True)
        matrix = choose_matrix(adata, limits=limits)
        summed = sum(float(block.sum()) for _, block in matrix.chunks(256))
        peak = tracemalloc.get_traced_memory()[1]
        adata.file.close()
    finally:
        tracemalloc.stop()
    assert matrix.where == "layers['counts']"
    assert summed == total
    assert peak < size / 2


# ---- real files


@pytest.mark.shared
def test_real_files_of_many_studies_are_told_right(shared):
    files = sorted((shared / "data" / "train").glob("*.h5ad")) + sorted((shared / "data" / "validation").glob("*.h5ad"))
    assert len(files) > 20
    chosen, true = {}, {}
    for path in files:
        adata = open_input(path)
        matrix = choose_matrix(adata)
        chosen[path.name], true[path.name] = (matrix.where, matrix.matrix_kind), ("X", str(adata.uns["x_is"]))
    assert chosen == true

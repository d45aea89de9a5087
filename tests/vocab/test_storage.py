"""Rows of a matrix, whatever it is stored as."""

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from anndata.io import sparse_dataset, write_elem
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.errors import MatrixError
from scmulan.vocab import storage

FORMS = ["dense", "csr", "csc", "csr_array", "h5 dense", "h5 csr", "h5 csc", "zarr dense", "zarr csr", "zarr csc"]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.poisson(0.7, (61, 23)) * (rng.random(23) < 0.8)).astype(np.float32)


@pytest.fixture(scope="module")
def stored(expected, tmp_path_factory):
    """The same matrix in every form."""
    folder = tmp_path_factory.mktemp("storage")
    memory = {
        "dense": expected,
        "csr": sp.csr_matrix(expected),
        "csc": sp.csc_matrix(expected),
        "csr_array": sp.csr_array(expected),
    }
    stores = {
        "h5": h5py.File(folder / "x.h5", "w"),
        "zarr": zarr.open_group(folder / "x.zarr", mode="w", zarr_format=2),
    }
    for kind, store in stores.items():
        for form in ("dense", "csr", "csc"):
            write_elem(store, form, memory[form])
            memory[f"{kind} {form}"] = store[form] if form == "dense" else sparse_dataset(store[form])
    yield memory
    stores["h5"].close()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 70))
def test_chunks_are_the_matrix_in_order(stored, expected, form, size):
    start = 0
    for rows, block in storage.row_chunks(stored[form], size):
        assert (rows.start, rows.stop) == (start, min(start + size, len(expected)))
        assert isinstance(block, sp.csr_matrix)
        np.testing.assert_array_equal(block.toarray(), expected[rows])
        start = rows.stop
    assert start == len(expected)


@pytest.mark.parametrize("form", ["csc", "h5 csc", "zarr csc"])
def test_columns_are_transposed_in_passes_of_bounded_size(stored, expected, form, monkeypatch):
    """No pass holds more than its limit of values, and none reads more than a few columns at a time."""
    limits = storage.ReadLimits(transposed=120, columns=60)
    read, held = storage.read_rows, []

    def watched(matrix, rows, limits):
        block = read(matrix, rows, limits)
        if getattr(matrix, "format", "") == "csc":
            held.append(block.nnz)
        return block

    monkeypatch.setattr(storage, "read_rows", watched)
    seen = []
    for rows, block in storage.row_chunks(stored[form], 3, limits=limits):
        np.testing.assert_array_equal(block.toarray(), expected[rows])
        seen += range(rows.start, rows.stop)
    assert seen == list(range(len(expected)))
    assert len(held) > 3
    assert max(held) < 240
    if form == "h5 csc":
        assert len(storage.column_blocks(stored[form], limits.columns)) > 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [10_000, 100])
def test_a_sample_says_where_its_values_come_from(stored, expected, form, budget):
    sample, rows, columns = storage.sample_rows(stored[form], storage.ReadLimits(sample=budget))
    np.testing.assert_array_equal(sample.toarray(), expected[np.ix_(rows, columns)])
    if budget == 100:
        assert sample.nnz < np.count_nonzero(expected) / 2
        if not form.endswith(" csc"):
            assert rows[0] == 0
            assert rows[-1] == len(expected) - 1  # spread over all cells
    else:
        assert sample.shape == expected.shape


def test_a_sample_of_many_cells_stays_small():
    cells = sp.random(50_000, 20, 0.1, format="csr", random_state=0)
    sample, rows, _ = storage.sample_rows(cells)
    assert sample.shape[0] == len(rows) == 2048
    assert rows[-1] == 49_999
    assert len(np.unique(rows)) == 2048


def test_sampling_leaves_the_matrix_as_it_is():
    matrix = sp.csr_matrix(([0.0, 1.0, 2.0], ([0, 0, 1], [0, 1, 2])), shape=(2, 3))
    sample, _, _ = storage.sample_rows(matrix)
    assert matrix.nnz == 3
    assert sample.nnz == 2


def test_half_precision_is_read():
    (_, block), *_ = storage.row_chunks(np.array([[0, 1.5]], dtype=np.float16), 10)
    assert block.toarray().tolist() == [[0, 1.5]]


def test_what_is_no_matrix_is_refused():
    class Odd:
        shape = (2, 2)

        def __getitem__(self, rows):
            return {"no": "matrix"}

    with pytest.raises(MatrixError, match="Odd cannot be read"):
        storage.read_rows(Odd(), slice(0, 2))

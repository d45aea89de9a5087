"""The format of shards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from scmulan.data.shards import (
    HEADER,
    MAX_EXACT_COUNT,
    FoldedCells,
    NotWhole,
    ShardWriter,
    code_values,
    content_hashes,
    encode,
    open_arrays,
)
from scmulan.errors import InputError


def back(values, encoding):
    codes, _ = encode(np.asarray(values, dtype=np.float32), encoding)
    return code_values(encoding)[codes]


@given(st.lists(st.integers(1, MAX_EXACT_COUNT), min_size=1))
def test_counts_come_back_as_they_were(values):
    assert back(values, "counts").tolist() == values


def test_large_counts_are_kept_to_a_thousandth_and_counted():
    values = np.array(
        [MAX_EXACT_COUNT, MAX_EXACT_COUNT + 1, 65_535, 65_536, 100_000, 1_234_567, 14_000_000], dtype=np.float32
    )
    codes, rounded = encode(values, "counts")
    assert rounded == 6
    np.testing.assert_allclose(code_values("counts")[codes], values, rtol=6e-4)
    assert (code_values("counts")[codes] % 1 == 0).all()
    assert encode(np.array([1e9], np.float32), "counts")[0] == 65_535
    assert (np.diff(code_values("counts")) > 0).all()


def test_fractions_are_no_counts():
    with pytest.raises(NotWhole):
        encode(np.array([1.0, 2.5], np.float32), "counts")


@given(st.lists(st.floats(0.125, 1e6, width=32), min_size=1))
def test_amounts_and_logarithms_come_back_nearly(values):
    np.testing.assert_allclose(back(values, "amounts"), values, rtol=8e-3)
    np.testing.assert_allclose(back(np.log1p(values), "log1p"), np.log1p(values), rtol=5e-4)


def test_no_value_vanishes():
    assert (back([1e-12, 1e-30], "amounts") > 0).all() and (back([1e-12], "log1p") > 0).all()


def write(path, parts=((0, 3), (3, 5))):
    lengths, gene = np.array([2, 0, 3, 1, 2]), np.array([4, 7, 0, 1, 9, 300, 2, 3])
    value = np.array([1, 2, 3, 4, 70_000, 6, 7, 8], dtype=np.float32)
    ends = np.r_[0, np.cumsum(lengths)]
    with path.open("wb") as file:
        writer = ShardWriter(file, 5, "counts")
        for a, b in parts:
            tokens, total = slice(ends[a], ends[b]), np.arange(a, b) * 10.0
            cells = FoldedCells(lengths[a:b], gene[tokens], value[tokens], total, total)
            writer.add(cells, donor=np.arange(a, b), metadata=np.full((b - a, 8), np.arange(a, b)[:, None]))
        assert writer.finish({"study": "one"}) == 8
    return gene, value


def test_a_shard_is_a_safetensors_file_whatever_the_blocks_it_came_in(tmp_path):
    gene, value = write(tmp_path / "a")
    write(tmp_path / "b", ((0, 1), (1, 5)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    ours, about = open_arrays(tmp_path / "a")
    theirs = load_file(tmp_path / "a")
    assert set(ours) == set(theirs) == {"indptr", "content", "total", "donor", "metadata", "words"}
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype and np.array_equal(array, ours[name]), name
    assert about == {"format": "scmulan-shard/1", "encoding": "counts", "study": "one"}
    assert ours["words"][:, 0].tolist() == gene.tolist()
    np.testing.assert_allclose(code_values("counts")[ours["words"][:, 1]], value, rtol=1e-3)
    assert ours["indptr"].tolist() == [0, 2, 2, 5, 6, 8]
    assert ours["total"].tolist() == [0, 10, 20, 30, 40] and ours["metadata"][3].tolist() == [3] * 8
    with pytest.raises(ValueError, match="read-only"):
        ours["total"][0] = 1


def test_hashes_tell_contents():
    tokens = np.array([[1, 2], [3, 4], [1, 2], [3, 4], [3, 5], [1, 2], [1, 2], [3, 4]], np.uint16)
    one, two, other, short, crossed = content_hashes(tokens, np.array([2, 4, 6, 7, 8])).tolist()
    assert one == two and len({one, other, short, crossed}) == 4


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r"damaged or cut off \(.* bytes, expected at least"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged or cut off"),
        (lambda path: path.write_bytes(b""), "damaged or cut off"),
        (lambda path: path.write_bytes(b"\0" * HEADER * 2), "damaged or cut off"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, harm, message):
    path = tmp_path / "a.safetensors"
    write(path)
    harm(path)
    with pytest.raises(InputError, match=rf"a\.safetensors: {message}"):
        open_arrays(path)

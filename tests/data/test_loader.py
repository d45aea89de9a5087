"""Loaded batches are those of the order, however many threads make them and ranks share them."""

import itertools
import threading
import time

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.data.loader import Loader, made_ahead, read_words
from scmulan.data.memory import CellStore
from scmulan.data.sampling import EpochOrder
from scmulan.data.store import Selection
from scmulan.errors import RecipeError
from scmulan.vocab.binning import tokenize
from scmulan.vocab.vocabulary import METADATA

GENES = 90


@pytest.fixture(scope="module")
def store():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.3, 2.0, (300, GENES))).astype(np.float32)
    total = counts.sum(1) + 20
    logged = np.arange(300) >= 200
    values = np.where(logged[:, None], np.log1p(counts * (1e4 / total)[:, None]), counts).astype(np.float32)
    metadata = rng.integers(-1, 5, (300, len(METADATA))).astype(np.int32)
    study = logged.astype(np.int64)
    return CellStore(
        sp.csr_matrix(values), total.astype(np.float32), logged, study, ["a", "b"], np.ones((2, GENES), bool), metadata
    )


def same(a, b):
    return (
        a.state == b.state
        and np.array_equal(a.cells, b.cells)
        and np.array_equal(a.metadata, b.metadata)
        and all(np.array_equal(getattr(a.words, f), getattr(b.words, f)) for f in ("indptr", "gene", "level"))
    )


def test_words_are_those_of_the_whole_cell(store):
    """Totals are those of the cell's file, also of genes that the vocabulary lacks; log1p values stay as they are."""
    chosen = np.array([250, 3, 199, 200, 7])
    words = read_words(store, chosen)
    for i, cell in enumerate(chosen):
        row = store.matrix[cell]
        if not store.logged[cell]:
            rest = np.float32(store.total[cell] - row.data.sum())
            row = sp.hstack([row, sp.csr_matrix([[rest]])], format="csr", dtype=np.float32)
        columns = np.r_[np.arange(GENES), -1][: row.shape[1]].astype(np.int32)
        alone = tokenize(row, columns, GENES, matrix_kind="log1p" if store.logged[cell] else "counts")
        part = slice(words.indptr[i], words.indptr[i + 1])
        assert np.array_equal(words.gene[part], alone.gene)
        assert np.array_equal(words.level[part], alone.level)
        assert words.maximum[i] == alone.maximum[0]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 2, 4]),
    st.lists(st.integers(0, 9), max_size=3),
)
def test_no_cell_is_lost_or_doubled(store, batch, workers, world, stops):
    """Over threads, ranks and interruptions: the union of what ranks read is the epoch, and it is the plain one."""
    order = EpochOrder(store.lengths, 4, batch=batch, block=8, window=96)
    plain = Loader(store, order, workers=0)
    state, seen = order.state(1, 0), []
    for stop in [*stops, None]:
        ranks = [Loader(store, EpochOrder(store.lengths, 4, batch=batch, block=8, window=96), workers=workers)] * world
        streams = [itertools.islice(r.resume(state, rank=i, world=world), stop) for i, r in enumerate(ranks)]
        for shares in zip(*streams, strict=True):
            assert len({share.state for share in shares}) == 1
            for rank, share in enumerate(shares):
                assert same(share, plain.batch(1, state.step, rank=rank, world=world))
                seen += share.cells.tolist()
            state = shares[0].state
        world = 3 - world if world < 3 else 1
        if state.epoch != 1:
            break
    assert sorted(seen) == list(range(len(store)))
    assert state == order.state(2, 0)


def test_metadata_and_states_come_with_the_cells(store):
    loader = Loader(Selection(store, np.arange(50)), EpochOrder(store.lengths[:50], 0, batch=20), workers=2)
    batches = list(loader.epoch(3, start=1))
    assert [(b.state.epoch, b.state.step) for b in batches] == [(3, 2), (4, 0)]
    for batch in batches:
        assert np.array_equal(batch.metadata, store.metadata[batch.cells])
        assert np.array_equal(batch.words.lengths, store.lengths[batch.cells])
    with pytest.raises(RecipeError, match="50 cells"):
        loader.resume(EpochOrder(store.lengths, 0).state(0, 0))


def test_results_come_in_order_and_no_more_are_made_than_wait():
    started = []
    lock = threading.Lock()

    def make(i):
        with lock:
            started.append(i)
        time.sleep(0.02 if i % 3 == 0 else 0.0)
        return i * i

    stream = made_ahead(make, range(50), workers=4, ahead=5)
    assert next(stream) == 0
    time.sleep(0.1)
    assert max(started) <= 6
    assert [next(stream) for _ in range(9)] == [i * i for i in range(1, 10)]
    stream.close()
    assert list(made_ahead(make, range(7), workers=0, ahead=0)) == [i * i for i in range(7)]


def test_threads_stop_where_the_reader_stops():
    started = []

    def make(i):
        started.append(i)
        time.sleep(0.03)
        return i

    stream = made_ahead(make, range(50), workers=1, ahead=10)
    assert next(stream) == 0
    stream.close()
    assert len(started) < 5


def test_a_failure_is_raised_where_its_batch_is_due():
    def make(i):
        if i == 3:
            raise OSError("cut off")
        return i

    stream = made_ahead(make, range(9), workers=2, ahead=8)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="cut off"):
        next(stream)

"""Orders are a pure function of (seed, epoch, step), and an epoch holds every cell once."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.data.memory import CellStore
from scmulan.data.sampling import BalancedOrder, BalancedSampler, EpochOrder, SamplerState, WindowShuffle
from scmulan.errors import RecipeError
from scmulan.vocab.vocabulary import METADATA, Family


def store(study, label, organ, lengths=None):
    """Cells of given studies, types and organs (−1: unknown)."""
    n = len(study)
    metadata = np.full((n, len(METADATA)), -1, dtype=np.int32)
    metadata[:, METADATA.index(Family.FINE)] = label
    metadata[:, METADATA.index(Family.ORGAN)] = organ
    lengths = np.ones(n, int) if lengths is None else np.asarray(lengths)
    indices = np.concatenate([np.arange(k) for k in lengths])
    matrix = sp.csr_matrix(
        (np.ones(len(indices), np.float32), indices, np.r_[0, np.cumsum(lengths)]), shape=(n, max(lengths))
    )
    names = [f"s{i}" for i in range(max(study) + 1)]
    measured = np.ones((len(names), matrix.shape[1]), bool)
    return CellStore(matrix, np.ones(n, np.float32), np.zeros(n, bool), np.asarray(study), names, measured, metadata)


sizes = st.tuples(st.integers(0, 700), st.integers(1, 40), st.integers(1, 200), st.integers(1, 33))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_holds_every_cell_once(shape, seed, epoch):
    cells, block, window, batch = shape
    lengths = np.random.default_rng(0).integers(1, 50, cells)
    order = EpochOrder(lengths, seed, batch=batch, block=block, window=window)
    batches = [order.batch(epoch, step) for step in range(order.steps)]
    assert sorted(itertools.chain(*batches)) == list(range(cells))
    assert all(0 < len(b) <= batch for b in batches)
    assert sum(len(b) < batch for b in batches) <= 1  # only the last window has one that is not full
    fresh = EpochOrder(lengths, seed, batch=batch, block=block, window=window)
    assert all(np.array_equal(fresh.batch(epoch, s), batches[s]) for s in reversed(range(order.steps)))


@settings(deadline=None, max_examples=40)
@given(
    sizes,
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=6),
)
def test_interrupted_epochs_on_other_ranks_lose_and_double_no_cell(shape, runs):
    """Each run does some steps with its number of ranks and leaves its state; the last one goes to the end."""
    cells, block, window, batch = shape
    lengths = np.random.default_rng(1).integers(1, 50, cells)
    state, seen = SamplerState(seed=3, epoch=2, step=0, cells=cells), []
    for number, (steps, world) in enumerate(runs):
        order = EpochOrder(lengths, state.seed, batch=batch, block=block, window=window)
        order.check(state)
        stop = order.steps if number == len(runs) - 1 else min(order.steps, state.step + steps)
        for step in range(state.step, stop):
            whole = order.batch(state.epoch, step)
            seen += itertools.chain(*(whole[rank::world] for rank in range(world)))
        state = order.state(state.epoch, stop)
    assert sorted(seen) == list(range(cells))


def test_other_seeds_and_epochs_have_other_batches():
    lengths = np.random.default_rng(0).integers(1, 90, 2000)
    first = [EpochOrder(lengths, seed, batch=50, window=400).batch(epoch, 0) for seed in (0, 1) for epoch in (0, 1)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(first, 2))
    with pytest.raises(IndexError, match="step 40"):
        EpochOrder(lengths, 0, batch=50).batch(0, 40)


def test_batches_have_cells_of_one_length_and_of_many_blocks():
    lengths = np.random.default_rng(0).lognormal(6, 0.5, 50_000).astype(int)
    order = EpochOrder(lengths, 0, batch=256)
    batches = [order.batch(0, step) for step in range(order.steps)]
    padded = sum(lengths[b].max() * len(b) for b in batches)
    assert 1 - lengths.sum() / padded < 0.03
    assert np.mean([len(np.unique(b // 64)) for b in batches]) > 100
    steps = [lengths[b].mean() for b in batches]
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.2  # short and long batches are mixed


def test_a_window_is_read_in_whole_blocks():
    windows = WindowShuffle(10_000, 0, block=16, window=512)
    for window in range(len(windows) - 1):
        blocks, number = np.unique(windows.read(0, window) // 16, return_counts=True)
        assert (number == 16).all() and len(blocks) == 32
        assert np.diff(blocks).max() > 1
    assert windows.cells_of(len(windows) - 1) == len(windows.read(0, len(windows) - 1)) < 1024


def test_a_state_of_another_corpus_or_seed_is_refused():
    order = EpochOrder(np.ones(100, int), 5)
    order.check(order.state(1, 0))
    for other in (SamplerState(seed=4, epoch=1, step=0, cells=100), SamplerState(seed=5, epoch=1, step=0, cells=99)):
        with pytest.raises(RecipeError, match="seed 5 and 100 cells"):
            order.check(other)
    assert order.state(1, 7).to_json() == {"seed": 5, "epoch": 1, "step": 7, "cells": 100}


STUDY = np.repeat([0, 1], [300, 100])
LABEL = np.r_[np.repeat([4, 5], [270, 30]), np.full(100, 4)]
ORGAN = np.r_[np.repeat([1, 2], [150, 150]), np.full(100, 2)]


@pytest.mark.parametrize(("study", "label"), [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0), (1.0, 0.0)])
def test_balance_gives_studies_and_types_their_powers(study, label):
    cells = store(STUDY, LABEL, ORGAN)
    chances = BalancedSampler(cells, np.ones(400, np.uint8), 1, study_power=study, label_power=label).chances(0)
    expected = np.array([300.0, 100.0]) ** study
    found = np.array([chances[STUDY == s].sum() for s in (0, 1)])
    assert found == pytest.approx(expected / expected.sum())
    types = np.array([270.0, 30.0]) ** label
    inside = np.array([chances[(STUDY == 0) & (LABEL == w)].sum() for w in (4, 5)])
    assert inside / inside.sum() == pytest.approx(types / types.sum())
    # Cells of one study and type are alike, whatever their organ.
    assert np.ptp(chances[(STUDY == 0) & (LABEL == 4)]) < 1e-15


def test_balance_evens_out_organs():
    cells = store(STUDY, LABEL, ORGAN)
    chances = BalancedSampler(
        cells, np.ones(400, np.uint8), 1, study_power=1.0, label_power=1.0, organ_power=0.0
    ).chances(0)
    assert [chances[ORGAN == o].sum() for o in (1, 2)] == pytest.approx([0.5, 0.5])


def test_draws_follow_the_chances_and_serve_what_they_are_drawn_for():
    cells = store(STUDY, LABEL, ORGAN)
    serves = np.where(np.arange(400) % 3 == 0, 3, 1).astype(np.uint8)
    balance = BalancedSampler(cells, serves, 3)
    assert not balance.any(2)
    for kind in (0, 1):
        drawn = balance.draw(kind, 40_000, np.random.default_rng(kind))
        assert (serves[drawn] >> kind & 1).all()
        chances = balance.chances(kind)
        assert chances.sum() == pytest.approx(1.0)
        found = np.bincount(drawn, minlength=400) / len(drawn)
        assert np.abs(found - chances).max() < 6 * np.sqrt(chances.max() / len(drawn))
        assert found[chances == 0].sum() == 0


def test_a_balanced_order_draws_rare_types_more_often():
    lengths = np.random.default_rng(0).integers(0, 30, 400)
    lengths[0] = 0
    cells = store(STUDY, LABEL, ORGAN, lengths)
    order = BalancedOrder(cells, 1, batch=32, window=128, study_power=0.0, label_power=0.0)
    drawn = np.concatenate([order.batch(epoch, step) for epoch in range(20) for step in range(order.steps)])
    assert len(drawn) == 20 * 400
    assert (lengths[drawn] > 0).all()
    assert (LABEL[drawn] == 5).mean() == pytest.approx(0.25, abs=0.03)  # half of the study, half of the cells
    again = BalancedOrder(cells, 1, batch=32, window=128, study_power=0.0, label_power=0.0)
    assert np.array_equal(again.batch(19, 3), order.batch(19, 3))

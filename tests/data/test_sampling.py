"""The order of cells is a pure function of (seed, epoch, step), and an epoch holds every cell once."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.data.memory import CellStore
from scmulan.data.sampling import BalancedSampler, WindowShuffle
from scmulan.vocab.vocabulary import METADATA, Family


def store(study, label, organ):
    """Cells of given studies, types and organs (−1: unknown)."""
    n = len(study)
    metadata = np.full((n, len(METADATA)), -1, dtype=np.int32)
    metadata[:, METADATA.index(Family.FINE)] = label
    metadata[:, METADATA.index(Family.ORGAN)] = organ
    matrix = sp.csr_matrix(np.ones((n, 1), np.float32))
    names = [f"s{i}" for i in range(max(study) + 1)]
    measured = np.ones((len(names), 1), bool)
    return CellStore(matrix, np.ones(n, np.float32), np.zeros(n, bool), np.asarray(study), names, measured, metadata)


sizes = st.tuples(st.integers(0, 700), st.integers(1, 40), st.integers(1, 200))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_holds_every_cell_once(shape, seed, epoch):
    cells, block, window = shape
    shuffle = WindowShuffle(cells, seed, block=block, window=window)
    windows = [shuffle.cells(epoch, i) for i in range(len(shuffle))]
    assert sorted(itertools.chain(*windows)) == list(range(cells))
    assert [len(cells) for cells in windows] == [shuffle.size(i) for i in range(len(shuffle))]
    fresh = WindowShuffle(cells, seed, block=block, window=window)
    assert all(np.array_equal(fresh.cells(epoch, i), windows[i]) for i in reversed(range(len(shuffle))))


def test_other_seeds_and_epochs_have_other_windows():
    first = [WindowShuffle(2000, seed, window=400).cells(epoch, 0) for seed in (0, 1) for epoch in (0, 1)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(first, 2))


def test_a_window_holds_whole_blocks_from_everywhere():
    windows = WindowShuffle(10_000, 0, block=16, window=512)
    for window in range(len(windows) - 1):
        blocks, number = np.unique(windows.cells(0, window) // 16, return_counts=True)
        assert (number == 16).all() and len(blocks) == 32
        assert np.diff(blocks).max() > 1
    assert windows.size(len(windows) - 1) == len(windows.cells(0, len(windows) - 1)) < 1024


STUDY = np.repeat([0, 1], [300, 100])
LABEL = np.r_[np.repeat([4, 5], [270, 30]), np.full(100, 4)]
ORGAN = np.r_[np.repeat([1, 2], [150, 150]), np.full(100, 2)]


@pytest.mark.parametrize(("study", "label"), [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0), (1.0, 0.0)])
def test_balance_gives_studies_and_types_their_powers(study, label):
    cells = store(STUDY, LABEL, ORGAN)
    probabilities = BalancedSampler(
        cells, np.ones(400, np.uint8), 1, study_power=study, label_power=label
    ).probabilities(0)
    expected = np.array([300.0, 100.0]) ** study
    found = np.array([probabilities[STUDY == s].sum() for s in (0, 1)])
    assert found == pytest.approx(expected / expected.sum())
    types = np.array([270.0, 30.0]) ** label
    inside = np.array([probabilities[(STUDY == 0) & (LABEL == w)].sum() for w in (4, 5)])
    assert inside / inside.sum() == pytest.approx(types / types.sum())
    # Cells of one study and type are alike, whatever their organ.
    assert np.ptp(probabilities[(STUDY == 0) & (LABEL == 4)]) < 1e-15


def test_balance_evens_out_organs():
    cells = store(STUDY, LABEL, ORGAN)
    probabilities = BalancedSampler(
        cells, np.ones(400, np.uint8), 1, study_power=1.0, label_power=1.0, organ_power=0.0
    ).probabilities(0)
    assert [probabilities[ORGAN == o].sum() for o in (1, 2)] == pytest.approx([0.5, 0.5])


def test_draws_follow_the_probabilities_and_are_eligible():
    cells = store(STUDY, LABEL, ORGAN)
    eligible = np.where(np.arange(400) % 3 == 0, 3, 1).astype(np.uint8)
    balance = BalancedSampler(cells, eligible, 3)
    assert not balance.any(2)
    for purpose in (0, 1):
        drawn = balance.draw(purpose, 40_000, np.random.default_rng(purpose))
        assert (eligible[drawn] >> purpose & 1).all()
        probabilities = balance.probabilities(purpose)
        assert probabilities.sum() == pytest.approx(1.0)
        found = np.bincount(drawn, minlength=400) / len(drawn)
        assert np.abs(found - probabilities).max() < 6 * np.sqrt(probabilities.max() / len(drawn))
        assert found[probabilities == 0].sum() == 0

"""The compiled race, the one of any device, and the race of every word against every other."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from scmulan.generate.noise import VISITS, NoiseBuffer, exponentials
from scmulan.generate.sampling import GumbelSampler
from scmulan.model.network import Mulan, MulanConfig

V, END, B, J = 50, 0, 40, 5
GENES = np.arange(3, 45)


@pytest.fixture(scope="module")
def network():
    config = MulanConfig(vocabulary=V, layers=1, heads=1, width=8, bounded_genes=True, word_bias=True)
    network = Mulan(config).initialise(0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    network.entity_head.weight.copy_(torch.randn(V, 8, generator=generator) * 0.7)
    network.entity_bias.copy_(torch.randn(V, generator=generator))
    return network


def chance(rows=B, *, listed=True, end=END, ring=32):
    made = NoiseBuffer(
        rows, GENES, end, levels=10, vocabulary=V, listed=listed, ring=ring, device=torch.device("cpu")
    )  # fmt: skip
    for row in range(rows):
        made.seat(row, 3, row)
    made.provide(np.zeros(rows, dtype=np.int64), 16)
    return made


def scene():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(B, J, 8, generator=generator)
    said = torch.rand(B, V, generator=generator) < 0.3
    said[:, END] = False
    said[:, np.setdiff1d(np.arange(1, V), GENES)] = True
    before = torch.randint(3, 45, (B, J + 1), generator=generator)
    return states, said, before


@pytest.mark.parametrize("rule", ["softmax", "set"])
@pytest.mark.parametrize("known", [0, 1])
def test_both_ways_of_running_a_listed_race_agree(network, rule, known):
    race = GumbelSampler(network, rule, 1.0, genes=GENES, end=END)
    states, said, before = scene()
    if rule == "set":
        said[:, END] = True
    draws = chance(end=None if rule == "set" else END).at(torch.zeros(B, dtype=torch.int64), 0, J)
    assert race.compiled
    found, closed = race.winners(states, draws, said, before, known)
    race.compiled = False
    other, other_closed = race.winners(states, draws, said, before, known)
    assert (closed == other_closed).all() and closed.float().mean() > 0.9
    assert (found == other)[closed].all()
    for b in range(B):
        for j in range(J):
            if closed[b, j]:
                assert not said[b, found[b, j]] and found[b, j] not in before[b, : known + j]
    assert (rule == "set") == (END not in found)


def test_guesses_are_the_winners_if_weights_stay(network):
    race = GumbelSampler(network, "softmax", 1.0, genes=GENES, end=END)
    states, said, _ = scene()
    draws = chance().at(torch.zeros(B, dtype=torch.int64), 1, J)
    first = torch.where(said[:, 3:45], 0.0, 1.0).argmax(1) + 3
    found = race.guesses(states[:, 0], draws, said, first)
    assert (found[:, 0] == first).all()
    same = states[:, :1].expand(-1, J, -1)
    assert torch.equal(found[:, 1:2], race.winners(same, draws, said, first[:, None], 1)[0][:, :1])


@pytest.mark.parametrize("listed", [True, False])
def test_numbers_depend_on_the_place_only(listed):
    far, near = chance(3, listed=listed), chance(3, listed=listed)
    count = torch.tensor([0, 7, 20])
    far.provide(count.numpy(), 12)
    for upto in range(1, 13):
        near.provide(np.minimum(count.numpy(), upto), 1)
    near.provide(count.numpy(), 12)
    a, b = far.at(count, 2, 4), near.at(count, 2, 4)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("words", "times", "horizon", "values"))
    near.select(np.array([2, 0]))
    c = near.at(count[[2, 0]], 2, 4)
    assert torch.equal(c.times, a.times[[2, 0]]) and torch.equal(c.values, a.values[[2, 0]])


def test_visits_come_in_order_and_at_the_rate_of_the_genes():
    draws = chance(400).at(torch.zeros(400, dtype=torch.int64), 0, 16)
    visits = draws.times[..., :VISITS]
    assert (visits.diff(dim=-1) >= 0).all() and torch.equal(draws.horizon, visits[..., -1])
    assert float(draws.horizon.mean()) == pytest.approx(VISITS / len(GENES), rel=0.02)
    assert (draws.words[..., -1] == END).all() and float(draws.times[..., -1].mean()) == pytest.approx(1, rel=0.05)
    counts = np.bincount(draws.words[..., :VISITS].flatten(), minlength=V)
    assert counts[GENES].min() > 0.9 * counts[GENES].mean() and counts.sum() == counts[GENES].sum()
    assert float(draws.values.mean()) == pytest.approx(np.euler_gamma, abs=0.05)


def test_small_times_are_told_apart():
    """What decides about words of little weight: the smallest of many times, which must neither be zero nor coarse."""
    drawn = exponentials(np.random.default_rng(0), (4_000_000,))
    assert kstest(drawn[:100_000], "expon").pvalue > 1e-3
    small = drawn[drawn < 1e-4]
    assert kstest(small / 1e-4, "uniform").pvalue > 1e-3
    assert len(np.unique(small)) > 0.99 * len(small) and 0 < drawn.min() < 3e-6
    assert len(small) == pytest.approx(400, abs=100)
    stream = np.random.default_rng(1)
    smallest = min(exponentials(stream, (10_000_000,)).min() for _ in range(40))
    assert 0 < smallest < 2.0**-25  # below what one and a number that is taken off it can tell

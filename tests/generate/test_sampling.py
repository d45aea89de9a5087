"""Gumbel-max sampling by the compiled loop and on any device, and the noise behind it."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from scmulan.generate.noise import N_CANDIDATES, NoiseBuffer, exponentials
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


def noise_of(rows=B, *, lazy=True, end=END):
    buffer = NoiseBuffer(
        rows, GENES, end, levels=10, vocabulary=V, lazy=lazy, capacity=32, device=torch.device("cpu")
    )  # fmt: skip
    for row in range(rows):
        buffer.start(row, 3, row)
    buffer.fill(np.zeros(rows, dtype=np.int64), 16)
    return buffer


def inputs():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, J, 8, generator=generator)
    excluded = torch.rand(B, V, generator=generator) < 0.3
    excluded[:, END] = False
    excluded[:, np.setdiff1d(np.arange(1, V), GENES)] = True
    drafted = torch.randint(3, 45, (B, J + 1), generator=generator)
    return hidden, excluded, drafted


@pytest.mark.parametrize("rule", ["softmax", "set"])
@pytest.mark.parametrize("n_drafted", [0, 1])
def test_the_compiled_loop_samples_what_any_device_samples(network, rule, n_drafted):
    sampler = GumbelSampler(network, rule, 1.0, genes=GENES, end=END)
    hidden, excluded, drafted = inputs()
    if rule == "set":
        excluded[:, END] = True
    noise = noise_of(end=None if rule == "set" else END).read(torch.zeros(B, dtype=torch.int64), 0, J)
    assert sampler.compiled
    token, decided = sampler.sample(hidden, noise, excluded, drafted, n_drafted)
    sampler.compiled = False
    other, other_decided = sampler.sample(hidden, noise, excluded, drafted, n_drafted)
    assert (decided == other_decided).all() and decided.float().mean() > 0.9
    assert (token == other)[decided].all()
    for b in range(B):
        for j in range(J):
            if decided[b, j]:
                assert not excluded[b, token[b, j]] and token[b, j] not in drafted[b, : n_drafted + j]
    assert (rule == "set") == (END not in token)


def test_drafts_are_the_samples_if_weights_stay(network):
    sampler = GumbelSampler(network, "softmax", 1.0, genes=GENES, end=END)
    hidden, excluded, _ = inputs()
    noise = noise_of().read(torch.zeros(B, dtype=torch.int64), 1, J)
    first = torch.where(excluded[:, 3:45], 0.0, 1.0).argmax(1) + 3
    token = sampler.draft(hidden[:, 0], noise, excluded, first)
    assert (token[:, 0] == first).all()
    same = hidden[:, :1].expand(-1, J, -1)
    assert torch.equal(token[:, 1:2], sampler.sample(same, noise, excluded, first[:, None], 1)[0][:, :1])


@pytest.mark.parametrize("lazy", [True, False])
def test_noise_depends_on_the_position_only(lazy):
    far, near = noise_of(3, lazy=lazy), noise_of(3, lazy=lazy)
    count = torch.tensor([0, 7, 20])
    far.fill(count.numpy(), 12)
    for upto in range(1, 13):
        near.fill(np.minimum(count.numpy(), upto), 1)
    near.fill(count.numpy(), 12)
    a, b = far.read(count, 2, 4), near.read(count, 2, 4)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("candidates", "times", "horizon", "values"))
    near.keep_rows(np.array([2, 0]))
    c = near.read(count[[2, 0]], 2, 4)
    assert torch.equal(c.times, a.times[[2, 0]]) and torch.equal(c.values, a.values[[2, 0]])


def test_candidates_come_in_order_and_at_the_rate_of_the_genes():
    noise = noise_of(400).read(torch.zeros(400, dtype=torch.int64), 0, 16)
    times = noise.times[..., :N_CANDIDATES]
    assert (times.diff(dim=-1) >= 0).all() and torch.equal(noise.horizon, times[..., -1])
    assert float(noise.horizon.mean()) == pytest.approx(N_CANDIDATES / len(GENES), rel=0.02)
    assert (noise.candidates[..., -1] == END).all() and float(noise.times[..., -1].mean()) == pytest.approx(1, rel=0.05)
    counts = np.bincount(noise.candidates[..., :N_CANDIDATES].flatten(), minlength=V)
    assert counts[GENES].min() > 0.9 * counts[GENES].mean() and counts.sum() == counts[GENES].sum()
    assert float(noise.values.mean()) == pytest.approx(np.euler_gamma, abs=0.05)


def test_small_times_are_told_apart():
    """What decides about tokens of little weight: the smallest of many times, which must neither be zero nor coarse."""
    drawn = exponentials(np.random.default_rng(0), (4_000_000,))
    assert kstest(drawn[:100_000], "expon").pvalue > 1e-3
    small = drawn[drawn < 1e-4]
    assert kstest(small / 1e-4, "uniform").pvalue > 1e-3
    assert len(np.unique(small)) > 0.99 * len(small) and 0 < drawn.min() < 3e-6
    assert len(small) == pytest.approx(400, abs=100)
    stream = np.random.default_rng(1)
    smallest = min(exponentials(stream, (10_000_000,)).min() for _ in range(40))
    assert 0 < smallest < 2.0**-25  # below what one and a number that is taken off it can tell

"""Random numbers of compiled loops: the published generator, streams of single integers, binomial draws."""

import numpy as np
import pytest

from scmulan._rng import GOLDEN, binomial, mix, random_bits, stream_keys, uniform, uniforms


def test_bits_are_those_of_splitmix64():
    # The first numbers of Vigna's reference implementation (splitmix64.c) with the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(random_bits(np.uint64(1234567), i)) for i in range(4)] == expected


def test_a_stream_one_by_one_is_the_stream_at_once():
    key, indices = np.uint64(2**63 + 5), np.arange(50)
    state, one_by_one = key, []
    with np.errstate(over="ignore"):
        for _ in indices:
            state += GOLDEN
            one_by_one.append(uniform(state))
    assert one_by_one == uniforms(key, indices).tolist()
    assert stream_keys(key, indices[7:9]).tolist() == [int(random_bits(key, i)) for i in (7, 8)]


def test_uniform_numbers_are_uniform():
    numbers = uniforms(np.uint64(3), np.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 49 + 5 * (2 * 49) ** 0.5
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize(("number", "chance"), [(3, 0.2), (40, 0.05), (40, 0.9), (300, 0.4), (5000, 0.7)])
def test_binomial_draws_have_their_mean_and_spread(number, chance):
    draws = np.array([binomial(np.uint64(mix(np.uint64(i))), number, chance)[1] for i in range(20_000)])
    variance = number * chance * (1 - chance)
    assert abs(draws.mean() - number * chance) < 5 * (variance / len(draws)) ** 0.5
    assert draws.var() == pytest.approx(variance, rel=0.06)
    assert draws.min() >= 0 and draws.max() <= number

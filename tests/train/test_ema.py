"""The running average of a network's weights."""

import pytest
import torch

from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.ema import WeightAverage


@pytest.fixture
def small():
    return Mulan(MulanConfig(vocabulary=20, layers=1, heads=2, width=8)).initialise(0)


def put(model, value):
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)


def test_it_is_the_mean_of_the_last_weights(small):
    put(small, 7.0)
    average = WeightAverage(small, 0.75)
    expected = 7.0
    for step in range(1, 60):
        put(small, float(step))
        average.update(step)
        keep = min(0.75, step / (step + 9))
        expected = keep * expected + (1 - keep) * step
    assert all(torch.allclose(w, torch.full_like(w, expected)) for w in average.weights.values())
    assert expected == pytest.approx(59 - 0.75 / 0.25, abs=1e-4)  # weights that grow by one each step lag by three


def test_the_network_has_it_for_a_while_only(small):
    put(small, 1.0)
    average = WeightAverage(small, 0.5)
    put(small, 3.0)
    average.update(1000)
    with pytest.raises(KeyError, match="inside"), average.in_use():
        assert all((w == 2.0).all() for w in small.parameters())
        raise KeyError("inside")
    assert all((w == 3.0).all() for w in small.parameters())
    assert all((w == 2.0).all() for w in average.weights.values())

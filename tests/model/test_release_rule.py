"""The release's decoding rules: a batch with a cache gives what one sentence gives, read anew for each token."""

import numpy as np
import pytest
import torch

from scmulan.infer.release_rule import annotate, decode, head_outputs
from scmulan.vocab.sentences import Sentences

END = 0


@pytest.fixture(scope="module")
def network(make_network):
    """A network that ends after none, one, two … tokens, and repeats tokens where it may."""
    network = make_network(seed=7, set_state=True)
    with torch.no_grad():
        network.entity_head.weight[END] *= 2
        network.entity_head.weight[20:26] *= 2
    return network


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    parts = []
    for n in (1, 2, 3, 5, 8, 13, 21) * 6:
        entity = np.append(rng.permutation(np.arange(1, 29))[: n - 1], 29)
        parts.append((entity, np.append(rng.integers(1, 11, n - 1), 0), n))
    return Sentences.join(parts)


def one_at_a_time(network, prompts, max_tokens, newest_allowed):
    """The rule as the release states it: the whole sentence is read again for every token."""
    out = []
    for i in range(len(prompts)):
        entity, value = (a.tolist() for a in prompts[i])
        start = len(entity)
        while True:
            hidden = network(torch.tensor([entity]), torch.tensor([value]))[0]
            logits = network.entity_logits(hidden[-1]).clone()
            logits[entity[:-1] if newest_allowed else entity] = -torch.inf
            word = int(logits.argmax())
            level = float(network.value_mean(hidden[-1])[word])
            entity.append(word)
            value.append(int(np.clip(np.round(level), 0, 10)))
            if word == END or len(entity) == start + max_tokens:
                break
        out.append((entity[start:], value[start:], hidden[max(len(hidden) - 2, 0)].numpy()))
    return out


@pytest.mark.parametrize(("rule", "newest_allowed"), [("release", True), ("release_cache", False)])
@torch.inference_mode()
def test_annotation(network, prompts, rule, newest_allowed):
    expected = one_at_a_time(network, prompts, 3, newest_allowed)
    lengths = [len(entity) for entity, _, _ in expected]
    assert {1, 2, 3} == set(lengths)  # or this test would show nothing about stopping
    assert any(e[i] == e[i + 1] for e, _, _ in expected for i in range(len(e) - 1)) == newest_allowed
    found = annotate(network, prompts, end=END, rule=rule)
    for i, (entity, value, embedding) in enumerate(expected):
        assert found.entity[i].tolist() == entity + [-1] * (3 - len(entity))
        assert found.value[i].tolist() == value + [-1] * (3 - len(entity))
        np.testing.assert_allclose(found.embedding[i], embedding, atol=1e-5)


@torch.inference_mode()
def test_generation(network, prompts):
    prompts = prompts.take(range(14))
    expected = one_at_a_time(network, prompts, 9, newest_allowed=False)
    found = decode(network, prompts, max_tokens=9, end=END)
    assert found.entity.shape == (14, max(len(e) for e, _, _ in expected))
    for i, (entity, value, _) in enumerate(expected):
        assert found.entity[i][: len(entity)].tolist() == entity
        assert found.value[i][: len(entity)].tolist() == value
        assert (found.entity[i][len(entity) :] == -1).all()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_neighbours_do_not_matter(network, prompts, batch_size):
    together = annotate(network, prompts, end=END)
    order = np.random.default_rng(0).permutation(len(prompts))
    apart = annotate(network, prompts.take(order), end=END, batch_size=batch_size)
    assert (apart.entity == together.entity[order]).all()
    assert (apart.value == together.value[order]).all()
    np.testing.assert_allclose(apart.embedding, together.embedding[order], atol=1e-5)


def test_values_are_rounded_half_to_even_within_the_bins(make_network):
    network = make_network(value_spread=True)
    prompt = Sentences.join([(np.array([3, 29]), np.array([4, 0]), 2)])
    for mean, level in ((2.5, 2), (3.5, 4), (2.51, 3), (-3.0, 0), (0.4, 0), (12.0, 10)):
        with torch.no_grad():
            network.value_head.weight.zero_()
            network.value_bias.fill_(mean)
        assert (annotate(network, prompt, end=END).value == level).all()


def test_heads_after_the_prompt(network, prompts):
    logits, values = head_outputs(network, prompts, batch_size=5)
    with torch.inference_mode():
        for i in (0, 6, 20):
            hidden = network(*(torch.from_numpy(a.astype(np.int64))[None] for a in prompts[i]))[0, -1]
            np.testing.assert_allclose(logits[i], network.entity_logits(hidden).numpy(), atol=1e-5)
            np.testing.assert_allclose(values[i], network.value_mean(hidden).numpy(), atol=1e-5)


def test_no_prompts(network):
    nothing = Sentences.join([])
    assert annotate(network, nothing, end=END).entity.shape == (0, 0)
    assert head_outputs(network, nothing)[0].shape == (0, 30)

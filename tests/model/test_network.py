"""The network: what it computes, and the properties that decoding relies on."""

import numpy as np
import pytest
import torch

from scmulan.errors import ModelError
from scmulan.model.network import PUBLISHED, Mulan, MulanConfig

SHAPES = {
    "published": {},
    "bias": {"bias": True},
    "own": {"set_state": True, "value_spread": True},
}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture
def sentence():
    rng = np.random.default_rng(1)
    entity = torch.from_numpy(rng.permutation(30)[None, :12])
    value = torch.from_numpy(rng.integers(0, 11, (1, 12)))
    return entity, value


def by_hand(network: Mulan, entity: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Hidden states of one sentence in plain float64 numpy, word by word, from the publication's description."""
    c = network.config
    w = {name: p.detach().double().numpy() for name, p in network.state_dict().items()}

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["word.weight"][entity] + w["level.weight"][value]
    if c.set_state:
        state = np.zeros_like(x)
        words = w["set_state.word.weight"][entity]
        for t in range(len(x)):
            said = np.arange(len(x)) <= t
            genes, others = said & (value > 0), said & (value == 0)
            n = genes.sum()
            expressed = (words * w["set_state.gain.weight"][value])[genes].sum(0) / np.sqrt(n + 1)
            summary = norm(expressed, "set_state.norm") * n / (n + 32), words[others].sum(0)
            state[t] = linear(np.concatenate([*summary, [np.log(n + 1) - 4, n / 512]]), "set_state.out")
        x = x + state
    size = c.width // c.heads
    for i in range(c.layers):
        q, k, v = np.split(linear(norm(x, f"blocks.{i}.norm_1"), f"blocks.{i}.attention.qkv"), 3, axis=1)
        y = np.zeros_like(x)
        for t in range(len(x)):
            for h in range(c.heads):
                part = slice(h * size, (h + 1) * size)
                score = k[: t + 1, part] @ q[t, part] / np.sqrt(size)
                weight = np.exp(score - score.max())
                y[t, part] = weight @ v[: t + 1, part] / weight.sum()
        x = x + linear(y, f"blocks.{i}.attention.out")
        up = linear(norm(x, f"blocks.{i}.norm_2"), f"blocks.{i}.up")
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + linear(gelu, f"blocks.{i}.down")
    return norm(x, "norm")


def test_hidden_states_are_those_of_the_formula(make_network, shape, sentence):
    network = make_network(**shape)
    with torch.inference_mode():
        found = network(*sentence)[0].numpy()
    np.testing.assert_allclose(found, by_hand(network, *(s[0].numpy() for s in sentence)), atol=2e-5)


# First three logits, then first three expected bins, after the last word.
GOLDEN = {
    "published": [-0.842977, -0.755293, 3.211458, -1.718954, 4.216550, -1.904810],
    "bias": [0.399328, 2.351888, -2.247175, 2.381842, 0.259411, 3.839531],
    "own": [0.950256, -2.394991, 1.890074, 3.747219, 6.380021, 4.134394],
}


@pytest.mark.parametrize("name", SHAPES)
def test_golden_outputs(make_network, sentence, name):
    network = make_network(**SHAPES[name])
    with torch.inference_mode():
        last = network(*sentence)[0, -1]
        logits, values = network.entity_logits(last)[:3], network.value_mean(last)[:3]
    np.testing.assert_allclose(torch.cat((logits, values)).numpy(), GOLDEN[name], rtol=0, atol=5e-6)


def test_published_shape_has_368_800_320_parameters():
    with torch.device("meta"):
        network = Mulan(PUBLISHED)
    assert sum(p.numel() for p in network.parameters()) == 368_800_320


# -- properties -----------------------------------------------------------------------------------------------------


def test_a_word_never_sees_what_comes_after_it(make_network, shape, sentence):
    network = make_network(**shape)
    entity, value = sentence
    changed = entity.clone(), value.clone()
    changed[0][0, 7:], changed[1][0, 7:] = 3, 9
    with torch.inference_mode():
        before, after = network(entity, value)[0], network(*changed)[0]
    np.testing.assert_allclose(after[:7].numpy(), before[:7].numpy(), atol=1e-6)
    assert (after[7:] - before[7:]).abs().amax(1).min() > 1e-3


def test_no_position_is_encoded(make_network):
    """The same word over and over gives the same state at each place: attention averages equal vectors."""
    network = make_network()
    with torch.inference_mode():
        hidden = network(torch.full((1, 9), 4), torch.full((1, 9), 7))[0]
    np.testing.assert_allclose(hidden.numpy(), hidden[:1].expand(9, -1).numpy(), atol=1e-5)


def test_set_state_tells_how_many_genes_there_are(make_network):
    """What attention, being an average, cannot."""
    network = make_network(set_state=True)
    with torch.inference_mode():
        hidden = network(torch.full((1, 9), 4), torch.full((1, 9), 7))[0]
    assert (hidden[1:] - hidden[:-1]).abs().amax(1).min() > 1e-3


def test_one_layer_reads_a_set(make_network, sentence):
    """Where no word has been mixed with its predecessors yet, the order of what a word looks back at is no matter."""
    entity, value = sentence
    order = torch.tensor([*np.random.default_rng(5).permutation(11), 11])
    with torch.inference_mode():
        one, two = (make_network(layers=n) for n in (1, 2))
        np.testing.assert_allclose(
            one(entity[:, order], value[:, order])[0, -1].numpy(), one(entity, value)[0, -1].numpy(), atol=1e-5
        )
        apart = (two(entity[:, order], value[:, order])[0, -1] - two(entity, value)[0, -1]).abs().max()
    assert apart > 1e-3  # hence genes are shuffled in training


def test_set_state_does_not_depend_on_order(make_network, sentence):
    entity, value = sentence
    order = torch.from_numpy(np.random.default_rng(5).permutation(12))
    state = make_network(set_state=True).set_state
    with torch.inference_mode():
        given, bag = state(entity, value, None)
        shuffled, bag_shuffled = state(entity[:, order], value[:, order], None)
    np.testing.assert_allclose(bag_shuffled[0, -1].numpy(), bag[0, -1].numpy(), atol=1e-5)
    np.testing.assert_allclose(shuffled[0, -1].numpy(), given[0, -1].numpy(), atol=1e-5)


def test_set_state_weighs_genes_by_their_value_and_keeps_other_words_apart(make_network):
    """A gene's contribution is its vector times the gain of its bin, as in a linear model of expression."""
    state = make_network(set_state=True).set_state
    entity = torch.tensor([[3, 5, 8]])
    with torch.inference_mode():
        low, high = (state(entity, torch.tensor([[v, 6, 0]]), None)[1][0, -1] for v in (2, 8))
        gain = state.gain.weight[8] - state.gain.weight[2]
        np.testing.assert_allclose((high - low)[:16].numpy(), (state.word.weight[3] * gain).numpy(), atol=1e-6)
        np.testing.assert_allclose(low[16:32].numpy(), state.word.weight[8].numpy(), atol=1e-6)
        assert (high - low)[16:].abs().max() == 0
        assert low[32] == 2


def test_padding_and_neighbours_do_not_matter(make_network, shape):
    network = make_network(**shape)
    rng = np.random.default_rng(2)
    entity, value = (torch.from_numpy(rng.integers(0, n, (4, 10))) for n in (30, 11))
    with torch.inference_mode():
        together = network(entity, value)
        for i, n in enumerate((1, 4, 7, 10)):
            alone = network(entity[i : i + 1, :n], value[i : i + 1, :n])[0]
            np.testing.assert_allclose(together[i, :n].numpy(), alone.numpy(), atol=1e-5)


# -- values ---------------------------------------------------------------------------------------------------------


def test_level_probabilities_sum_to_one(make_network):
    network = make_network(value_spread=True)
    mean = torch.tensor([-50.0, -1.0, 0.5, 1.0, 5.3, 10.0, 12.0, 70.0])[:, None].expand(8, 30)
    with torch.no_grad():
        network.log_scale.copy_(torch.linspace(-4, 3, 30))
    logs = network.level_log_probs(mean, torch.arange(30).expand(8, 30))
    assert logs.shape == (8, 30, 10)
    assert logs.isfinite().all()
    np.testing.assert_allclose(logs.exp().sum(-1).detach().numpy(), 1.0, atol=1e-5)
    logs.sum().backward()
    assert network.log_scale.grad.isfinite().all()


def test_level_probabilities_follow_mean_and_scale(make_network):
    network = make_network(value_spread=True)
    with torch.no_grad():
        network.log_scale.fill_(-3.0)
        sharp = network.level_log_probs(torch.tensor([3.0, 7.2, -4.0, 30.0]), torch.zeros(4, dtype=torch.int64)).exp()
        network.log_scale.fill_(2.0)
        wide = network.level_log_probs(torch.tensor([3.0]), torch.zeros(1, dtype=torch.int64)).exp()
    assert sharp.argmax(-1).tolist() == [2, 6, 0, 9]  # bins are numbered from 1
    assert sharp.max(-1).values.min() > 0.99
    assert wide.max() < 0.5


# -- making one -----------------------------------------------------------------------------------------------------


def test_initialisation_is_a_function_of_the_seed():
    config = MulanConfig(vocabulary=50, layers=2, heads=2, width=32, set_state=True, value_spread=True)
    first, again, other = (Mulan(config).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["word.weight"], other["word.weight"])


def test_initialisation_scales():
    state = Mulan(MulanConfig(vocabulary=500, layers=8, heads=2, width=64)).initialise(0).state_dict()
    assert state["word.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.3.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.3.down.weight"].std().item() == pytest.approx(0.005, rel=0.05)  # 0.02 / √(2 × 8 layers)
    assert (state["blocks.3.norm_1.weight"] == 1).all()
    assert (state["norm.weight"] == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"layers": 0}, "layers is 0"), ({"heads": 3, "width": 16}, "16 is not a multiple of its 3 heads")],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        MulanConfig(**settings)


def test_config_survives_json_and_refuses_what_it_does_not_know():
    config = MulanConfig(layers=3, set_state=True)
    assert MulanConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelError, match="'rotary'"):
        MulanConfig.from_json({**config.to_json(), "rotary": True})

"""Drafted tokens are kept exactly as often as decoding token by token would have drawn them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from scmulan.generate.decoding import CellDecoder, DecodingConfig
from scmulan.generate.noise import N_CANDIDATES, NoiseBuffer
from scmulan.generate.sampling import GumbelSampler
from scmulan.generate.speculative import MAX_DRAFT_LENGTH, DraftLength, DraftModel, expected_tokens
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.vocabulary import Family, Vocabulary

GENES, LEVELS = 4, 2
N = 5000


def tiny(*, bounded, seed=0, genes=GENES, levels=LEVELS, width=8):
    """Random model, small enough to list all its sentences, whose next token depends much on the tokens before."""
    vocabulary = Vocabulary.build([f"G{i}" for i in range(genes)], {})
    config = MulanConfig(
        vocabulary=len(vocabulary),
        layers=1,
        heads=2,
        width=width,
        levels=levels,
        set_state=True,
        value_spread=True,
        bounded_genes=bounded,
        word_bias=True,
    )
    network = Mulan(config).initialise(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
        network.value_bias.fill_((levels + 1) / 2)
        network.value_head.weight *= 2
        network.entity_bias[vocabulary.end] -= 2
    return SimpleNamespace(network=network, vocabulary=vocabulary, config=config, card={})


def prompt(model):
    return np.array([model.vocabulary.prompts["generate"]])


def weights(model, rule, logits):
    """Weight of each token, by the definition of the rule."""
    v = model.vocabulary
    tokens = [*v.ids(Family.GENE).tolist(), *([] if rule == "set" else [v.end])]
    bounded = rule == "set" or model.config.bounded_genes
    return {t: float(logits[t].sigmoid() if bounded and t != v.end else logits[t].exp()) for t in tokens}


@torch.inference_mode()
def sentence_probabilities(model, rule):
    """Probability of every whole sentence of (token, value) pairs by the chain rule, without cache and sampling."""
    network, end = model.network, model.vocabulary.end
    genes = model.vocabulary.ids(Family.GENE).tolist()
    start = prompt(model).tolist()

    def hidden_after(pairs):
        entity, value = [*start, *(t for t, _ in pairs)], [0] * len(start) + [v for _, v in pairs]
        return network(torch.tensor([entity]), torch.tensor([value]))[0, -1]

    if rule == "set":
        number = {0: 1.0}
        for t in genes:
            p = float(network.entity_logits(hidden_after(()))[t].sigmoid())
            number = {n: number.get(n, 0.0) * (1 - p) + number.get(n - 1, 0.0) * p for n in range(len(genes) + 1)}
        number[1] += number.pop(0)
        ends = {n: number[n] / sum(p for m, p in number.items() if m >= n) for n in number}
    out = {}
    queue = [((), 1.0)]
    while queue:
        pairs, probability = queue.pop()
        hidden = hidden_after(pairs)
        if rule == "set" and pairs:
            out[pairs] = probability * ends[len(pairs)]
            probability *= 1 - ends[len(pairs)]
        weight = weights(model, rule, network.entity_logits(hidden))
        weight = {t: w for t, w in weight.items() if t not in [other for other, _ in pairs]}
        for t, w in weight.items():
            next_probability = probability * w / sum(weight.values())
            if t == end:
                out[pairs] = next_probability
                continue
            levels = network.level_log_probs(network.value_mean(hidden)[t], torch.tensor(t)).exp()
            queue += [((*pairs, (t, i + 1)), next_probability * float(p)) for i, p in enumerate(levels)]
    assert sum(out.values()) == pytest.approx(1, abs=1e-4)
    return out


def p_value(model, rule, draft, n, seed, *, decoder_type=CellDecoder, draft_model=None, **options):
    """p-value of decoded sentences against their exact probabilities, all outcomes counted."""
    decoder = decoder_type(model, DecodingConfig(rule=rule, draft=draft, batch_size=1500), **options)
    if draft_model is not None:
        decoder.draft_model = draft_model(model.network)
    cells = decoder.decode([prompt(model)], [(0, i) for i in range(n)], seed=seed)
    seen = {}
    for i in range(n):
        entity, value = cells[i]
        pairs = tuple(zip(entity[1:].tolist(), value[1:].tolist(), strict=True))
        seen[pairs] = seen.get(pairs, 0) + 1
    probabilities = sentence_probabilities(model, rule)
    probabilities = {(*pairs, (model.vocabulary.end, 0)): p for pairs, p in probabilities.items()}
    if not set(seen) <= set(probabilities):
        return 0.0
    likely = [pairs for pairs, p in probabilities.items() if p * n >= 5]
    observed = [seen.get(pairs, 0) for pairs in likely]
    expected = [probabilities[pairs] * n for pairs in likely]
    rest = n - sum(expected)
    if rest > 5:
        observed, expected = [*observed, n - sum(observed)], [*expected, rest]
    expected = np.array(expected) * sum(observed) / sum(expected)
    assert len(expected) > 25
    return chisquare(observed, expected).pvalue


CASES = [("softmax", True, 1), ("softmax", True, 3), ("softmax", True, 8), ("softmax", False, 8), ("set", False, 3)]


@pytest.mark.parametrize(("rule", "bounded", "draft"), CASES)
def test_whole_sentences_come_with_their_exact_probabilities(rule, bounded, draft):
    """Eight tokens are more than there are, end token included: drafts run past the last token."""
    assert p_value(tiny(bounded=bounded), rule, draft, N, seed=draft) > 1e-3


@pytest.mark.parametrize("rule", ["softmax", "set"])
def test_tokens_that_their_candidates_leave_undecided_are_finished(rule):
    assert p_value(tiny(bounded=True), rule, 3, N, seed=21, n_candidates=2) > 1e-3


def test_undecided_rows_pause_between_checks_and_continue():
    """As on a device that the host does not wait for: several passes between two looks."""
    assert p_value(tiny(bounded=True), "softmax", 2, N, seed=22, n_candidates=2, passes_per_check=4) > 1e-3


class AnythingIsRight(CellDecoder):
    @staticmethod
    def accepts(token, value, true_token, true_value):
        return torch.ones_like(token, dtype=torch.bool)


class ValuesDoNotMatter(CellDecoder):
    @staticmethod
    def accepts(token, value, true_token, true_value):
        return token == true_token


class TokensDoNotMatter(CellDecoder):
    @staticmethod
    def accepts(token, value, true_token, true_value):
        return value == true_value


class LowestValues(DraftModel):
    def draft(self, sampler, *args, **options):
        tokens, values = super().draft(sampler, *args, **options)
        values[:, 1:] = tokens[:, 1:] != sampler.end
        return tokens, values


class TokensInOrder(DraftModel):
    """The first token, then the others in the order of the vocabulary, the end token last."""

    def draft(self, sampler, noise, excluded, mean, mean_input, token, value, *, sample_values):
        others = [[t for t in (1, 2, 3, 4, 0) if t != first] for first in token.tolist()]
        tokens = torch.cat((token[:, None], torch.tensor(others)[:, : noise.candidates.shape[1]]), 1)
        return tokens, self.draft_values(mean, mean_input, tokens, value, noise.values, sampler.end)


@pytest.mark.parametrize("poor", [TokensInOrder, LowestValues])
def test_what_is_kept_is_exact_however_poor_the_drafts(poor):
    assert p_value(tiny(bounded=True), "softmax", 4, N, seed=2, draft_model=poor) > 1e-3


@pytest.mark.parametrize(
    ("wrong", "poor"),
    [(AnythingIsRight, TokensInOrder), (ValuesDoNotMatter, LowestValues), (TokensDoNotMatter, TokensInOrder)],
)
def test_a_wrong_rule_of_acceptance_is_found_out(wrong, poor):
    assert p_value(tiny(bounded=True), "softmax", 4, N, seed=2, decoder_type=wrong, draft_model=poor) < 1e-6


@pytest.fixture(scope="module")
def wide():
    """Model of 60 genes, whose draft model learns while it decodes."""
    return tiny(bounded=True, genes=60, levels=10, width=16)


def decode(model, draft, n=20, **settings):
    decoder = CellDecoder(model, DecodingConfig(draft=draft, **settings))
    cells = decoder.decode([prompt(model)], [(0, i) for i in range(n)], seed=4)
    return [(cells[i][0].tolist(), cells[i][1].tolist()) for i in range(n)], decoder.stats


@pytest.mark.parametrize("rule", ["softmax", "set", "release"])
def test_cells_do_not_depend_on_the_draft_length(wide, rule):
    one_by_one, stats = decode(wide, 1, rule=rule)
    assert stats.tokens_per_pass == 1
    for draft in (2, 5, 32, None):
        cells, stats = decode(wide, draft, rule=rule)
        assert cells == one_by_one
        assert stats.tokens == sum(len(entity) - 1 - (rule == "set") for entity, _ in cells)
        assert stats.tokens_per_pass > 1.2


@pytest.mark.parametrize(("rule", "temperature"), [("softmax", 0.5), ("softmax", 1e-6), ("set", 1e-6)])
@torch.inference_mode()
def test_temperature(wide, rule, temperature):
    cells, _ = decode(wide, 6, n=4, rule=rule, temperature=temperature, sample_values=False)
    assert cells == decode(wide, 1, n=4, rule=rule, temperature=temperature, sample_values=False)[0]
    if temperature > 0.1:
        return
    v = wide.vocabulary
    for entity, value in cells:  # greedy: the most probable token every time, with its mean value
        for t in range(1, len(entity) - (rule == "set")):
            hidden = wide.network(torch.tensor([entity[:t]]), torch.tensor([value[:t]]))[0, -1]
            weight = weights(wide, rule, wide.network.entity_logits(hidden))
            token = max((other for other in weight if other not in entity[:t]), key=weight.__getitem__)
            assert entity[t] == token
            level = 0 if token == v.end else int(wide.network.value_mean(hidden)[token].round().clamp(0, 10))
            assert value[t] == level


@pytest.fixture
def fitted(wide):
    """Draft model fitted to hidden states that are a mean plus a linear image of the input, as it supposes."""
    draft_model = DraftModel(wide.network, ridge=1e-6)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(16, 16, generator=generator)
    token = torch.randint(1, 61, (2000,), generator=generator)
    value = torch.randint(1, 11, (2000,), generator=generator)
    with torch.inference_mode():
        inputs = draft_model.inputs(token, value)
        mean_input = inputs.mean(0)
        draft_model.update((inputs - mean_input) @ matrix, inputs - mean_input, n_tokens=1000)
    return draft_model, matrix, mean_input


@torch.inference_mode()
def test_values_are_predicted_from_the_token_before(fitted, wide):
    draft_model, matrix, mean_input = fitted
    network = wide.network
    mean = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    tokens, first = torch.tensor([[7, 9, 11, 13, 15]]), torch.tensor([3])
    noise = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(2))
    values = draft_model.draft_values(mean, mean_input[None], tokens, first, noise, end=0)[0].tolist()
    expected = [3]
    for j in range(4):
        hidden = mean + (draft_model.inputs(tokens[:, j], torch.tensor(expected[-1:])) - mean_input) @ matrix
        mean_value = network.value_mean_of(hidden, tokens[:, j + 1])
        expected.append(int((network.level_log_probs(mean_value, tokens[:, j + 1]) + noise[:, j]).argmax()) + 1)
    assert values == expected
    unfitted = DraftModel(network)
    assert values != unfitted.draft_values(mean, mean_input[None], tokens, first, noise, end=0)[0].tolist()


@pytest.mark.parametrize("sample_values", [True, False])
@torch.inference_mode()
def test_compiled_drafts_are_what_the_predicted_states_give(fitted, wide, sample_values):
    draft_model, matrix, mean_input = fitted
    genes, end, B, J = wide.vocabulary.ids(Family.GENE), wide.vocabulary.end, 30, 6
    sampler = GumbelSampler(wide.network, "softmax", 1.0, genes=genes, end=end)
    buffer = NoiseBuffer(
        B, genes, end, levels=10, vocabulary=len(wide.vocabulary), lazy=True, capacity=64, device=torch.device("cpu")
    )
    for row in range(B):
        buffer.start(row, 1, row)
    buffer.fill(np.zeros(B, dtype=np.int64), 8)
    noise = buffer.read(torch.zeros(B, dtype=torch.int64), 1, J)
    excluded = torch.zeros(B, len(wide.vocabulary), dtype=torch.bool)
    mean = torch.randn(B, 16, generator=torch.Generator().manual_seed(1))
    first, value, means = torch.arange(B) % 40 + 3, torch.arange(B) % 10 + 1, mean_input.expand(B, -1)
    assert sampler.compiled and noise.candidates.shape[2] == N_CANDIDATES + 1
    tokens, values = draft_model.draft(sampler, noise, excluded, mean, means, first, value, sample_values=sample_values)
    assert (tokens[:, 0] == first).all() and (values[:, 0] == value).all()
    assert all(len(set(row)) == J + 1 for row in tokens.tolist())
    hidden = mean[:, None] + (draft_model.inputs(tokens, values)[:, :-1] - mean_input) @ matrix
    expected, decided = sampler.sample(hidden, noise, excluded, tokens, 1)
    assert decided.float().mean() > 0.5 and ((tokens[:, 1:] == expected)[decided]).float().mean() > 0.99
    value_noise = noise.values if sample_values else None
    predicted = draft_model.draft_values(mean, means, tokens, value, value_noise, end)
    assert (predicted == values).float().mean() > 0.99


def simulate(draft_length, acceptance, start, slope, passes=200):
    for _ in range(passes):
        k = draft_length.next()
        accepted = sum(acceptance**j for j in range(1, k))
        verified = sum(acceptance ** (j - 1) for j in range(1, k))
        seconds = start + slope * k
        draft_length.update(
            k, seconds, passes=1, row_passes=1, tokens=1 + accepted, verified=verified, accepted=accepted
        )
    return draft_length.best()


@pytest.mark.parametrize(("acceptance", "start", "slope"), [(0.9, 1.0, 0.1), (0.9, 0.05, 1.0), (0.97, 5.0, 0.01)])
def test_the_draft_length_with_most_tokens_per_second_is_found(acceptance, start, slope):
    speed = {k: expected_tokens(acceptance, k) / (start + slope * k) for k in range(1, MAX_DRAFT_LENGTH + 1)}
    found = simulate(DraftLength(None), acceptance, start, slope)
    assert speed[found] >= 0.97 * max(speed.values())


def test_the_draft_length_follows_a_machine_that_changes():
    draft_length = DraftLength(None)
    simulate(draft_length, 0.95, 5.0, 0.01)
    assert draft_length.best() >= 16
    assert simulate(draft_length, 0.95, 0.01, 1.0) <= 2


def test_expected_tokens():
    assert expected_tokens(0.5, 3) == pytest.approx(1.75)
    assert expected_tokens(1.0, 8) == 8
    assert list(itertools.accumulate([1, 0.5, 0.25]))[-1] == expected_tokens(0.5, 3)

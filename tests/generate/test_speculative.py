"""Drafted words are kept exactly as often as writing word by word would have said them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from scmulan.generate import decoding, speculative
from scmulan.generate import noise as noise_module
from scmulan.generate.decoding import CellDecoder, DecodingConfig
from scmulan.generate.sampling import GumbelSampler
from scmulan.generate.speculative import MOST, DraftLength, DraftModel, expected_words
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.vocabulary import Family, Vocabulary

GENES, LEVELS = 4, 2
N = 5000


def tiny(*, bounded, seed=0, genes=GENES, levels=LEVELS, width=8):
    """Random model, small enough to list all it can say, whose next word depends much on the words before."""
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
    """Chance of each word, by the definition of the rule, of words that have not been said."""
    v = model.vocabulary
    words = [*v.ids(Family.GENE).tolist(), *([] if rule == "set" else [v.end])]
    bounded = rule == "set" or model.config.bounded_genes
    return {w: float(logits[w].sigmoid() if bounded and w != v.end else logits[w].exp()) for w in words}


@torch.inference_mode()
def chances(model, rule):
    """Probability of every whole sentence of (word, value) pairs by the chain rule, without cache and sampling."""
    network, end = model.network, model.vocabulary.end
    genes = model.vocabulary.ids(Family.GENE).tolist()
    ask = prompt(model).tolist()

    def state(said):
        entity, value = [*ask, *(w for w, _ in said)], [0] * len(ask) + [v for _, v in said]
        return network(torch.tensor([entity]), torch.tensor([value]))[0, -1]

    if rule == "set":
        number = {0: 1.0}
        for w in genes:
            chance_of = float(network.entity_logits(state(()))[w].sigmoid())
            number = {
                n: number.get(n, 0.0) * (1 - chance_of) + number.get(n - 1, 0.0) * chance_of
                for n in range(len(genes) + 1)
            }
        number[1] += number.pop(0)
        ends = {n: number[n] / sum(p for m, p in number.items() if m >= n) for n in number}
    out = {}
    line = [((), 1.0)]
    while line:
        said, chance_of = line.pop()
        hidden = state(said)
        if rule == "set" and said:
            out[said] = chance_of * ends[len(said)]
            chance_of *= 1 - ends[len(said)]
        weight = weights(model, rule, network.entity_logits(hidden))
        weight = {w: x for w, x in weight.items() if w not in [a for a, _ in said]}
        for w, x in weight.items():
            next_chance = chance_of * x / sum(weight.values())
            if w == end:
                out[said] = next_chance
                continue
            levels = network.level_log_probs(network.value_mean(hidden)[w], torch.tensor(w)).exp()
            line += [((*said, (w, i + 1)), next_chance * float(p)) for i, p in enumerate(levels)]
    assert sum(out.values()) == pytest.approx(1, abs=1e-4)
    return out


def surprise(model, rule, draft, n, seed, **settings):
    """p-value of the sentences written against their exact chances, all outcomes counted."""
    config = DecodingConfig(rule=rule, draft=draft, batch=1500, **settings)
    cells = CellDecoder(model, config).write([prompt(model)], [(0, i) for i in range(n)], seed=seed)
    seen = {}
    for i in range(n):
        entity, value = cells[i]
        said = tuple(zip(entity[1:].tolist(), value[1:].tolist(), strict=True))
        seen[said] = seen.get(said, 0) + 1
    expected = {(*said, (model.vocabulary.end, 0)): p for said, p in chances(model, rule).items()}
    if not set(seen) <= set(expected):
        return 0.0
    likely = [s for s, p in expected.items() if p * n >= 5]
    observed = [seen.get(s, 0) for s in likely]
    wanted = [expected[s] * n for s in likely]
    rest = n - sum(wanted)
    if rest > 5:
        observed, wanted = [*observed, n - sum(observed)], [*wanted, rest]
    wanted = np.array(wanted) * sum(observed) / sum(wanted)
    assert len(wanted) > 25
    return chisquare(observed, wanted).pvalue


CASES = [("softmax", True, 1), ("softmax", True, 3), ("softmax", True, 8), ("softmax", False, 8), ("set", False, 3)]


@pytest.mark.parametrize(("rule", "bounded", "draft"), CASES)
def test_whole_sentences_come_with_their_exact_chances(rule, bounded, draft):
    """Eight words are more than there are, end word included: drafts run past the last word."""
    assert surprise(tiny(bounded=bounded), rule, draft, N, seed=draft) > 1e-3


@pytest.mark.parametrize("rule", ["softmax", "set"])
def test_races_that_their_list_leaves_open_are_run_to_the_end(monkeypatch, rule):
    monkeypatch.setattr(noise_module, "VISITS", 2)
    assert surprise(tiny(bounded=True), rule, 3, N, seed=21) > 1e-3


def test_hidden_passes_pause_and_go_on(monkeypatch):
    """As on a device that is not waited for: several passes between looks, rows with an open race pause."""
    monkeypatch.setattr(noise_module, "VISITS", 2)
    original = CellDecoder._passes
    monkeypatch.setattr(CellDecoder, "_passes", lambda self, places, number: original(self, places, 4))
    assert surprise(tiny(bounded=True), "softmax", 2, N, seed=22) > 1e-3


WRONG = {
    "anything is right": lambda word, value, true_word, true_value: torch.ones_like(word, dtype=torch.bool),
    "values do not matter": lambda word, value, true_word, true_value: word == true_word,
    "words do not matter": lambda word, value, true_word, true_value: value == true_value,
}


def lowest_values(self, race, draws, said, mean, mean_input, word, value, *, values_drawn, guess=DraftModel.guess):
    words, values = guess(self, race, draws, said, mean, mean_input, word, value, values_drawn=values_drawn)
    values[:, 1:] = words[:, 1:] != race.end
    return words, values


def words_in_order(self, race, draws, said, mean, mean_input, word, value, *, values_drawn):
    """The first word, then the others in the order of the vocabulary, the end word last."""
    others = [[w for w in (1, 2, 3, 4, 0) if w != first] for first in word.tolist()]
    words = torch.cat((word[:, None], torch.tensor(others)[:, : draws.words.shape[1]]), 1)
    return words, self.values(mean, mean_input, words, value, draws.values, race.end)


POOR = {"words": words_in_order, "values": lowest_values}


@pytest.mark.parametrize("poor", list(POOR))
def test_what_is_kept_is_exact_however_poor_the_guesses(monkeypatch, poor):
    monkeypatch.setattr(DraftModel, "guess", POOR[poor])
    assert surprise(tiny(bounded=True), "softmax", 4, N, seed=2) > 1e-3


@pytest.mark.parametrize(
    ("wrong", "poor"),
    [("anything is right", "words"), ("values do not matter", "values"), ("words do not matter", "words")],
)
def test_a_wrong_rule_of_acceptance_is_found_out(monkeypatch, wrong, poor):
    monkeypatch.setattr(DraftModel, "guess", POOR[poor])
    monkeypatch.setattr(decoding, "agrees", WRONG[wrong])
    assert surprise(tiny(bounded=True), "softmax", 4, N, seed=2) < 1e-6


@pytest.fixture(scope="module")
def wide():
    """Model of 60 genes, whose outlook learns while it writes."""
    return tiny(bounded=True, genes=60, levels=10, width=16)


def written(model, draft, n=20, **settings):
    writer = CellDecoder(model, DecodingConfig(draft=draft, **settings))
    cells = writer.write([prompt(model)], [(0, i) for i in range(n)], seed=4)
    return [(cells[i][0].tolist(), cells[i][1].tolist()) for i in range(n)], writer.tally


@pytest.mark.parametrize("rule", ["softmax", "set", "release"])
def test_cells_do_not_depend_on_the_number_drafted(wide, rule):
    alone, tally = written(wide, 1, rule=rule)
    assert tally.words_per_pass == 1
    for draft in (2, 5, 32, None):
        cells, tally = written(wide, draft, rule=rule)
        assert cells == alone
        assert tally.words == sum(len(entity) - 1 - (rule == "set") for entity, _ in cells)
        assert tally.words_per_pass > 1.2


@pytest.mark.parametrize(("rule", "temperature"), [("softmax", 0.5), ("softmax", 1e-6), ("set", 1e-6)])
@torch.inference_mode()
def test_temperature(wide, rule, temperature):
    cells, _ = written(wide, 6, n=4, rule=rule, temperature=temperature, sample_values=False)
    assert cells == written(wide, 1, n=4, rule=rule, temperature=temperature, sample_values=False)[0]
    if temperature > 0.1:
        return
    v = wide.vocabulary
    for entity, value in cells:  # greedy: the likeliest word every time, with its mean value
        for t in range(1, len(entity) - (rule == "set")):
            hidden = wide.network(torch.tensor([entity[:t]]), torch.tensor([value[:t]]))[0, -1]
            weight = weights(wide, rule, wide.network.entity_logits(hidden))
            word = max((w for w in weight if w not in entity[:t]), key=weight.__getitem__)
            assert entity[t] == word
            level = 0 if word == v.end else int(wide.network.value_mean(hidden)[word].round().clamp(0, 10))
            assert value[t] == level


@pytest.fixture
def taught(wide, monkeypatch):
    """Outlook that has seen states which are a mean plus a linear image of the input, as it supposes."""
    monkeypatch.setattr(speculative, "RIDGE", 1e-6)
    outlook = DraftModel(wide.network)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(16, 16, generator=generator)
    word = torch.randint(1, 61, (2000,), generator=generator)
    value = torch.randint(1, 11, (2000,), generator=generator)
    with torch.inference_mode():
        inputs = outlook.inputs(word, value)
        mean_input = inputs.mean(0)
        outlook.learn((inputs - mean_input) @ matrix, inputs - mean_input, words=1000)
    return outlook, matrix, mean_input


@torch.inference_mode()
def test_values_are_foreseen_from_the_word_before(taught, wide):
    outlook, matrix, mean_input = taught
    network = wide.network
    mean = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    drafted = torch.tensor([[7, 9, 11, 13, 15]])
    noise = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(2))
    found = outlook.values(mean, mean_input[None], drafted, torch.tensor([3]), noise, end=0)
    expected = [3]
    for j in range(4):
        state = mean + (outlook.inputs(drafted[:, j], torch.tensor(expected[-1:])) - mean_input) @ matrix
        mean_value = network.value_mean_of(state, drafted[:, j + 1])
        expected.append(int((network.level_log_probs(mean_value, drafted[:, j + 1]) + noise[:, j]).argmax()) + 1)
    assert found[0].tolist() == expected
    outlook.effect = None
    assert found[0].tolist() != outlook.values(mean, mean_input[None], drafted, torch.tensor([3]), noise, 0)[0].tolist()


@pytest.mark.parametrize("values_drawn", [True, False])
@torch.inference_mode()
def test_the_compiled_guess_is_what_the_foreseen_states_say(taught, wide, values_drawn):
    outlook, matrix, mean_input = taught
    genes, B, J = wide.vocabulary.ids(Family.GENE), 30, 6
    race = GumbelSampler(wide.network, "softmax", 1.0, genes=genes, end=wide.vocabulary.end)
    source = noise_module.NoiseBuffer(
        B, genes, race.end, levels=10, vocabulary=len(wide.vocabulary), listed=True, ring=64, device=torch.device("cpu")
    )  # fmt: skip
    for row in range(B):
        source.seat(row, 1, row)
    source.provide(np.zeros(B, dtype=np.int64), 8)
    draws = source.at(torch.zeros(B, dtype=torch.int64), 1, J)
    said = torch.zeros(B, len(wide.vocabulary), dtype=torch.bool)
    mean = torch.randn(B, 16, generator=torch.Generator().manual_seed(1))
    first, value, means = torch.arange(B) % 40 + 3, torch.arange(B) % 10 + 1, mean_input.expand(B, -1)
    assert race.compiled
    words, values = outlook.guess(race, draws, said, mean, means, first, value, values_drawn=values_drawn)
    assert (words[:, 0] == first).all() and (values[:, 0] == value).all()
    assert all(len(set(row)) == J + 1 for row in words.tolist())
    states = mean[:, None] + (outlook.inputs(words, values)[:, :-1] - mean_input) @ matrix
    wanted, closed = race.winners(states, draws, said, words, 1)
    assert closed.float().mean() > 0.5 and ((words[:, 1:] == wanted)[closed]).float().mean() > 0.99
    noise = draws.values if values_drawn else None
    foreseen = outlook.values(mean, means, words, value, noise, race.end)
    assert (foreseen == values).float().mean() > 0.99


def simulate(pace, acceptance, start, slope, passes=200):
    for _ in range(passes):
        k = pace.next()
        right = sum(acceptance**j for j in range(1, k))
        compared = sum(acceptance ** (j - 1) for j in range(1, k))
        pace.learn(k, start + slope * k, passes=1, rows=1, words=1 + right, compared=compared, right=right)
    return pace.best()


@pytest.mark.parametrize(("acceptance", "start", "slope"), [(0.9, 1.0, 0.1), (0.9, 0.05, 1.0), (0.97, 5.0, 0.01)])
def test_the_pace_finds_the_number_with_most_words_per_second(acceptance, start, slope):
    speed = {k: expected_words(acceptance, k) / (start + slope * k) for k in range(1, MOST + 1)}
    found = simulate(DraftLength(None), acceptance, start, slope)
    assert speed[found] >= 0.97 * max(speed.values())


def test_the_pace_follows_a_machine_that_changes():
    pace = DraftLength(None)
    simulate(pace, 0.95, 5.0, 0.01)
    assert pace.best() >= 16
    assert simulate(pace, 0.95, 0.01, 1.0) <= 2


def test_expected_words():
    assert expected_words(0.5, 3) == pytest.approx(1.75)
    assert expected_words(1.0, 8) == 8
    assert list(itertools.accumulate([1, 0.5, 0.25]))[-1] == expected_words(0.5, 3)

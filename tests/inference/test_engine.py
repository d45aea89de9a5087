import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from scmulan.inference.engine import buckets, score_labels
from scmulan.inference.sampling import draw_number, pick, word_weights
from scmulan.inference.writing import GenerateConfig, write_cells
from scmulan.language.sentence import Sentences
from scmulan.language.vocabulary import Family, Vocabulary
from scmulan.model.transformer import Mulan, MulanConfig


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200), st.integers(1, 9))
def test_buckets_hold_every_row_once_and_stay_within_their_size(lengths, words, most):
    lengths = np.array(lengths, dtype=np.int64)
    batches = list(buckets(lengths, words, most))
    assert sorted(np.concatenate([*batches, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) <= most
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= words


def prompts(model, n=9, seed=0):
    rng = np.random.default_rng(seed)
    genes = model.vocabulary.ids(Family.GENE)
    ask = model.vocabulary.prompts["annotate"]
    parts = []
    for _ in range(n):
        k = int(rng.integers(0, 60))
        entity = np.append(rng.permutation(genes)[:k], ask)
        parts.append((entity, np.append(rng.integers(1, 11, k), 0), k + 1))
    return Sentences.join(parts)


def test_scores_are_probabilities_and_do_not_depend_on_neighbours(random_model):
    asked = prompts(random_model)
    whole = score_labels(random_model, asked)
    alone = [score_labels(random_model, asked.take([i])) for i in range(len(asked))]
    assert np.allclose(whole.fine.sum(1), 1, atol=1e-5) and np.allclose(whole.coarse.sum(1), 1, atol=1e-5)
    for i, one in enumerate(alone):
        assert np.abs(one.fine - whole.fine[i]).max() < 1e-5
        assert np.abs(one.state - whole.state[i]).max() < 1e-5


def test_published_objective_normalises_chances_instead_of_odds(random_model):
    asked = prompts(random_model, 3)
    published = replace(random_model, card={"objective": "published"})
    odds = score_labels(random_model, asked).fine
    chances = score_labels(published, asked).fine
    ids = random_model.vocabulary.ids(Family.FINE)
    entity, value = (torch.from_numpy(a[None].astype(np.int64)) for a in asked[0])
    with torch.inference_mode():
        logits = random_model.network.entity_logits(random_model.network(entity, value)[0, -1])[ids]
    assert np.allclose(chances[0], (logits.sigmoid() / logits.sigmoid().sum()).numpy(), atol=1e-5)
    assert not np.allclose(odds[0], chances[0], atol=1e-5)


def test_same_seed_same_cells_whatever_the_batch(random_model):
    prompt = np.array([random_model.vocabulary.prompts["generate"]])
    whole = write_cells(random_model, prompt, 7, config=GenerateConfig(max_words=30, batch=7), seed=5)
    split = write_cells(random_model, prompt, 5, config=GenerateConfig(max_words=30, batch=2), seed=5)
    other = write_cells(random_model, prompt, 5, config=GenerateConfig(max_words=30, batch=2), seed=6)
    for i in range(5):
        assert np.array_equal(whole[i][0], split[i][0]) and np.array_equal(whole[i][1], split[i][1])
    assert not all(np.array_equal(whole[i][0], other[i][0]) for i in range(5))


def test_sentences_hold_genes_once_and_end_or_are_full(random_model):
    v = random_model.vocabulary
    prompt = np.array([v.id(Family.ORGAN, "Blood"), v.prompts["generate"]])
    panel = np.zeros(len(v), dtype=bool)
    panel[v.ids(Family.GENE)[:40]] = True
    for rule in ("softmax", "set", "release"):
        cells = write_cells(
            random_model, prompt, 6, config=GenerateConfig(rule=rule, max_words=25), seed=0, genes=panel
        )
        for i in range(6):
            entity, value = cells[i]
            said, levels = entity[2:], value[2:]
            assert len(set(said.tolist())) == len(said)
            genes = said[said != v.end]
            assert panel[genes].all() and len(genes) <= 25
            assert (v.end not in said[:-1]) and (levels[said == v.end] == 0).all()


def tiny(objective: str, seed: int):
    """Random model with three genes, small enough to list all it can say."""
    vocabulary = Vocabulary.build(["G1", "G2", "G3"], {})
    torch.manual_seed(seed)
    config = MulanConfig(vocabulary=len(vocabulary), layers=1, heads=1, width=8, set_state=True, value_spread=True)
    network = Mulan(config).initialise(seed).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.4)

    return SimpleNamespace(network=network, vocabulary=vocabulary, config=config, card={"objective": objective})


@torch.inference_mode()
def chance_of(model, prompt: list[int], words: list[tuple[int, int]]) -> float:
    """Probability of a whole sentence by the chain rule, without cache and sampling code."""
    said, value, chance = list(prompt), [0] * len(prompt), 1.0
    genes = model.vocabulary.ids(Family.GENE).tolist()
    for word, level in words:
        hidden = model.network(torch.tensor([said]), torch.tensor([value]))[0, -1]
        sayable = [w for w in [model.vocabulary.end, *genes] if w not in said]
        logits = model.network.entity_logits(hidden)[sayable]
        chance *= float(logits.softmax(0)[sayable.index(word)])
        if level:
            mean = model.network.value_mean(hidden)[word]
            chance *= float(model.network.level_log_probs(mean, torch.tensor(word)).exp()[level - 1])
        said.append(word)
        value.append(level)
    return chance


@pytest.mark.slow
def test_softmax_sampling_draws_whole_sentences_with_their_likelihood():
    model = tiny("next_word", 1)
    prompt = [model.vocabulary.prompts["generate"]]
    n = 4000
    cells = write_cells(model, np.array(prompt), n, config=GenerateConfig(batch=1000), seed=11)
    seen: dict[tuple[int, ...], int] = {}
    for i in range(n):
        seen[tuple(cells[i][0][1:].tolist())] = seen.get(tuple(cells[i][0][1:].tolist()), 0) + 1
    # A word's chance depends on the values before it: sum them out over a coarse sample is not exact, so compare the
    # first word with its exact chance, and every sentence of values and words with the chain rule.
    genes = model.vocabulary.ids(Family.GENE).tolist()
    first = {w: chance_of(model, prompt, [(w, 0)]) for w in [model.vocabulary.end, *genes]}
    assert sum(first.values()) == pytest.approx(1, abs=1e-5)
    counts = [sum(c for s, c in seen.items() if s[0] == w) for w in first]
    assert chisquare(counts, np.array(list(first.values())) / sum(first.values()) * n).pvalue > 1e-3
    expected: dict[tuple[int, ...], float] = {}
    for k in range(4):
        for order in itertools.permutations(genes, k):
            whole = 0.0
            for levels in itertools.product(range(1, 11), repeat=k) if k < 3 else ():
                words = [*zip(order, levels, strict=True), (model.vocabulary.end, 0)]
                whole += chance_of(model, prompt, words)
            expected[(*order, model.vocabulary.end)] = whole
    short = {s: p for s, p in expected.items() if len(s) < 4}
    rest = n - sum(seen.get(s, 0) for s in short)
    observed = [*(seen.get(s, 0) for s in short), rest]
    wanted = [*(p * n for p in short.values()), (1 - sum(short.values())) * n]
    assert chisquare(observed, np.array(wanted) * n / sum(wanted)).pvalue > 1e-3


def test_pick_draws_in_proportion_and_never_a_word_without_weight():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(1000, -1)
    u = torch.from_numpy(np.random.default_rng(0).random(1000))
    drawn = pick(weights, u)
    assert set(drawn.tolist()) == {1, 3} and 700 < int((drawn == 3).sum()) < 800
    edge = pick(weights[:2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edge.tolist() == [1, 3]


def test_set_rule_weighs_by_chance_and_softmax_by_odds():
    logits = torch.tensor([[2.0, -1.0, -torch.inf]])
    chance = word_weights(logits, "set", 1.0)
    odds = word_weights(logits, "softmax", 1.0)
    expected = torch.tensor(-1.0).sigmoid() / torch.tensor(2.0).sigmoid()
    assert float(chance[0, 1] / chance[0, 0]) == pytest.approx(float(expected))
    assert float(odds[0, 1] / odds[0, 0]) == pytest.approx(float(np.exp(-3)))
    assert chance[0, 2] == 0 and odds[0, 2] == 0


def test_number_of_words_of_published_models_follows_the_chances():
    logits = torch.tensor([[4.0] * 50 + [-torch.inf] * 50]).expand(400, -1)
    u = torch.from_numpy(np.random.default_rng(1).random((400, 100)))
    mean = float(draw_number(logits, u).double().mean())
    assert mean == pytest.approx(50 * float(torch.tensor(4.0).sigmoid()), abs=0.3)

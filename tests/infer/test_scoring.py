from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.infer.scoring import TokenBudget, buckets, last_hidden, score_labels
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family


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
        assert np.abs(one.hidden - whole.hidden[i]).max() < 1e-5


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


def test_the_last_layer_at_the_last_word_gives_what_all_positions_give(random_model):
    asked = prompts(random_model, 7)
    entity, value, lengths = (torch.from_numpy(a) for a in asked.padded())
    with torch.inference_mode():
        whole = random_model.network(entity, value)[torch.arange(7), lengths - 1]
        last = random_model.network.forward_last(entity, value, lengths)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-5)
    assert np.abs(last_hidden(random_model, asked) - whole.numpy()).max() < 1e-5


def test_fine_types_after_the_coarse_one(random_model):
    """The further word is read from the cache, for rows of different lengths; here the whole sentence is read anew."""
    asked = prompts(random_model, 6)
    found = score_labels(random_model, asked, given_coarse=True)
    plain = score_labels(random_model, asked)
    coarse, fine = (random_model.vocabulary.ids(f) for f in (Family.COARSE, Family.FINE))
    assert np.abs(found.coarse - plain.coarse).max() < 1e-5 and np.abs(found.fine - plain.fine).max() > 1e-4
    for i in range(6):
        entity, value = asked[i]
        entity = np.append(entity, coarse[plain.coarse[i].argmax()]).astype(np.int64)
        with torch.inference_mode():
            hidden = random_model.network(
                torch.from_numpy(entity)[None], torch.from_numpy(np.append(value, 0))[None].long()
            )
            expected = random_model.network.entity_logits(hidden[0, -1])[fine].softmax(0).numpy()
        assert np.abs(found.fine[i] - expected).max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 400))
def test_the_batch_does_not_matter(random_model, words):
    asked = prompts(random_model, 12, seed=1)
    one, other = score_labels(random_model, asked), score_labels(random_model, asked, budget=TokenBudget(words=words))
    assert np.abs(one.hidden - other.hidden).max() < 1e-5 and np.abs(one.fine - other.fine).max() < 1e-5
    assert np.array_equal(one.fine.argmax(1), other.fine.argmax(1))

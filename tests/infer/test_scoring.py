"""Label scores and hidden states do not depend on how sentences are batched."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.infer.batching import TokenBudget, buckets
from scmulan.infer.scoring import last_hidden, score_labels
from scmulan.vocab.vocabulary import Family


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200), st.integers(1, 9))
def test_buckets_hold_every_row_once_and_stay_within_their_size(lengths, max_tokens, max_rows):
    lengths = np.array(lengths, dtype=np.int64)
    batches = list(buckets(lengths, max_tokens, max_rows))
    assert sorted(np.concatenate([*batches, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) <= max_rows
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= max_tokens


def test_scores_are_probabilities_and_do_not_depend_on_neighbours(random_model, random_prompts):
    batch = random_prompts(random_model, 9, min_genes=0)
    whole = score_labels(random_model, batch)
    alone = [score_labels(random_model, batch.take([i])) for i in range(len(batch))]
    assert np.allclose(whole.fine.sum(1), 1, atol=1e-5) and np.allclose(whole.coarse.sum(1), 1, atol=1e-5)
    for i, one in enumerate(alone):
        assert np.abs(one.fine - whole.fine[i]).max() < 1e-5
        assert np.abs(one.hidden - whole.hidden[i]).max() < 1e-5


def test_published_objective_normalises_probabilities_instead_of_odds(random_model, random_prompts):
    batch = random_prompts(random_model, 3, min_genes=0)
    published = replace(random_model, card={"objective": "published"})
    odds = score_labels(random_model, batch).fine
    probabilities = score_labels(published, batch).fine
    ids = random_model.vocabulary.ids(Family.FINE)
    entity, value = (torch.from_numpy(a[None].astype(np.int64)) for a in batch[0])
    with torch.inference_mode():
        logits = random_model.network.entity_logits(random_model.network(entity, value)[0, -1])[ids]
    assert np.allclose(probabilities[0], (logits.sigmoid() / logits.sigmoid().sum()).numpy(), atol=1e-5)
    assert not np.allclose(odds[0], probabilities[0], atol=1e-5)


def test_forward_last_gives_what_all_positions_give(random_model, random_prompts):
    batch = random_prompts(random_model, 7, min_genes=0)
    entity, value, lengths = (torch.from_numpy(a) for a in batch.padded())
    with torch.inference_mode():
        whole = random_model.network(entity, value)[torch.arange(7), lengths - 1]
        last = random_model.network.forward_last(entity, value, lengths)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-5)
    assert np.abs(last_hidden(random_model, batch) - whole.numpy()).max() < 1e-5


def test_fine_types_after_the_coarse_one(random_model, random_prompts):
    """The coarse type is read from the cache, for rows of different lengths; here the whole sentence is read anew."""
    batch = random_prompts(random_model, 6, min_genes=0)
    found = score_labels(random_model, batch, coarse_first=True)
    plain = score_labels(random_model, batch)
    coarse, fine = (random_model.vocabulary.ids(f) for f in (Family.COARSE, Family.FINE))
    assert np.abs(found.coarse - plain.coarse).max() < 1e-5 and np.abs(found.fine - plain.fine).max() > 1e-4
    for i in range(6):
        entity, value = batch[i]
        entity = np.append(entity, coarse[plain.coarse[i].argmax()]).astype(np.int64)
        with torch.inference_mode():
            hidden = random_model.network(
                torch.from_numpy(entity)[None], torch.from_numpy(np.append(value, 0))[None].long()
            )
            expected = random_model.network.entity_logits(hidden[0, -1])[fine].softmax(0).numpy()
        assert np.abs(found.fine[i] - expected).max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 400))
def test_the_batch_does_not_matter(random_model, random_prompts, max_tokens):
    batch = random_prompts(random_model, 12, seed=1, min_genes=0)
    one, other = (
        score_labels(random_model, batch),
        score_labels(random_model, batch, budget=TokenBudget(max_tokens=max_tokens)),
    )
    assert np.abs(one.hidden - other.hidden).max() < 1e-5 and np.abs(one.fine - other.fine).max() < 1e-5
    assert np.array_equal(one.fine.argmax(1), other.fine.argmax(1))

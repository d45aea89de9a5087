import numpy as np
import pytest
import torch

from scmulan.generate.decoding import CellDecoder, DecodingConfig, decode_cells
from scmulan.generate.sampling import bounded_weights, draw_number, log_weights
from scmulan.model.kv_cache import KVCache
from scmulan.vocab.vocabulary import Family


def prompt_of(model, *tokens):
    v = model.vocabulary
    return np.array([*(v.id(family, token) for family, token in tokens), v.prompts["generate"]])


def as_lists(cells):
    return [(cells[i][0].tolist(), cells[i][1].tolist()) for i in range(len(cells))]


@pytest.mark.parametrize("rule", ["softmax", "set", "release"])
def test_rows_do_not_depend_on_batch_neighbours_or_refills(random_model, rule):
    prompts = [prompt_of(random_model), prompt_of(random_model, (Family.ORGAN, "Blood"), (Family.FINE, "B cell"))]
    rows = [(i % 3 % 2, i) for i in range(20)]
    found = {}
    for batch in (1, 3, 64):
        config = DecodingConfig(rule=rule, max_tokens=30, batch_size=batch)
        found[batch] = as_lists(CellDecoder(random_model, config).decode(prompts, rows, seed=5))
    assert found[1] == found[3] == found[64]
    for (which, _), (entity, _) in zip(rows, found[1], strict=True):
        assert entity[: len(prompts[which])] == prompts[which].tolist()  # in the order requested
    reverse = CellDecoder(random_model, DecodingConfig(rule=rule, max_tokens=30, batch_size=4)).decode(
        prompts, rows[::-1], seed=5
    )
    assert as_lists(reverse)[::-1] == found[1]


def test_seeds_differ_and_fewer_cells_are_the_first_ones(random_model):
    config = DecodingConfig(max_tokens=30, batch_size=3)
    seven, five = (
        as_lists(decode_cells(random_model, prompt_of(random_model), n, config=config, seed=5)) for n in (7, 5)
    )
    assert seven[:5] == five
    assert five != as_lists(decode_cells(random_model, prompt_of(random_model), 5, config=config, seed=6))


def test_free_slots_are_filled_at_once_and_prompts_are_read_once(random_model, monkeypatch):
    """Rows end at different times; a pass is as wide as the batch as long as rows wait."""
    network = random_model.network
    widths, prefills = [], []
    whole = network.forward

    def spy(entity, value, cache=None, new=None):
        (prefills if cache.used == 0 else widths).append(len(entity))
        return whole(entity, value, cache, new)

    monkeypatch.setattr(network, "forward", spy)
    config = DecodingConfig(rule="set", max_tokens=400, batch_size=5, draft=1)
    finished = []
    cells = decode_cells(random_model, prompt_of(random_model), 23, config=config, seed=1, advance=finished.append)
    lengths = cells.lengths - 2
    assert len(set(lengths.tolist())) > 5
    assert prefills == [1]
    assert sum(finished) == 23
    waiting = widths[: -int(lengths.max())]
    assert set(waiting) == {5} and len(waiting) > 100
    assert widths == sorted(widths, reverse=True) and widths[-1] < 5
    assert len(widths) < 1.3 * sum(lengths) / 5


def test_cache_grows_with_the_tokens(random_model, monkeypatch):
    seen = []
    network = random_model.network
    monkeypatch.setattr(network, "new_cache", lambda *a, made=network.new_cache: seen.append(made(*a)) or seen[-1])
    decode_cells(random_model, prompt_of(random_model), 3, config=DecodingConfig(max_tokens=20, batch_size=3), seed=0)
    assert all(cache.capacity <= 128 for cache in seen)


def test_no_cells(random_model):
    assert len(decode_cells(random_model, prompt_of(random_model), 0, config=DecodingConfig(), seed=0)) == 0


def test_sentences_hold_genes_once_and_end_or_are_full(random_model):
    v = random_model.vocabulary
    prompt = np.array([v.id(Family.ORGAN, "Blood"), v.prompts["generate"]])
    panel = np.zeros(len(v), dtype=bool)
    panel[v.ids(Family.GENE)[:40]] = True
    for rule in ("softmax", "set", "release"):
        cells = decode_cells(
            random_model, prompt, 6, config=DecodingConfig(rule=rule, max_tokens=25), seed=0, genes=panel
        )
        for i in range(6):
            entity, value = cells[i]
            tokens, levels = entity[2:], value[2:]
            assert len(set(tokens.tolist())) == len(tokens)
            genes = tokens[tokens != v.end]
            assert panel[genes].all() and len(genes) <= 25
            assert (v.end not in tokens[:-1]) and (levels[tokens == v.end] == 0).all()


def test_half_of_the_rows_continue_where_memory_runs_out(random_model, monkeypatch):
    reserve, refusals = KVCache.reserve, []

    def short_of_memory(self, n_tokens, max_capacity=None):
        if self.rows > 2 and len(refusals) < 2 and self.used > 10:
            refusals.append(self.rows)
            raise torch.OutOfMemoryError("out of memory")
        reserve(self, n_tokens, max_capacity)

    config = DecodingConfig(max_tokens=30, batch_size=8)
    expected = as_lists(decode_cells(random_model, prompt_of(random_model), 11, config=config, seed=5))
    monkeypatch.setattr(KVCache, "reserve", short_of_memory)
    assert as_lists(decode_cells(random_model, prompt_of(random_model), 11, config=config, seed=5)) == expected
    assert refusals == [8, 4]


def test_set_rule_weighs_by_probability_and_softmax_by_odds(random_model):
    logits = torch.tensor([[2.0, -1.0, 0.3]])
    network, end = random_model.network, random_model.vocabulary.end
    log_probability = log_weights(network, logits, "set", 1.0, end)
    assert torch.allclose(log_probability, logits.sigmoid().log())
    assert torch.allclose(log_weights(network, logits, "softmax", 1.0, end), logits)
    assert torch.allclose(log_weights(network, logits, "set", 0.5, end), 2 * log_probability)
    assert torch.allclose(log_weights(network, logits, "release", 0.5, end), 2 * logits)


def test_number_of_tokens_of_published_models_follows_the_probabilities():
    logits = torch.tensor([[4.0] * 50 + [-torch.inf] * 50]).expand(400, -1)
    u = torch.from_numpy(np.random.default_rng(1).random((400, 100)))
    mean = float(draw_number(logits, u).double().mean())
    assert mean == pytest.approx(50 * float(torch.tensor(4.0).sigmoid()), abs=0.3)


def test_bounded_weights_are_the_set_rule_and_the_odds_of_the_end():
    logits = torch.tensor([[2.0, -1.0, -200.0, 0.5]])
    ends = torch.tensor([[False, False, False, True]])
    found = bounded_weights(logits, ends)
    assert float(found[0, 3]) == pytest.approx(float(np.exp(0.5)))
    assert torch.allclose(found[:, :2], logits[:, :2].sigmoid())
    assert 0 < float(found[0, 2]) < 1e-30

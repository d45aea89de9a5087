"""Decoding from a cache gives what reading the whole sentence gives."""

from functools import partial

import numpy as np
import pytest
import torch

from scmulan.model.cpu_attention.kv_cache import TILE, CpuKVCache
from scmulan.model.kv_cache import CAPACITY_STEP, KVCache

LENGTHS = (1, 6, 3, 9)
# What each row reads after its prompt, in three calls: a row may pause, one call brings several tokens.
CALLS = ((1, 1, 1, 1), (1, 0, 3, 2), (0, 2, 1, 1))


@pytest.fixture(params=[CpuKVCache, KVCache], ids=["tiled", "plain"])
def kind(request):
    """The cache of a CPU in float32, and the one of everything else, on the CPU."""
    return request.param


@pytest.fixture(params=[False, True], ids=["published", "set_state"])
def network(request, make_network):
    return make_network(set_state=request.param)


@pytest.fixture
def new_cache(network, kind):
    return partial(network.new_cache, kind=kind)


@pytest.fixture
def sentences():
    rng = np.random.default_rng(7)
    total = [n + sum(call[i] for call in CALLS) for i, n in enumerate(LENGTHS)]
    return [tuple(torch.from_numpy(rng.integers(0, m, n)) for m in (30, 11)) for n in total]


def padded(parts, fill):
    """Rows of different lengths side by side; padding is any token, not a harmless one."""
    longest = max(len(e) for e, _ in parts)
    rows = [[torch.cat((t, torch.full((longest - len(t),), fill))) for t in pair] for pair in parts]
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


@torch.inference_mode()
def test_ragged_rows_read_step_by_step(network, new_cache, sentences):
    whole = [network(e[None], v[None])[0] for e, v in sentences]
    cache = new_cache(4, 20)
    read = [0, 0, 0, 0]
    for call in (LENGTHS, *CALLS):
        part = [(e[r : r + n], v[r : r + n]) for (e, v), r, n in zip(sentences, read, call, strict=True)]
        hidden = network(*padded(part, fill=10), cache, torch.tensor(call))
        for i, n in enumerate(call):
            np.testing.assert_allclose(hidden[i, :n].numpy(), whole[i][read[i] : read[i] + n].numpy(), atol=1e-5)
            read[i] += n
    assert cache.lengths.tolist() == [len(e) for e, _ in sentences] == read


@torch.inference_mode()
def test_a_shared_prompt_is_read_once(network, new_cache, sentences):
    """One row's cache, expanded, then different tokens in each row."""
    entity, value = sentences[3]
    cache = new_cache(1, 20)
    network(entity[None, :9], value[None, :9], cache)
    cache = cache.expand(3)
    new = torch.tensor([[4], [5], [6]])
    found = network(new, torch.tensor([[1], [2], [3]]), cache)[:, 0]
    for i in range(3):
        e, v = torch.cat((entity[:9], new[i])), torch.cat((value[:9], torch.tensor([i + 1])))
        np.testing.assert_allclose(found[i].numpy(), network(e[None], v[None])[0, -1].numpy(), atol=1e-5)


@torch.inference_mode()
def test_selected_rows_go_on_alone(network, new_cache, sentences):
    prompts = [(e[:n], v[:n]) for (e, v), n in zip(sentences, LENGTHS, strict=True)]
    cache = new_cache(4, 20)
    network(*padded(prompts, fill=10), cache, torch.tensor(LENGTHS))
    cache.select_rows([1, 3])
    assert cache.rows == 2 and cache.lengths.tolist() == [LENGTHS[1], LENGTHS[3]]
    found = network(torch.tensor([[8], [9]]), torch.tensor([[2], [5]]), cache)[:, 0]
    for row, i, token, value in ((0, 1, 8, 2), (1, 3, 9, 5)):
        e, v = (torch.cat((t, torch.tensor([x]))) for t, x in zip(prompts[i], (token, value), strict=True))
        np.testing.assert_allclose(found[row].numpy(), network(e[None], v[None])[0, -1].numpy(), atol=1e-5)


def test_capacity_and_size(make_network, kind):
    network = make_network(layers=2, heads=2, width=16)
    assert type(network.new_cache(3, 20)) is CpuKVCache
    cache = network.new_cache(3, 20, kind=kind)
    assert type(cache) is kind and cache.set_sums is None
    assert cache.capacity == (20 if kind is KVCache else TILE)
    assert cache.keys.numel() == cache.values.numel() == 2 * 3 * 16 * cache.capacity


@torch.inference_mode()
def test_rejected_tokens_are_forgotten(network, new_cache, sentences):
    """Rows accept 0 … 3 of three tokens just read and go on with others in their stead."""
    cache = new_cache(4, 20)
    prompts = [(e[:n], v[:n]) for (e, v), n in zip(sentences, LENGTHS, strict=True)]
    network(*padded(prompts, fill=10), cache, torch.tensor(LENGTHS))
    drafts = [(torch.tensor([3, 4, 5]) + i, torch.tensor([1, 2, 3])) for i in range(4)]
    network(*padded(drafts, fill=10), cache)
    cache.accept(torch.arange(4))
    cache.refresh_used()
    assert cache.lengths.tolist() == [1, 7, 5, 12] and cache.used == 12
    found = network(torch.full((4, 1), 20), torch.full((4, 1), 7), cache)[:, 0]
    for i in range(4):
        e = torch.cat((prompts[i][0], drafts[i][0][:i], torch.tensor([20])))
        v = torch.cat((prompts[i][1], drafts[i][1][:i], torch.tensor([7])))
        np.testing.assert_allclose(found[i].numpy(), network(e[None], v[None])[0, -1].numpy(), atol=1e-5)


@torch.inference_mode()
def test_a_row_restarts_in_its_own_slots(network, new_cache, sentences):
    cache = new_cache(4, 20)
    prompts = [(e[:n], v[:n]) for (e, v), n in zip(sentences, LENGTHS, strict=True)]
    network(*padded(prompts, fill=10), cache, torch.tensor(LENGTHS))
    start = new_cache(1, 2)
    network(torch.tensor([[5, 6]]), torch.tensor([[1, 2]]), start)
    cache.restart(torch.tensor([1, 3]), start)
    cache.refresh_used()
    assert cache.lengths.tolist() == [1, 2, 3, 2] and cache.used == 3
    found = network(torch.full((4, 1), 20), torch.full((4, 1), 7), cache)[:, 0]
    for i in range(4):
        e, v = prompts[i] if i in (0, 2) else (torch.tensor([5, 6]), torch.tensor([1, 2]))
        e, v = torch.cat((e, torch.tensor([20]))), torch.cat((v, torch.tensor([7])))
        np.testing.assert_allclose(found[i].numpy(), network(e[None], v[None])[0, -1].numpy(), atol=1e-5)


@torch.inference_mode()
def test_capacity_grows_in_steps(network, new_cache, sentences, kind):
    entity, value = sentences[3]
    cache = new_cache(1, 3)
    first = cache.capacity
    network(torch.full((1, first), 7), torch.full((1, first), 3), cache)
    for t in range(9):
        cache.reserve(1)
        hidden = network(entity[None, t : t + 1], value[None, t : t + 1], cache)
    e, v = (torch.cat((torch.full((first,), x), part[:9])) for x, part in ((7, entity), (3, value)))
    np.testing.assert_allclose(hidden[0, 0].numpy(), network(e[None], v[None])[0, -1], atol=1e-5)
    assert cache.capacity == first + CAPACITY_STEP
    full = new_cache(1, 3)
    full.reserve(full.capacity + 1, max_capacity=full.capacity + 6)
    assert full.capacity == (9 if kind is KVCache else 2 * TILE)


def test_too_many_tokens_are_refused(network, new_cache):
    """Not written elsewhere: the compiled loop does not look where memory ends."""
    cache = new_cache(2, 3)
    network(torch.zeros(2, cache.capacity, dtype=torch.int64), torch.zeros(2, cache.capacity, dtype=torch.int64), cache)
    with pytest.raises((IndexError, RuntimeError)), torch.inference_mode():
        network(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), cache)

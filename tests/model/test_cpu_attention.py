"""The compiled attention of a CPU is attention: whole sentences, and new tokens beside a cache in tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scmulan.model.cpu_attention import threads as threads_module
from scmulan.model.cpu_attention.attention import causal_attention
from scmulan.model.cpu_attention.kernels import TILE, Matrix, add_product
from scmulan.model.cpu_attention.kv_cache import MAX_NEW_TOKENS, CpuKVCache, attend_to_tiles


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 56, 64), (4, 3, 56), (9, 64, 45), (6, 32, 111), (5, 0, 16)])
def test_a_product_of_panels(rows, inner, columns, wide):
    """Parts of larger arrays, so that steps between rows matter; what lies beside them stays."""
    rng = np.random.default_rng(rows)
    a, b, c = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((rows, inner + 3), (inner, columns + 5), (rows, columns + 7))
    )
    expected = c.astype(np.float64)
    expected[:, :columns] += a[:, :inner].astype(np.float64) @ b[:, :columns]
    add_product(*(Matrix(m.ctypes.data, m.shape[1]) for m in (a, b, c)), rows, inner, columns, wide)
    np.testing.assert_allclose(c, expected, atol=1e-5)


def plain_attention(qkv, past_k, past_v, lengths):
    """The definition, row by row in float64: ``[rows, new, heads, width]``."""
    out = np.zeros(qkv[:, :, 0].shape)
    for row, before in enumerate(lengths):
        for t in range(qkv.shape[1]):
            k = np.concatenate((past_k[row, :before], qkv[row, : t + 1, 1]))
            v = np.concatenate((past_v[row, :before], qkv[row, : t + 1, 2]))
            score = np.einsum("hd,jhd->hj", qkv[row, t, 0], k) / np.sqrt(qkv.shape[-1])
            weight = np.exp(score - score.max(1, keepdims=True))
            out[row, t] = np.einsum("hj,jhd->hd", weight / weight.sum(1, keepdims=True), v)
    return out


def filled(past_k, past_v, lengths):
    """Cache that has read the past; what no row has read is NaN, so that reading it would show."""
    rows, tokens, heads, width = past_k.shape
    cache = CpuKVCache.empty(1, rows, heads, tokens + TILE, width, set_sums=None, like=torch.empty(0))
    for tensor in (cache.keys, cache.values):
        tensor.fill_(torch.nan)
    cache.attend(0, torch.from_numpy(np.stack((np.zeros_like(past_k), past_k, past_v), 2)).float(), None)
    cache.advance(tokens, torch.from_numpy(lengths), None)
    return cache


@pytest.fixture(params=["alone", "openmp", "python"])
def threads(request, monkeypatch):
    """One thread; several of OpenMP; several of Python, where OpenMP cannot be found."""
    if request.param == "python":
        monkeypatch.setattr(threads_module, "gomp_parallel", lambda: None)
    return 1 if request.param == "alone" else 3


@pytest.mark.parametrize(("heads", "width", "new"), [(2, 32, 1), (3, 56, 4), (1, 5, 7), (2, 72, 40)])
def test_rows_of_any_length_attend_to_their_own_tokens(heads, width, new, threads):
    rng = np.random.default_rng(width)
    lengths = np.array([0, 1, TILE - 1, TILE, 3 * TILE + 5])
    past_k, past_v = rng.standard_normal((2, 5, lengths.max(), heads, width)) * 2
    qkv = rng.standard_normal((5, new, 3, heads, width)) * 2
    cache, out = filled(past_k, past_v, lengths), np.empty((5, new, heads, width), np.float32)
    arrays = (cache.keys[0].numpy(), cache.values[0].numpy(), lengths)
    attend_to_tiles(qkv.astype(np.float32), *arrays, out, threads=threads)
    np.testing.assert_allclose(out, plain_attention(qkv, past_k, past_v, lengths), atol=3e-5)


def test_a_token_does_not_depend_on_those_read_with_it():
    """Bit for bit: neither on the number of new tokens, nor on the rows beside it, nor on threads."""
    rng = np.random.default_rng(0)
    lengths = np.array([70, 3, 128])
    past_k, past_v = rng.standard_normal((2, 3, 128, 2, 56))
    qkv = rng.standard_normal((3, 9, 3, 2, 56)).astype(np.float32)
    together, found = filled(past_k, past_v, lengths), np.empty((3, 9, 2, 56), np.float32)
    attend_to_tiles(qkv, together.keys[0].numpy(), together.values[0].numpy(), lengths, found, threads=2)
    for row in range(3):
        alone = filled(past_k[[row]], past_v[[row]], lengths[[row]])
        for t in range(9):
            out = np.empty((1, 1, 2, 56), np.float32)
            arrays = (alone.keys[0].numpy(), alone.values[0].numpy(), lengths[[row]] + t)
            attend_to_tiles(qkv[[row], t : t + 1].copy(), *arrays, out, threads=1)
            np.testing.assert_array_equal(out[0, 0], found[row, t])


@pytest.mark.parametrize("threads", [1, 3])
def test_python_threads_share_the_work(monkeypatch, threads):
    monkeypatch.setattr(threads_module, "gomp_parallel", lambda: None)
    called = []
    threads_module.run_on_threads(called.append, lambda: None, 7, threads)
    assert called == [7] * threads


def test_extreme_scores_have_a_softmax():
    qkv = np.zeros((1, 3, 3, 1, 8), np.float32)
    qkv[0, :, 0] = 100
    qkv[0, :, 1] = np.array([-100, 100, 99])[:, None, None]
    qkv[0, :, 2] = np.array([1, 2, 3])[:, None, None]
    cache = CpuKVCache.empty(1, 1, 1, 3, 8, set_sums=None, like=torch.empty(0))
    out = np.empty((1, 3, 1, 8), np.float32)
    attend_to_tiles(qkv, cache.keys[0].numpy(), cache.values[0].numpy(), np.array([0]), out, threads=1)
    np.testing.assert_allclose(out[0, :, 0, 0], [1, 2, 2], atol=1e-6)


@pytest.mark.parametrize("new", [MAX_NEW_TOKENS, MAX_NEW_TOKENS + 1, 2 * TILE])
def test_a_long_prompt_is_read_alike(new):
    qkv = torch.randn(2, new, 3, 2, 8, generator=torch.Generator().manual_seed(new))
    cache = CpuKVCache.empty(1, 2, 2, new + 1, 8, set_sums=None, like=torch.empty(0))
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(cache.attend(0, qkv, None), expected, atol=1e-5, rtol=0)
    cache.advance(new, None, None)
    more = torch.randn(2, 1, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(qkv.unbind(2), more.unbind(2), strict=True))
    expected = F.scaled_dot_product_attention(q[:, :, -1:], k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(cache.attend(0, more, None), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "width"), [(2, 64, 2, 32), (1, 65, 3, 56), (3, 200, 1, 5), (1, 1, 1, 8)]
)
def test_whole_sentences(rows, tokens, heads, width, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    qkv = torch.from_numpy(np.random.default_rng(tokens).standard_normal((rows, tokens, 3, heads, width))).float() * 2
    q, k, v = (t.double().transpose(1, 2) for t in qkv.unbind(2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(causal_attention(qkv).double(), expected, atol=1e-5, rtol=0)
    longer = torch.cat((qkv, torch.full((rows, 70, 3, heads, width), 1e3)), 1)  # padding counts for nothing
    assert torch.equal(causal_attention(longer)[:, :tokens], causal_attention(qkv))


def test_a_network_gives_the_same_with_and_without_gradients(make_network):
    """That is with torch's attention, and with ours."""
    network = make_network(layers=2, heads=2, width=16)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 30, (2, 2 * TILE + 3)))
    with torch.inference_mode():
        found = network(tokens, tokens % 11)
    torch.testing.assert_close(found, network(tokens, tokens % 11).detach(), atol=1e-5, rtol=0)

"""Attention alone: our compiled loops beside torch's kernel, with heads of the packaged and published models."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan.benchmarks.ceiling import machine
from scmulan.model.cost import best_seconds
from scmulan.model.cpu_attention.attention import causal_attention
from scmulan.model.cpu_attention.kv_cache import CpuKVCache
from scmulan.model.kv_cache import KVCache

# Heads, their width, and tokens read before.
SHAPES = {"mini": (4, 32, 800), "368M": (20, 56, 300)}
ROWS = 64
NEW_TOKENS = (1, 4, 8, 16, 32)
# Whole sentences: rows, and tokens of each.
SENTENCES = ((10, 185), (6, 300), (3, 600), (1, 1500))


@torch.inference_mode()
def run(*, quick: bool = False) -> dict[str, object]:
    """Time new tokens that attend to tokens read before, and whole sentences: milliseconds and GFLOP/s.

    Of whole sentences the operations that causal attention needs are counted, half of the square.
    """
    rows = 8 if quick else ROWS
    new_tokens: dict[str, Any] = {}
    sentences: dict[str, Any] = {}
    for name, (heads, width, before) in SHAPES.items():
        numbers = NEW_TOKENS[:2] if quick else NEW_TOKENS
        new_tokens[name] = {str(n): _new_tokens(rows, heads, width, before, n) for n in numbers}
        sizes = ((4, 185),) if quick else SENTENCES
        sentences[name] = {str(n): _sentences(rows_n, heads, width, n) for rows_n, n in sizes}
    return {"machine": machine(quick=quick), "rows": rows, "new_words": new_tokens, "sentences": sentences}


def _new_tokens(rows: int, heads: int, width: int, before: int, new: int) -> dict[str, float]:
    past, qkv = (torch.randn(rows, n, 3, heads, width) for n in (before, new))

    def timed(kind: type[KVCache]) -> tuple[float, Tensor]:
        cache = kind.empty(1, rows, heads, before + new, width, set_sums=None, like=torch.empty(0))
        cache.attend(0, past, None)
        cache.advance(before, None, None)
        attend = partial(cache.attend, 0, qkv, cache.mask(new))
        return best_seconds(attend), attend()

    return _figures(4.0 * rows * heads * width * (before + new) * new, timed(KVCache), timed(CpuKVCache))


def _sentences(rows: int, heads: int, width: int, n_tokens: int) -> dict[str, float]:
    qkv = torch.randn(rows, n_tokens, 3, heads, width)

    def library() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    ours = partial(causal_attention, qkv)
    operations = 2.0 * rows * heads * width * n_tokens**2
    return _figures(operations, (best_seconds(library), library()), (best_seconds(ours), ours()))


def _figures(operations: float, library: tuple[float, Tensor], ours: tuple[float, Tensor]) -> dict[str, float]:
    """Return the figures of two ways, of each of which seconds and result are given."""
    if not torch.allclose(library[1], ours[1], atol=1e-4):
        raise AssertionError("the two kernels disagree about the same words")
    return {
        "milliseconds": round(1e3 * ours[0], 3),
        "milliseconds_library": round(1e3 * library[0], 3),
        "gflops": round(operations / ours[0] / 1e9, 1),
        "ratio": round(library[0] / ours[0], 2),
    }

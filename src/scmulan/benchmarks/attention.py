"""Attention alone: our compiled loops beside the library's kernel, with heads of the packaged and published models."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan.benchmarks.ceiling import machine
from scmulan.model.cost import best_seconds
from scmulan.model.cpu_attention.attention import causal_attention
from scmulan.model.cpu_attention.kv_cache import CpuKVCache
from scmulan.model.kv_cache import KVCache

# Heads and their width; words read before.
SHAPES = {"mini": (4, 32, 800), "368M": (20, 56, 300)}
ROWS = 64
NEW = (1, 4, 8, 16, 32)
# Rows of whole sentences, and their words.
SENTENCES = ((10, 185), (6, 300), (3, 600), (1, 1500))


@torch.inference_mode()
def run(*, quick: bool = False) -> dict[str, object]:
    """Milliseconds and GFLOP/s of new words that attend to words read before, and of whole sentences.

    Of whole sentences the operations that causal attention needs are counted, half of the square.
    """
    rows = 8 if quick else ROWS
    new_words: dict[str, Any] = {}
    sentences: dict[str, Any] = {}
    for name, (heads, width, before) in SHAPES.items():
        new_words[name] = {str(n): _new(rows, heads, width, before, n) for n in (NEW[:2] if quick else NEW)}
        sizes = ((4, 185),) if quick else SENTENCES
        sentences[name] = {str(words): _whole(n, heads, width, words) for n, words in sizes}
    return {"machine": machine(quick=quick), "rows": rows, "new_words": new_words, "sentences": sentences}


def _new(rows: int, heads: int, width: int, before: int, new: int) -> dict[str, float]:
    past, qkv = (torch.randn(rows, n, 3, heads, width) for n in (before, new))

    def timed(kind: type[KVCache]) -> tuple[float, Tensor]:
        cache = kind.empty(1, rows, heads, before + new, width, set_sums=None, like=torch.empty(0))
        cache.attend(0, past, None)
        cache.advance(before, None, None)
        mask = cache.mask(new)
        return best_seconds(lambda: cache.attend(0, qkv, mask)), cache.attend(0, qkv, mask)

    (library, expected), (ours, found) = timed(KVCache), timed(CpuKVCache)
    return _told(4.0 * rows * heads * width * (before + new) * new, library, ours, expected, found)


def _whole(rows: int, heads: int, width: int, words: int) -> dict[str, float]:
    qkv = torch.randn(rows, words, 3, heads, width)

    def library() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    seconds = best_seconds(library), best_seconds(lambda: causal_attention(qkv))
    return _told(2.0 * rows * heads * width * words**2, seconds[0], seconds[1], library(), causal_attention(qkv))


def _told(operations: float, library: float, ours: float, expected: Tensor, found: Tensor) -> dict[str, float]:
    if not torch.allclose(expected, found, atol=1e-4):
        raise AssertionError("the two kernels disagree about the same words")
    return {
        "milliseconds": round(1e3 * ours, 3),
        "milliseconds_library": round(1e3 * library, 3),
        "gflops": round(operations / ours / 1e9, 1),
        "ratio": round(library / ours, 2),
    }

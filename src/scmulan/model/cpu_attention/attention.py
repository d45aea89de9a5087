"""Causal attention of whole sentences on a CPU in float32, for inference.

The library's kernel reaches a quarter of what a CPU multiplies with heads of 32 and a third with heads of 56. Here keys
of one head are laid out in tiles once, queries come in blocks of 64 that look at no tile beyond their own, and the
products are those of :mod:`scmulan.model.cpu_attention.kernels`.
"""

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from scmulan._numba import callback, compiled
from scmulan.model.cpu_attention import threads as openmp
from scmulan.model.cpu_attention.kernels import FAST, TILE, WIDE, add_product, next_number, pointer_to, softmax


def causal_attention(qkv: Tensor) -> Tensor:
    """Attention of every word to itself and those before it.

    Parameters
    ----------
    qkv
        float32 ``[rows, words, 3, heads, head width]``: queries, keys and values, finite also where they are padding.

    Returns
    -------
    Tensor
        ``[rows, words, width]``. A word's result does not depend on the words after it, nor on other rows.
    """
    rows, words, _, heads, width = qkv.shape
    source = qkv.detach().contiguous().numpy()
    out = torch.zeros(rows, words, heads * width)
    frame = np.array([0, rows, words, heads, width, source.ctypes.data, out.data_ptr()], dtype=np.int64)
    openmp.run(_attend, _callback().address, frame.ctypes.data, min(torch.get_num_threads(), rows * heads))
    return out


@lru_cache
def _callback() -> Any:
    """The job as a C function."""

    def attend_in_c(frame: int) -> None:
        _attend(frame)

    return callback(attend_in_c, numba.void(numba.int64))


@compiled(**FAST)
def _attend(frame: int) -> None:
    """Heads that no other thread has taken; see :func:`causal_attention` for what the frame says of them."""
    f = numba.carray(pointer_to(frame), 7, np.int64)
    rows, words, heads, width = f[1], f[2], f[3], f[4]
    qkv = numba.carray(pointer_to(f[5]), (rows, words, 3, heads, width), np.float32)
    number = -(-words // TILE)
    key = np.zeros((number, width, TILE), np.float32)
    score = np.empty((TILE, number * TILE), np.float32)
    exponent, share = np.empty(number * TILE, np.int32), np.empty(TILE, np.float32)
    value = np.empty((words, width), np.float32)
    out = numba.carray(pointer_to(f[6]), (rows, words, heads, width), np.float32)
    step, scale = 3 * heads * width, np.float32(width) ** np.float32(-0.5)
    while True:
        job = next_number(frame)
        if job >= rows * heads:
            return
        row, head = job // heads, job % heads
        for t in range(words):
            for d in range(width):
                key[t // TILE, d, t % TILE] = qkv[row, t, 1, head, d]
                value[t, d] = qkv[row, t, 2, head, d]
        for block in range(number):
            first, end = block * TILE, min((block + 1) * TILE, words)
            score[:, : (block + 1) * TILE] = 0
            query = f[5] + 4 * ((row * words + first) * step + head * width)
            for tile in range(block + 1):
                add_product(
                    query, step,
                    key.ctypes.data + 4 * tile * width * TILE, TILE,
                    score.ctypes.data + 4 * tile * TILE, number * TILE,
                    end - first, width, TILE, WIDE,
                )  # fmt: skip
            for t in range(first, end):
                share[t - first] = softmax(score[t - first], t + 1, end, scale, exponent)
            add_product(
                score.ctypes.data, number * TILE,
                value.ctypes.data, width,
                f[6] + 4 * ((row * words + first) * heads + head) * width, heads * width,
                end - first, end, width, WIDE,
            )  # fmt: skip
            for t in range(first, end):
                for d in range(width):
                    out[row, t, head, d] *= share[t - first]

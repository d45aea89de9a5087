"""Causal attention of whole sentences on a CPU in float32, for inference.

torch's kernel reaches a quarter of what a CPU multiplies with heads of 32 and a third with heads of 56. Here the keys
of one head are laid out in tiles once, queries come in blocks of 64 that look at no tile beyond their own, and the
products are those of :mod:`scmulan.model.cpu_attention.kernels`. The plain version that tests compare it with is
``torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)``.
"""

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from scmulan._numba import callback, compiled
from scmulan.model.cpu_attention.kernels import (
    AVX512,
    FAST,
    TILE,
    Matrix,
    add_product,
    next_number,
    pointer_to,
    softmax,
)
from scmulan.model.cpu_attention.threads import run_on_threads


def causal_attention(qkv: Tensor) -> Tensor:
    """Attend from every token to itself and those before it.

    Parameters
    ----------
    qkv
        float32 ``[rows, tokens, 3, heads, head width]``: queries, keys and values, finite also where they are padding.

    Returns
    -------
    Tensor
        ``[rows, tokens, width]``. A token's result does not depend on the tokens after it, nor on other rows.
    """
    rows, tokens, _, heads, width = qkv.shape
    source = qkv.detach().contiguous().numpy()
    out = torch.zeros(rows, tokens, heads * width)
    frame = np.array([0, rows, tokens, heads, width, source.ctypes.data, out.data_ptr()], dtype=np.int64)
    run_on_threads(_attend, _c_function, frame.ctypes.data, min(torch.get_num_threads(), rows * heads))
    return out


@lru_cache
def _c_function() -> Any:
    """Compile the job as a C function.

    ``kv_cache`` has a twin of this on purpose: one function made from a job that it is given would close over the job,
    and numba's cache takes that for another function in each process, which compiles it again (0.8 s).
    """

    def attend_in_c(frame: int) -> None:
        _attend(frame)

    return callback(attend_in_c, numba.void(numba.int64))


@compiled(**FAST)
def _attend(frame: int) -> None:
    """Attend in each head of each row that no other thread has taken.

    The frame holds, as int64: the next job to be taken, rows, tokens, heads, head width, and the addresses of ``qkv``
    and ``out`` (see :func:`causal_attention`).
    """
    f = numba.carray(pointer_to(frame), 7, np.int64)
    rows, tokens, heads, width, qkv_address, out_address = f[1], f[2], f[3], f[4], f[5], f[6]
    qkv = numba.carray(pointer_to(qkv_address), (rows, tokens, 3, heads, width), np.float32)
    out = numba.carray(pointer_to(out_address), (rows, tokens, heads, width), np.float32)
    tiles = -(-tokens // TILE)
    key = np.zeros((tiles, width, TILE), np.float32)
    score = np.empty((TILE, tiles * TILE), np.float32)
    exponent, normaliser = np.empty(tiles * TILE, np.int32), np.empty(TILE, np.float32)
    value = np.empty((tokens, width), np.float32)  # last: before the scores, a head of 32 takes 4 % longer
    step, scale = 3 * heads * width, np.float32(width) ** np.float32(-0.5)
    while True:
        job = next_number(frame)
        if job >= rows * heads:
            return
        row, head = job // heads, job % heads
        for t in range(tokens):
            for d in range(width):
                key[t // TILE, d, t % TILE] = qkv[row, t, 1, head, d]
                value[t, d] = qkv[row, t, 2, head, d]
        for block in range(tiles):
            first, end = block * TILE, min((block + 1) * TILE, tokens)
            queries = Matrix(qkv_address + 4 * ((row * tokens + first) * step + head * width), step)
            score[:, : (block + 1) * TILE] = 0
            for tile in range(block + 1):
                tile_keys = Matrix(key.ctypes.data + 4 * tile * width * TILE, TILE)
                tile_scores = Matrix(score.ctypes.data + 4 * tile * TILE, tiles * TILE)
                add_product(queries, tile_keys, tile_scores, end - first, width, TILE, AVX512)
            for t in range(first, end):
                normaliser[t - first] = softmax(score[t - first], t + 1, end, scale, exponent)
            scores, values = Matrix(score.ctypes.data, tiles * TILE), Matrix(value.ctypes.data, width)
            result = Matrix(out_address + 4 * ((row * tokens + first) * heads + head) * width, heads * width)
            add_product(scores, values, result, end - first, end, width, AVX512)
            for t in range(first, end):
                for d in range(width):
                    out[row, t, head, d] *= normaliser[t - first]

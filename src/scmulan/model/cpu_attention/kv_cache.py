"""Key-value cache in tiles and attention of a few new tokens to it, on a CPU in float32.

One new token per row reads every key and value once and computes little: the speed of memory decides. torch's attention
is made for many queries; here it reached half of that speed, and a quarter of the arithmetic with eight new tokens.
This one keeps keys in tiles of 64 tokens, each dimension's side by side, so that memory is read in one stream and 64
products are summed at a time; it looks at the tokens that a row has and not at those that the longest row has; and what
it gives for a token does not depend on how many tokens are read in the same call. The plain version that tests compare
it with is :class:`scmulan.model.kv_cache.KVCache`.
"""

from functools import lru_cache
from typing import Any, Self

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan._numba import callback, compiled
from scmulan.model.cpu_attention.attention import causal_attention
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
from scmulan.model.kv_cache import KVCache

# A prompt of more tokens than this is read as a whole sentence; fewer are read as new tokens of an empty cache.
MAX_NEW_TOKENS = 32


class CpuKVCache(KVCache):
    """Cache in the host's memory in float32, in tiles of 64 tokens.

    Keys are ``[layers, rows, tiles, heads, head width, 64]``, values ``[layers, rows, tiles, heads, 64, head width]``.
    """

    SLOT_AXIS, SLOTS_PER_INDEX = 2, TILE

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        heads: int,
        capacity: int,
        head_width: int,
        *,
        set_sums: Tensor | None,
        like: Tensor,
    ) -> Self:
        """Return a cache that has read nothing."""
        outer = (layers, rows, -(-capacity // TILE), heads)
        keys, values = cls._allocate((*outer, head_width, TILE), like), cls._allocate((*outer, TILE, head_width), like)
        return cls(keys=keys, values=values, lengths=torch.zeros(rows, dtype=torch.int64), set_sums=set_sums)

    @staticmethod
    def _allocate(shape: tuple[int, ...], like: Tensor) -> Tensor:
        # numpy asks the system for large pages. What no token has filled is never read, so it needs no zeros.
        return torch.from_numpy(np.empty(shape, np.float32))

    def mask(self, new: int) -> None:
        """Return None: a row's length says what its tokens may look at."""

    def attend(self, layer: int, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Write a layer's new tokens into the cache and let them attend to their rows; as :meth:`KVCache.attend`."""
        rows, new, _, heads, width = qkv.shape
        if self.used + new > self.capacity:
            raise IndexError(
                f"{new} more words after {self.used} in a cache with room for {self.capacity}: reserve some"
            )
        if self.used == 0 and new > MAX_NEW_TOKENS:
            self._write_prompt(layer, *(t.transpose(1, 2) for t in qkv.unbind(2)[1:]))
            return causal_attention(qkv)
        out = torch.empty(rows, new, heads, width)
        keys, values, lengths = (t.numpy() for t in (self.keys[layer], self.values[layer], self.lengths))
        attend_to_tiles(qkv.detach().contiguous().numpy(), keys, values, lengths, out.numpy(), torch.get_num_threads())
        return out.flatten(2)

    def _write_prompt(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the first tokens of all rows: ``[rows, heads, tokens, head width]`` each."""
        missing = -keys.shape[2] % TILE
        for mine, new in ((self.keys[layer].transpose(-1, -2), keys), (self.values[layer], values)):
            tiles = F.pad(new, (0, 0, 0, missing)).unflatten(2, (-1, TILE)).transpose(1, 2)
            mine[:, : tiles.shape[1]] = tiles


def attend_to_tiles(
    qkv: np.ndarray, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray, out: np.ndarray, threads: int
) -> None:
    """Add new tokens to a layer's cache and let them attend to all tokens of their row up to themselves.

    Parameters
    ----------
    qkv
        float32 ``[rows, new, 3, heads, head width]``: queries, keys and values of the new tokens.
    keys, values
        float32 ``[rows, tiles, heads, head width, 64]`` and ``[rows, tiles, heads, 64, head width]``; the new tokens'
        are written into them.
    lengths
        int64 ``[rows]``: tokens that each row has read before.
    out
        float32 ``[rows, new, heads, head width]``: is filled.
    threads
        Number of threads that share the rows.
    """
    rows, new, _, heads, width = qkv.shape
    shape = (rows, new, heads, width, keys.shape[1], int(lengths.max(initial=0)))
    frame = np.array([0, *shape, *(t.ctypes.data for t in (qkv, keys, values, lengths, out))], dtype=np.int64)
    run_on_threads(_attend, _c_function, frame.ctypes.data, min(threads, rows))


@lru_cache
def _c_function() -> Any:
    """Compile the job as a C function; the module ``attention`` says why it has a twin of this."""

    def attend_in_c(frame: int) -> None:
        _attend(frame)

    return callback(attend_in_c, numba.void(numba.int64))


@compiled(**FAST)
def _attend(frame: int) -> None:
    """Attend in each row that no other thread has taken.

    The frame holds, as int64: the next row to be taken, rows, new tokens, heads, head width, tiles, longest row, and
    the addresses of ``qkv``, ``keys``, ``values``, ``lengths`` and ``out`` (see :func:`attend_to_tiles`).
    """
    f = numba.carray(pointer_to(frame), 12, np.int64)
    rows, new, heads, width, tiles, longest = f[1], f[2], f[3], f[4], f[5], f[6]
    qkv = numba.carray(pointer_to(f[7]), (rows, new, 3, heads, width), np.float32)
    keys = numba.carray(pointer_to(f[8]), (rows, tiles, heads, width, TILE), np.float32)
    values = numba.carray(pointer_to(f[9]), (rows, tiles, heads, TILE, width), np.float32)
    lengths = numba.carray(pointer_to(f[10]), rows, np.int64)
    out = numba.carray(pointer_to(f[11]), (rows, new, heads, width), np.float32)
    slots = -(-(longest + new) // TILE) * TILE
    score = np.empty((heads, new, slots), np.float32)
    normaliser = np.empty((heads, new), np.float32)
    exponent = np.empty(slots, np.int32)
    scale = np.float32(width) ** np.float32(-0.5)
    step, size = 3 * heads * width, TILE * width
    while True:
        row = next_number(frame)
        if row >= rows:
            return
        before = lengths[row]
        end = before + new
        used = -(-end // TILE)
        for t in range(new):
            tile, slot = (before + t) // TILE, (before + t) % TILE
            for head in range(heads):
                for d in range(width):
                    keys[row, tile, head, d, slot] = qkv[row, t, 1, head, d]
                    values[row, tile, head, slot, d] = qkv[row, t, 2, head, d]
                    out[row, t, head, d] = 0
        score[:, :, : used * TILE] = 0
        query, key, value = qkv[row].ctypes.data, keys[row].ctypes.data, values[row].ctypes.data
        scores, result = score.ctypes.data, out[row].ctypes.data
        # Tiles outside, heads inside: a row's memory is read from its start to its end.
        for tile in range(used):
            for head in range(heads):
                head_queries = Matrix(query + 4 * head * width, step)
                tile_keys = Matrix(key + 4 * (tile * heads + head) * size, TILE)
                tile_scores = Matrix(scores + 4 * (head * new * slots + tile * TILE), slots)
                add_product(head_queries, tile_keys, tile_scores, new, width, TILE, AVX512)
        for head in range(heads):
            for t in range(new):
                normaliser[head, t] = softmax(score[head, t], before + t + 1, end, scale, exponent)
        for tile in range(used):
            for head in range(heads):
                tile_scores = Matrix(scores + 4 * (head * new * slots + tile * TILE), slots)
                tile_values = Matrix(value + 4 * (tile * heads + head) * size, width)
                head_result = Matrix(result + 4 * head * width, heads * width)
                add_product(tile_scores, tile_values, head_result, new, min(TILE, end - tile * TILE), width, AVX512)
        for t in range(new):
            for head in range(heads):
                for d in range(width):
                    out[row, t, head, d] *= normaliser[head, t]

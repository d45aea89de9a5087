"""Attention of a few new words to many words read before, on a CPU in float32.

One new word per row reads every key and value once and computes little: the speed of memory decides. A library's
attention is made for many queries; here it reached half of that speed, and a quarter of the arithmetic with eight new
words. This one keeps keys in tiles of 64 words, each dimension's side by side, so that memory is read in one stream and
64 products are summed at a time; it looks at the words that a row has and not at those that the longest row has; and
what it gives for a word does not depend on how many words are read in the same call.
"""

from functools import lru_cache
from typing import Any, Self

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan._numba import callback, compiled
from scmulan.model.cpu_attention import threads as openmp
from scmulan.model.cpu_attention.attention import causal_attention
from scmulan.model.cpu_attention.kernels import FAST, TILE, WIDE, add_product, next_number, pointer_to, softmax
from scmulan.model.kv_cache import KVCache

# New words of empty rows from which on they are read as whole sentences.
MANY = 32


class CpuKVCache(KVCache):
    """Cache of the host's memory in float32, in tiles.

    Keys are ``[layers, rows, tiles, heads, head width, 64]``, values ``[layers, rows, tiles, heads, 64, head width]``.
    """

    AXIS, UNIT = 2, TILE

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, capacity: int, width: int, *, bag: Tensor | None, like: Tensor
    ) -> Self:
        """Cache of words of so many heads of so much width."""
        outer = (layers, rows, -(-capacity // TILE), heads)
        keys, values = cls._room((*outer, width, TILE), like), cls._room((*outer, TILE, width), like)
        return cls(keys=keys, values=values, length=torch.zeros(rows, dtype=torch.int64), bag=bag)

    @staticmethod
    def _room(shape: tuple[int, ...], like: Tensor) -> Tensor:
        # numpy asks the system for large pages, and what no word has filled is never read: nothing to be cleared.
        return torch.from_numpy(np.empty(shape, np.float32))

    def mask(self, new: int) -> None:
        """Nothing: a row's length says what its words may look at."""

    def attend(self, layer: int, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Add new words ``[rows, new, 3, heads, head width]`` of a layer; what they see: ``[rows, new, width]``."""
        rows, new, _, heads, width = qkv.shape
        if self.used + new > self.capacity:
            raise IndexError(
                f"{new} more words after {self.used} in a cache with room for {self.capacity}: reserve some"
            )
        if self.used == 0 and new > MANY:
            self._fill(layer, *(t.transpose(1, 2) for t in qkv.unbind(2)[1:]))
            return causal_attention(qkv)
        out = torch.empty(rows, new, heads, width)
        keys, values, length = (t.numpy() for t in (self.keys[layer], self.values[layer], self.length))
        attend(qkv.detach().contiguous().numpy(), keys, values, length, out.numpy(), torch.get_num_threads())
        return out.flatten(2)

    def _fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the first words of all rows: ``[rows, heads, new, head width]`` each."""
        missing = -keys.shape[2] % TILE
        for mine, new in ((self.keys[layer].transpose(-1, -2), keys), (self.values[layer], values)):
            tiles = F.pad(new, (0, 0, 0, missing)).unflatten(2, (-1, TILE)).transpose(1, 2)
            mine[:, : tiles.shape[1]] = tiles


def attend(
    qkv: np.ndarray, keys: np.ndarray, values: np.ndarray, length: np.ndarray, out: np.ndarray, threads: int
) -> None:
    """Add new words to a layer's cache and let them attend to all words of their row up to themselves.

    Parameters
    ----------
    qkv
        float32 ``[rows, new, 3, heads, head width]``: queries, keys and values of the new words.
    keys, values
        float32 ``[rows, tiles, heads, head width, 64]`` and ``[rows, tiles, heads, 64, head width]``; the new words'
        are written into them.
    length
        int64 ``[rows]``: words that each row has read before.
    out
        float32 ``[rows, new, heads, head width]``: is filled.
    threads
        Rows are shared among so many.
    """
    rows, new, _, heads, width = qkv.shape
    shape = (0, rows, new, heads, width, keys.shape[1], int(length.max(initial=0)))
    frame = np.array([*shape, *(t.ctypes.data for t in (qkv, keys, values, length, out))], dtype=np.int64)
    openmp.run(_attend, _callback().address, frame.ctypes.data, min(threads, rows))


@lru_cache
def _callback() -> Any:
    """The job as a C function."""

    def attend_in_c(frame: int) -> None:
        _attend(frame)

    return callback(attend_in_c, numba.void(numba.int64))


@compiled(**FAST)
def _attend(frame: int) -> None:
    """Rows that no other thread has taken; see :func:`attend` for what the frame says of them."""
    f = numba.carray(pointer_to(frame), 12, np.int64)
    rows, new, heads, width, capacity, most = f[1], f[2], f[3], f[4], f[5], f[6]
    qkv = numba.carray(pointer_to(f[7]), (rows, new, 3, heads, width), np.float32)
    keys = numba.carray(pointer_to(f[8]), (rows, capacity, heads, width, TILE), np.float32)
    values = numba.carray(pointer_to(f[9]), (rows, capacity, heads, TILE, width), np.float32)
    length = numba.carray(pointer_to(f[10]), rows, np.int64)
    out = numba.carray(pointer_to(f[11]), (rows, new, heads, width), np.float32)
    slots = -(-(most + new) // TILE) * TILE
    score = np.empty((heads, new, slots), np.float32)
    share = np.empty((heads, new), np.float32)
    exponent = np.empty(slots, np.int32)
    scale = np.float32(width) ** np.float32(-0.5)
    words, size = 3 * heads * width, TILE * width
    while True:
        row = next_number(frame)
        if row >= rows:
            return
        before = length[row]
        end = before + new
        used = -(-end // TILE)
        for t in range(new):
            tile, at = (before + t) // TILE, (before + t) % TILE
            for head in range(heads):
                for d in range(width):
                    keys[row, tile, head, d, at] = qkv[row, t, 1, head, d]
                    values[row, tile, head, at, d] = qkv[row, t, 2, head, d]
                    out[row, t, head, d] = 0
        score[:, :, : used * TILE] = 0
        query, key, value = qkv[row].ctypes.data, keys[row].ctypes.data, values[row].ctypes.data
        scores, result = score.ctypes.data, out[row].ctypes.data
        # Tiles outside, heads inside: a row's memory is read from its start to its end.
        for tile in range(used):
            for head in range(heads):
                add_product(
                    query + 4 * head * width, words,
                    key + 4 * (tile * heads + head) * size, TILE,
                    scores + 4 * (head * new * slots + tile * TILE), slots,
                    new, width, TILE, WIDE,
                )  # fmt: skip
        for head in range(heads):
            for t in range(new):
                share[head, t] = softmax(score[head, t], before + t + 1, end, scale, exponent)
        for tile in range(used):
            for head in range(heads):
                add_product(
                    scores + 4 * (head * new * slots + tile * TILE), slots,
                    value + 4 * (tile * heads + head) * size, width,
                    result + 4 * head * width, heads * width,
                    new, min(TILE, end - tile * TILE), width, WIDE,
                )  # fmt: skip
        for t in range(new):
            for head in range(heads):
                for d in range(width):
                    out[row, t, head, d] *= share[head, t]

"""Random numbers of the Gumbel-max trick, one stream per row, so that a cell depends on its seed only.

``argmax(log-weight + Gumbel noise)`` is a draw in proportion to the weights. Written as a race it reads: each token
arrives after a standard-exponential time divided by its weight, and the first arrival is the draw.

Full noise is one number for each token of the vocabulary. Where no gene weighs more than one, a short *candidate list*
does (lazy Gumbel sampling, after Mussmann et al. 2017): genes at the events of a Poisson process in which each gene
comes at rate one. A gene that comes first at time t arrives at t / weight, never before t; so once some token has
arrived before the end of the list (the *horizon*), no gene beyond the list can be the first. Some sixty candidates then
stand for thousands of genes.

The numbers of a position depend on the stream and the position only, not on how many positions are drawn at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmulan._numba import compiled
from scmulan._rng import random_bits

POSITIONS_PER_DRAW = 32
"""Positions whose numbers are drawn at once."""
N_CANDIDATES = 64
"""Length of a candidate list. Genes that are excluded or weigh little come to nothing in it."""
HASH_BLOCK = 512
"""Numbers that are hashed together, so that intermediate results stay in the first-level cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Random numbers of J positions of each of B rows."""

    candidates: Tensor
    """int64 ``[B, J, N]``: genes in the order of their times, then the end token; N = 0 with full noise."""
    times: Tensor
    """``[B, J, N]``: standard-exponential time of each candidate, to be divided by its weight; with full noise
    ``[B, J, V]``, the standard Gumbel noise of each token."""
    horizon: Tensor
    """``[B, J]``: time until which a candidate list is complete."""
    values: Tensor
    """``[B, J, levels]``: standard Gumbel noise that draws the value of whichever token is chosen."""


class NoiseBuffer:
    """Ring buffer of noise, one stream per row.

    Parameters
    ----------
    rows
        Number of rows.
    genes
        int64: genes that may be drawn.
    end
        The end token where it competes; None where it does not.
    levels
        Number of values.
    vocabulary
        Number of tokens.
    lazy
        Draw candidate lists instead of full noise; no gene's weight may exceed one.
    capacity
        Positions that are kept of each row; at least one draw more than are read at a time.
    device
        Where the numbers are needed.
    n_candidates
        Length of a candidate list. Another length draws other cells.
    """

    def __init__(
        self,
        rows: int,
        genes: np.ndarray,
        end: int | None,
        *,
        levels: int,
        vocabulary: int,
        lazy: bool,
        capacity: int,
        device: torch.device,
        n_candidates: int = N_CANDIDATES,
    ) -> None:
        self.genes, self.end, self.levels, self.lazy, self.device = genes, end, levels, lazy, device
        self.n_candidates = n_candidates
        self.capacity = -(-capacity // POSITIONS_PER_DRAW) * POSITIONS_PER_DRAW
        width = n_candidates + (end is not None) if lazy else vocabulary
        self._streams: list[np.random.Generator | None] = [None] * rows
        self._keys = [(0, 0)] * rows
        self._drawn = np.zeros(rows, dtype=np.int64)
        self.times = torch.ones(rows, self.capacity, width, device=device)
        self.candidates = torch.zeros(rows, self.capacity, width if lazy else 0, dtype=torch.int64, device=device)
        self.horizon = torch.full((rows, self.capacity), torch.inf, device=device)
        self.values = torch.zeros(rows, self.capacity, levels, device=device)

    def start(self, row: int, seed: int, number: int) -> np.random.Generator:
        """Start the stream ``(seed, number)`` in a row; return it, for what is drawn before the positions."""
        self._streams[row] = stream = np.random.default_rng([seed, number])
        self._keys[row] = (seed, number)
        self._drawn[row] = 0
        return stream

    def fill(self, counts: np.ndarray, ahead: int) -> None:
        """Draw what is missing of ``ahead`` positions of each row, from its count (int64 ``[rows]``) on."""
        for row in np.flatnonzero(self._drawn < counts + ahead):
            while self._drawn[row] < counts[row] + ahead:
                self._draw(int(row))

    def _draw(self, row: int) -> None:
        stream = self._streams[row]
        if stream is None:
            self._drawn[row] = np.iinfo(np.int64).max
            return
        start = int(self._drawn[row] % self.capacity)
        positions = slice(start, start + POSITIONS_PER_DRAW)
        if self.lazy:
            n = self.n_candidates
            genes = self.genes[stream.integers(len(self.genes), size=(POSITIONS_PER_DRAW, n))]
            drawn = exponentials(stream, (POSITIONS_PER_DRAW, n + (self.end is not None) + self.levels))
            times = np.cumsum(drawn[:, :n], axis=1)
            times /= np.float32(len(self.genes))
            _copy_to(self.candidates[row, positions, :n], genes)
            _copy_to(self.times[row, positions, :n], times)
            _copy_to(self.horizon[row, positions], times[:, -1])
            if self.end is not None:
                self.candidates[row, positions, n:] = self.end
                _copy_to(self.times[row, positions, n:], drawn[:, n : n + 1])
        else:
            width = self.times.shape[2]
            drawn = exponentials(stream, (POSITIONS_PER_DRAW, width + self.levels))
            _copy_to(self.times[row, positions], -np.log(drawn[:, :width]))
        _copy_to(self.values[row, positions], -np.log(drawn[:, drawn.shape[1] - self.levels :]))
        self._drawn[row] += POSITIONS_PER_DRAW

    def read(self, counts: Tensor, first: int, n: int) -> Noise:
        """Return the noise of ``n`` positions of each row, from ``first`` after its count (int64 ``[rows]``) on."""
        slot = (counts[:, None] + torch.arange(first, first + n, device=self.device)) % self.capacity
        row = torch.arange(len(counts), device=self.device)[:, None]
        return Noise(
            candidates=self.candidates[row, slot],
            times=self.times[row, slot],
            horizon=self.horizon[row, slot],
            values=self.values[row, slot],
        )

    def times_beyond(self, row: int, position: int) -> Tensor:
        """Return the time from the horizon of a position to each gene's next event, ``[genes]``."""
        stream = np.random.default_rng([*self._keys[row], 1 + position])
        return torch.from_numpy(exponentials(stream, (len(self.genes),))).to(self.device)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Forget all rows but some."""
        index = torch.from_numpy(rows).to(self.device)
        self.times, self.candidates = self.times[index], self.candidates[index]
        self.horizon, self.values = self.horizon[index], self.values[index]
        self._streams = [self._streams[row] for row in rows]
        self._keys = [self._keys[row] for row in rows]
        self._drawn = self._drawn[rows]


def exponentials(stream: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard-exponential numbers, float32; small ones in steps of 2⁻³².

    Notes
    -----
    The stream gives a key; 32 bits of each number are its index hashed with the key. numpy's own have 23 bits in all
    and some are zero, so that among thousands of tokens one that is as good as impossible would be drawn now and then;
    and they take ten times as long (8.8 ns against 0.9), more than a small network needs for a token.
    """
    out = np.empty(shape, dtype=np.float32)
    _exponentials(stream.integers(2**64, dtype=np.uint64), out.reshape(-1))
    return out


@compiled(error_model="numpy", fastmath={"contract", "nsz"})
def _exponentials(key: Any, out: np.ndarray) -> None:
    """Fill in −log(1 − v) with v uniform, by the logarithm of Cephes: loops that the compiler makes SIMD of."""
    bits = np.empty(HASH_BLOCK, np.uint32)
    rest, taken = np.empty(HASH_BLOCK, np.float32), np.empty(HASH_BLOCK, np.float32)
    as_bits, mantissa = rest.view(np.int32), bits.view(np.float32)
    for start in range(0, len(out), HASH_BLOCK):
        number = min(HASH_BLOCK, len(out) - start)
        numbers = out[start : start + number]
        for i in range(number):
            bits[i] = random_bits(key, start + i) >> np.uint64(32)
        for i in range(number):
            v = min((np.float32(bits[i]) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
            numbers[i] = v
            rest[i] = np.float32(1) - v
            taken[i] = np.float32(1) - rest[i]
        for i in range(number):
            # 1 − v = 2^e m with √½ ≤ m < √2
            e = (as_bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)
            bits[i] = np.uint32(as_bits[i] - (e << np.int32(23)))
            as_bits[i] = e
        for i in range(number):
            m, e, v = mantissa[i] - np.float32(1), np.float32(as_bits[i]), numbers[i]
            p = np.float32(7.0376836292e-2) * m + np.float32(-1.1514610310e-1)
            p = p * m + np.float32(1.1676998740e-1)
            p = p * m + np.float32(-1.2420140846e-1)
            p = p * m + np.float32(1.4249322787e-1)
            p = p * m + np.float32(-1.6668057665e-1)
            p = p * m + np.float32(2.0000714765e-1)
            p = p * m + np.float32(-2.4999993993e-1)
            p = p * m + np.float32(3.3333331174e-1)
            square = m * m
            log = (p * m - np.float32(0.5)) * square + m + e * np.float32(0.6931471805599453)
            # 1 − v was rounded. Near 1 the logarithm is proportional to v: correct by what was really taken off.
            numbers[i] = -log * (v / taken[i]) if taken[i] > 0 else v


def _copy_to(buffer: Tensor, numbers: np.ndarray) -> None:
    """Copy numbers into a part of the buffer, without torch's overhead where it lies in the memory of the host."""
    if buffer.device.type == "cpu":
        buffer.numpy()[...] = numbers
    else:
        buffer.copy_(torch.from_numpy(numbers))

"""Random numbers of rows that are being written: for each word of a row its own, drawn from the row's own stream.

The next word is the first to arrive in a race: each word arrives after standard-exponential time divided by its weight,
which makes the chance of being first proportional to the weight (in logarithms: the largest log-weight + Gumbel
noise). Where no gene weighs more than one, most of the race need not be run: *visits* of genes, each gene's at rate
one, come from a list; a gene that is visited at time t arrives at t / weight, never before its visit; so once some word
has arrived before the list's last visit, no gene beyond the list can be the first. A few dozen visits then stand for
thousands of genes. Otherwise every word has its noise.

What is drawn for a word's place depends on the stream and the place only, not on how many places are drawn at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmulan._numba import compiled

# Places drawn at once.
CHUNK = 32
# Visits listed for each place; those of genes that are said already or have little weight come to nothing.
VISITS = 64
# Numbers that are made together, in memory that is near.
BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Random numbers of J places of each of B rows, with N words each."""

    words: Tensor
    """int64 ``[B, J, N]``: who takes part in the race; N = 0 where all words do."""
    times: Tensor
    """``[B, J, N]``: time of the visit, to be divided by the word's weight, visits of genes in their order and the end
    word last; where all words take part, ``[B, J, V]``: Gumbel noise of each."""
    horizon: Tensor
    """``[B, J]``: time until which a list of visits is complete."""
    values: Tensor
    """``[B, J, levels]``, standard Gumbel: for the value of whichever word is said."""


class NoiseBuffer:
    """Random numbers kept in a ring of places for each row.

    Parameters
    ----------
    rows
        Number of rows.
    genes
        int64: words that may be said, other than the end word.
    end
        The end word where it takes part in the race.
    levels
        Number of values.
    vocabulary
        Number of words.
    listed
        Whether a list of visits stands for the race: no gene's weight may exceed one.
    ring
        Places that are kept, at least one chunk more than are asked for at a time.
    device
        Where they are wanted.
    """

    def __init__(
        self,
        rows: int,
        genes: np.ndarray,
        end: int | None,
        *,
        levels: int,
        vocabulary: int,
        listed: bool,
        ring: int,
        device: torch.device,
    ) -> None:
        self.genes, self.end, self.levels, self.listed, self.device = genes, end, levels, listed, device
        self.ring = -(-ring // CHUNK) * CHUNK
        self.width = VISITS + (end is not None) if listed else vocabulary
        self._streams: list[np.random.Generator | None] = [None] * rows
        self._keys = [(0, 0)] * rows
        self._drawn = np.zeros(rows, dtype=np.int64)
        self.times = torch.ones(rows, self.ring, self.width, device=device)
        self.words = torch.zeros(rows, self.ring, self.width if listed else 0, dtype=torch.int64, device=device)
        self.horizon = torch.full((rows, self.ring), torch.inf, device=device)
        self.values = torch.zeros(rows, self.ring, levels, device=device)

    def seat(self, row: int, seed: int, number: int) -> np.random.Generator:
        """Begin the stream ``(seed, number)`` in a row; numbers drawn from what is returned come before all places."""
        self._streams[row] = stream = np.random.default_rng([seed, number])
        self._keys[row] = (seed, number)
        self._drawn[row] = 0
        return stream

    def provide(self, counts: np.ndarray, ahead: int) -> None:
        """Make sure that each row has numbers for ``ahead`` places from its count on."""
        for row in np.flatnonzero(self._drawn < counts + ahead):
            while self._drawn[row] < counts[row] + ahead:
                self._draw(int(row))

    def _draw(self, row: int) -> None:
        stream = self._streams[row]
        if stream is None:
            self._drawn[row] = np.iinfo(np.int64).max
            return
        start = int(self._drawn[row] % self.ring)
        slots = slice(start, start + CHUNK)
        ending = self.end is not None
        if self.listed:
            genes = self.genes[stream.integers(len(self.genes), size=(CHUNK, VISITS))]
            drawn = exponentials(stream, (CHUNK, VISITS + ending + self.levels))
            visits = np.cumsum(drawn[:, :VISITS], axis=1)
            visits /= np.float32(len(self.genes))
            _put(self.words[row, slots, :VISITS], genes)
            _put(self.times[row, slots, :VISITS], visits)
            _put(self.horizon[row, slots], visits[:, -1])
            if self.end is not None:
                self.words[row, slots, VISITS:] = self.end
                _put(self.times[row, slots, VISITS:], drawn[:, VISITS : VISITS + 1])
        else:
            drawn = exponentials(stream, (CHUNK, self.width + self.levels))
            _put(self.times[row, slots], -np.log(drawn[:, : self.width]))
        _put(self.values[row, slots], -np.log(drawn[:, drawn.shape[1] - self.levels :]))
        self._drawn[row] += CHUNK

    def at(self, count: Tensor, first: int, places: int) -> Noise:
        """Numbers of ``places`` places of each row, from ``first`` after its count (int64 ``[rows]``) on."""
        slot = (count[:, None] + torch.arange(first, first + places, device=self.device)) % self.ring
        row = torch.arange(len(count), device=self.device)[:, None]
        rings = {"words": self.words, "times": self.times, "horizon": self.horizon, "values": self.values}
        return Noise(**{name: ring[row, slot] for name, ring in rings.items()})

    def later(self, row: int, place: int) -> Tensor:
        """Time from the horizon of a place to each gene's next visit (``[genes]``)."""
        stream = np.random.default_rng([*self._keys[row], 1 + place])
        return torch.from_numpy(exponentials(stream, (len(self.genes),))).to(self.device)

    def select(self, rows: np.ndarray) -> None:
        """Keep some rows only."""
        at = torch.from_numpy(rows).to(self.device)
        self.times, self.words = self.times[at], self.words[at]
        self.horizon, self.values = self.horizon[at], self.values[at]
        self._streams = [self._streams[row] for row in rows]
        self._keys = [self._keys[row] for row in rows]
        self._drawn = self._drawn[rows]


def exponentials(stream: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard-exponential numbers in float32, the small ones in steps of 2⁻³².

    numpy's have 23 bits in all, some are zero: among thousands of words one that is as good as impossible would win a
    race now and then; and drawing them takes longer than a small network needs for a word. Here the stream gives a key,
    and 32 bits of each number are its place hashed with the key.
    """
    out = np.empty(shape, dtype=np.float32)
    _exponentials(stream.integers(2**64, dtype=np.uint64), out.reshape(-1))
    return out


@compiled(error_model="numpy", fastmath={"contract", "nsz"})
def _exponentials(key: Any, out: np.ndarray) -> None:
    """Fill in −log(1 − v) with v uniform: SplitMix64 (Steele, Lea and Flood 2014), then Cephes' logarithm."""
    bits = np.empty(BLOCK, np.uint32)
    rest, taken = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    as_bits, mantissa = rest.view(np.int32), bits.view(np.float32)
    for start in range(0, len(out), BLOCK):
        number = min(BLOCK, len(out) - start)
        numbers = out[start : start + number]
        for i in range(number):
            z = key + np.uint64(start + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits[i] = (z ^ (z >> np.uint64(31))) >> np.uint64(32)
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
            # 1 − v was rounded; the logarithm of what is near 1 is in proportion to what was really taken off.
            numbers[i] = -log * (v / taken[i]) if taken[i] > 0 else v


def _put(ring: Tensor, numbers: np.ndarray) -> None:
    """Write numbers into a part of a ring, without torch's overhead where the memory is the host's."""
    if ring.device.type == "cpu":
        ring.numpy()[...] = numbers
    else:
        ring.copy_(torch.from_numpy(numbers))

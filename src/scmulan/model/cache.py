"""Keys and values of words already read, for rows of different lengths."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Slots are added in steps of this many, and by at least half of what there is: growing copies everything.
STEP = 64


@dataclass(kw_only=True)
class Cache:
    """State of decoding: what a batch of rows has read so far.

    Without positional encoding a cached word is valid wherever it lies, so each row simply fills its own slots from
    the left, a row whose sentence is done can start another one in the same slots, and words read in vain are
    forgotten by counting fewer of them. A sentence never says a word twice: capacity is bounded by the vocabulary.

    Parameters
    ----------
    keys, values
        ``[layers, rows, heads, capacity, head width]``.
    length
        int64 ``[rows]``: words read.
    bag
        ``[rows, 2 × width + 1]``: running sums of the set state, or None where the model has none.
    used
        Slots that may be in use in some row; kept on the host so that no step waits for the device.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    bag: Tensor | None
    used: int = 0
    _before: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)
    _sums: Tensor | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """Number of sentences."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Words that each row has room for."""
        return self.keys.shape[3]

    def mask(self, new: int) -> Tensor | None:
        """Which slots each of ``new`` coming words may look at: bool ``[rows, 1, new, slots]``.

        None stands for plain causal attention, which is what an empty cache needs.
        """
        if self.used == 0:
            return None
        slots = torch.arange(self.used + new, device=self.length.device)
        last = self.length[:, None] + torch.arange(new, device=self.length.device)
        return (slots <= last[..., None])[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values of new words ``[rows, heads, new, head width]``; return all in use."""
        rows, _, new, _ = keys.shape
        if self.used == 0:
            self.keys[layer][:, :, :new] = keys
            self.values[layer][:, :, :new] = values
            return keys, values
        row = torch.arange(rows, device=keys.device)[:, None]
        slot = self.length[:, None] + torch.arange(new, device=keys.device)
        self.keys[layer][row, :, slot] = keys.transpose(1, 2)
        self.values[layer][row, :, slot] = values.transpose(1, 2)
        end = self.used + new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, words: int, real: Tensor | None, bag: Tensor | None) -> None:
        """Count words as read: ``real`` of the ``words`` of each row; ``bag`` is the set state after each of them."""
        self._before, self._sums = (self.length, self.bag), bag
        self.used += words
        self.keep(torch.full_like(self.length, words) if real is None else real)

    def keep(self, words: Tensor) -> None:
        """Forget what the last call read, but for the first ``words`` (int64 ``[rows]``) of each row."""
        assert self._before is not None
        length, bag = self._before
        self.length = length + words
        if self._sums is not None:
            assert bag is not None
            at = (words - 1).clamp(min=0)[:, None, None].expand(-1, 1, bag.shape[1])
            self.bag = torch.where((words > 0)[:, None], self._sums.gather(1, at)[:, 0], bag)

    def tighten(self) -> None:
        """Look up how many slots are in use; on an accelerator this waits for it."""
        self.used = int(self.length.max())

    def reserve(self, words: int, most: int | None = None) -> None:
        """Make room for ``words`` more in each row, and for some to come but no more than ``most`` in all."""
        needed = self.used + words
        if needed <= self.capacity:
            return
        room = max(needed, self.capacity + max(STEP, self.capacity // 2))
        room = max(needed, room if most is None else min(room, most))
        grown = [old.new_zeros((*old.shape[:3], room, old.shape[4])) for old in (self.keys, self.values)]
        for new, old in zip(grown, (self.keys, self.values), strict=True):
            new[:, :, :, : self.used] = old[:, :, :, : self.used]
        self.keys, self.values = grown

    def put(self, rows: Tensor, source: "Cache") -> None:
        """Let rows (int64 indices) start anew with what another cache's only row has read."""
        self.keys[:, rows, :, : source.used] = source.keys[:, :, :, : source.used]
        self.values[:, rows, :, : source.used] = source.values[:, :, :, : source.used]
        self.length = self.length.index_fill(0, rows, source.used)
        self.used = max(self.used, source.used)
        if self.bag is not None:
            assert source.bag is not None
            self.bag = self.bag.index_copy(0, rows, source.bag.expand(len(rows), -1))

    def expand(self, rows: int) -> "Cache":
        """Copy of a one-row cache for ``rows`` rows that share its prompt."""
        shape = (-1, rows, -1, -1, -1)
        return Cache(
            keys=self.keys.expand(shape).clone(),
            values=self.values.expand(shape).clone(),
            length=self.length.expand(rows).clone(),
            bag=None if self.bag is None else self.bag.expand(rows, -1).clone(),
            used=self.used,
        )

    def select(self, rows: Tensor) -> "Cache":
        """Cache of some rows (int64 indices)."""
        return Cache(
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            length=self.length[rows],
            bag=None if self.bag is None else self.bag[rows],
            used=self.used,
        )

"""Keys and values of words already read, for rows of different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Slots are added in steps of this many, and by at least half of what there is: growing copies everything.
STEP = 64


@dataclass(kw_only=True)
class KVCache:
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

    AXIS: ClassVar[int] = 3
    """Axis of the slots."""
    UNIT: ClassVar[int] = 1
    """Slots that one index of it stands for."""

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, capacity: int, width: int, *, bag: Tensor | None, like: Tensor
    ) -> Self:
        """Cache of words of so many heads of so much width, of the kind of a tensor."""
        keys, values = (cls._room((layers, rows, heads, capacity, width), like) for _ in range(2))
        return cls(keys=keys, values=values, length=torch.zeros(rows, dtype=torch.int64, device=like.device), bag=bag)

    @staticmethod
    def _room(shape: tuple[int, ...], like: Tensor) -> Tensor:
        # What no word has filled is masked, and must be a number nevertheless: zero times it is added.
        return like.new_zeros(shape)

    @property
    def rows(self) -> int:
        """Number of sentences."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Words that each row has room for."""
        return self.keys.shape[self.AXIS] * self.UNIT

    def attend(self, layer: int, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Add new words ``[rows, new, 3, heads, head width]`` of a layer; what they see: ``[rows, new, width]``."""
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        k, v = self.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).flatten(2)

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
        self.keys, self.values = (self._moved(t, range(self.rows), room) for t in (self.keys, self.values))

    def put(self, rows: Tensor, source: Self) -> None:
        """Let rows (int64 indices) start anew with what another cache's only row has read."""
        for mine, other in ((self.keys, source.keys), (self.values, source.values)):
            self._used(mine, source.used)[:, rows] = self._used(other, source.used)
        self.length = self.length.index_fill(0, rows, source.used)
        self.used = max(self.used, source.used)
        if self.bag is not None:
            assert source.bag is not None
            self.bag = self.bag.index_copy(0, rows, source.bag.expand(len(rows), -1))

    def expand(self, rows: int) -> Self:
        """Copy of a one-row cache for ``rows`` rows that share its prompt."""
        return replace(
            self,
            keys=self._moved(self.keys, [0] * rows, self.capacity),
            values=self._moved(self.values, [0] * rows, self.capacity),
            length=self.length.expand(rows).clone(),
            bag=None if self.bag is None else self.bag.expand(rows, -1).clone(),
            _before=None,
            _sums=None,
        )

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but some, which move together; they are named in ascending order."""
        for tensor in (self.keys, self.values):
            used = self._used(tensor, self.used)
            for place, row in enumerate(rows):
                if place != row:
                    used[:, place].copy_(used[:, row])
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        at = torch.tensor(rows, dtype=torch.int64, device=self.length.device)
        self.length, self.bag = self.length[at], None if self.bag is None else self.bag[at]

    def _used(self, tensor: Tensor, words: int) -> Tensor:
        """Part of keys or values that holds the first words of all rows."""
        return tensor.narrow(self.AXIS, 0, -(-words // self.UNIT))

    def _moved(self, old: Tensor, rows: Sequence[int], capacity: int) -> Tensor:
        """Keys or values of some rows in new room, what is in use of them."""
        shape = list(old.shape)
        shape[1], shape[self.AXIS] = len(rows), -(-capacity // self.UNIT)
        new = self._room(tuple(shape), old)
        to, source = self._used(new, self.used), self._used(old, self.used)
        for place, row in enumerate(rows):
            to[:, place].copy_(source[:, row])
        return new

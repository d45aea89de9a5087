"""Keys and values of words already read, for rows of different lengths."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Cache:
    """State of decoding: what a batch of rows has read so far.

    Without positional encoding a cached word is valid wherever it lies, so each row simply fills its own slots from
    the left. A sentence never says a word twice, hence capacity is bounded by the vocabulary.

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
        rows, heads, new, width = keys.shape
        if self.used == 0:
            self.keys[layer][:, :, :new] = keys
            self.values[layer][:, :, :new] = values
            return keys, values
        slots = self.length[:, None] + torch.arange(new, device=keys.device)
        index = slots[:, None, :, None].expand(rows, heads, new, width)
        self.keys[layer].scatter_(2, index, keys)
        self.values[layer].scatter_(2, index, values)
        end = self.used + new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, words: int, real: Tensor | None, bag: Tensor | None) -> None:
        """Count words as read: ``real`` of the ``words`` of each row; ``bag`` is the set state after each of them."""
        if bag is not None:
            last = torch.full_like(self.length, words) if real is None else real
            after = bag.gather(1, (last - 1).clamp(min=0)[:, None, None].expand(-1, 1, bag.shape[2]))[:, 0]
            assert self.bag is not None
            self.bag = torch.where((last > 0)[:, None], after, self.bag)
        self.length = self.length + (words if real is None else real)
        self.used += words

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

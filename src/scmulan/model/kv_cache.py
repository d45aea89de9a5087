"""Key-value cache for rows of different lengths: what decoding has read so far.

This one works on every device and in every type; :class:`scmulan.model.cpu_attention.kv_cache.CpuKVCache` replaces it
on a CPU in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewest slots by which a cache grows (else by half of what it has): growing copies everything.
CAPACITY_STEP = 64


@dataclass(kw_only=True)
class KVCache:
    """Keys and values of the tokens that a batch of rows has read.

    Parameters
    ----------
    keys, values
        ``[layers, rows, heads, capacity, head width]``.
    lengths
        int64 ``[rows]``: tokens read.
    set_sums
        float32 ``[rows, 2 × width + 1]``: running sums of the set state (:class:`scmulan.model.network.SetState`), or
        None where the model has none.
    used
        Slots that may be in use in some row; kept on the host so that no step waits for the device.

    Notes
    -----
    Without positional encoding a cached token is valid wherever it lies. So each row fills its own slots from the left,
    a row whose sentence is done can start another one in the same slots, and rejected drafts are forgotten by counting
    fewer tokens. A sentence never holds a token twice: capacity is bounded by the vocabulary.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    set_sums: Tensor | None
    used: int = 0
    _before: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)
    """``lengths`` and ``set_sums`` before the last pass."""
    _new_sums: Tensor | None = field(default=None, repr=False)
    """``set_sums`` after each token of the last pass: ``[rows, new, 2 × width + 1]``."""

    SLOT_AXIS: ClassVar[int] = 3
    """Axis of keys and values along which the slots lie."""
    SLOTS_PER_INDEX: ClassVar[int] = 1
    """Slots that one index of that axis holds."""

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
        """Return a cache that has read nothing, with type and device of the tensor ``like``."""
        keys, values = (cls._allocate((layers, rows, heads, capacity, head_width), like) for _ in range(2))
        lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return cls(keys=keys, values=values, lengths=lengths, set_sums=set_sums)

    @staticmethod
    def _allocate(shape: tuple[int, ...], like: Tensor) -> Tensor:
        # Zeros: unused slots are masked, but what lies there is multiplied by zero and added, so it must be finite.
        return like.new_zeros(shape)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return self.keys.shape[self.SLOT_AXIS] * self.SLOTS_PER_INDEX

    # -- one pass ------------------------------------------------------------------------------------------------------

    def mask(self, new: int) -> Tensor | None:
        """Return the slots that each of ``new`` coming tokens attends to: bool ``[rows, 1, new, slots]``.

        None stands for plain causal attention, which is what an empty cache needs.
        """
        if self.used == 0:
            return None
        slots = torch.arange(self.used + new, device=self.lengths.device)
        last = self.lengths[:, None] + torch.arange(new, device=self.lengths.device)
        return (slots <= last[..., None])[:, None]

    def attend(self, layer: int, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Write a layer's new tokens into the cache and let them attend to their rows.

        Parameters
        ----------
        layer
            Index of the layer.
        qkv
            ``[rows, new, 3, heads, head width]``: queries, keys and values of the new tokens.
        mask
            From :meth:`mask`, the same for all layers of a pass.

        Returns
        -------
        Tensor
            ``[rows, new, width]``.
        """
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        k, v = self._append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).flatten(2)

    def _append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[rows, heads, new, head width]``; return all that may be in use."""
        rows, _, new, _ = keys.shape
        if self.used == 0:
            self.keys[layer][:, :, :new] = keys
            self.values[layer][:, :, :new] = values
            return keys, values
        row = torch.arange(rows, device=keys.device)[:, None]
        slot = self.lengths[:, None] + torch.arange(new, device=keys.device)
        self.keys[layer][row, :, slot] = keys.transpose(1, 2)
        self.values[layer][row, :, slot] = values.transpose(1, 2)
        end = self.used + new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, new: int, n_real: Tensor | None, set_sums: Tensor | None) -> None:
        """Count the tokens of a pass as read, after its last layer.

        Parameters
        ----------
        new
            Tokens of each row, padding included.
        n_real
            int64 ``[rows]``: those of them that are no padding; None for all.
        set_sums
            ``[rows, new, 2 × width + 1]``: running sums after each of them.
        """
        self._before, self._new_sums = (self.lengths, self.set_sums), set_sums
        self.used += new
        self.accept(torch.full_like(self.lengths, new) if n_real is None else n_real)

    def accept(self, n_tokens: Tensor) -> None:
        """Keep the first ``n_tokens`` (int64 ``[rows]``) that each row read in the last pass; forget the others."""
        assert self._before is not None
        lengths, set_sums = self._before
        self.lengths = lengths + n_tokens
        if self._new_sums is not None:
            assert set_sums is not None
            at = (n_tokens - 1).clamp(min=0)[:, None, None].expand(-1, 1, set_sums.shape[1])
            self.set_sums = torch.where((n_tokens > 0)[:, None], self._new_sums.gather(1, at)[:, 0], set_sums)

    # -- room and rows -------------------------------------------------------------------------------------------------

    def refresh_used(self) -> None:
        """Look up how many slots are in use; on an accelerator this waits for it."""
        self.used = int(self.lengths.max())

    def reserve(self, n_tokens: int, max_capacity: int | None = None) -> None:
        """Make room for ``n_tokens`` more in each row, and some spare room within ``max_capacity``."""
        needed = self.used + n_tokens
        if needed <= self.capacity:
            return
        room = max(needed, self.capacity + max(CAPACITY_STEP, self.capacity // 2))
        room = max(needed, room if max_capacity is None else min(room, max_capacity))
        self.keys, self.values = (self._copied(t, range(self.rows), room) for t in (self.keys, self.values))

    def restart(self, rows: Tensor, prompt: Self) -> None:
        """Let rows (int64 indices) forget what they read and go on from what the only row of ``prompt`` has read."""
        for mine, other in ((self.keys, prompt.keys), (self.values, prompt.values)):
            self._in_use(mine, prompt.used)[:, rows] = self._in_use(other, prompt.used)
        self.lengths = self.lengths.index_fill(0, rows, prompt.used)
        self.used = max(self.used, prompt.used)
        if self.set_sums is not None:
            assert prompt.set_sums is not None
            self.set_sums = self.set_sums.index_copy(0, rows, prompt.set_sums.expand(len(rows), -1))

    def expand(self, rows: int) -> Self:
        """Return a copy of a one-row cache for ``rows`` rows that share its prompt."""
        return replace(
            self,
            keys=self._copied(self.keys, [0] * rows, self.capacity),
            values=self._copied(self.values, [0] * rows, self.capacity),
            lengths=self.lengths.expand(rows).clone(),
            set_sums=None if self.set_sums is None else self.set_sums.expand(rows, -1).clone(),
            _before=None,
            _new_sums=None,
        )

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep some rows only, named in ascending order; they are moved together in place."""
        for tensor in (self.keys, self.values):
            used = self._in_use(tensor, self.used)
            for index, row in enumerate(rows):
                if index != row:
                    used[:, index].copy_(used[:, row])
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        at = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        self.lengths, self.set_sums = self.lengths[at], None if self.set_sums is None else self.set_sums[at]

    def _in_use(self, tensor: Tensor, n_tokens: int) -> Tensor:
        """Return the part of keys or values that holds the first tokens of all rows."""
        return tensor.narrow(self.SLOT_AXIS, 0, -(-n_tokens // self.SLOTS_PER_INDEX))

    def _copied(self, old: Tensor, rows: Sequence[int], capacity: int) -> Tensor:
        """Copy what is in use of some rows of keys or values into a tensor of another capacity."""
        shape = list(old.shape)
        shape[1], shape[self.SLOT_AXIS] = len(rows), -(-capacity // self.SLOTS_PER_INDEX)
        new = self._allocate(tuple(shape), old)
        target, source = self._in_use(new, self.used), self._in_use(old, self.used)
        for index, row in enumerate(rows):
            target[:, index].copy_(source[:, row])
        return new

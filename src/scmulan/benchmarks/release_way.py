"""Decoding as the published release does it, as a yardstick: one cell at a time, all positions through both heads.

Written from the facts of the published code, on the same network and the same kernels as ours, so that a ratio shows
what the method costs and not how well it was compiled. The plain class reads the whole sentence again for every new
token; the class with a key-value cache reads the prompt once, lengthens the cache by concatenation, and passes every
new position through both heads. No token is generated twice (the plain class lets the newest be repeated). Either is
greedy, or samples from the softmax of the logits; a value is always the rounded mean.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan.model.network import Block, Mulan

ANNOTATION_TOKENS = 3
LEVELS = 10


def prompt_of(row: np.ndarray, gene_ids: np.ndarray, prompt_token: int) -> tuple[list[int], list[int]]:
    """Return tokens and values of a cell from its log1p values ``[genes]``: genes in reverse order, then the prompt."""
    genes = np.flatnonzero(row > 0)[::-1]
    levels = np.digitize(row[genes], np.linspace(0, row.max(), LEVELS + 1), right=True)
    return [*gene_ids[genes].tolist(), prompt_token], [*levels.tolist(), 0]


@dataclass(kw_only=True)
class ReleaseDecoder:
    """Decoder of one sentence at a time.

    Parameters
    ----------
    network
        In float32, without set state (the published shape).
    end
        Id of the end token.
    cached
        Decode as the class with a key-value cache does.
    generator
        Generator to sample from the softmax with; None for greedy decoding.
    """

    network: Mulan
    end: int
    cached: bool = False
    generator: torch.Generator | None = None
    _past: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    @torch.inference_mode()
    def annotate(
        self, row: np.ndarray, gene_ids: np.ndarray, prompt_token: int
    ) -> tuple[list[int], list[int], np.ndarray]:
        """Annotate a cell from its log1p values ``[genes]``; returns as :meth:`generate`."""
        return self.generate(*prompt_of(row, gene_ids, prompt_token), ANNOTATION_TOKENS)

    @torch.inference_mode()
    def generate(self, entity: list[int], value: list[int], max_tokens: int) -> tuple[list[int], list[int], np.ndarray]:
        """Go on with a sentence until the end token or ``max_tokens`` tokens.

        Returns
        -------
        tuple
            Tokens and values generated; and the hidden state at the second-to-last position of the last pass, float32
            ``[width]``.
        """
        entity, value, self._past = list(entity), list(value), []
        prompt_length, read = len(entity), 0
        while True:
            new = torch.tensor([entity[read:]]), torch.tensor([value[read:]])
            hidden = self._forward_cached(*new) if self.cached else self.network(*new)
            logits, means = self.network.entity_head(hidden), self.network.value_head(hidden)
            read = len(entity) if self.cached else 0
            next_logits = logits[0, -1].clone()
            next_logits[torch.tensor(entity if self.cached else entity[:-1], dtype=torch.int64)] = -torch.inf
            token = self._choose(next_logits)
            entity.append(token)
            value.append(int(means[0, -1, token].round().clamp(0, LEVELS)))
            if token == self.end or len(entity) == prompt_length + max_tokens:
                return entity[prompt_length:], value[prompt_length:], hidden[0, max(hidden.shape[1] - 2, 0)].numpy()

    def _choose(self, logits: Tensor) -> int:
        if self.generator is None:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(0), 1, generator=self.generator))

    def _forward_cached(self, entity: Tensor, value: Tensor) -> Tensor:
        x = self.network.word(entity) + self.network.level(value)
        for layer, block in enumerate(self.network.blocks):
            assert isinstance(block, Block)
            x = x + self._attend(block, block.norm_1(x), layer)
            x = x + block.down(F.gelu(block.up(block.norm_2(x)), approximate="tanh"))
        return self.network.norm(x)

    def _attend(self, block: Block, x: Tensor, layer: int) -> Tensor:
        B, T, W = x.shape
        heads = block.attention.heads
        q, k, v = (t.view(B, T, heads, W // heads).transpose(1, 2) for t in block.attention.qkv(x).split(W, dim=2))
        if layer < len(self._past):
            k, v = (torch.cat(pair, dim=2) for pair in zip(self._past[layer], (k, v), strict=True))
            self._past[layer] = (k, v)
        else:
            self._past.append((k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return block.attention.out(y.transpose(1, 2).reshape(B, T, W))

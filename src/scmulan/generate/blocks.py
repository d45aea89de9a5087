"""Decoding in a few blocks of many genes each.

A model with bounded genes gives the odds with which every gene is still to come. Token by token that is a likelihood,
and also slow: hundreds of passes per cell, each adding the error of a small model. A set may be drawn in blocks
instead. In block j of J, every gene still to come is drawn now with probability σ(z + c) / (J − j), since it falls into
each of the J − j blocks left with equal chance; the next block reads what was drawn. The shift c makes the expected
number of genes come out, which is drawn first: what the model expects after the prompt, times a factor for the depth of
the cell.

With one block, genes are independent given the prompt; each further block lets them depend on those before it. Many
blocks are not the model's likelihood: that is token-by-token decoding (``rule="exact"``).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmulan._progress import Advance
from scmulan.model.kv_cache import KVCache
from scmulan.model.loading import LoadedModel
from scmulan.vocab.sentences import Sentences

BISECTIONS = 40
"""Halvings of the interval in which the shift is sought."""
MAX_SHIFT = 20.0
"""Largest shift of the log-odds."""


@dataclass(kw_only=True, slots=True)
class BlockConfig:
    """How cells are decoded in blocks."""

    blocks: int
    """Number of blocks."""
    gene_count_factor: float = 1.0
    """Factor on the number of genes that the model expects after the prompt."""
    gene_count_spread: float = 0.0
    """Standard deviation of the logarithm of a cell's number of genes around its expectation."""
    temperature: float = 1.0
    """Below 1, likely genes are preferred."""
    sample_values: bool = True
    """Draw values from their distribution where the model has one; otherwise take their rounded mean."""
    max_tokens: int = 1_550
    """Most genes of a cell."""
    batch_size: int = 64
    """Rows decoded side by side. Speed only."""


@torch.inference_mode()
def decode_in_blocks(
    model: LoadedModel,
    prompt: np.ndarray,
    n: int,
    *,
    config: BlockConfig,
    seed: int,
    rows: slice = slice(None),
    genes: np.ndarray | None = None,
    advance: Advance = lambda finished: None,
) -> Sentences:
    """Decode ``n`` sentences after one prompt.

    Parameters
    ----------
    prompt, n, seed, rows, genes, advance
        As for :func:`scmulan.generate.decoding.decode_cells`.
    config
        How.

    Returns
    -------
    Sentences
        Prompt, genes in the order of their blocks, end token.
    """
    network = model.network
    device = network.device
    allowed = torch.from_numpy(model.vocabulary.is_gene if genes is None else model.vocabulary.is_gene & genes)
    allowed = allowed.to(device)
    entity = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    cache = network.new_cache(1, entity.shape[1])
    hidden = network(entity, torch.zeros_like(entity), cache)[:, -1]
    logits = network.entity_logits(hidden).float() / config.temperature
    expected = float(logits[:, allowed].sigmoid().sum()) * config.gene_count_factor
    sentences: list[tuple[np.ndarray, np.ndarray, int]] = []
    numbers = range(n)[rows]
    for begin in range(0, len(numbers), config.batch_size):
        streams = [np.random.default_rng([seed, number]) for number in numbers[begin : begin + config.batch_size]]
        spread = config.gene_count_spread
        factors = np.array([np.exp(spread * s.standard_normal() - spread**2 / 2) for s in streams])
        wanted = torch.from_numpy(np.minimum(expected * factors, config.max_tokens)).to(device)
        batch = _Batch(model, config, cache.expand(len(streams)), hidden.expand(len(streams), -1), allowed)
        for block in range(config.blocks):
            batch.decode_block(wanted, 1 / (config.blocks - block), streams)
        for tokens, values in zip(batch.tokens, batch.values, strict=True):
            entity_ids = np.concatenate([prompt, *tokens, [model.vocabulary.end]])
            levels = np.concatenate([np.zeros(len(prompt), np.int64), *values, [0]])
            sentences.append((entity_ids, levels, len(prompt)))
        advance(len(streams))
    return Sentences.join(sentences)


class _Batch:
    """Rows that are being decoded, and what the network has read of them."""

    def __init__(
        self, model: LoadedModel, config: BlockConfig, cache: KVCache, hidden: Tensor, allowed: Tensor
    ) -> None:
        self.network = model.network
        self.config = config
        self.cache = cache
        self.hidden = hidden
        self.left = allowed.expand(len(hidden), -1).clone()
        self.count = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self.tokens: list[list[np.ndarray]] = [[] for _ in range(len(hidden))]
        self.values: list[list[np.ndarray]] = [[] for _ in range(len(hidden))]

    def decode_block(self, wanted: Tensor, probability: float, streams: list[np.random.Generator]) -> None:
        """Draw one block, and let the network read it.

        Parameters
        ----------
        wanted
            ``[B]``: expected number of genes of the whole cell.
        probability
            That a gene still to come falls into this block.
        streams
            Random stream of each row.
        """
        rows, V = self.left.shape
        uniform = np.stack([s.random((3, V)) for s in streams])
        u, order, u_value = torch.from_numpy(uniform).to(self.hidden.device).unbind(1)
        logits = self.network.entity_logits(self.hidden).float() / self.config.temperature
        logits = logits.masked_fill(~self.left, -torch.inf)
        shifted = logits + solve_shift(logits, wanted - self.count)[:, None]
        drawn = u < shifted.sigmoid() * probability
        # In random order, and no more than there is room for.
        ranked = order.masked_fill(~drawn, 2.0).argsort(1)
        new = drawn.sum(1).minimum(self.config.max_tokens - self.count)
        longest = int(new.max())
        if not longest:
            return
        token = ranked[:, :longest]
        real = torch.arange(longest, device=token.device) < new[:, None]
        value = self._pick_values(token, u_value.gather(1, token)) * real
        token = token * real
        for row in range(rows):
            self.tokens[row].append(token[row, : new[row]].cpu().numpy())
            self.values[row].append(value[row, : new[row]].cpu().numpy())
        self.left &= ~torch.zeros_like(self.left).scatter(1, token, real)
        self.count += new
        self.cache.reserve(longest)
        hidden = self.network(token, value, self.cache, new)
        last = hidden[torch.arange(rows, device=new.device), (new - 1).clamp(min=0)]
        self.hidden = torch.where((new > 0)[:, None], last, self.hidden)

    def _pick_values(self, token: Tensor, uniform: Tensor) -> Tensor:
        network = self.network
        mean = network.value_mean(self.hidden).float().gather(1, token)
        if self.config.sample_values and network.log_scale is not None:
            cumulated = network.level_log_probs(mean, token).exp().cumsum(-1)
            return (cumulated < uniform[..., None]).sum(-1).clamp(max=network.config.levels - 1) + 1
        return mean.round().clamp(1, network.config.levels).long()


def solve_shift(logits: Tensor, wanted: Tensor) -> Tensor:
    """Find the shift of each row's logits ``[B, V]`` with which their σ add up to ``wanted`` ``[B]``, by bisection.

    Logits of −inf never count.
    """
    low = torch.full_like(wanted, -MAX_SHIFT)
    high = torch.full_like(wanted, MAX_SHIFT)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = (logits + middle[:, None]).sigmoid().sum(1) >= wanted
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return (low + high) / 2

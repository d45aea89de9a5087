"""Cells written in a few blocks of many words.

A model with bounded genes says of every gene with which odds it is still to come. Word by word that is a likelihood,
and also slow: hundreds of passes per cell, each adding the error of a small model. A set can be said in blocks instead:
in block j of J every gene that is still to come is said now with chance 1 / (J − j), so it is drawn with
σ(z + c) / (J − j); the next block reads what was said. The shift c makes the expected number of genes come out, which
is drawn first: what the model expects after the prompt, times a factor for the depth of the cell.

With one block, genes are independent given the prompt; each further block lets them depend on those before it. Many
blocks are not the model's likelihood: that is word-by-word sampling (``rule="exact"``).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scmulan.model.kv_cache import KVCache
from scmulan.model.loading import LoadedModel
from scmulan.vocab.sentences import Sentences

BISECTIONS = 40
# Odds are shifted by no more than this.
LARGEST_SHIFT = 20.0


@torch.inference_mode()
def generate_in_blocks(
    model: LoadedModel,
    prompt: np.ndarray,
    n: int,
    *,
    seed: int,
    blocks: int,
    factor: float = 1.0,
    spread: float = 0.0,
    temperature: float = 1.0,
    sample_values: bool = True,
    max_words: int = 1_550,
    batch: int = 64,
    share: slice = slice(None),
    genes: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Sentences:
    """Write ``n`` sentences after one prompt.

    Parameters
    ----------
    prompt
        int64 word ids without values, the task's prompt word last.
    seed
        Row ``i`` draws from its own stream ``(seed, i)``.
    blocks
        Number of blocks.
    factor
        On the number of genes that the model expects after the prompt.
    spread
        Standard deviation of the logarithm of a cell's number of genes around its expectation.
    temperature, sample_values, max_words, batch, share, genes, progress
        As for :func:`scmulan.generate.decoding.decode_cells`.

    Returns
    -------
    Sentences
        Prompt, genes in the order of their blocks, end word.
    """
    network = model.network
    device = network.word.weight.device
    allowed = model.vocabulary.is_gene if genes is None else model.vocabulary.is_gene & genes
    sayable = torch.from_numpy(allowed).to(device)
    entity = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    first = network.new_cache(1, entity.shape[1])
    start = network(entity, torch.zeros_like(entity), first)[:, -1]
    expected = float(_logits(model, start, temperature)[:, sayable].sigmoid().sum()) * factor
    written: list[tuple[np.ndarray, np.ndarray, int]] = []
    rows = range(n)[share]
    for begin in range(0, len(rows), batch):
        streams = [np.random.default_rng([seed, row]) for row in rows[begin : begin + batch]]
        depth = np.array([np.exp(spread * s.standard_normal() - spread**2 / 2) for s in streams])
        wanted = torch.from_numpy(np.minimum(expected * depth, max_words)).to(device)
        state = _State(model, first.expand(len(streams)), start.expand(len(streams), -1), sayable)
        for block in range(blocks):
            state.say(wanted, 1 / (blocks - block), streams, temperature, sample_values, max_words)
        for words, values in zip(state.words, state.values, strict=True):
            said = np.concatenate([prompt, *words, [model.vocabulary.end]])
            level = np.concatenate([np.zeros(len(prompt), np.int64), *values, [0]])
            written.append((said, level, len(prompt)))
        progress(len(streams))
    return Sentences.join(written)


def _logits(model: LoadedModel, hidden: Tensor, temperature: float) -> Tensor:
    return model.network.entity_logits(hidden).float() / temperature


class _State:
    """Rows that are being written, and what the network has read of them."""

    def __init__(self, model: LoadedModel, cache: KVCache, hidden: Tensor, sayable: Tensor) -> None:
        self.model = model
        self.cache = cache
        self.hidden = hidden
        self.left = sayable.expand(len(hidden), -1).clone()
        self.number = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self.words: list[list[np.ndarray]] = [[] for _ in range(len(hidden))]
        self.values: list[list[np.ndarray]] = [[] for _ in range(len(hidden))]

    def say(
        self,
        wanted: Tensor,
        chance: float,
        streams: list[np.random.Generator],
        temperature: float,
        sample_values: bool,
        max_words: int,
    ) -> None:
        """Draw one block, keep it, and let the network read it."""
        rows, V = self.left.shape
        uniform = np.stack([s.random((3, V)) for s in streams])
        u, order, u_value = torch.from_numpy(uniform).to(self.hidden.device).unbind(1)
        logits = _logits(self.model, self.hidden, temperature).masked_fill(~self.left, -torch.inf)
        shifted = logits + shift_to(logits, wanted - self.number)[:, None]
        drawn = u < shifted.sigmoid() * chance
        # In random order, and no more than there is room for.
        rank = order.masked_fill(~drawn, 2.0).argsort(1)
        new = drawn.sum(1).minimum(max_words - self.number)
        longest = int(new.max())
        if not longest:
            return
        word = rank[:, :longest]
        real = torch.arange(longest, device=word.device) < new[:, None]
        value = self._values(word, u_value.gather(1, word), sample_values) * real
        word = word * real
        for row in range(rows):
            self.words[row].append(word[row, : new[row]].cpu().numpy())
            self.values[row].append(value[row, : new[row]].cpu().numpy())
        self.left &= ~torch.zeros_like(self.left).scatter(1, word, real)
        self.number += new
        self.cache.reserve(longest)
        states = self.model.network(word, value, self.cache, new)
        last = states[torch.arange(rows, device=new.device), (new - 1).clamp(min=0)]
        self.hidden = torch.where((new > 0)[:, None], last, self.hidden)

    def _values(self, word: Tensor, uniform: Tensor, sample: bool) -> Tensor:
        network = self.model.network
        mean = network.value_mean(self.hidden).float().gather(1, word)
        if sample and network.log_scale is not None:
            cumulated = network.level_log_probs(mean, word).exp().cumsum(-1)
            return (cumulated < uniform[..., None]).sum(-1).clamp(max=network.config.levels - 1) + 1
        return mean.round().clamp(1, network.config.levels).long()


def shift_to(logits: Tensor, wanted: Tensor) -> Tensor:
    """Shift of each row's logits ``[B, V]`` with which their σ add up to ``wanted`` ``[B]``; −inf never counts."""
    low = torch.full_like(wanted, -LARGEST_SHIFT)
    high = torch.full_like(wanted, LARGEST_SHIFT)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = (logits + middle[:, None]).sigmoid().sum(1) >= wanted
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return (low + high) / 2

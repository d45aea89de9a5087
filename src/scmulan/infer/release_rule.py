"""The greedy decoding rules of the published release, on our network, for many sentences at once.

Two rules differ in which tokens may not come again. ``"release"`` (the release's plain class) excludes all tokens of
the sentence **except the newest one**, so that a coarse type may be repeated as the fine type; ``"release_cache"`` (its
key-value-cache class) excludes the newest too. Both take the token with the largest logit, with the value
``clamp(round(value head), 0, levels)``, rounding half to even.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scmulan.infer.batching import padded_tensors
from scmulan.model.network import Mulan
from scmulan.vocab.sentences import Sentences

ReleaseRule = Literal["release", "release_cache"]

# Tokens that the release generates to annotate a cell.
ANNOTATION_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Tokens generated after each prompt.

    Parameters
    ----------
    entity, value
        int64 ``[sentences, longest]``, padded with −1; the end token is among them where it was generated.
    embedding
        float32 ``[sentences, width]``: normalised hidden state of the last layer at the second-to-last position of
        the sentence as it was when the last token was predicted. With three tokens that is the position of the first
        of them; where the end token came at once it is the last token before the task's prompt token.
    """

    entity: np.ndarray
    value: np.ndarray
    embedding: np.ndarray


def annotate(
    network: Mulan, prompts: Sentences, *, end: int, rule: ReleaseRule = "release", batch_size: int = 16
) -> Decoded:
    """Generate up to three tokens, as the release does to annotate and to embed.

    See :func:`decode` for the parameters; the embedding is published for the rule ``"release"``.
    """
    return decode(network, prompts, max_tokens=ANNOTATION_TOKENS, end=end, rule=rule, batch_size=batch_size)


@torch.inference_mode()
def decode(
    network: Mulan,
    prompts: Sentences,
    *,
    max_tokens: int,
    end: int,
    rule: ReleaseRule = "release_cache",
    batch_size: int = 16,
) -> Decoded:
    """Decode greedily until the end token or ``max_tokens`` tokens.

    Parameters
    ----------
    network
        Network in evaluation mode.
    prompts
        Sentences to go on with, each of at least one token.
    max_tokens
        Largest number of tokens to generate per sentence.
    end
        Id of the end token.
    rule
        ``"release"`` or ``"release_cache"``.
    batch_size
        Sentences decoded at a time. Those of similar length go together; results do not depend on it.

    Returns
    -------
    Decoded
        In the order of ``prompts``.
    """
    shape = (len(prompts), max_tokens)
    entity = np.full(shape, -1, dtype=np.int64)
    value = np.full(shape, -1, dtype=np.int64)
    embedding = np.zeros((len(prompts), network.config.width), dtype=np.float32)
    for rows in _batches(prompts, batch_size):
        tokens, levels, hidden = _decode_batch(network, prompts.take(rows), max_tokens, end, rule)
        entity[rows, : tokens.shape[1]], value[rows, : tokens.shape[1]] = tokens.cpu(), levels.cpu()
        embedding[rows] = hidden.float().cpu()
    longest = int((entity >= 0).sum(1).max(initial=0))
    return Decoded(entity=entity[:, :longest], value=value[:, :longest], embedding=embedding)


@torch.inference_mode()
def head_outputs(network: Mulan, prompts: Sentences, *, batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Compute both heads at the last prompt token: logits and expected bins, float32 ``[sentences, vocabulary]``."""
    shape = (len(prompts), network.config.vocabulary)
    logits, values = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for rows in _batches(prompts, batch_size):
        entity, value, lengths = padded_tensors(prompts.take(rows), network.device)
        hidden = network(entity, value)[torch.arange(len(rows), device=lengths.device), lengths - 1]
        logits[rows] = network.entity_logits(hidden).float().cpu()
        values[rows] = network.value_mean(hidden).float().cpu()
    return logits, values


def _batches(prompts: Sentences, batch_size: int) -> list[np.ndarray]:
    order = np.argsort(prompts.lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _decode_batch(
    network: Mulan, prompts: Sentences, max_tokens: int, end: int, rule: ReleaseRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and levels ``[rows, steps]``, padded with −1, and the embedding ``[rows, width]``."""
    entity, value, lengths = padded_tensors(prompts, network.device)
    rows = torch.arange(len(prompts), device=lengths.device)
    cache = network.new_cache(len(prompts), entity.shape[1] + max_tokens)
    hidden = network(entity, value, cache, lengths)
    last = hidden[rows, lengths - 1]
    second_last = hidden[rows, (lengths - 2).clamp(min=0)]  # a prompt of one token has nothing before its last position
    newest = entity[rows, lengths - 1]
    excluded = _contained(network, entity, lengths if rule == "release_cache" else lengths - 1)
    running = torch.ones(len(prompts), dtype=torch.bool, device=lengths.device)
    tokens, levels = [], []
    for step in range(max_tokens):
        token = network.entity_logits(last).masked_fill(excluded, -torch.inf).argmax(1)
        level = network.value_mean(last)[rows, token].round().clamp(0, network.config.levels).long()
        tokens.append(token.where(running, -1))
        levels.append(level.where(running, -1))
        running = running & (token != end)
        if step + 1 == max_tokens or not running.any():
            break
        excluded[rows, token if rule == "release_cache" else newest] = True
        newest = token
        # Rows that have ended read padding, which their cache does not count and nobody looks at.
        new_hidden = network(token[:, None], level[:, None], cache, running.long())[:, 0]
        second_last = torch.where(running[:, None], last, second_last)
        last = torch.where(running[:, None], new_hidden, last)
    return torch.stack(tokens, 1), torch.stack(levels, 1), second_last


def _contained(network: Mulan, entity: Tensor, lengths: Tensor) -> Tensor:
    """Return which tokens are among the first ``lengths`` of each row: bool ``[rows, vocabulary]``."""
    inside = torch.arange(entity.shape[1], device=entity.device) < lengths[:, None]
    counts = torch.zeros(len(entity), network.config.vocabulary, dtype=torch.int64, device=entity.device)
    return counts.scatter_add_(1, entity, inside.long()) > 0

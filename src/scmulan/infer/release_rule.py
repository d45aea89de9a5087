"""The decoding rules of the published release, on our network, for many sentences at once.

Two rules differ in which words may not be said again. ``"release"`` (its plain class) excludes all words of the
sentence **except the newest one**, so that a coarse type may be repeated as the fine type; ``"release_cache"`` (its
key-value-cache class) excludes the newest too. Both are greedy: the word with the largest logit, with the value
``clamp(round(value head), 0, levels)``, rounding half to even.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scmulan.model.network import Mulan
from scmulan.vocab.sentences import Sentences

Rule = Literal["release", "release_cache"]

ANNOTATION_WORDS = 3


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Words that were said after each prompt.

    Parameters
    ----------
    entity, value
        int64 ``[sentences, most words]``, padded with −1; the end word is among them where it was said.
    embedding
        float32 ``[sentences, width]``: normalised hidden state of the last layer at the second-to-last position of
        the sentence as it was when the last word was predicted. With three words said that is the position of the first
        of them; where the end word came at once it is the last word before the task's prompt word.
    """

    entity: np.ndarray
    value: np.ndarray
    embedding: np.ndarray


def annotate(network: Mulan, prompts: Sentences, *, end: int, rule: Rule = "release", batch_size: int = 16) -> Decoded:
    """Say up to three words, as the release does to annotate and to embed.

    See :func:`decode` for the parameters; the embedding is published for the rule ``"release"``.
    """
    return decode(network, prompts, words=ANNOTATION_WORDS, end=end, rule=rule, batch_size=batch_size)


@torch.inference_mode()
def decode(
    network: Mulan, prompts: Sentences, *, words: int, end: int, rule: Rule = "release_cache", batch_size: int = 16
) -> Decoded:
    """Greedy decoding until the end word or ``words`` words.

    Parameters
    ----------
    network
        Network in evaluation mode.
    prompts
        Sentences to go on with, each of at least one word.
    words
        Most words to say per sentence.
    end
        Id of the end word.
    rule
        ``"release"`` or ``"release_cache"``.
    batch_size
        Sentences decoded at a time. Those of like length go together; results do not depend on it.

    Returns
    -------
    Decoded
        In the order of ``prompts``.
    """
    shape = (len(prompts), words)
    entity = np.full(shape, -1, dtype=np.int64)
    value = np.full(shape, -1, dtype=np.int64)
    embedding = np.zeros((len(prompts), network.config.width), dtype=np.float32)
    for rows in _batches(prompts, batch_size):
        said, level, hidden = _decode(network, prompts.take(rows), words, end, rule)
        entity[rows, : said.shape[1]], value[rows, : said.shape[1]] = said.cpu(), level.cpu()
        embedding[rows] = hidden.float().cpu()
    most = int((entity >= 0).sum(1).max(initial=0))
    return Decoded(entity=entity[:, :most], value=value[:, :most], embedding=embedding)


@torch.inference_mode()
def next_word(network: Mulan, prompts: Sentences, *, batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Both heads after the last prompt word: entity logits and value means, float32 ``[sentences, vocabulary]``."""
    shape = (len(prompts), network.config.vocabulary)
    logits, values = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for rows in _batches(prompts, batch_size):
        entity, value, lengths = _tensors(network, prompts.take(rows))
        hidden = network(entity, value)[torch.arange(len(rows), device=lengths.device), lengths - 1]
        logits[rows] = network.entity_logits(hidden).float().cpu()
        values[rows] = network.value_mean(hidden).float().cpu()
    return logits, values


def _batches(prompts: Sentences, size: int) -> list[np.ndarray]:
    order = np.argsort(prompts.lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def _tensors(network: Mulan, prompts: Sentences) -> tuple[Tensor, Tensor, Tensor]:
    device = network.word.weight.device
    entity, value, lengths = (torch.from_numpy(array).to(device) for array in prompts.padded())
    return entity, value, lengths


def _decode(network: Mulan, prompts: Sentences, words: int, end: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    entity, value, lengths = _tensors(network, prompts)
    rows = torch.arange(len(prompts), device=lengths.device)
    cache = network.new_cache(len(prompts), entity.shape[1] + words)
    hidden = network(entity, value, cache, lengths)
    last = hidden[rows, lengths - 1]
    before = hidden[rows, (lengths - 2).clamp(min=0)]  # a prompt of one word has nothing before its last position
    newest = entity[rows, lengths - 1]
    excluded = _said(network, entity, lengths if rule == "release_cache" else lengths - 1)
    running = torch.ones(len(prompts), dtype=torch.bool, device=lengths.device)
    said, levels = [], []
    for step in range(words):
        word = network.entity_logits(last).masked_fill(excluded, -torch.inf).argmax(1)
        level = network.value_mean(last)[rows, word].round().clamp(0, network.config.levels).long()
        said.append(word.where(running, -1))
        levels.append(level.where(running, -1))
        running = running & (word != end)
        if step + 1 == words or not running.any():
            break
        excluded[rows, word if rule == "release_cache" else newest] = True
        newest = word
        # Rows that have ended read padding, which their cache does not count and nobody looks at.
        reading = network(word[:, None], level[:, None], cache, running.long())[:, 0]
        before = torch.where(running[:, None], last, before)
        last = torch.where(running[:, None], reading, last)
    return torch.stack(said, 1), torch.stack(levels, 1), before


def _said(network: Mulan, entity: Tensor, lengths: Tensor) -> Tensor:
    """Which words are among the first ``lengths`` of each row: bool ``[rows, vocabulary]``."""
    inside = torch.arange(entity.shape[1], device=entity.device) < lengths[:, None]
    counts = torch.zeros(len(entity), network.config.vocabulary, dtype=torch.int64, device=entity.device)
    return counts.scatter_add_(1, entity, inside.long()) > 0

"""Sentences written word by word, many side by side."""

from dataclasses import dataclass

import numpy as np
import torch

from scmulan.inference.engine import Progress
from scmulan.inference.sampling import Rule, draw_number, pick, pick_value, word_weights
from scmulan.language.sentence import Sentences
from scmulan.model.cache import Cache
from scmulan.model.checkpoint import LoadedModel


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """How sentences are written."""

    rule: Rule = "softmax"
    """Which distribution the next word is drawn from, see :mod:`scmulan.inference.sampling`."""
    temperature: float = 1.0
    """Below 1 the likely words are preferred."""
    sample_values: bool = True
    """Draw values from their distribution where the model has one; otherwise their mean."""
    max_words: int = 1_550
    """Most words of a sentence after its prompt."""
    batch: int = 64
    """Sentences written side by side."""


@torch.inference_mode()
def write_cells(
    model: LoadedModel,
    prompt: np.ndarray,
    n: int,
    *,
    config: GenerateConfig,
    seed: int,
    genes: np.ndarray | None = None,
    progress: Progress = lambda n: None,
) -> Sentences:
    """Write ``n`` sentences after one prompt.

    Parameters
    ----------
    prompt
        int64 word ids without values, the task's prompt word last.
    n
        Number of sentences.
    seed
        Row ``i`` draws from its own stream ``(seed, i)``: the same seed gives the same cells, whatever the batch.
    genes
        Bool ``[V]``: genes that may be said (default: all).

    Returns
    -------
    Sentences
        Prompt and words; a sentence that reached ``max_words`` lacks the end word.
    """
    network = model.network
    device = network.word.weight.device
    V = network.config.vocabulary
    sayable = model.vocabulary.is_gene.copy() if genes is None else model.vocabulary.is_gene & genes
    most = min(config.max_words, int(sayable.sum()) + 1)
    sayable[model.vocabulary.end] = config.rule != "set"
    forbidden = torch.from_numpy(~sayable).to(device)
    entity = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    first = network.new_cache(1, entity.shape[1])
    start = network(entity, torch.zeros_like(entity), first)[:, -1]
    written: list[tuple[np.ndarray, np.ndarray, int]] = []
    for begin in range(0, n, config.batch):
        rows = np.arange(begin, min(n, begin + config.batch))
        uniform = np.stack([np.random.default_rng([seed, int(r)]).random(2 * most + V) for r in rows])
        cache = _widen(first, len(rows), most)
        rest = _write_batch(model, cache, start.expand(len(rows), -1), forbidden, uniform, most, config, progress)
        for words, values in rest:
            said = np.concatenate([prompt, words])
            written.append((said, np.concatenate([np.zeros(len(prompt), np.int64), values]), len(prompt)))
    return Sentences.join(written)


def _widen(cache: Cache, rows: int, extra: int) -> Cache:
    """One row's cache for many rows, with room for ``extra`` more words."""
    wide = cache.expand(rows)
    room = wide.keys.new_zeros((*wide.keys.shape[:3], extra, wide.keys.shape[4]))
    wide.keys = torch.cat((wide.keys, room), dim=3)
    wide.values = torch.cat((wide.values, room), dim=3)
    return wide


def _write_batch(
    model: LoadedModel,
    cache: Cache,
    hidden: torch.Tensor,
    forbidden: torch.Tensor,
    uniform: np.ndarray,
    most: int,
    config: GenerateConfig,
    progress: Progress,
) -> list[tuple[np.ndarray, np.ndarray]]:
    network = model.network
    device = hidden.device
    B, V = len(uniform), len(forbidden)
    u = torch.from_numpy(uniform).to(device)
    said = forbidden.expand(B, V).clone()
    words = np.zeros((B, most), dtype=np.int64)
    values = np.zeros((B, most), dtype=np.int64)
    length = np.zeros(B, dtype=np.int64)
    alive = torch.arange(B, device=device)
    limit = torch.full((B,), most, dtype=torch.int64, device=device)
    for t in range(most):
        logits = network.entity_logits(hidden).float()
        if config.rule == "softmax":
            logits = network.log_weights(logits, model.vocabulary.end)
        logits = logits.masked_fill(said, -torch.inf)
        if t == 0 and config.rule == "set":
            limit = draw_number(logits, u[:, 2 * most :]).clamp(max=most)
        word = pick(word_weights(logits, config.rule, config.temperature), u[alive, 2 * t])
        value = pick_value(network, hidden, word, u[alive, 2 * t + 1], config.sample_values)
        ended = word == model.vocabulary.end
        value = value.masked_fill(ended, 0)
        at = alive.cpu().numpy()
        words[at, t], values[at, t], length[at] = word.cpu().numpy(), value.cpu().numpy(), t + 1
        going = ~(ended | (limit[alive] <= t + 1))
        if not bool(going.all()):
            progress(int((~going).sum()))
            keep = going.nonzero()[:, 0]
            alive, word, value, said = alive[keep], word[keep], value[keep], said[keep]
            cache = cache.select(keep)
        if not len(alive):
            break
        said = said.scatter(1, word[:, None], True)
        hidden = network(word[:, None], value[:, None], cache)[:, 0]
    if config.rule == "set":  # the number of words was drawn: the cell is complete
        return [_with_end(words[b, : length[b]], values[b, : length[b]], model.vocabulary.end) for b in range(B)]
    return [(words[b, : length[b]], values[b, : length[b]]) for b in range(B)]


def _with_end(words: np.ndarray, values: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    return np.append(words, end), np.append(values, 0)

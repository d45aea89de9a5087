"""Batched passes over ragged prompts: the state at a prompt's end, and label scores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from scmulan.language.sentence import Sentences
from scmulan.language.vocabulary import Family
from scmulan.model.checkpoint import LoadedModel

Progress = Callable[[int], None]


def buckets(lengths: np.ndarray, words: int, most: int = 256) -> Iterator[np.ndarray]:
    """Rows in batches of similar length: at most ``words`` padded words (but at least one row) in each.

    Parameters
    ----------
    lengths
        Words of each row.
    words
        Padded words per batch.
    most
        Rows per batch.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and end - start < most and (end - start + 1) * lengths[order[end]] <= words:
            end += 1
        yield order[start:end]
        start = end


@dataclass(frozen=True)
class LabelScores:
    """What the state at the end of an annotation prompt says.

    Parameters
    ----------
    coarse, fine
        float32 probabilities ``[cells, types]``, in the order of the vocabulary's families; rows sum to one.
    state
        float32 ``[cells, width]``: the hidden state itself.
    """

    coarse: np.ndarray
    fine: np.ndarray
    state: np.ndarray


@torch.inference_mode()
def score_labels(
    model: LoadedModel, prompts: Sentences, *, batch_words: int = 16_384, progress: Progress = lambda n: None
) -> LabelScores:
    """Probability of every coarse and fine cell type, from one forward pass per cell.

    Parameters
    ----------
    model
        Any model with cell types in its vocabulary.
    prompts
        Annotation prompts.
    batch_words
        Padded words per batch; results do not depend on it beyond rounding.
    progress
        Called with the number of cells just done.
    """
    network = model.network
    device = network.word.weight.device
    families = [model.vocabulary.ids(f) for f in (Family.COARSE, Family.FINE)]
    out = [np.zeros((len(prompts), len(ids)), dtype=np.float32) for ids in families]
    state = np.zeros((len(prompts), network.config.width), dtype=np.float32)
    for rows in buckets(prompts.lengths, batch_words):
        entity, value, lengths = prompts.take(rows).padded()
        hidden = network(torch.from_numpy(entity).to(device), torch.from_numpy(value).to(device))
        last = hidden[torch.arange(len(rows)), torch.from_numpy(lengths - 1).to(device)]
        logits = network.entity_logits(last).float()
        for probabilities, ids in zip(out, families, strict=True):
            probabilities[rows] = _normalise(logits[:, ids], model.card.get("objective", "published")).cpu().numpy()
        state[rows] = last.float().cpu().numpy()
        progress(len(rows))
    return LabelScores(coarse=out[0], fine=out[1], state=state)


def _normalise(logits: torch.Tensor, objective: str) -> torch.Tensor:
    """Probabilities over one family: softmax of next-word logits, normalised σ of "still to be said" logits."""
    if objective == "published":
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.softmax(1)

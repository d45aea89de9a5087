"""Batched passes over ragged prompts: the state at a prompt's end, and label scores."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmulan.infer.batching import TokenBudget, buckets, suitable_tokens
from scmulan.model.loading import LoadedModel
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family

__all__ = ["LabelScores", "Progress", "TokenBudget", "buckets", "last_hidden", "score_labels"]

Progress = Callable[[int], None]


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
    hidden: np.ndarray


def token_budget(model: LoadedModel, batch_tokens: int | None) -> TokenBudget:
    """Budget of a job: as many words as were asked for, or as suit the device and its memory."""
    return TokenBudget(words=batch_tokens or suitable_tokens(model.network))


@torch.inference_mode()
def score_labels(
    model: LoadedModel,
    prompts: Sentences,
    *,
    budget: TokenBudget | None = None,
    given_coarse: bool = False,
    progress: Progress = lambda n: None,
) -> LabelScores:
    """Probability of every coarse and fine cell type, from one forward pass per cell.

    Parameters
    ----------
    model
        Any model with cell types in its vocabulary.
    prompts
        Annotation prompts.
    budget
        Padded words per batch (default: what suits the device); results do not depend on it beyond rounding.
    given_coarse
        Say the most probable coarse type first and score the fine types after it: one more step of one word.
        Otherwise both are scored where the prompt ends.
    progress
        Called with the number of cells just done.
    """
    coarse_ids, fine_ids = (model.vocabulary.ids(f) for f in (Family.COARSE, Family.FINE))
    coarse, fine = (np.zeros((len(prompts), len(ids)), dtype=np.float32) for ids in (coarse_ids, fine_ids))
    hidden = np.zeros((len(prompts), model.config.width), dtype=np.float32)
    objective = model.card.get("objective", "published")

    def work(rows: np.ndarray) -> None:
        entity, value, lengths = _tensors(model, prompts.take(rows))
        if given_coarse and len(coarse_ids):
            last, after = _with_coarse(model, entity, value, lengths, coarse_ids)
        else:
            last = after = model.network.forward_last(entity, value, lengths)
        logits = model.network.entity_logits(last).float()
        logits_after = logits if after is last else model.network.entity_logits(after).float()
        coarse[rows] = _normalise(logits[:, coarse_ids], objective).cpu().numpy()
        fine[rows] = _normalise(logits_after[:, fine_ids], objective).cpu().numpy()
        hidden[rows] = last.float().cpu().numpy()
        progress(len(rows))

    (budget or token_budget(model, None)).for_each(prompts.lengths, work)
    return LabelScores(coarse=coarse, fine=fine, hidden=hidden)


@torch.inference_mode()
def last_hidden(
    model: LoadedModel,
    prompts: Sentences,
    *,
    budget: TokenBudget | None = None,
    progress: Progress = lambda n: None,
) -> np.ndarray:
    """Hidden state at the last word of each sentence, float32 ``[sentences, width]``; as in :func:`score_labels`."""
    hidden = np.zeros((len(prompts), model.config.width), dtype=np.float32)

    def work(rows: np.ndarray) -> None:
        hidden[rows] = model.network.forward_last(*_tensors(model, prompts.take(rows))).float().cpu().numpy()
        progress(len(rows))

    (budget or token_budget(model, None)).for_each(prompts.lengths, work)
    return hidden


def _tensors(model: LoadedModel, prompts: Sentences) -> tuple[Tensor, Tensor, Tensor]:
    device = model.network.word.weight.device
    entity, value, lengths = (torch.from_numpy(array).to(device) for array in prompts.padded())
    return entity, value, lengths


def _with_coarse(
    model: LoadedModel, entity: Tensor, value: Tensor, lengths: Tensor, ids: np.ndarray
) -> tuple[Tensor, Tensor]:
    """States after the prompt, and after the most probable coarse type as one more word."""
    network = model.network
    cache = network.new_cache(len(entity), entity.shape[1] + 1)
    hidden = network(entity, value, cache, lengths)
    last = hidden[torch.arange(len(entity), device=entity.device), lengths - 1]
    words = torch.from_numpy(ids).to(entity.device)
    said = words[network.entity_logits(last)[:, words].argmax(1)][:, None]
    return last, network(said, torch.zeros_like(said), cache)[:, 0]


def _normalise(logits: Tensor, objective: str) -> Tensor:
    """Probabilities over one family: softmax of next-word logits, normalised σ of "still to be said" logits."""
    if objective == "published":
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.softmax(1)

"""Batched forward passes over prompts of different lengths: label probabilities and hidden states."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmulan._progress import Advance
from scmulan.infer.batching import TokenBudget, padded_tensors
from scmulan.model.loading import LoadedModel
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family


@dataclass(frozen=True)
class LabelScores:
    """Results of annotation prompts.

    Parameters
    ----------
    coarse, fine
        float32 probabilities ``[cells, types]``, in the order of the vocabulary's families; rows sum to one.
    hidden
        float32 ``[cells, width]``: hidden state at the prompt's last token.
    """

    coarse: np.ndarray
    fine: np.ndarray
    hidden: np.ndarray


@torch.inference_mode()
def score_labels(
    model: LoadedModel,
    prompts: Sentences,
    *,
    budget: TokenBudget | None = None,
    coarse_first: bool = False,
    advance: Advance = lambda n: None,
) -> LabelScores:
    """Compute the probability of every coarse and fine cell type, with one forward pass per cell.

    Parameters
    ----------
    model
        Any model with cell types in its vocabulary.
    prompts
        Annotation prompts.
    budget
        Size of a batch (default: what suits the device); results do not depend on it beyond rounding.
    coarse_first
        Append the most probable coarse type to the prompt and score the fine types after it: one more step of one
        token. Otherwise both are scored at the prompt's last token.
    advance
        Called with the number of cells just finished.
    """
    coarse_ids, fine_ids = (model.vocabulary.ids(f) for f in (Family.COARSE, Family.FINE))
    coarse, fine = (np.zeros((len(prompts), len(ids)), dtype=np.float32) for ids in (coarse_ids, fine_ids))
    hidden = np.zeros((len(prompts), model.config.width), dtype=np.float32)
    objective = model.objective
    network = model.network

    def work(rows: np.ndarray) -> None:
        entity, value, lengths = padded_tensors(prompts.take(rows), network.device)
        if coarse_first and len(coarse_ids):
            last, after_coarse = _hidden_after_coarse(model, entity, value, lengths, coarse_ids)
        else:
            last = after_coarse = network.forward_last(entity, value, lengths)
        logits = network.entity_logits(last).float()
        fine_logits = logits if after_coarse is last else network.entity_logits(after_coarse).float()
        coarse[rows] = _probabilities(logits[:, coarse_ids], objective).cpu().numpy()
        fine[rows] = _probabilities(fine_logits[:, fine_ids], objective).cpu().numpy()
        hidden[rows] = last.float().cpu().numpy()
        advance(len(rows))

    (budget or TokenBudget.of(network)).for_each(prompts.lengths, work)
    return LabelScores(coarse=coarse, fine=fine, hidden=hidden)


@torch.inference_mode()
def last_hidden(
    model: LoadedModel,
    prompts: Sentences,
    *,
    budget: TokenBudget | None = None,
    advance: Advance = lambda n: None,
) -> np.ndarray:
    """Compute the hidden state at each sentence's last token, float32 ``[sentences, width]``; see `score_labels`."""
    hidden = np.zeros((len(prompts), model.config.width), dtype=np.float32)

    def work(rows: np.ndarray) -> None:
        batch = padded_tensors(prompts.take(rows), model.network.device)
        hidden[rows] = model.network.forward_last(*batch).float().cpu().numpy()
        advance(len(rows))

    (budget or TokenBudget.of(model.network)).for_each(prompts.lengths, work)
    return hidden


def _hidden_after_coarse(
    model: LoadedModel, entity: Tensor, value: Tensor, lengths: Tensor, coarse_ids: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Compute hidden states at the prompts' last tokens, and at the most probable coarse types appended to them."""
    network = model.network
    cache = network.new_cache(len(entity), entity.shape[1] + 1)
    hidden = network(entity, value, cache, lengths)
    last = hidden[torch.arange(len(entity), device=entity.device), lengths - 1]
    candidates = torch.from_numpy(coarse_ids).to(entity.device)
    coarse = candidates[network.entity_logits(last)[:, candidates].argmax(1)][:, None]
    return last, network(coarse, torch.zeros_like(coarse), cache)[:, 0]


def _probabilities(logits: Tensor, objective: str) -> Tensor:
    """Normalise logits over one family: their softmax, or for the published objective (each token's σ) their σ."""
    if objective == "published":
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.softmax(1)

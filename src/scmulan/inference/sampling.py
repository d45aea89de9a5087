"""Which word is said next, and with which value.

Logits mean different things under the two objectives. A ``next_word`` model gives the distribution of the next word:
softmax is exact, the end word included. A ``published`` model gives for each word the chance that it is *still to be
said*. Under a random order the next word is then in proportion to σ(z); the end word is in every set and tells
nothing about when to stop, so the number of words is drawn first, from the chances at the prompt's last word.
"""

from typing import Literal

import torch
from torch import Tensor

from scmulan.model.transformer import Mulan

Rule = Literal["softmax", "set", "release"]


def word_weights(logits: Tensor, rule: Rule, temperature: float) -> Tensor:
    """Unnormalised chance of each word to be said next.

    Parameters
    ----------
    logits
        ``[B, V]``, −inf where a word must not be said.
    rule
        ``"softmax"`` (of a next-word model's log-weights) and ``"release"`` (which samples so from published
        models): exp(z / temperature);
        ``"set"``: σ(z) ^ (1 / temperature).
    temperature
        Below 1 the likely words are preferred.

    Returns
    -------
    Tensor
        ``[B, V]``, the largest weight of a row is at most 1.
    """
    if rule == "set":
        logits = torch.nn.functional.logsigmoid(logits)
    scaled = logits / temperature
    return (scaled - scaled.max(dim=1, keepdim=True).values).exp()


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Word whose stretch of the cumulated weights holds ``uniform`` (``[B]``, in [0, 1)): inverse-CDF sampling.

    One number per row, from that row's own stream: what is drawn for a row does not depend on its neighbours.
    """
    cumulated = weights.double().cumsum(1)
    at = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
    # Rounding can point past the last word that has any weight.
    last = (weights > 0).int().mul(torch.arange(1, weights.shape[1] + 1, device=weights.device)).argmax(1)
    return torch.minimum(at, last)


def pick_value(model: Mulan, hidden: Tensor, word: Tensor, uniform: Tensor, sample: bool) -> Tensor:
    """Bin of the words just chosen, were they genes.

    Parameters
    ----------
    hidden
        ``[B, W]``.
    word
        int64 ``[B]``.
    uniform
        ``[B]`` in [0, 1), used where values are sampled.
    sample
        Draw from the bins' distribution; otherwise (or where the model has none) the rounded mean.
    """
    mean = model.value_mean(hidden).gather(1, word[:, None])[:, 0]
    if sample and model.log_scale is not None:
        cumulated = model.level_log_probs(mean, word).exp().cumsum(1)
        return (cumulated < uniform[:, None]).sum(1).clamp(max=model.config.levels - 1) + 1
    return mean.round().clamp(0, model.config.levels).long()


def draw_number(logits: Tensor, uniforms: Tensor) -> Tensor:
    """How many words a cell of a published model gets: one Bernoulli draw per word from σ(z).

    Parameters
    ----------
    logits, uniforms
        ``[B, V]``; −inf logits never count.

    Returns
    -------
    Tensor
        int64 ``[B]``, at least 1.
    """
    return (uniforms < logits.sigmoid()).sum(1).clamp(min=1)

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
# An impossible word keeps a weight, so that one can be said where all are impossible.
LEAST_WEIGHT = 1e-36


def log_weights(model: Mulan, logits: Tensor, rule: Rule, temperature: float, end: int) -> Tensor:
    """Log of the weight with which each word competes to be the next one.

    Parameters
    ----------
    logits
        ``[..., V]``.
    rule
        ``"softmax"`` (of a next-word model's log-weights) and ``"release"`` (which samples so from published
        models): z / temperature; ``"set"``: log σ(z) / temperature.
    temperature
        Below 1 the likely words are preferred.
    end
        The end word.
    """
    if rule == "set":
        logits = torch.nn.functional.logsigmoid(logits)
    elif rule == "softmax":
        logits = model.log_weights(logits, end)
    return logits if temperature == 1 else logits / temperature


def bounded_weights(logits: Tensor, ends: Tensor) -> Tensor:
    """Weights at temperature 1 where no gene's exceeds one: σ(z), but exp(z) of end words (bool, of logits' shape)."""
    return torch.where(ends, logits.exp(), logits.sigmoid()).clamp(min=LEAST_WEIGHT)


def pick_value(model: Mulan, hidden: Tensor, word: Tensor, noise: Tensor | None) -> Tensor:
    """Bin of the words just chosen, were they genes: int64 of the words' shape.

    Parameters
    ----------
    hidden
        ``[..., W]``.
    word
        int64 ``[...]``.
    noise
        ``[..., levels]``, standard Gumbel: the bin with the largest log-probability + noise is a draw
        from the bins' distribution. None (and wherever the model has no such distribution): the rounded mean.
    """
    mean = model.value_mean_of(hidden, word)
    if noise is not None:
        return (model.level_log_probs(mean.float(), word) + noise).argmax(-1) + 1
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

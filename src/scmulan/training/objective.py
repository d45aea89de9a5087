"""What a position is asked for: the set of words not yet said.

Both objectives read the same table: ``place[b, v]`` is the place of word v in the target of sentence b (−1 where it
is none), so the set still to be said before target t is ``place > t − 1``, and no positions × words target is ever
kept. Heads and losses are computed in chunks of positions, and those of more than a few chunks again in the backward
pass, so memory does not grow with the number of positions.

* *published* (scMulan): vocabulary × mean binary cross-entropy of all words against the set, plus 200 × the mean
  squared error of the value head over the words of the set.
* *next_word*: cross-entropy against the uniform distribution over the set, which is the next word's log-likelihood
  averaged over all orders of the set; the end word is a target only when nothing else is left. A true likelihood.

Shape letters: N target positions, B sentences, W width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scmulan.model.transformer import Mulan

Objective = Literal["published", "next_word"]
KEPT_CHUNKS = 3


@dataclass(kw_only=True)
class Targets:
    """What is to be said at each of N positions.

    Parameters
    ----------
    row
        int64 ``[N]``: sentence of each position.
    said
        int64 ``[N]``: number of target words said before the position's next word.
    weight
        float ``[N]``: weight of each position in the loss; sums to one for a plain mean.
    place
        int16 ``[B, V]``: place of each word in its sentence's target, −1 where it is not in it.
    level
        uint8 ``[B, V]``: value of each target word.
    end
        Id of the end word.
    allowed
        Bool ``[B, V]``: words that could have been said: of the families that the task asks for, and no genes that the
        sentence's study did not measure; None for all. Only the next-word objective uses it.
    satisfies
        Bool ``[V, V]`` or None: ``satisfies[v, u]`` where saying u is right when v is the truth (a finer cell type).
        Only the next-word objective uses it, at positions of ``labelled`` sentences.
    labelled
        Bool ``[B]``: sentences whose target are labels: for ``satisfies``, and as only genes may have bounded weights.
    """

    row: Tensor
    said: Tensor
    weight: Tensor
    place: Tensor
    level: Tensor
    end: int
    allowed: Tensor | None = None
    satisfies: Tensor | None = None
    labelled: Tensor | None = None


def objective_loss(
    model: Mulan,
    hidden: Tensor,
    targets: Targets,
    *,
    objective: Objective,
    value_weight: float,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Entity and value loss of target positions; the total is ``entity + value_weight × value``.

    Parameters
    ----------
    model
        Gives the two heads.
    hidden
        ``[N, W]`` hidden states of the target positions.
    targets
        What each of them is asked for.
    objective
        ``"published"`` or ``"next_word"``.
    value_weight
        200 in the publication; 1 makes the next-word total a negative log-likelihood in nats.
    chunk
        Positions per chunk.

    Returns
    -------
    tuple of Tensor
        Entity loss and (unweighted) value loss, scalars.
    """
    entity = hidden.new_zeros(())
    value = hidden.new_zeros(())
    pairs = hidden.new_zeros(())
    step = _published_chunk if objective == "published" else _next_word_chunk
    # A few chunks are cheaper to keep than to compute twice.
    keep = len(hidden) <= KEPT_CHUNKS * chunk
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        arguments = (model, hidden[part], targets, part, value_weight > 0)
        e, v, n = step(*arguments) if keep else checkpoint(step, *arguments, use_reentrant=False)
        entity, value, pairs = entity + e, value + v, pairs + n
    if objective == "published":
        value = value / pairs.clamp(min=1)
    return entity, value


def _published_chunk(
    model: Mulan, hidden: Tensor, targets: Targets, part: slice, with_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    row, said, weight = targets.row[part], targets.said[part], targets.weight[part]
    logits = model.entity_logits(hidden)
    left = targets.place[row] >= said[:, None]
    # BCE with logits against a set is Σ softplus(z) − Σ_{in the set} z; V × its mean over V words is that sum.
    entity = ((F.softplus(logits) - logits * left).sum(1) * weight).sum()
    if not with_value:
        return entity, entity.new_zeros(()), entity.new_zeros(())
    error = (model.value_mean(hidden) - targets.level[row]).square() * left
    return entity, error.sum(), left.sum().to(entity.dtype)


def _next_word_chunk(
    model: Mulan, hidden: Tensor, targets: Targets, part: slice, with_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    row, said, weight = targets.row[part], targets.said[part], targets.weight[part]
    place = targets.place[row]
    left = place >= said[:, None]
    # A word is said once, in decoding as here: without this the losses would not be those of a distribution over sets.
    excluded = (place >= 0) & ~left
    if targets.allowed is not None:
        excluded |= ~targets.allowed[row]
    logits = model.entity_logits(hidden)
    if model.config.bounded_genes:
        weights = model.log_weights(logits, targets.end)
        labelled = targets.labelled
        logits = weights if labelled is None else torch.where(labelled[row][:, None], logits, weights)
    logits = logits.masked_fill(excluded, -torch.inf)
    left[:, targets.end] &= left.sum(1) == 1
    number = left.sum(1)
    n, v = left.nonzero(as_tuple=True)
    log_probs = logits - logits.logsumexp(1, keepdim=True)
    picked = log_probs[n, v]
    if targets.satisfies is not None and targets.labelled is not None:
        finer = targets.labelled[row[n]] & (targets.satisfies[v].sum(1) > 1)
        if finer.any():
            allowed = targets.satisfies[v[finer]]
            picked = picked.masked_scatter(finer, log_probs[n[finer]].masked_fill(~allowed, -torch.inf).logsumexp(1))
    entity = -(picked * (weight / number)[n]).sum()
    if not with_value:
        return entity, entity.new_zeros(()), entity.new_zeros(())
    level = targets.level[row[n], v].long()
    gene = level > 0
    n, v, level = n[gene], v[gene], level[gene]
    mean = model.value_mean(hidden)[n, v]
    if model.log_scale is None:
        loss = (mean - level).square()
    else:
        loss = -model.level_log_probs(mean, v).gather(1, (level - 1)[:, None])[:, 0]
    return entity, (loss * (weight / number)[n]).sum(), entity.new_zeros(())

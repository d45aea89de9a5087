"""What a position is asked for: the set of words not yet said.

Both objectives read the same table: ``place[b, v]`` is the place of word v in the target of sentence b (−1 where it
is none), so the set still to be said before target t is ``place > t − 1``, and no positions × words target is ever
kept. Heads, losses and their gradients are computed in chunks of positions (:mod:`scmulan.training.fused`), so memory
does not grow with the number of positions.

* *published* (scMulan): vocabulary × mean binary cross-entropy of all words against the set, plus 200 × the mean
  squared error of the value head over the words of the set.
* *next_word*: cross-entropy against the uniform distribution over the set, which is the next word's log-likelihood
  averaged over all orders of the set; the end word is a target only when nothing else is left. A true likelihood.

Shape letters: N target positions, B sentences, W width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scmulan.model.transformer import Mulan
from scmulan.training.fused import FusedLoss, Lists, Work

Objective = Literal["published", "next_word"]


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
        int16 ``[B, V]``: place of each word in its sentence's target, −1 where it is not in it; the end is last.
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
    chunk: int | None = None,
    pairs: float | None = None,
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
        Positions per chunk; by default as many as the cache holds.
    pairs
        Pairs of position and word over which the published value loss is a mean (see :func:`value_pairs`): those of
        all parts, where a batch is shared out; by default those of these targets.

    Returns
    -------
    tuple of Tensor
        Entity loss and (unweighted) value loss, scalars; their gradient can be asked for in that sum only.
    """
    work = Work(
        model=model,
        targets=targets,
        lists=Lists.of(targets.place, targets.end),
        objective=objective,
        value_weight=value_weight,
        pairs=max(1.0, value_pairs(targets) if pairs is None else pairs),
        chunk=chunk,
    )
    values = model.value_head.weight, model.value_bias, None if objective == "published" else model.log_scale
    heads = model.entity_head.weight, model.entity_bias, *(values if value_weight else (None, None, None))
    entity, value = FusedLoss.apply(hidden, *heads, work)
    return entity, value


def value_pairs(targets: Targets) -> float:
    """Pairs of position and word still to be said: what the published value loss is a mean over."""
    number = (targets.place >= 0).sum(1)[targets.row] - targets.said
    return float(number[targets.weight > 0].sum())

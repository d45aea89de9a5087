"""Losses of target positions: against the set of tokens that are still to come.

Both objectives read one table: ``order[b, v]`` is the index of token v in the target of sentence b (−1 where it is not
in it), so the set still to come before target i is ``order >= i``, and no targets of positions × tokens are kept.

* *published* (scMulan): vocabulary × mean binary cross-entropy of all tokens against the set, plus 200 × the mean
  squared error of the value head over the tokens of the set.
* *next_word*: cross-entropy against the uniform distribution over the set, which is the next token's log-likelihood
  averaged over all orders of the set; the end token is a target only when nothing else is left. A true likelihood.

Heads and losses are computed in chunks of positions, so memory does not grow with the number of positions. The gradient
at the two heads is found while a chunk lies in the cache; the backward pass only scales it. Gradients are written out
by hand: autograd per chunk took 15 % [11, 18] longer for a step of generation of the small model (paired runs), 2 %
[0, 4] for its mix of tasks with bounded weights written out, and 49 MiB more at the published shape.

Shape letters: N target positions, n those of a chunk, B sentences, W width, V vocabulary, P pairs of a position and a
token still to come.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan.model.network import Mulan

Objective = Literal["published", "next_word"]

CHUNK_ENTRIES = {"cpu": 2**18, "cuda": 2**25}
"""Entries of a chunk's table of positions × tokens: on a CPU it should stay in the cache."""
MIN_CHUNK = 16
"""Smallest number of positions of a chunk."""


@dataclass(kw_only=True)
class Targets:
    """Targets of N positions of B sentences.

    Parameters
    ----------
    row
        int64 ``[N]``: sentence of each position.
    index
        int64 ``[N]``: index in the target of the token that is next; those before it are known.
    weight
        float ``[N]``: weight of each position in the loss; sums to one for a plain mean.
    order
        int16 ``[B, V]``: index of each token in its sentence's target, −1 where it is not in it; the end is last.
    level
        uint8 ``[B, V]``: level of each target token.
    end
        Id of the end token.
    allowed
        Bool ``[B, V]``, or None for all: tokens that could come next, which are those of the families that the task
        asks for, without genes that the sentence's study did not measure. Only the next-token loss uses it.
    satisfies
        Bool ``[V, V]``, or None: ``[v, u]`` where predicting u is right when v is the truth (a finer cell type). Only
        the next-token loss uses it, at positions of ``labelled`` sentences.
    labelled
        Bool ``[B]``: sentences whose targets are labels, not genes: for ``satisfies``, and as only genes may have
        bounded weights.
    """

    row: Tensor
    index: Tensor
    weight: Tensor
    order: Tensor
    level: Tensor
    end: int
    allowed: Tensor | None = None
    satisfies: Tensor | None = None
    labelled: Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        """Return the targets with their tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


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
    """Compute entity and value loss of target positions; the total is ``entity + value_weight × value``.

    Parameters
    ----------
    model
        Gives the two heads.
    hidden
        ``[N, W]``: hidden states of the target positions.
    targets
        What comes next at each of them.
    objective
        ``"published"`` or ``"next_word"``.
    value_weight
        200 in the publication; 1 makes the next-token total a negative log-likelihood in nats; 0 leaves values out.
    chunk
        Positions per chunk; by default as many as the cache holds.
    pairs
        Number of pairs over which the published value loss is a mean (see :func:`value_pairs`): that of all parts,
        where a batch is cut into parts; by default that of these targets.

    Returns
    -------
    entity, value : Tensor
        Scalars, the value loss not weighted; only the gradient of the total can be taken.
    """
    context = LossContext(
        model=model,
        targets=targets,
        lists=TargetLists.of(targets),
        objective=objective,
        value_weight=value_weight,
        pairs=max(1.0, value_pairs(targets) if pairs is None else pairs),
        chunk=chunk,
    )
    values = model.value_head.weight, model.value_bias, None if objective == "published" else model.log_scale
    heads = model.entity_head.weight, model.entity_bias, *(values if value_weight else (None, None, None))
    entity, value = FusedLoss.apply(hidden, *heads, context)
    return entity, value


def value_pairs(targets: Targets) -> float:
    """Count the pairs of a position and a token still to come, over which the published value loss is a mean."""
    number = (targets.order >= 0).sum(1)[targets.row] - targets.index
    return float(number[targets.weight > 0].sum())


def chunk_positions(vocabulary: int, device: str) -> int:
    """Return the number of positions per chunk."""
    return max(MIN_CHUNK, CHUNK_ENTRIES.get(device, CHUNK_ENTRIES["cuda"]) // vocabulary)


@dataclass
class TargetLists:
    """Target tokens of each sentence in their order: ``flat[start[b] : start[b] + length[b]]``."""

    flat: Tensor
    start: Tensor
    length: Tensor
    ends: Tensor
    """Bool ``[B]``: the last target token is the end token."""

    @classmethod
    def of(cls, targets: Targets) -> "TargetLists":
        """Make the lists from ``order``."""
        b, v = (targets.order >= 0).nonzero(as_tuple=True)
        length = torch.bincount(b, minlength=len(targets.order))
        start = length.cumsum(0) - length
        flat = torch.empty_like(v)
        flat[start[b] + targets.order[b, v]] = v
        ends = torch.zeros_like(length, dtype=torch.bool)
        some = length > 0
        ends[some] = flat[(start + length - 1)[some]] == targets.end
        return cls(flat, start, length, ends)

    def pairs(self, first: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return pairs (position, token) of ``number[n]`` tokens from ``flat[first[n]]`` on: int64 ``[P]`` each."""
        n = torch.repeat_interleave(torch.arange(len(number), device=number.device), number)
        offset = torch.arange(len(n), device=n.device) + (first - (number.cumsum(0) - number))[n]
        return n, self.flat[offset]


class FusedLoss(torch.autograd.Function):
    """Entity and value loss, with a gradient found in the forward pass; see :func:`objective_loss`."""

    @staticmethod
    def forward(  # noqa: D102 (autograd's own interface)
        ctx: Any,
        hidden: Tensor,
        entity_weight: Tensor,
        entity_bias: Tensor | None,
        value_weight: Tensor,
        value_bias: Tensor | None,
        log_scale: Tensor | None,
        context: "LossContext",
    ) -> tuple[Tensor, Tensor]:
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        at_hidden = torch.zeros_like(hidden, dtype=wide)
        entity = Head(at_hidden, 1.0, entity_weight, entity_bias)
        value = Head(at_hidden, context.value_weight, value_weight, value_bias) if context.value_weight else None
        scale = None if log_scale is None or value is None else torch.zeros_like(log_scale, dtype=wide)
        step = _published if context.objective == "published" else _next_token
        losses = [hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)]
        rows = context.chunk or chunk_positions(len(entity_weight), hidden.device.type)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            for i, loss in enumerate(step(context, part, hidden[part], entity, value, log_scale, scale)):
                losses[i] += loss
        ctx.gradients = entity, value, scale
        ctx.value_weight = context.value_weight
        return losses[0], losses[1]

    @staticmethod
    def backward(ctx: Any, entity_grad: Tensor, value_grad: Tensor) -> Any:  # noqa: D102
        entity, value, scale = ctx.gradients
        ctx.gradients = None
        if value is not None and not torch.isclose(value_grad, ctx.value_weight * entity_grad):
            raise ValueError("the two losses have to be added as entity + value_weight × value")
        # In place: these tables are as large as the hidden states.
        hidden = entity.grad_hidden.mul_(entity_grad)
        found = [
            entity.grad_weight.mul_(entity_grad),
            None if entity.grad_bias is None else entity.grad_bias.mul_(entity_grad),
        ]
        if value is None:
            return hidden, *found, None, None, None, None
        found += [
            value.grad_weight.mul_(value_grad),
            None if value.grad_bias is None else value.grad_bias.mul_(value_grad),
        ]
        return hidden, *found, None if scale is None else scale.mul_(value_grad), None


class Head:
    """Linear head, and the gradient at its weights, its bias and its input, summed over chunks.

    Parameters
    ----------
    hidden
        Gradient ``[N, W]`` at the input, to which that of this head is added, ``loss_weight`` times.
    loss_weight
        Weight of the head's loss in the total.
    weight, bias
        The head's own.
    """

    def __init__(self, hidden: Tensor, loss_weight: float, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias, self.wide, self.loss_weight = weight, bias, hidden.dtype, loss_weight
        self.grad_hidden = hidden
        self.grad_weight = torch.zeros_like(weight, dtype=hidden.dtype)
        self.grad_bias = None if bias is None else torch.zeros_like(bias, dtype=hidden.dtype)

    def outputs(self, hidden: Tensor) -> Tensor:
        """Apply the head, ``[n, W]`` → ``[n, V]``."""
        return F.linear(hidden, self.weight, self.bias).to(self.wide)

    def add(self, part: slice, hidden: Tensor, gradient: Tensor) -> None:
        """Add the gradient ``[n, V]`` at a chunk's outputs."""
        if gradient.dtype == self.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            self.grad_hidden[part].addmm_(gradient, self.weight, alpha=self.loss_weight)
            self.grad_weight.addmm_(gradient.T, hidden)
        else:
            self.grad_hidden[part].add_(gradient @ self.weight, alpha=self.loss_weight)
            self.grad_weight += gradient.T @ hidden
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0)


@dataclass
class LossContext:
    """Arguments of a loss that all chunks share."""

    model: Mulan
    targets: Targets
    lists: TargetLists
    objective: str
    value_weight: float
    pairs: float
    chunk: int | None


def _published(
    context: LossContext,
    part: slice,
    hidden: Tensor,
    entity: Head,
    value: Head | None,
    log_scale: Tensor | None,
    _: Any,
) -> tuple[Tensor, Tensor]:
    targets, lists = context.targets, context.lists
    row, index, weight = targets.row[part], targets.index[part], targets.weight[part]
    n, v = lists.pairs(lists.start[row] + index, lists.length[row] - index)
    logits = entity.outputs(hidden)
    # BCE with logits against a set is Σ softplus(z) − Σ_{in the set} z; V × its mean over V words is that sum.
    loss = (F.softplus(logits).sum(1) * weight).sum() - (logits[n, v] * weight[n]).sum()
    gradient = logits.sigmoid_().mul_(weight[:, None])
    gradient[n, v] -= weight[n].to(gradient.dtype)
    entity.add(part, hidden, gradient)
    if value is None:
        return loss, loss.new_zeros(())
    # A sentence without weight stands in for none, where a process has no part of a batch.
    error = (value.outputs(hidden)[n, v] - targets.level[row[n], v]) * (weight[n] > 0)
    gradient.zero_()[n, v] = error * (2 / context.pairs)
    value.add(part, hidden, gradient)
    return loss, error.square().sum() / context.pairs


def _next_token(
    context: LossContext,
    part: slice,
    hidden: Tensor,
    entity: Head,
    value: Head | None,
    log_scale: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    targets, lists = context.targets, context.lists
    row, index, weight = targets.row[part], targets.index[part], targets.weight[part]
    left = lists.length[row] - index
    # The end is a target only when nothing else is left.
    n, v = lists.pairs(lists.start[row] + index, left - (lists.ends[row] & (left > 1)).long())
    number = torch.bincount(n, minlength=len(row))
    pair_weight = (weight / number)[n].to(entity.wide)
    logits = entity.outputs(hidden)
    # A token comes once, in decoding as here: without this the losses would not be those of a distribution over sets.
    before = lists.pairs(lists.start[row], index)
    logits[before] = -torch.inf
    if targets.allowed is not None:
        logits.masked_fill_(~targets.allowed[row], -torch.inf)
    labels = context.model.config.bounded_genes and targets.labelled is not None and targets.labelled[row]
    if context.model.config.bounded_genes and targets.labelled is None:
        labels = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    if labels is False or bool(labels.all()):
        loss, gradient = _softmax(targets, row, n, v, pair_weight, weight, logits)
    elif not bool(labels.any()):
        loss, gradient = _bounded(targets.end, n, v, pair_weight, weight, logits)
    else:
        loss, gradient = _mixed(targets, row, labels, n, v, pair_weight, weight, logits)
    entity.add(part, hidden, gradient)
    if value is None:
        return loss, loss.new_zeros(())
    level = targets.level[row[n], v]
    gene = level > 0
    n, v, pair_weight, level = n[gene], v[gene], pair_weight[gene], level[gene].to(pair_weight.dtype)
    mean = value.outputs(hidden)[n, v]
    gradient.zero_()
    if log_scale is None:
        error = mean - level
        gradient[n, v] = 2 * pair_weight * error
        value.add(part, hidden, gradient)
        return loss, (pair_weight * error.square()).sum()
    log_probs, by_mean, by_scale = level_log_prob(
        mean, level, log_scale[v].to(pair_weight.dtype), context.model.config.levels
    )
    gradient[n, v] = -pair_weight * by_mean
    value.add(part, hidden, gradient)
    assert scale is not None
    scale.index_add_(0, v, -pair_weight * by_scale)
    return loss, -(pair_weight * log_probs).sum()


def _softmax(
    targets: Targets, row: Tensor, n: Tensor, v: Tensor, pair_weight: Tensor, weight: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient at the logits where a token competes with weight exp(z)."""
    total = logits.logsumexp(1, keepdim=True)
    log_probs = logits.sub_(total)
    picked = log_probs[n, v]
    finer = None
    if targets.satisfies is not None and targets.labelled is not None:
        finer = targets.labelled[row[n]] & (targets.satisfies[v].sum(1) > 1)
        if finer.any():
            among = log_probs[n[finer]].masked_fill(~targets.satisfies[v[finer]], -torch.inf)
            sums = among.logsumexp(1)
            picked = picked.masked_scatter(finer, sums)
            wanted = (among - sums[:, None]).exp_().mul_(pair_weight[finer][:, None])
    gradient = log_probs.exp_().mul_(weight[:, None])
    if finer is not None and finer.any():
        gradient.index_add_(0, n[finer], wanted, alpha=-1)
        gradient[n[~finer], v[~finer]] -= pair_weight[~finer]
    else:
        gradient[n, v] -= pair_weight
    return -(picked * pair_weight).sum(), gradient


def _bounded(
    end: int, n: Tensor, v: Tensor, pair_weight: Tensor, weight: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient at the logits where a gene competes with weight σ(z), the end with exp(z)."""
    ends, picked = logits[:, end].clone(), logits[n, v]
    probability = logits.sigmoid_()
    # exp(z) of the end may be large: all weights are taken relative to the larger of it and one.
    top = ends.clamp(min=0)
    own = (ends - top).exp()
    probability[:, end] = 0
    total = probability.sum(1) * (-top).exp() + own
    factor = weight.to(total.dtype) * (-top).exp() / total
    # d log σ(z) = 1 − σ(z), so the gradient at z is (w σ / total − pair_weight) × (1 − σ).
    gradient = torch.ops.aten.sigmoid_backward(factor[:, None].expand_as(probability), probability)
    is_end = v == end
    gradient[n, v] -= torch.where(is_end, 0, pair_weight * torch.sigmoid(-picked))
    gradient[:, end] = weight * own / total
    gradient[n[is_end], end] -= pair_weight[is_end]
    log_weight = torch.where(is_end, picked, F.logsigmoid(picked))
    log_total = total.log() + top
    return -(pair_weight * log_weight).sum() + (weight * log_total).sum(), gradient


def _mixed(
    targets: Targets,
    row: Tensor,
    labels: Tensor,
    n: Tensor,
    v: Tensor,
    pair_weight: Tensor,
    weight: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient at the logits of a chunk with labels and cells."""
    gradient = torch.empty_like(logits)
    total = logits.new_zeros(())
    for mine, bounded in ((labels, False), (~labels, True)):
        at = mine.cumsum(0) - 1
        keep = mine[n]
        arguments = at[n[keep]], v[keep], pair_weight[keep], weight[mine], logits[mine]
        found = _bounded(targets.end, *arguments) if bounded else _softmax(targets, row[mine], *arguments)
        total = total + found[0]
        gradient[mine] = found[1]
    return total, gradient


def level_log_prob(mean: Tensor, level: Tensor, log_scale: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the log-probability of each pair's own level, and its derivatives by mean and by log scale, ``[P]`` each.

    The one bin of :meth:`scmulan.model.network.Mulan.level_log_probs` that is wanted: a logistic distribution cut
    at the half levels, the tails in the outer bins.
    """
    rate = (-log_scale).exp()
    above, below = (level + 0.5 - mean) * rate, (level - 0.5 - mean) * rate
    lowest, highest = level == 1, level == levels
    inner = ~(lowest | highest)
    # log(σ(b) − σ(a)) = log σ(b) + log σ(−a) + log(1 − exp(a − b)), stable in both tails
    log_probs = torch.where(highest, 0, F.logsigmoid(above)) + torch.where(lowest, 0, F.logsigmoid(-below))
    log_probs += torch.where(inner, torch.log(-torch.expm1(-rate)), 0)
    up = torch.where(highest, 0, torch.sigmoid(-above))
    down = torch.where(lowest, 0, torch.sigmoid(below))
    by_scale = down * below - up * above - torch.where(inner, rate / torch.expm1(rate), 0)
    return log_probs, (down - up) * rate, by_scale

"""What a position is asked for: the set of words not yet said.

Both objectives read the same table: ``place[b, v]`` is the place of word v in the target of sentence b (−1 where it
is none), so the set still to be said before target t is ``place > t − 1``, and no positions × words target is ever
kept. Heads, losses and their gradients are computed in chunks of positions (:mod:`scmulan.train.losses`), so memory
does not grow with the number of positions.

* *published* (scMulan): vocabulary × mean binary cross-entropy of all words against the set, plus 200 × the mean
  squared error of the value head over the words of the set.
* *next_word*: cross-entropy against the uniform distribution over the set, which is the next word's log-likelihood
  averaged over all orders of the set; the end word is a target only when nothing else is left. A true likelihood.

Shape letters: N target positions, B sentences, W width, V vocabulary.

Losses over positions × words that find their gradient on the way: one pass per chunk, nothing of it kept.

Autograd would keep a dozen tables of positions × words, or compute them twice. Here a chunk's logits, their weights and
the gradient at the two heads are made while the chunk lies in the cache; what is kept has the size of the heads and of
the hidden states. The backward pass only scales it.

Shape letters: n positions of a chunk, W width, V words, P pairs of a position and a word still to be said.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scmulan.model.network import Mulan

Objective = Literal["published", "next_word"]


@dataclass(kw_only=True)
class Targets:
    """What is to be said at each of N positions.

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
        lists=Lists.of(targets.order, targets.end),
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
    number = (targets.order >= 0).sum(1)[targets.row] - targets.index
    return float(number[targets.weight > 0].sum())


# Entries of a chunk's table of positions × words: on a CPU it should stay in the cache.
TABLE = {"cpu": 2**18, "cuda": 2**25}


def chunk_rows(words: int, device: str) -> int:
    """Positions per chunk."""
    return max(16, TABLE.get(device, TABLE["cuda"]) // words)


@dataclass
class Lists:
    """Target words of each sentence in their order: ``flat[start[b] : start[b] + length[b]]``."""

    flat: Tensor
    start: Tensor
    length: Tensor
    ends: Tensor

    @classmethod
    def of(cls, place: Tensor, end: int) -> "Lists":
        """Lists from ``place`` ``[B, V]``; the end word, where a target has it, is its last."""
        b, v = (place >= 0).nonzero(as_tuple=True)
        length = torch.bincount(b, minlength=len(place))
        start = length.cumsum(0) - length
        flat = torch.empty_like(v)
        flat[start[b] + place[b, v]] = v
        ends = torch.zeros_like(length, dtype=torch.bool)
        some = length > 0
        ends[some] = flat[(start + length - 1)[some]] == end
        return cls(flat, start, length, ends)

    def pairs(self, first: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (position, word) of ``number[n]`` words from place ``first[n]`` of ``flat`` on."""
        n = torch.repeat_interleave(torch.arange(len(number), device=number.device), number)
        offset = torch.arange(len(n), device=n.device) + (first - (number.cumsum(0) - number))[n]
        return n, self.flat[offset]


class FusedLoss(torch.autograd.Function):
    """Entity and value loss; see :func:`scmulan.train.losses.objective_loss`."""

    @staticmethod
    def forward(  # noqa: D102 (autograd's own interface)
        ctx: Any,
        hidden: Tensor,
        entity_weight: Tensor,
        entity_bias: Tensor | None,
        value_weight: Tensor,
        value_bias: Tensor | None,
        log_scale: Tensor | None,
        work: "Work",
    ) -> tuple[Tensor, Tensor]:
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        at_hidden = torch.zeros_like(hidden, dtype=wide)
        entity = Head(at_hidden, 1.0, entity_weight, entity_bias)
        value = Head(at_hidden, work.value_weight, value_weight, value_bias) if work.value_weight else None
        scale = None if log_scale is None or value is None else torch.zeros_like(log_scale, dtype=wide)
        step = _published if work.objective == "published" else _next_word
        losses = [hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)]
        rows = work.chunk or chunk_rows(len(entity_weight), hidden.device.type)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            for i, loss in enumerate(step(work, part, hidden[part], entity, value, log_scale, scale)):
                losses[i] += loss
        ctx.gradients = entity, value, scale
        ctx.value_weight = work.value_weight
        return losses[0], losses[1]

    @staticmethod
    def backward(ctx: Any, entity_grad: Tensor, value_grad: Tensor) -> Any:  # noqa: D102
        entity, value, scale = ctx.gradients
        ctx.gradients = None
        if value is not None and not torch.isclose(value_grad, ctx.value_weight * entity_grad):
            raise ValueError("the two losses have to be added as entity + value_weight × value")
        # In place: these tables are as large as the hidden states.
        hidden = entity.hidden.mul_(entity_grad)
        found = [entity.weight.mul_(entity_grad), None if entity.bias is None else entity.bias.mul_(entity_grad)]
        if value is None:
            return hidden, *found, None, None, None, None
        found += [value.weight.mul_(value_grad), None if value.bias is None else value.bias.mul_(value_grad)]
        return hidden, *found, None if scale is None else scale.mul_(value_grad), None


class Head:
    """A linear head with the gradient at its weights, its bias and its input, as it adds up over chunks.

    Parameters
    ----------
    hidden
        Where the gradient ``[N, W]`` at the input is added, ``share`` times.
    share
        Of the head's loss in the total.
    weight, bias
        The head's own.
    """

    def __init__(self, hidden: Tensor, share: float, weight: Tensor, bias: Tensor | None) -> None:
        self.weights, self.biases, self.wide, self.share = weight, bias, hidden.dtype, share
        self.hidden = hidden
        self.weight = torch.zeros_like(weight, dtype=hidden.dtype)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=hidden.dtype)

    def outputs(self, hidden: Tensor) -> Tensor:
        """``[n, W]`` → ``[n, V]``."""
        return F.linear(hidden, self.weights, self.biases).to(self.wide)

    def add(self, part: slice, hidden: Tensor, gradient: Tensor) -> None:
        """Take in the gradient ``[n, V]`` at a chunk's outputs."""
        if gradient.dtype == self.weights.dtype and not torch.is_autocast_enabled(hidden.device.type):
            self.hidden[part].addmm_(gradient, self.weights, alpha=self.share)
            self.weight.addmm_(gradient.T, hidden)
        else:
            self.hidden[part].add_(gradient @ self.weights, alpha=self.share)
            self.weight += gradient.T @ hidden
        if self.bias is not None:
            self.bias += gradient.sum(0)


@dataclass
class Work:
    """What a loss is taken of."""

    model: Mulan
    targets: "Targets"
    lists: Lists
    objective: str
    value_weight: float
    pairs: float
    chunk: int | None


def _published(
    work: Work, part: slice, hidden: Tensor, entity: Head, value: Head | None, log_scale: Tensor | None, _: Any
) -> tuple[Tensor, Tensor]:
    targets, lists = work.targets, work.lists
    row, said, weight = targets.row[part], targets.index[part], targets.weight[part]
    n, v = lists.pairs(lists.start[row] + said, lists.length[row] - said)
    logits = entity.outputs(hidden)
    # BCE with logits against a set is Σ softplus(z) − Σ_{in the set} z; V × its mean over V words is that sum.
    loss = (F.softplus(logits).sum(1) * weight).sum() - (logits[n, v] * weight[n]).sum()
    gradient = logits.sigmoid_().mul_(weight[:, None])
    gradient[n, v] -= weight[n].to(gradient.dtype)
    entity.add(part, hidden, gradient)
    if value is None:
        return loss, loss.new_zeros(())
    # A sentence without weight stands in for none, where a process has no share of a batch.
    error = (value.outputs(hidden)[n, v] - targets.level[row[n], v]) * (weight[n] > 0)
    gradient.zero_()[n, v] = error * (2 / work.pairs)
    value.add(part, hidden, gradient)
    return loss, error.square().sum() / work.pairs


def _next_word(
    work: Work,
    part: slice,
    hidden: Tensor,
    entity: Head,
    value: Head | None,
    log_scale: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    targets, lists = work.targets, work.lists
    row, said, weight = targets.row[part], targets.index[part], targets.weight[part]
    left = lists.length[row] - said
    # The end is a target only when nothing else is left.
    n, v = lists.pairs(lists.start[row] + said, left - (lists.ends[row] & (left > 1)).long())
    number = torch.bincount(n, minlength=len(row))
    share = (weight / number)[n].to(entity.wide)
    logits = entity.outputs(hidden)
    # A word is said once, in decoding as here: without this the losses would not be those of a distribution over sets.
    before = lists.pairs(lists.start[row], said)
    logits[before] = -torch.inf
    if targets.allowed is not None:
        logits.masked_fill_(~targets.allowed[row], -torch.inf)
    labels = work.model.config.bounded_genes and targets.labelled is not None and targets.labelled[row]
    if work.model.config.bounded_genes and targets.labelled is None:
        labels = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    if labels is False or bool(labels.all()):
        loss, gradient = _softmax(targets, row, n, v, share, weight, logits)
    elif not bool(labels.any()):
        loss, gradient = _bounded(targets.end, n, v, share, weight, logits)
    else:
        loss, gradient = _mixed(targets, row, labels, n, v, share, weight, logits)
    entity.add(part, hidden, gradient)
    if value is None:
        return loss, loss.new_zeros(())
    level = targets.level[row[n], v]
    gene = level > 0
    n, v, share, level = n[gene], v[gene], share[gene], level[gene].to(share.dtype)
    mean = value.outputs(hidden)[n, v]
    gradient.zero_()
    if log_scale is None:
        error = mean - level
        gradient[n, v] = 2 * share * error
        value.add(part, hidden, gradient)
        return loss, (share * error.square()).sum()
    log_probs, by_mean, by_scale = level_log_prob(mean, level, log_scale[v].to(share.dtype), work.model.config.levels)
    gradient[n, v] = -share * by_mean
    value.add(part, hidden, gradient)
    assert scale is not None
    scale.index_add_(0, v, -share * by_scale)
    return loss, -(share * log_probs).sum()


def _softmax(
    targets: "Targets", row: Tensor, n: Tensor, v: Tensor, share: Tensor, weight: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and gradient where a word competes with weight exp(z)."""
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
            wanted = (among - sums[:, None]).exp_().mul_(share[finer][:, None])
    gradient = log_probs.exp_().mul_(weight[:, None])
    if finer is not None and finer.any():
        gradient.index_add_(0, n[finer], wanted, alpha=-1)
        gradient[n[~finer], v[~finer]] -= share[~finer]
    else:
        gradient[n, v] -= share
    return -(picked * share).sum(), gradient


def _bounded(end: int, n: Tensor, v: Tensor, share: Tensor, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient where a gene competes with weight σ(z), the end with exp(z)."""
    ends, picked = logits[:, end].clone(), logits[n, v]
    chance = logits.sigmoid_()
    # exp(z) of the end may be large: all weights are taken relative to the larger of it and one.
    top = ends.clamp(min=0)
    own = (ends - top).exp()
    chance[:, end] = 0
    total = chance.sum(1) * (-top).exp() + own
    factor = weight.to(total.dtype) * (-top).exp() / total
    # d log σ(z) = 1 − σ(z), so the gradient at z is (w σ / total − share) × (1 − σ).
    gradient = torch.ops.aten.sigmoid_backward(factor[:, None].expand_as(chance), chance)
    is_end = v == end
    gradient[n, v] -= torch.where(is_end, 0, share * torch.sigmoid(-picked))
    gradient[:, end] = weight * own / total
    gradient[n[is_end], end] -= share[is_end]
    log_weight = torch.where(is_end, picked, F.logsigmoid(picked))
    log_total = total.log() + top
    return -(share * log_weight).sum() + (weight * log_total).sum(), gradient


def _mixed(
    targets: "Targets",
    row: Tensor,
    labels: Tensor,
    n: Tensor,
    v: Tensor,
    share: Tensor,
    weight: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Labels and cells in one chunk."""
    gradient = torch.empty_like(logits)
    total = logits.new_zeros(())
    for mine, bounded in ((labels, False), (~labels, True)):
        at = mine.cumsum(0) - 1
        keep = mine[n]
        arguments = at[n[keep]], v[keep], share[keep], weight[mine], logits[mine]
        found = _bounded(targets.end, *arguments) if bounded else _softmax(targets, row[mine], *arguments)
        total = total + found[0]
        gradient[mine] = found[1]
    return total, gradient


def level_log_prob(mean: Tensor, level: Tensor, log_scale: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each pair's own level, with its derivatives by mean and by the logarithm of the scale.

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

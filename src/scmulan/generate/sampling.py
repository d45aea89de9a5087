"""Gumbel-max sampling of the next token and its value.

The logit z of a token means different things under the two training objectives, so each has its rule:

``"softmax"``
    Models trained on the next token (*any-order likelihood*: the genes of a cell in random order). The weight is
    exp(z), or σ(z) for the genes of a model with bounded genes; the end token competes with exp(z).
``"set"``
    Published models, whose σ(z) is the probability that a token is *still to come*. Under a random order the next token
    is then in proportion to σ(z). The end token is in every set and cannot tell when to stop, so the number of tokens
    is drawn first (:func:`draw_number`).
``"release"``
    exp(z) of a published model, as its release samples.

The next token is ``argmax(log-weight + Gumbel noise)``. Where no gene weighs more than one, candidate lists stand for
the noise (:mod:`scmulan.generate.noise`), and on a CPU a compiled loop walks through them: it stops at the first
arrival that no later candidate can beat, computes the logits of those tokens only (about as many as the cell has genes
for each gene still to come), and needs no pass over the vocabulary.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scmulan._numba import compiled
from scmulan.generate.noise import Noise
from scmulan.model.network import Mulan

SamplingRule = Literal["softmax", "set", "release"]
MIN_WEIGHT = 1e-36
"""Weight of an impossible token: one can be drawn where all are impossible."""
NOT_DRAFTED = 127
"""Draft position of tokens that are not in a draft: beyond any (int8)."""


def log_weights(network: Mulan, logits: Tensor, rule: SamplingRule, temperature: float, end: int) -> Tensor:
    """Compute the log-weight with which each token competes to be the next one.

    Parameters
    ----------
    network
        The network that gave the logits.
    logits
        ``[..., V]``.
    rule
        ``"softmax"`` and ``"release"``: z / temperature (of a model with bounded genes, ``"softmax"`` takes log σ(z) of
        genes for z); ``"set"``: log σ(z) / temperature.
    temperature
        Below 1, likely tokens are preferred.
    end
        The end token.
    """
    if rule == "set":
        logits = torch.nn.functional.logsigmoid(logits)
    elif rule == "softmax":
        logits = network.log_weights(logits, end)
    return logits if temperature == 1 else logits / temperature


def bounded_weights(logits: Tensor, is_end: Tensor) -> Tensor:
    """Compute weights at temperature 1 where no gene's exceeds one: σ(z), but exp(z) where ``is_end`` (bool)."""
    return torch.where(is_end, logits.exp(), logits.sigmoid()).clamp(min=MIN_WEIGHT)


def pick_value(network: Mulan, hidden: Tensor, token: Tensor, noise: Tensor | None) -> Tensor:
    """Choose the value of tokens just drawn, as if each were a gene: int64 of the tokens' shape.

    Parameters
    ----------
    hidden
        ``[..., W]``.
    token
        int64 ``[...]``.
    noise
        ``[..., levels]``, standard Gumbel: the value is drawn, ``argmax(log-probability + noise)``. None: it is the
        rounded mean.
    """
    mean = network.value_mean_of(hidden, token)
    if noise is not None:
        return (network.level_log_probs(mean.float(), token) + noise).argmax(-1) + 1
    return mean.round().clamp(0, network.config.levels).long()


def draw_number(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw how many tokens a cell of a published model gets: one Bernoulli draw per token from σ(z).

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


class EntityHead(NamedTuple):
    """Weights ``[V, W]`` and biases ``[V]`` of a head, on the host."""

    weight: np.ndarray
    bias: np.ndarray


class Candidates(NamedTuple):
    """Candidate lists of a :class:`~scmulan.generate.noise.Noise`, on the host, and the tokens that they exclude."""

    tokens: np.ndarray
    times: np.ndarray
    horizon: np.ndarray
    excluded: np.ndarray
    end: int


class GumbelSampler:
    """Sampler of next tokens under one rule.

    Parameters
    ----------
    network, rule, temperature
        As for :func:`log_weights`.
    genes
        int64: genes that may be drawn.
    end
        The end token.

    Attributes
    ----------
    lazy : bool
        Whether candidate lists stand for full noise.
    compiled : bool
        Whether the compiled loop walks through them.
    """

    def __init__(self, network: Mulan, rule: SamplingRule, temperature: float, *, genes: np.ndarray, end: int) -> None:
        self.network, self.rule, self.temperature, self.end = network, rule, temperature, end
        device = network.device
        self.genes = torch.from_numpy(genes.astype(np.int64)).to(device)
        self.lazy = temperature == 1 and (rule == "set" or (rule == "softmax" and network.config.bounded_genes))
        self.compiled = self.lazy and device.type == "cpu"

    def sample(
        self, hidden: Tensor, noise: Noise, excluded: Tensor, drafted: Tensor, n_drafted: int
    ) -> tuple[Tensor, Tensor]:
        """Sample the tokens of J positions of each row by the Gumbel-max trick.

        Parameters
        ----------
        hidden
            ``[B, J, W]``, or ``[B, 1, W]`` where all positions share one.
        noise
            Of the positions.
        excluded
            Bool ``[B, V]``: tokens that must not be drawn at any position.
        drafted
            int64 ``[B, K]``: tokens of a draft; position ``j`` must not repeat the first ``n_drafted + j`` of them.
        n_drafted
            See above.

        Returns
        -------
        token : Tensor
            int64 ``[B, J]``.
        decided : Tensor
            Bool ``[B, J]``: False where a candidate list ended before its winner was certain (:meth:`finish`).
        """
        if self.compiled:
            return self._sample_compiled(hidden, noise, excluded, drafted, n_drafted)
        logits = self.network.entity_logits(hidden).float()
        n = noise.times.shape[1]
        taken = self._taken(excluded, drafted, n_drafted, n)
        if not self.lazy:
            score = log_weights(self.network, logits, self.rule, self.temperature, self.end) + noise.times
            token = score.masked_fill_(taken, -torch.inf).argmax(2)
            return token, torch.ones_like(token, dtype=torch.bool)
        listed = logits.expand(-1, n, -1).gather(2, noise.candidates)
        weights = bounded_weights(listed, noise.candidates == self.end)
        gone = taken.expand(-1, n, -1).gather(2, noise.candidates)
        arrival, first = (noise.times / weights).masked_fill(gone, torch.inf).min(2)
        return noise.candidates.gather(2, first[..., None])[..., 0], arrival <= noise.horizon

    @staticmethod
    def _taken(excluded: Tensor, drafted: Tensor, n_drafted: int, n: int) -> Tensor:
        """Return the tokens that each of ``n`` positions must not draw: bool ``[B, n or 1, V]``."""
        if not drafted.shape[1]:
            return excluded[:, None]
        first = torch.full(excluded.shape, NOT_DRAFTED, dtype=torch.int8, device=excluded.device)
        first.masked_fill_(excluded, -1)
        # A token that was drafted twice counts where it came first.
        position = torch.arange(drafted.shape[1], dtype=torch.int8, device=excluded.device).expand_as(drafted)
        first.scatter_reduce_(1, drafted, position, "amin")
        return first[:, None] < torch.arange(n_drafted, n_drafted + n, device=excluded.device)[:, None]

    def draft(self, hidden: Tensor, noise: Noise, excluded: Tensor, first: Tensor) -> Tensor:
        """Draft tokens ``[B, 1 + J]`` after one hidden state ``[B, W]``: ``first`` (``[B]``), then what it samples.

        A draft may have a token twice; the second is rejected later.
        """
        token, _ = self.sample(hidden[:, None], noise, excluded, first[:, None], 1)
        return torch.cat((first[:, None], token), 1)

    def finish(self, hidden: Tensor, noise: Noise, excluded: Tensor, row: int, times_beyond: Tensor) -> Tensor:
        """Sample the next token of one row whose candidate list left it undecided, from all genes.

        Parameters
        ----------
        hidden
            ``[W]``: of the row.
        noise, excluded
            Of one position of all rows, and ``[B, V]``.
        row
            Which row.
        times_beyond
            ``[genes]``: time from the horizon to each gene's next event.
        """
        logits = self.network.entity_logits(hidden).float()
        tokens = torch.cat((noise.candidates[row, 0], self.genes))
        times = torch.cat((noise.times[row, 0], noise.horizon[row, 0] + times_beyond))
        arrivals = times / bounded_weights(logits[tokens], tokens == self.end)
        return tokens[arrivals.masked_fill(excluded[row, tokens], torch.inf).argmin()]

    def head(self) -> EntityHead:
        """Return the entity head for compiled loops."""
        weight, bias = self.network.entity_head.weight, self.network.entity_bias
        return EntityHead(
            weight.detach().numpy(), np.zeros(len(weight), np.float32) if bias is None else bias.detach().numpy()
        )

    def candidates(self, noise: Noise, excluded: Tensor) -> Candidates:
        """Return candidate lists for compiled loops."""
        return Candidates(
            noise.candidates.numpy(), noise.times.numpy(), noise.horizon.numpy(), excluded.numpy(), self.end
        )

    def _sample_compiled(
        self, hidden: Tensor, noise: Noise, excluded: Tensor, drafted: Tensor, n_drafted: int
    ) -> tuple[Tensor, Tensor]:
        token = torch.empty(noise.candidates.shape[:2], dtype=torch.int64)
        decided = torch.empty(noise.candidates.shape[:2], dtype=torch.bool)
        sample_rows(
            hidden.float().contiguous().numpy(),
            self.head(),
            self.candidates(noise, excluded),
            drafted.numpy(),
            n_drafted,
            token.numpy(),
            decided.numpy(),
        )
        return token, decided


@compiled()
def sample_rows(
    hidden: np.ndarray,
    head: EntityHead,
    candidates: Candidates,
    drafted: np.ndarray,
    n_drafted: int,
    token: np.ndarray,
    decided: np.ndarray,
) -> None:
    """Fill in the tokens of all rows and positions, see :meth:`GumbelSampler.sample`."""
    for b in range(token.shape[0]):
        for j in range(token.shape[1]):
            h = hidden[b, min(j, hidden.shape[1] - 1)]
            winner, arrival = sample_token(h, head, candidates, b, j, drafted[b, : n_drafted + j])
            token[b, j], decided[b, j] = winner, arrival <= candidates.horizon[b, j]


@compiled()
def sample_token(
    hidden: np.ndarray, head: EntityHead, candidates: Candidates, row: int, position: int, drafted: np.ndarray
) -> tuple[Any, Any]:
    """Return the first token to arrive at one position, and its arrival time."""
    tokens, times = candidates.tokens[row, position], candidates.times[row, position]
    n, end = len(tokens), candidates.end
    ends_listed = tokens[n - 1] == end
    arrival, winner = np.float32(np.inf), tokens[0]
    for step in range(n):
        i = (step + n - 1) % n if ends_listed else step  # the end token first: its arrival may spare all genes
        time, token = times[i], tokens[i]
        if time >= arrival and token != end:
            break
        taken = candidates.excluded[row, token]
        for other in drafted:
            taken = taken or other == token
        if taken:
            continue
        logit = dot(hidden, head.weight[token]) + head.bias[token]
        weight = np.exp(logit) if token == end else np.float32(1) / (np.float32(1) + np.exp(-logit))
        arrives = time / max(weight, np.float32(MIN_WEIGHT))
        if arrives < arrival:
            arrival, winner = arrives, token
    return winner, arrival


@compiled(fastmath={"reassoc", "contract", "nsz"})
def dot(a: np.ndarray, b: np.ndarray) -> Any:
    """Compute the product of two vectors."""
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total

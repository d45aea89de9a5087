"""Speculative sampling: several tokens of each row in one pass, the same ones as token by token.

Speculative sampling (Leviathan et al. 2023) drafts the coming tokens cheaply and lets one pass of the network verify
all of them. Here both use the same noise::

    draft    argmax(predicted log-weights + noise)   for the next k positions, without the network
    verify   argmax(computed log-weights  + noise)   for the same positions, in one pass
    keep     tokens up to the first that differs, value included; the verified one there begins the next pass

A cell's next-token distribution hardly changes after one token, so most drafts are right. What is kept is the very
token that decoding one by one would have given, not only one of the same distribution: a cell is a function of its
seed, whatever the draft length, the quality of the draft and the rows beside it. That is why the length may follow the
clock (:class:`DraftLength`). The usual rule of acceptance draws anew at each refusal; it accepts a little more, and
gives other cells with every other draft length.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scmulan._numba import compiled
from scmulan.generate.noise import Noise
from scmulan.generate.sampling import Candidates, EntityHead, GumbelSampler, dot, pick_value, sample_token
from scmulan.model.network import Mulan

MAX_DRAFT_LENGTH = 32
"""Most tokens that are read per row and pass."""
INITIAL_DRAFT_LENGTHS = (8, 2, 16, 4)
"""Lengths of the first passes, from which the cost of a pass is fitted."""
PROBE_INTERVAL = 16
"""Every so many passes, half or double of the best length is tried."""
THROUGHPUT_DECAY = 0.93
"""Weight of earlier measurements after one more pass."""
TOKENS_PER_WIDTH = 128
"""Tokens per unit of the network's width from which the draft model learns."""
RIDGE = 0.3
"""Ridge penalty, in units of the mean variance of the inputs."""


def is_accepted(token: Tensor, value: Tensor, true_token: Tensor, true_value: Tensor) -> Tensor:
    """Tell whether drafted tokens with their values are those that decoding one by one gives."""
    return (token == true_token) & (value == true_value)


class DraftModel:
    """Ridge regression that predicts the next hidden states from the last ones, without the network.

    A hidden state differs from the mean of those before it mostly by a linear image of the token just read::

        hidden[t] ≈ mean(hidden) + (input[t] − mean(input)) @ coefficients

    with the input embeddings of tokens and values. The coefficients are fitted to the tokens kept so far. From the mean
    alone, values of two drafted tokens in a row are right in nine of ten cases at best.

    Parameters
    ----------
    network
        The network whose hidden states are predicted.
    ridge
        Penalty, see :data:`RIDGE`.
    """

    def __init__(self, network: Mulan, *, ridge: float = RIDGE) -> None:
        self.network, self.ridge = network, ridge
        width, weight = network.config.width, network.word.weight
        self.coefficients: Tensor | None = None
        """``[W, W]``; None until there was enough to fit them."""
        self._gram = torch.zeros(width, width, device=weight.device)
        self._cross = torch.zeros_like(self._gram)
        self._token_effect, self._level_effect = torch.zeros(1, width), torch.zeros(1, width)
        self._next_fit = width
        self._max_tokens = TOKENS_PER_WIDTH * width

    def inputs(self, token: Tensor, value: Tensor) -> Tensor:
        """Return the input embeddings of tokens with their values, float32 ``[..., W]``."""
        return (self.network.word(token) + self.network.level(value)).float()

    def draft(
        self,
        sampler: GumbelSampler,
        noise: Noise,
        excluded: Tensor,
        mean: Tensor,
        mean_input: Tensor,
        token: Tensor,
        value: Tensor,
        *,
        sample_values: bool,
    ) -> tuple[Tensor, Tensor]:
        """Draft tokens and values ``[B, 1 + J]`` of each row: the certain next one, then J predicted ones.

        Parameters
        ----------
        sampler, noise, excluded
            As for :meth:`GumbelSampler.sample <scmulan.generate.sampling.GumbelSampler.sample>`, of J positions.
        mean, mean_input
            ``[B, W]``: means of the last hidden states and inputs.
        token, value
            int64 ``[B]``: the next token and its value.
        sample_values
            Draw values from their distribution.
        """
        if sampler.compiled:
            return self._draft_compiled(sampler, noise, excluded, mean, mean_input, token, value, sample_values)
        tokens = sampler.draft(mean.to(self.network.word.weight.dtype), noise, excluded, token)
        value_noise = noise.values if sample_values else None
        return tokens, self.draft_values(mean, mean_input, tokens, value, value_noise, sampler.end)

    def _draft_compiled(
        self,
        sampler: GumbelSampler,
        noise: Noise,
        excluded: Tensor,
        mean: Tensor,
        mean_input: Tensor,
        token: Tensor,
        value: Tensor,
        sample_values: bool,
    ) -> tuple[Tensor, Tensor]:
        network = self.network
        n = noise.candidates.shape[1]
        tokens = torch.cat((token[:, None], token.new_empty(len(token), n)), 1)
        values = torch.cat((value[:, None], value.new_zeros(len(value), n)), 1)
        zeros = torch.zeros(network.config.vocabulary)
        base = mean if self.coefficients is None else mean - mean_input @ self.coefficients
        draft_rows(
            Prediction(
                base.numpy(), self._token_effect.numpy(), self._level_effect.numpy(), self.coefficients is not None
            ),
            sampler.head(),
            ValueHead(
                network.value_head.weight.detach().numpy(),
                (zeros if network.value_bias is None else network.value_bias.detach()).numpy(),
                (zeros if network.log_scale is None else network.log_scale.detach()).numpy(),
                sample_values,
            ),
            sampler.candidates(noise, excluded),
            noise.values.numpy(),
            tokens.numpy(),
            values.numpy(),
        )
        return tokens, values

    def draft_values(
        self, mean: Tensor, mean_input: Tensor, token: Tensor, first: Tensor, noise: Tensor | None, end: int
    ) -> Tensor:
        """Draft the values of drafted tokens, each predicted from the token before it and its value: int64 ``[B, k]``.

        Parameters
        ----------
        mean, mean_input
            As for :meth:`draft`.
        token
            int64 ``[B, k]``.
        first
            int64 ``[B]``: value of the first token.
        noise
            ``[B, k − 1, levels]`` of the others, as for :func:`scmulan.generate.sampling.pick_value`.
        end
            The end token, which has no value.
        """
        dtype = self.network.word.weight.dtype
        rest = token[:, 1:, None]
        if self.coefficients is None:
            hidden = mean[:, None, None].expand(*rest.shape, -1)
        else:
            # One state for each value that the token before may have: what is left to do one by one is looking up.
            after = mean[:, None] + (self.network.word(token[:, :-1]).float() - mean_input[:, None]) @ self.coefficients
            hidden = after[:, :, None] + self.network.level.weight.float() @ self.coefficients
        picked = pick_value(self.network, hidden.to(dtype), rest, None if noise is None else noise[:, :, None])
        picked = picked.masked_fill(rest == end, 0)
        values = [first]
        for j in range(rest.shape[1]):
            before = values[-1][:, None] if self.coefficients is not None else torch.zeros_like(first)[:, None]
            values.append(picked[:, j].gather(1, before)[:, 0])
        return torch.stack(values, 1)

    def update(self, difference: Tensor, input_difference: Tensor, n_tokens: int) -> None:
        """Learn from hidden states and inputs, less their means: ``[N, W]``, zero where they do not count.

        Parameters
        ----------
        difference, input_difference
            Of the hidden state after each token, and of the token's input.
        n_tokens
            Tokens seen before, over all calls.
        """
        if n_tokens >= self._max_tokens:
            return
        self._gram += input_difference.T @ input_difference
        self._cross += input_difference.T @ difference
        if n_tokens >= self._next_fit:
            self._next_fit = 3 * n_tokens // 2
            self._fit()

    def _fit(self) -> None:
        gram, cross = self._gram.cpu().double(), self._cross.cpu().double()
        penalty = self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.coefficients = torch.linalg.solve(gram + penalty, cross).float().to(self._gram.device)
        if self._gram.device.type == "cpu":
            self._token_effect = self.network.word.weight.detach().float() @ self.coefficients
            self._level_effect = self.network.level.weight.detach().float() @ self.coefficients


class Prediction(NamedTuple):
    """Hidden states as the draft model predicts them, on the host: base + effect of the token and of its value."""

    base: np.ndarray
    token_effect: np.ndarray
    level_effect: np.ndarray
    is_fitted: bool


class ValueHead(NamedTuple):
    """Value head on the host: weights ``[V, W]``, biases ``[V]``, log-scales ``[V]``, and whether values are drawn."""

    weight: np.ndarray
    bias: np.ndarray
    log_scale: np.ndarray
    sample: bool


@compiled()
def draft_rows(
    prediction: Prediction,
    head: EntityHead,
    value_head: ValueHead,
    candidates: Candidates,
    value_noise: np.ndarray,
    tokens: np.ndarray,
    values: np.ndarray,
) -> None:
    """Fill in drafted tokens and values one after the other; every one of them is verified later."""
    levels = value_noise.shape[2]
    for b in range(len(tokens)):
        base = prediction.base[b]
        hidden = base.copy()
        for j in range(1, tokens.shape[1]):
            if prediction.is_fitted:
                hidden[:] = base + prediction.token_effect[tokens[b, j - 1]] + prediction.level_effect[values[b, j - 1]]
            token, _ = sample_token(hidden, head, candidates, b, j - 1, tokens[b, :j])
            tokens[b, j] = token
            if token == candidates.end:
                continue
            mean = dot(hidden, value_head.weight[token]) + value_head.bias[token]
            if not value_head.sample:
                values[b, j] = min(max(np.round(mean), 0), levels)
                continue
            scale, best, below = np.exp(value_head.log_scale[token]), -np.inf, 0.0
            for level in range(1, levels + 1):
                above = 1 / (1 + np.exp((mean - level - 0.5) / scale)) if level < levels else 1.0
                score = np.log(max(above - below, 1e-30)) + value_noise[b, j - 1, level - 1]
                if score > best:
                    best, values[b, j] = score, level
                below = above


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Compute how many drafted tokens are kept on average: the first always, each next one with one probability."""
    return float(draft_length) if acceptance >= 1 else (1 - acceptance**draft_length) / (1 - acceptance)


@dataclass(kw_only=True, slots=True)
class DraftStats:
    """Counts of what was drafted and kept."""

    passes: int = 0
    """Passes of the network, over all rows at once."""
    row_passes: int = 0
    """Passes of each row added up."""
    tokens: int = 0
    """Tokens kept."""
    verified: int = 0
    """Drafted tokens whose predecessors were all accepted."""
    accepted: int = 0
    """Those of them that were accepted too."""
    seconds: float = 0.0
    """Time of all passes."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Passes by draft length."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass adds to a row."""
        return self.tokens / max(self.row_passes, 1)


class DraftLength:
    """Chooses the draft length with most tokens per second on this machine, measured while decoding.

    Tokens per pass follow from the acceptance; seconds per pass are fitted by a straight line in the number of tokens
    that it reads, over all rows. Both forget slowly, so that a machine may change.

    Parameters
    ----------
    fixed
        A length that stays; None chooses.
    """

    def __init__(self, fixed: int | None) -> None:
        self.fixed = fixed
        self.stats = DraftStats()
        self._updates = 0
        self._accepted = self._verified = 0.0
        self._sums = [0.0] * 5  # of 1, n, n², t, n t with n tokens read in t seconds
        self._rows = 1.0
        self._double = True

    def next(self) -> int:
        """Return the length of the coming draft."""
        if self.fixed is not None:
            return self.fixed
        if self._updates < len(INITIAL_DRAFT_LENGTHS):
            return INITIAL_DRAFT_LENGTHS[self._updates]
        best = self.best()
        if self._updates % PROBE_INTERVAL:
            return best
        self._double = not self._double
        return max(1, min(MAX_DRAFT_LENGTH, best * 2 if self._double else best // 2))

    def best(self) -> int:
        """Return the length with most tokens per second by what was measured so far."""
        one, n, nn, t, nt = self._sums
        spread = one * nn - n * n
        slope = max((one * nt - n * t) / spread, 0.0) if spread > 1e-9 else 0.0
        start = max((t - slope * n) / one, 0.0)
        acceptance = self._accepted / self._verified if self._verified else 0.9
        slope *= self._rows
        lengths = range(1, MAX_DRAFT_LENGTH + 1)
        return max(lengths, key=lambda k: expected_tokens(acceptance, k) / (start + slope * k + 1e-9))

    def update(
        self, length: int, seconds: float, *, passes: int, row_passes: int, tokens: int, verified: int, accepted: int
    ) -> None:
        """Count passes of one draft length.

        Parameters
        ----------
        length
            Tokens read per row and pass.
        seconds
            Time of all these passes.
        passes, row_passes, tokens, verified, accepted
            As in :class:`DraftStats`.
        """
        stats = self.stats
        stats.passes += passes
        stats.row_passes += row_passes
        stats.tokens += tokens
        stats.verified += verified
        stats.accepted += accepted
        stats.seconds += seconds
        stats.lengths[length] = stats.lengths.get(length, 0) + passes
        self._updates += 1
        decay = math.pow(THROUGHPUT_DECAY, passes)
        self._accepted = decay * self._accepted + accepted
        self._verified = decay * self._verified + verified
        self._rows = max(row_passes / passes, 1.0)
        read, each = length * self._rows, seconds / passes
        new = (1.0, read, read**2, each, read * each)
        self._sums = [decay * old + term for old, term in zip(self._sums, new, strict=True)]

"""Several words of each cell in one pass, exactly as if they had been written one by one.

A set's next-word distribution hardly changes after one word. So the coming words are guessed: each is the winner of its
own race (:mod:`scmulan.generate.noise`) if weights stay as they are, with the value that follows from its own noise.
One pass of the network reads all of them; then each is compared with the word and value that the network, having read
those before it, really says in the same race with the same noise. The words up to the first difference are kept, and
the true word in its place begins the next pass.

A kept word is the word that would have been written one by one, not merely one of the same distribution: a cell is a
function of its seed, whatever number of words is guessed, however good the guesses are and whichever rows it is
written beside. That is what lets the number be chosen by the clock on the wall (:class:`DraftLength`). It costs a
little acceptance against the usual rule of speculative sampling, which needs fresh chance at each refusal and so
writes other cells with every other number.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from scmulan._numba import compiled
from scmulan.generate.noise import Noise
from scmulan.generate.sampling import GumbelSampler, dot, pick_value, run_race
from scmulan.model.network import Mulan

MOST = 32
# What is tried first; later now and then half or double of the best.
FIRST = (8, 2, 16, 4)
PROBE = 16
# Share of what was measured that is remembered after one more pass.
MEMORY = 0.93
# Words per unit of width from which the outlook learns.
LEARNED = 128
RIDGE = 0.3


def agrees(word: Tensor, value: Tensor, true_word: Tensor, true_value: Tensor) -> Tensor:
    """Whether a guessed word with its value is what is said one by one: the one rule of acceptance."""
    return (word == true_word) & (value == true_value)


class DraftModel:
    """What the coming states will be like, foreseen from the last ones without the network.

    A state differs from the mean of those before it mostly by the word that was just read there, and that difference
    is nearly linear in the word's embedding. Its matrix is fitted by ridge regression to the states of words kept so
    far: without it, values of two guessed words in a row are right in nine of ten cases at best.

    Parameters
    ----------
    network
        The network whose states are foreseen.
    """

    def __init__(self, network: Mulan) -> None:
        self.network = network
        width, weight = network.config.width, network.word.weight
        self.effect: Tensor | None = None
        self._gram = torch.zeros(width, width, device=weight.device)
        self._cross = torch.zeros_like(self._gram)
        self._word_effect, self._level_effect = torch.zeros(1, width), torch.zeros(1, width)
        self._fit_at = width
        self._enough = LEARNED * width

    def inputs(self, word: Tensor, value: Tensor) -> Tensor:
        """What the network adds up at the input for words and their values: float32 ``[..., W]``."""
        return (self.network.word(word) + self.network.level(value)).float()

    def guess(
        self,
        race: GumbelSampler,
        draws: Noise,
        said: Tensor,
        mean: Tensor,
        mean_input: Tensor,
        word: Tensor,
        value: Tensor,
        *,
        values_drawn: bool,
    ) -> tuple[Tensor, Tensor]:
        """Words and values ``[B, 1 + J]`` of each row: the one that is said next, then J guesses.

        Parameters
        ----------
        race, draws, said
            The races of the J places, and words that must not be said.
        mean, mean_input
            ``[B, W]``: of the states and inputs of the last words.
        word, value
            int64 ``[B]``: what is said next.
        values_drawn
            Whether values are drawn from the bins' distribution.
        """
        if race.compiled:
            return self._compiled(race, draws, said, mean, mean_input, word, value, values_drawn)
        words = race.guesses(mean.to(self.network.word.weight.dtype), draws, said, word)
        noise = draws.values if values_drawn else None
        return words, self.values(mean, mean_input, words, value, noise, race.end)

    def _compiled(
        self,
        race: GumbelSampler,
        draws: Noise,
        said: Tensor,
        mean: Tensor,
        mean_input: Tensor,
        word: Tensor,
        value: Tensor,
        values_drawn: bool,
    ) -> tuple[Tensor, Tensor]:
        network = self.network
        base = mean if self.effect is None else mean - mean_input @ self.effect
        words = torch.cat((word[:, None], word.new_empty(len(word), draws.words.shape[1])), 1)
        values = torch.cat((value[:, None], torch.zeros_like(words[:, 1:])), 1)
        none = torch.zeros(network.config.vocabulary)
        foresee(
            base.numpy(), self._word_effect.numpy(), self._level_effect.numpy(), *race.vectors,
            network.value_head.weight.detach().numpy(),
            (none if network.value_bias is None else network.value_bias.detach()).numpy(),
            (none if network.log_scale is None else network.log_scale.detach()).numpy(),
            draws.words.numpy(), draws.times.numpy(), draws.values.numpy(), said.numpy(), race.end,
            self.effect is not None, values_drawn, words.numpy(), values.numpy(),
        )  # fmt: skip
        return words, values

    def values(
        self, mean: Tensor, mean_input: Tensor, word: Tensor, first: Tensor, noise: Tensor | None, end: int
    ) -> Tensor:
        """Values of guessed words, each foreseen from the word before it and that one's value: int64 ``[B, k]``.

        Parameters
        ----------
        mean, mean_input
            ``[B, W]``: of the states and inputs of the last words.
        word
            int64 ``[B, k]``: the words.
        first
            int64 ``[B]``: value of the first one.
        noise
            ``[B, k − 1, levels]`` of the others, as for :func:`scmulan.generate.sampling.pick_value`.
        end
            The end word, which has no value.
        """
        kind = self.network.word.weight.dtype
        rest = word[:, 1:, None]
        if self.effect is None:
            states = mean[:, None, None].expand(*rest.shape, -1)
        else:
            # One state for each value that the word before may have: then only looking up is left for word by word.
            words = mean[:, None] + (self.network.word(word[:, :-1]).float() - mean_input[:, None]) @ self.effect
            states = words[:, :, None] + self.network.level.weight.float() @ self.effect
        picked = pick_value(self.network, states.to(kind), rest, None if noise is None else noise[:, :, None])
        picked = picked.masked_fill(rest == end, 0)
        values = [first]
        for j in range(rest.shape[1]):
            before = values[-1][:, None] if self.effect is not None else torch.zeros_like(first)[:, None]
            values.append(picked[:, j].gather(1, before)[:, 0])
        return torch.stack(values, 1)

    def learn(self, difference: Tensor, input_difference: Tensor, words: int) -> None:
        """Take note of states and inputs, less their means ``[N, W]`` (zero where they do not count).

        Parameters
        ----------
        difference, input_difference
            Of the state after each word, and of the word's input.
        words
            Words seen before, over all calls.
        """
        if words >= self._enough:
            return
        self._gram += input_difference.T @ input_difference
        self._cross += input_difference.T @ difference
        if words >= self._fit_at:
            self._fit_at = 3 * words // 2
            gram, cross = self._gram.cpu().double(), self._cross.cpu().double()
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            self.effect = torch.linalg.solve(gram + ridge, cross).float().to(self._gram.device)
            if self._gram.device.type == "cpu":
                self._word_effect = self.network.word.weight.detach().float() @ self.effect
                self._level_effect = self.network.level.weight.detach().float() @ self.effect


@compiled()
def foresee(
    base: np.ndarray,
    word_effect: np.ndarray,
    level_effect: np.ndarray,
    head: np.ndarray,
    bias: np.ndarray,
    value_head: np.ndarray,
    value_bias: np.ndarray,
    log_scale: np.ndarray,
    listed: np.ndarray,
    times: np.ndarray,
    noise: np.ndarray,
    said: np.ndarray,
    end: int,
    moved: bool,
    values_drawn: bool,
    words: np.ndarray,
    values: np.ndarray,
) -> None:
    """Fill in guessed words and values, one after the other; what decides about them is not computed here."""
    levels = noise.shape[2]
    for b in range(len(words)):
        state = base[b].copy()
        for j in range(1, words.shape[1]):
            if moved:
                state[:] = base[b] + word_effect[words[b, j - 1]] + level_effect[values[b, j - 1]]
            word, _ = run_race(state, head, bias, listed[b, j - 1], times[b, j - 1], said[b], words[b, :j], end)
            words[b, j] = word
            if word == end:
                continue
            mean = dot(state, value_head[word]) + value_bias[word]
            if not values_drawn:
                values[b, j] = min(max(np.round(mean), 0), levels)
                continue
            scale, best, below = np.exp(log_scale[word]), -np.inf, 0.0
            for level in range(1, levels + 1):
                above = 1 / (1 + np.exp((mean - level - 0.5) / scale)) if level < levels else 1.0
                score = np.log(max(above - below, 1e-30)) + noise[b, j - 1, level - 1]
                if score > best:
                    best, values[b, j] = score, level
                below = above


def expected_words(acceptance: float, drafted: int) -> float:
    """Words kept of ``drafted`` ones, the first of which always is, where each next one is with one chance."""
    return float(drafted) if acceptance >= 1 else (1 - acceptance**drafted) / (1 - acceptance)


@dataclass(kw_only=True, slots=True)
class DraftStats:
    """What was drafted and what was kept of it."""

    passes: int = 0
    """Passes of the network, over all rows at once."""
    row_passes: int = 0
    """Passes of each row added up."""
    words: int = 0
    """Words kept."""
    compared: int = 0
    """Guessed words whose predecessors were all right."""
    right: int = 0
    """Those of them that were right too."""
    seconds: float = 0.0
    """Time of all passes."""
    drafts: dict[int, int] = field(default_factory=dict)
    """Passes with each number of words."""

    @property
    def words_per_pass(self) -> float:
        """Words that one pass adds to a row."""
        return self.words / max(self.row_passes, 1)

    @property
    def acceptance(self) -> float:
        """Chance of a guessed word to be right, its predecessors being so."""
        return self.right / max(self.compared, 1)


class DraftLength:
    """How many words to draft: those that bring most words per second on this machine, as measured while writing.

    Words per pass follow from the share of guesses that are right; seconds per pass are fitted by a straight line in
    the number of words that it reads, all rows together.

    Parameters
    ----------
    draft
        A number that stays; None chooses.
    """

    def __init__(self, draft: int | None) -> None:
        self.fixed = draft
        self.tally = DraftStats()
        self._seen = 0
        self._right = self._compared = 0.0
        self._sums = [0.0] * 5  # of 1, n, n², t, n t with n words read in t seconds
        self._rows = 1.0
        self._doubling = True

    def next(self) -> int:
        """Words to draft in the coming pass."""
        if self.fixed is not None:
            return self.fixed
        if self._seen < len(FIRST):
            return FIRST[self._seen]
        best = self.best()
        if self._seen % PROBE:
            return best
        self._doubling = not self._doubling
        return max(1, min(MOST, best * 2 if self._doubling else best // 2))

    def best(self) -> int:
        """Number of words that brings most words per second, by what was measured so far."""
        one, n, nn, t, nt = self._sums
        spread = one * nn - n * n
        slope = max((one * nt - n * t) / spread, 0.0) if spread > 1e-9 else 0.0
        start = max((t - slope * n) / one, 0.0)
        acceptance = self._right / self._compared if self._compared else 0.9
        slope *= self._rows
        return max(range(1, MOST + 1), key=lambda k: expected_words(acceptance, k) / (start + slope * k + 1e-9))

    def learn(
        self, drafted: int, seconds: float, *, passes: int, rows: int, words: int, compared: int, right: int
    ) -> None:
        """Take note of passes that drafted the same number of words.

        Parameters
        ----------
        drafted
            Words read per row and pass.
        seconds
            Time of all these passes.
        passes, rows, words, compared, right
            As in :class:`DraftStats`; ``rows`` are row passes.
        """
        tally = self.tally
        tally.passes += passes
        tally.row_passes += rows
        tally.words += words
        tally.compared += compared
        tally.right += right
        tally.seconds += seconds
        tally.drafts[drafted] = tally.drafts.get(drafted, 0) + passes
        self._seen += 1
        kept = math.pow(MEMORY, passes)
        self._right = kept * self._right + right
        self._compared = kept * self._compared + compared
        self._rows = max(rows / passes, 1.0)
        read, each = drafted * self._rows, seconds / passes
        one = (1.0, read, read**2, each, read * each)
        self._sums = [kept * old + new for old, new in zip(self._sums, one, strict=True)]

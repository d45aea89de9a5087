"""Which word is said next, and with which value.

Logits mean different things under the two objectives. A ``next_word`` model gives the distribution of the next word:
softmax is exact, the end word included. A ``published`` model gives for each word the chance that it is *still to be
said*. Under a random order the next word is then in proportion to σ(z); the end word is in every set and tells
nothing about when to stop, so the number of words is drawn first, from the chances at the prompt's last word.

Which word is said next: the winner of a race, see :mod:`scmulan.generate.noise`.

Where no gene weighs more than one, few words take part, and each race ends with the first arrival that no later visit
can beat: a compiled loop looks at about as many words as the cell has genes to a word still to come, and never computes
the other logits. Where every word takes part, logits of all of them are computed.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scmulan._numba import compiled
from scmulan.generate.noise import Noise
from scmulan.model.network import Mulan

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


# Order of words that are not said yet.
LATER = 127


class GumbelSampler:
    """Races under one rule.

    Parameters
    ----------
    network, rule, temperature
        Whose words, and how they are weighed (:mod:`scmulan.generate.sampling`).
    genes
        int64: genes that may be said.
    end
        The end word.
    """

    def __init__(self, network: Mulan, rule: Rule, temperature: float, *, genes: np.ndarray, end: int) -> None:
        self.network, self.rule, self.temperature, self.end = network, rule, temperature, end
        device = network.word.weight.device
        self.genes = torch.from_numpy(genes.astype(np.int64)).to(device)
        bounded = rule == "set" or (rule == "softmax" and network.config.bounded_genes)
        self.listed = bounded and temperature == 1
        """Whether a list of visits stands for the race."""
        self.compiled = self.listed and device.type == "cpu"
        """Whether the compiled loop runs it."""

    def winners(self, states: Tensor, draws: Noise, said: Tensor, before: Tensor, known: int) -> tuple[Tensor, Tensor]:
        """Words said at J places of each row, and whether each race is closed: ``[B, J]``.

        Parameters
        ----------
        states
            ``[B, J, W]``, or ``[B, 1, W]`` where all places share one.
        draws
            Random numbers of the places.
        said
            Bool ``[B, V]``: words that must not be said anywhere.
        before
            int64 ``[B, K]``: words that must not be said either, the first ``known + j`` of them at place ``j``.
        known
            As said.
        """
        if self.compiled:
            return self._compiled(states, draws, said, before, known)
        logits = self.network.entity_logits(states).float()
        taken = self._taken(said, before, known, draws.times.shape[1])
        if not self.listed:
            score = log_weights(self.network, logits, self.rule, self.temperature, self.end) + draws.times
            winner = score.masked_fill_(taken, -torch.inf).argmax(2)
            return winner, torch.ones_like(winner, dtype=torch.bool)
        J = draws.words.shape[1]
        weights = bounded_weights(logits.expand(-1, J, -1).gather(2, draws.words), draws.words == self.end)
        gone = taken.expand(-1, J, -1).gather(2, draws.words)
        best, at = (draws.times / weights).masked_fill(gone, torch.inf).min(2)
        return draws.words.gather(2, at[..., None])[..., 0], best <= draws.horizon

    @staticmethod
    def _taken(said: Tensor, before: Tensor, known: int, places: int) -> Tensor:
        """Words that must not be said: bool ``[B, places or 1, V]``."""
        if not before.shape[1]:
            return said[:, None]
        order = torch.full(said.shape, LATER, dtype=torch.int8, device=said.device).masked_fill_(said, -1)
        # A word that was guessed twice is said the first time.
        place = torch.arange(before.shape[1], dtype=torch.int8, device=said.device).expand_as(before)
        order.scatter_reduce_(1, before, place, "amin")
        return order[:, None] < torch.arange(known, known + places, device=said.device)[:, None]

    def guesses(self, state: Tensor, draws: Noise, said: Tensor, first: Tensor) -> Tensor:
        """Words ``[B, 1 + J]`` after one state ``[B, W]`` if weights stay: ``first`` (``[B]``), then the winners."""
        # Two guesses may be the same word: the second is wrong then.
        found, _ = self.winners(state[:, None], draws, said, first[:, None], 1)
        return torch.cat((first[:, None], found), 1)

    def to_the_end(self, state: Tensor, draws: Noise, said: Tensor, row: int, later: Tensor) -> Tensor:
        """Winner of a race of one row that its list left open.

        Parameters
        ----------
        state, draws, said
            Of the row's next place: ``[W]``, one place of all rows, ``[B, V]``.
        row
            Which row.
        later
            Time from the horizon to each gene's next visit.
        """
        logits = self.network.entity_logits(state).float()
        words = torch.cat((draws.words[row, 0], self.genes))
        times = torch.cat((draws.times[row, 0], draws.horizon[row, 0] + later))
        arrivals = times / bounded_weights(logits[words], words == self.end)
        return words[arrivals.masked_fill(said[row, words], torch.inf).argmin()]

    @property
    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and biases of the entity head, on the host."""
        head, bias = self.network.entity_head.weight, self.network.entity_bias
        return head.detach().numpy(), np.zeros(len(head), np.float32) if bias is None else bias.detach().numpy()

    def _compiled(
        self, states: Tensor, draws: Noise, said: Tensor, before: Tensor, known: int
    ) -> tuple[Tensor, Tensor]:
        winner = torch.empty(draws.words.shape[:2], dtype=torch.int64)
        closed = torch.empty(draws.words.shape[:2], dtype=torch.bool)
        run_races(
            states.float().contiguous().numpy(),
            *self.vectors,
            draws.words.numpy(),
            draws.times.numpy(),
            draws.horizon.numpy(),
            said.numpy(),
            before.numpy(),
            known,
            self.end,
            winner.numpy(),
            closed.numpy(),
        )
        return winner, closed


@compiled(fastmath={"reassoc", "contract", "nsz"})
def dot(a: np.ndarray, b: np.ndarray) -> Any:
    """Product of two vectors."""
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@compiled()
def run_race(
    state: np.ndarray,
    head: np.ndarray,
    bias: np.ndarray,
    words: np.ndarray,
    times: np.ndarray,
    said: np.ndarray,
    before: np.ndarray,
    end: int,
) -> tuple[Any, Any]:
    """Winner of one race and its arrival. Visits come in the order of time, the end word's last in the list."""
    listed = len(words)
    ending = words[listed - 1] == end
    best, who = np.float32(np.inf), words[0]
    for step in range(listed):
        s = (step + listed - 1) % listed if ending else step  # the end word first: it may close the race
        visit, word = times[s], words[s]
        if visit >= best and word != end:
            break
        taken = said[word]
        for other in before:
            taken = taken or other == word
        if taken:
            continue
        logit = dot(state, head[word]) + bias[word]
        weight = np.exp(logit) if word == end else np.float32(1) / (np.float32(1) + np.exp(-logit))
        arrival = visit / max(weight, np.float32(LEAST_WEIGHT))
        if arrival < best:
            best, who = arrival, word
    return who, best


@compiled()
def run_races(
    states: np.ndarray,
    head: np.ndarray,
    bias: np.ndarray,
    words: np.ndarray,
    times: np.ndarray,
    horizon: np.ndarray,
    said: np.ndarray,
    before: np.ndarray,
    known: int,
    end: int,
    winner: np.ndarray,
    closed: np.ndarray,
) -> None:
    """Run the races of all rows and places, see :meth:`GumbelSampler.winners`."""
    for b in range(words.shape[0]):
        for j in range(words.shape[1]):
            state = states[b, min(j, states.shape[1] - 1)]
            who, best = run_race(state, head, bias, words[b, j], times[b, j], said[b], before[b, : known + j], end)
            winner[b, j], closed[b, j] = who, best <= horizon[b, j]

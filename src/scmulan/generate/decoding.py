"""Sentences written side by side, from a queue of rows that takes each free place at once."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmulan._progress import Advance as Progress
from scmulan.generate.noise import CHUNK, NoiseBuffer
from scmulan.generate.sampling import GumbelSampler, Rule, draw_number, pick_value
from scmulan.generate.speculative import MOST, DraftLength, DraftModel, DraftStats, agrees
from scmulan.infer.batching import MAX_MEMORY_FRACTION, free_bytes, is_out_of_memory
from scmulan.model.cost import kv_bytes_per_token
from scmulan.model.kv_cache import CAPACITY_STEP, KVCache
from scmulan.model.loading import LoadedModel
from scmulan.vocab.sentences import Sentences

# Passes between two looks at which rows are done, on a device that would have to be waited for.
PASSES_UNSEEN = 8
# Words over which states are averaged to guess from: one state says much of the word just read.
AVERAGED = 4
# Rows side by side where memory is not short.
CPU_ROWS, GPU_ROWS = 64, 256
# Bytes of cache that a CPU gets at once: growing copies everything, and the system gives pages when they are written.
ROOM = 1 << 30
# Rows are moved together once this share of them is done and none waits.
SPARSE = 0.25


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """How sentences are written."""

    rule: Rule = "softmax"
    """Which distribution the next word is drawn from, see :mod:`scmulan.generate.sampling`."""
    temperature: float = 1.0
    """Below 1 the likely words are preferred."""
    sample_values: bool = True
    """Draw values from their distribution where the model has one; otherwise their mean."""
    max_words: int = 1_550
    """Most words of a sentence after its prompt."""
    batch: int | None = None
    """Sentences written side by side; None takes what suits the device and its memory."""
    draft: int | None = None
    """Words guessed and read in one pass (:mod:`scmulan.generate.speculative`); 1 writes word by word, None chooses.
    Cells do not depend on it."""


def decode_cells(
    model: LoadedModel,
    prompt: np.ndarray,
    n: int,
    *,
    config: DecodingConfig,
    seed: int,
    share: slice = slice(None),
    genes: np.ndarray | None = None,
    progress: Progress = lambda n: None,
) -> Sentences:
    """Write ``n`` sentences after one prompt.

    Parameters
    ----------
    prompt
        int64 word ids without values, the task's prompt word last.
    n
        Number of sentences.
    seed
        Row ``i`` draws from its own stream ``(seed, i)``: the same seed gives the same cells, whatever the batch.
    share
        Which of the ``n`` sentences to write: a process among others writes its own.
    genes
        Bool ``[V]``: genes that may be said (default: all).

    Returns
    -------
    Sentences
        Prompt and words; a sentence that reached ``max_words`` lacks the end word.
    """
    rows = [(0, i) for i in range(n)[share]]
    return CellDecoder(model, config, genes=genes).write([prompt], rows, seed=seed, progress=progress)


@dataclass(kw_only=True, slots=True)
class _Start:
    """What the network has read of a prompt: read once, for all of its rows."""

    prompt: np.ndarray
    cache: KVCache
    hidden: Tensor
    inputs: Tensor


class _DecodingSlots:
    """Rows being written. Each tensor's first axis is the place."""

    def __init__(self, model: LoadedModel, chance: NoiseBuffer, places: int, most: int, longest: int) -> None:
        network = model.network
        V, W, weight = network.config.vocabulary, network.config.width, network.word.weight
        device = weight.device
        self.chance = chance
        self.bound = longest + most + MOST
        """Most slots that a row can need."""
        needed = places * self.bound * kv_bytes_per_token(network.config, "fp32")
        at_once = device.type == "cpu" and needed <= ROOM
        self.cache = network.new_cache(places, self.bound if at_once else min(longest + CAPACITY_STEP, self.bound))
        self.hidden = weight.new_zeros(places, W)
        self.average = torch.zeros(places, W, device=device)
        """Mean of the last states, from which the coming ones are foreseen."""
        self.inputs = self.average.clone()
        """Mean of the last inputs."""
        self.said = torch.zeros(places, V, dtype=torch.bool, device=device)
        self.words = torch.zeros(places, most + MOST, dtype=torch.int64, device=device)
        self.values = torch.zeros_like(self.words)
        self.count = torch.zeros(places, dtype=torch.int64, device=device)
        self.limit = torch.zeros_like(self.count)
        self.running = torch.zeros(places, dtype=torch.bool, device=device)
        self.who = np.full(places, -1)
        """Which row lies there; kept on the host."""

    def select(self, places: np.ndarray) -> None:
        """Keep some places only, named in ascending order."""
        at = torch.from_numpy(places).to(self.count.device)
        self.cache.select_rows(places.tolist())
        self.chance.select(places)
        for name in ("hidden", "average", "inputs", "said", "words", "values", "count", "limit", "running"):
            setattr(self, name, getattr(self, name)[at])
        self.who = self.who[places]


class CellDecoder:
    """Writes rows.

    Parameters
    ----------
    model
        Any model that has the prompts' words.
    config
        How.
    genes
        Bool ``[V]``: genes that may be said (default: all).
    """

    def __init__(self, model: LoadedModel, config: DecodingConfig, *, genes: np.ndarray | None = None) -> None:
        self.model = model
        self.network = model.network
        self.config = config
        self.end = model.vocabulary.end
        sayable = model.vocabulary.is_gene if genes is None else model.vocabulary.is_gene & genes
        self.genes = np.flatnonzero(sayable)
        self.most = min(config.max_words, len(self.genes) + 1)
        self.forbidden = torch.from_numpy(~sayable).to(self.device)
        self.forbidden[self.end] = config.rule == "set"
        self.race = GumbelSampler(self.network, config.rule, config.temperature, genes=self.genes, end=self.end)
        self.values_drawn = config.sample_values and self.network.log_scale is not None
        self.pace = DraftLength(config.draft)
        self.outlook = DraftModel(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.word.weight.device

    @property
    def tally(self) -> DraftStats:
        """What was drafted and kept so far."""
        return self.pace.tally

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[np.ndarray],
        rows: Sequence[tuple[int, int]],
        *,
        seed: int,
        progress: Progress = lambda n: None,
    ) -> Sentences:
        """Write sentences after several prompts.

        Parameters
        ----------
        prompts
            int64 word ids without values of each prompt.
        rows
            For each sentence its prompt, and its number within the seed: it draws from the stream ``(seed, number)``.
        seed
            The same seed gives the same sentences.
        progress
            Called with the number of sentences just done.

        Returns
        -------
        Sentences
            In the order of ``rows``.
        """
        waiting = deque(range(len(rows)))
        starts: dict[int, _Start] = {}
        done: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        unseen = 1 if self.device.type == "cpu" else PASSES_UNSEEN
        longest = max((len(p) for p in prompts), default=0)
        ring = unseen * (self.config.draft or MOST) + CHUNK
        batch = min(self.config.batch or self._suitable(ring), len(rows))
        chance = NoiseBuffer(
            batch,
            self.genes,
            None if self.config.rule == "set" else self.end,
            levels=self.network.config.levels,
            vocabulary=self.network.config.vocabulary,
            listed=self.race.listed,
            ring=ring,
            device=self.device,
        )
        places = _DecodingSlots(self.model, chance, batch, self.most, longest)
        while True:
            for place in np.flatnonzero(places.who < 0)[: len(waiting)]:
                row = waiting.popleft()
                which, number = rows[row]
                if which not in starts:
                    starts[which] = self._read(prompts[which])
                self._seat(places, int(place), starts[which], seed, number)
                places.who[place] = row
            if (places.who < 0).all():
                return Sentences.join([done[row] for row in range(len(rows))])
            if (places.who < 0).mean() >= SPARSE:
                places.select(np.flatnonzero(places.who >= 0))
            try:
                self._passes(places, unseen)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(places.who) == 1:
                    raise
                half = len(places.who) // 2
                waiting.extendleft(sorted((r for r in places.who[half:].tolist() if r >= 0), reverse=True))
                places.select(np.arange(half))
                continue
            ended = ~places.running.cpu().numpy() & (places.who >= 0)
            for place in np.flatnonzero(ended):
                row = int(places.who[place])
                done[row] = self._sentence(places, int(place), starts[rows[row][0]].prompt)
                places.who[place] = -1
            progress(int(ended.sum()))

    def _suitable(self, ring: int) -> int:
        """Rows that suit the device, if all of them got as long as they may."""
        kind = "bf16" if self.network.precision == "bf16" else "fp32"
        needed = (self.most + MOST) * kv_bytes_per_token(self.network.config, kind)
        needed += 4 * self.network.config.vocabulary * (4 * MOST + (0 if self.race.listed else ring))
        most = CPU_ROWS if self.device.type == "cpu" else GPU_ROWS
        return max(1, min(most, int(free_bytes(self.device) * MAX_MEMORY_FRACTION) // needed))

    def _read(self, prompt: np.ndarray) -> _Start:
        entity = torch.from_numpy(prompt.astype(np.int64))[None].to(self.device)
        cache = self.network.new_cache(1, entity.shape[1])
        value = torch.zeros_like(entity)
        hidden = self.network(entity, value, cache)[0, -1]
        return _Start(prompt=prompt, cache=cache, hidden=hidden, inputs=self.outlook.inputs(entity, value)[0, -1])

    def _seat(self, places: _DecodingSlots, place: int, start: _Start, seed: int, number: int) -> None:
        stream = places.chance.seat(place, seed, number)
        places.cache.restart(torch.tensor([place], device=self.device), start.cache)
        places.hidden[place] = start.hidden
        places.average[place] = start.hidden.float()
        places.inputs[place] = start.inputs
        places.said[place] = self.forbidden
        limit = self.most
        if self.config.rule == "set":
            logits = self.network.entity_logits(start.hidden).float()[torch.from_numpy(self.genes).to(self.device)]
            uniform = torch.from_numpy(stream.random(len(self.genes), dtype=np.float32)).to(self.device)
            limit = min(limit, int(draw_number(logits[None], uniform[None])))
        places.limit[place] = limit
        places.count[place] = 0
        places.running[place] = True

    def _sentence(self, places: _DecodingSlots, place: int, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        count = int(places.count[place])
        words = places.words[place, :count].cpu().numpy()
        values = places.values[place, :count].cpu().numpy()
        # Where the number of words was drawn, the cell is complete.
        tail = [self.end] if self.config.rule == "set" else []
        said = np.concatenate([prompt, words, tail]).astype(np.int64)
        return said, np.concatenate([np.zeros(len(prompt), np.int64), values, [0] * len(tail)]), len(prompt)

    # -- passes ------------------------------------------------------------------------------------------------

    def _passes(self, places: _DecodingSlots, number: int) -> None:
        """Some passes with the same number of words, and what they teach."""
        drafted = min(self.pace.next(), self.most)
        places.cache.lengths = places.cache.lengths * places.running
        places.cache.refresh_used()
        places.chance.provide(places.count.cpu().numpy(), number * drafted)
        counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        begin = time.perf_counter()
        for i in range(number):
            self._pass(places, drafted, counts, wait=i == 0)
        rows, words, compared, right = counts.tolist()
        seconds = time.perf_counter() - begin
        self.pace.learn(drafted, seconds, passes=number, rows=rows, words=words, compared=compared, right=right)

    def _pass(self, places: _DecodingSlots, drafted: int, counts: Tensor, *, wait: bool) -> None:
        """Read ``drafted`` words of each row and keep those that are said one by one.

        Only with ``wait`` the host looks at what the device has: to run races to their end that their list of visits
        leaves open. Without, such a row pauses.
        """
        word, value, started = self._first(places, wait)
        if drafted > 1:
            word, value = self._guess(places, word, value, drafted)
        else:
            word, value = word[:, None], value[:, None]
        places.cache.reserve(drafted, places.bound)
        states = self.network(word, value, places.cache)
        kept = started.long()
        if drafted > 1:
            draws = places.chance.at(places.count, 1, drafted - 1)
            column = torch.arange(1, drafted, device=self.device)
            true, closed = self.race.winners(states[:, :-1], draws, places.said, word, 1)
            true_value = self._values(states[:, :-1], true, draws.values)
            room = (word[:, :-1] != self.end) & (places.count[:, None] + column < places.limit[:, None])
            right = closed & room & agrees(word[:, 1:], value[:, 1:], true, true_value)
            chain = right.long().cumprod(1) * started[:, None]
            kept = kept + chain.sum(1)
            reached = torch.cat((started[:, None], chain[:, :-1] > 0), 1) & room
            counts[2] += reached.sum()
            counts[3] += chain.sum()
        self._keep(places, word, value, states, kept)
        counts[0] += started.sum()
        counts[1] += kept.sum()

    def _first(self, places: _DecodingSlots, wait: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Next word and value of each row, certain, and which rows have one (all that run, if ``wait``)."""
        draws = places.chance.at(places.count, 0, 1)
        none = places.words[:, :0]
        word, closed = self.race.winners(places.hidden[:, None], draws, places.said, none, 0)
        word, started = word[:, 0], places.running & closed[:, 0]
        if wait and self.race.listed:
            for row in (places.running & ~started).nonzero()[:, 0].tolist():
                later = places.chance.later(row, int(places.count[row]))
                word[row] = self.race.to_the_end(places.hidden[row], draws, places.said, row, later)
            started = places.running
        return word, self._values(places.hidden, word, draws.values[:, 0]), started

    def _guess(self, places: _DecodingSlots, word: Tensor, value: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """``number`` words and values ``[B, number]``: the one that is said next, then those foreseen."""
        draws = places.chance.at(places.count, 1, number - 1)
        return self.outlook.guess(
            self.race, draws, places.said, places.average, places.inputs, word, value, values_drawn=self.values_drawn
        )

    def _keep(self, places: _DecodingSlots, word: Tensor, value: Tensor, states: Tensor, kept: Tensor) -> None:
        """Count the first ``kept`` words of each row as said."""
        drafted = word.shape[1]
        column = torch.arange(drafted, device=kept.device)
        real = column < kept[:, None]
        at = places.count[:, None] + column  # what lies beyond the words kept is written over, or never looked at
        places.words.scatter_(1, at, word)
        places.values.scatter_(1, at, value)
        places.said |= torch.zeros_like(places.said).scatter_(
            1, word.where(real, word[:, :1]), (kept[:, None] > 0).expand_as(word)
        )
        places.cache.accept(kept)
        last = (kept - 1).clamp(min=0)[:, None]
        newest = states.gather(1, last[..., None].expand(-1, 1, states.shape[2]))[:, 0]
        places.hidden = torch.where((kept > 0)[:, None], newest, places.hidden)
        if self.pace.fixed != 1:
            self._look_back(places, word, value, states, real[..., None])
        ended = (word.gather(1, last)[:, 0] == self.end) & (kept > 0)
        places.count = places.count + kept
        places.running = places.running & ~ended & (places.count < places.limit)

    def _look_back(self, places: _DecodingSlots, word: Tensor, value: Tensor, states: Tensor, real: Tensor) -> None:
        """Learn from the states of words kept, from which the next ones are guessed."""
        states, inputs = states.float(), self.outlook.inputs(word, value)
        self.outlook.learn(
            ((states - places.average[:, None]) * real).flatten(0, 1),
            ((inputs - places.inputs[:, None]) * real).flatten(0, 1),
            self.tally.words,
        )
        before = places.count.clamp(max=AVERAGED)[:, None]
        number = (before + real.sum(1)).clamp(min=1)
        places.average = (places.average * before + (states * real).sum(1)) / number
        places.inputs = (places.inputs * before + (inputs * real).sum(1)) / number

    def _values(self, hidden: Tensor, word: Tensor, noise: Tensor) -> Tensor:
        picked = pick_value(self.network, hidden, word, noise if self.values_drawn else None)
        return picked.masked_fill(word == self.end, 0)

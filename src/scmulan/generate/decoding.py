"""Token-by-token decoding of many rows side by side, from a queue whose next row takes each slot that comes free."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmulan._progress import Advance
from scmulan.generate.noise import N_CANDIDATES, POSITIONS_PER_DRAW, NoiseBuffer
from scmulan.generate.sampling import GumbelSampler, SamplingRule, draw_number, pick_value
from scmulan.generate.speculative import MAX_DRAFT_LENGTH, DraftLength, DraftModel, DraftStats, is_accepted
from scmulan.infer.batching import MAX_MEMORY_FRACTION, free_bytes, is_out_of_memory
from scmulan.model.cost import kv_bytes_per_token
from scmulan.model.kv_cache import CAPACITY_STEP, KVCache
from scmulan.model.loading import LoadedModel
from scmulan.vocab.sentences import Sentences

PASSES_PER_CHECK = 8
"""Passes between two looks at which rows have ended, on a device that the host would have to wait for."""
AVERAGED_TOKENS = 4
"""Tokens over which hidden states are averaged for drafting: a single state says much of the token just read."""
CPU_ROWS, GPU_ROWS = 64, 256
"""Rows side by side where memory is not short."""
FULL_CACHE_BYTES = 1 << 30
"""Cache that a CPU gets at once: growing copies everything, and the system gives pages only when they are written."""
IDLE_FRACTION = 0.25
"""Fraction of idle slots, with an empty queue, from which on the other rows are moved together."""


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """How sentences are decoded."""

    rule: SamplingRule = "softmax"
    """Distribution of the next token, see :mod:`scmulan.generate.sampling`."""
    temperature: float = 1.0
    """Below 1, likely tokens are preferred."""
    sample_values: bool = True
    """Draw values from their distribution where the model has one; otherwise take their rounded mean."""
    max_tokens: int = 1_550
    """Most tokens of a sentence after its prompt."""
    batch_size: int | None = None
    """Rows decoded side by side; None: what suits the device and its memory. Speed only."""
    draft: int | None = None
    """Draft length (:mod:`scmulan.generate.speculative`); 1 decodes token by token, None chooses. Speed only."""


def decode_cells(
    model: LoadedModel,
    prompt: np.ndarray,
    n: int,
    *,
    config: DecodingConfig,
    seed: int,
    rows: slice = slice(None),
    genes: np.ndarray | None = None,
    advance: Advance = lambda finished: None,
) -> Sentences:
    """Decode ``n`` sentences after one prompt.

    Parameters
    ----------
    prompt
        int64 token ids without values, the task's prompt token last.
    n
        Number of sentences.
    seed
        Sentence ``i`` draws from its own stream ``(seed, i)``: the same seed gives the same cells, whatever the batch.
    rows
        Which of the ``n`` sentences to decode: a process among others decodes its own.
    genes
        Bool ``[V]``: genes that may be drawn (default: all).
    advance
        Called with the number of sentences just finished.

    Returns
    -------
    Sentences
        Prompt and tokens; a sentence that reached ``max_tokens`` lacks the end token.
    """
    streams = [(0, i) for i in range(n)[rows]]
    return CellDecoder(model, config, genes=genes).decode([prompt], streams, seed=seed, advance=advance)


@dataclass(kw_only=True, slots=True)
class Prefix:
    """A prompt as the network has read it: once, for all of its rows."""

    prompt: np.ndarray
    cache: KVCache
    hidden: Tensor
    inputs: Tensor


class DecodingSlots:
    """State of the rows that are being decoded; first axis of each tensor: the slot.

    Parameters
    ----------
    model
        The model.
    noise
        Noise of each slot.
    n
        Number of slots.
    max_tokens
        Most tokens of a sentence after its prompt.
    longest_prompt
        Tokens of the longest prompt.
    """

    def __init__(self, model: LoadedModel, noise: NoiseBuffer, n: int, max_tokens: int, longest_prompt: int) -> None:
        network = model.network
        weight = network.word.weight
        device = weight.device
        self.noise = noise
        self.max_length = longest_prompt + max_tokens + MAX_DRAFT_LENGTH
        """Most cache positions that a row can need."""
        needed = n * self.max_length * kv_bytes_per_token(network.config, "fp32")
        at_once = device.type == "cpu" and needed <= FULL_CACHE_BYTES
        self.cache = network.new_cache(
            n, self.max_length if at_once else min(longest_prompt + CAPACITY_STEP, self.max_length)
        )
        self.hidden = weight.new_zeros(n, network.config.width)
        self.mean_hidden = torch.zeros(n, network.config.width, device=device)
        """Mean of the last hidden states, for drafting."""
        self.mean_input = self.mean_hidden.clone()
        """Mean of the last inputs, for drafting."""
        self.excluded = torch.zeros(n, network.config.vocabulary, dtype=torch.bool, device=device)
        """Tokens that may not be drawn, those drawn before among them."""
        self.tokens = torch.zeros(n, max_tokens + MAX_DRAFT_LENGTH, dtype=torch.int64, device=device)
        self.values = torch.zeros_like(self.tokens)
        self.count = torch.zeros(n, dtype=torch.int64, device=device)
        """Tokens kept after the prompt."""
        self.limit = torch.zeros_like(self.count)
        """Tokens after which the row ends."""
        self.running = torch.zeros(n, dtype=torch.bool, device=device)
        self.row = np.full(n, -1)
        """Which row is in the slot, −1 for none; on the host."""

    def keep(self, slots: np.ndarray) -> None:
        """Forget all slots but some, named in ascending order."""
        index = torch.from_numpy(slots).to(self.count.device)
        self.cache.select_rows(slots.tolist())
        self.noise.keep_rows(slots)
        for name in (
            "hidden", "mean_hidden", "mean_input", "excluded", "tokens", "values", "count", "limit", "running",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[index])
        self.row = self.row[slots]


class CellDecoder:
    """Decodes rows.

    Parameters
    ----------
    model
        Any model that has the prompts' tokens.
    config
        How.
    genes
        Bool ``[V]``: genes that may be drawn (default: all).
    n_candidates
        Length of candidate lists, see :class:`scmulan.generate.noise.NoiseBuffer`.
    passes_per_check
        Passes between two looks at which rows have ended (default: 1 on a CPU, else :data:`PASSES_PER_CHECK`).
    """

    accepts = staticmethod(is_accepted)
    """The rule by which drafted tokens are kept."""

    def __init__(
        self,
        model: LoadedModel,
        config: DecodingConfig,
        *,
        genes: np.ndarray | None = None,
        n_candidates: int = N_CANDIDATES,
        passes_per_check: int | None = None,
    ) -> None:
        self.model = model
        self.network = model.network
        self.config = config
        self.end = model.vocabulary.end
        allowed = model.vocabulary.is_gene if genes is None else model.vocabulary.is_gene & genes
        self.genes = np.flatnonzero(allowed)
        self.max_tokens = min(config.max_tokens, len(self.genes) + 1)
        self.forbidden = torch.from_numpy(~allowed).to(self.device)
        self.forbidden[self.end] = config.rule == "set"
        self.sampler = GumbelSampler(self.network, config.rule, config.temperature, genes=self.genes, end=self.end)
        self.sample_values = config.sample_values and self.network.log_scale is not None
        self.draft_length = DraftLength(config.draft)
        self.draft_model = DraftModel(self.network)
        self.n_candidates = n_candidates
        self.passes_per_check = passes_per_check or (1 if self.device.type == "cpu" else PASSES_PER_CHECK)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.device

    @property
    def stats(self) -> DraftStats:
        """Counts of what was drafted and kept so far."""
        return self.draft_length.stats

    @torch.inference_mode()
    def decode(
        self,
        prompts: Sequence[np.ndarray],
        rows: Sequence[tuple[int, int]],
        *,
        seed: int,
        advance: Advance = lambda finished: None,
    ) -> Sentences:
        """Decode sentences after several prompts.

        Parameters
        ----------
        prompts
            int64 token ids without values of each prompt.
        rows
            For each sentence its prompt, and its number within the seed: it draws from the stream ``(seed, number)``.
        seed
            The same seed gives the same sentences.
        advance
            Called with the number of sentences just finished.

        Returns
        -------
        Sentences
            In the order of ``rows``.
        """
        queue = deque(range(len(rows)))
        prefixes: dict[int, Prefix] = {}
        finished: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        slots = self.new_slots(len(rows), max((len(p) for p in prompts), default=0))
        while True:
            for slot in np.flatnonzero(slots.row < 0)[: len(queue)]:
                row = queue.popleft()
                prompt, number = rows[row]
                if prompt not in prefixes:
                    prefixes[prompt] = self.read_prompt(prompts[prompt])
                self.start_row(slots, int(slot), prefixes[prompt], seed, number)
                slots.row[slot] = row
            if (slots.row < 0).all():
                return Sentences.join([finished[row] for row in range(len(rows))])
            if (slots.row < 0).mean() >= IDLE_FRACTION:
                slots.keep(np.flatnonzero(slots.row >= 0))
            try:
                self.step(slots)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(slots.row) == 1:
                    raise
                half = len(slots.row) // 2
                queue.extendleft(sorted((r for r in slots.row[half:].tolist() if r >= 0), reverse=True))
                slots.keep(np.arange(half))
                continue
            ended = ~slots.running.cpu().numpy() & (slots.row >= 0)
            for slot in np.flatnonzero(ended):
                row = int(slots.row[slot])
                finished[row] = self._sentence(slots, int(slot), prefixes[rows[row][0]].prompt)
                slots.row[slot] = -1
            advance(int(ended.sum()))

    # -- rows --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def new_slots(self, n_rows: int, longest_prompt: int) -> DecodingSlots:
        """Make empty slots, as many as suit the device and at most ``n_rows``."""
        capacity = self.passes_per_check * (self.config.draft or MAX_DRAFT_LENGTH) + POSITIONS_PER_DRAW
        n = min(self.config.batch_size or self._suitable_rows(capacity), n_rows)
        noise = NoiseBuffer(
            n,
            self.genes,
            None if self.config.rule == "set" else self.end,
            levels=self.network.config.levels,
            vocabulary=self.network.config.vocabulary,
            lazy=self.sampler.lazy,
            capacity=capacity,
            device=self.device,
            n_candidates=self.n_candidates,
        )
        return DecodingSlots(self.model, noise, n, self.max_tokens, longest_prompt)

    def _suitable_rows(self, noise_capacity: int) -> int:
        """Return the number of rows that suits the device, if all of them got as long as they may."""
        kind = "bf16" if self.network.precision == "bf16" else "fp32"
        needed = (self.max_tokens + MAX_DRAFT_LENGTH) * kv_bytes_per_token(self.network.config, kind)
        full_noise = 0 if self.sampler.lazy else noise_capacity
        needed += 4 * self.network.config.vocabulary * (4 * MAX_DRAFT_LENGTH + full_noise)
        max_rows = CPU_ROWS if self.device.type == "cpu" else GPU_ROWS
        return max(1, min(max_rows, int(free_bytes(self.device) * MAX_MEMORY_FRACTION) // needed))

    @torch.inference_mode()
    def read_prompt(self, prompt: np.ndarray) -> Prefix:
        """Let the network read a prompt (int64 token ids)."""
        entity = torch.from_numpy(prompt.astype(np.int64))[None].to(self.device)
        cache = self.network.new_cache(1, entity.shape[1])
        value = torch.zeros_like(entity)
        hidden = self.network(entity, value, cache)[0, -1]
        return Prefix(prompt=prompt, cache=cache, hidden=hidden, inputs=self.draft_model.inputs(entity, value)[0, -1])

    @torch.inference_mode()
    def start_row(self, slots: DecodingSlots, slot: int, prefix: Prefix, seed: int, number: int) -> None:
        """Start a row in a slot: after a prompt, with the stream ``(seed, number)``."""
        stream = slots.noise.start(slot, seed, number)
        slots.cache.restart(torch.tensor([slot], device=self.device), prefix.cache)
        slots.hidden[slot] = prefix.hidden
        slots.mean_hidden[slot] = prefix.hidden.float()
        slots.mean_input[slot] = prefix.inputs
        slots.excluded[slot] = self.forbidden
        limit = self.max_tokens
        if self.config.rule == "set":
            logits = self.network.entity_logits(prefix.hidden).float()[torch.from_numpy(self.genes).to(self.device)]
            uniform = torch.from_numpy(stream.random(len(self.genes), dtype=np.float32)).to(self.device)
            limit = min(limit, int(draw_number(logits[None], uniform[None])))
        slots.limit[slot] = limit
        slots.count[slot] = 0
        slots.running[slot] = True

    def _sentence(self, slots: DecodingSlots, slot: int, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Return tokens, values and prompt length of a row that has ended."""
        count = int(slots.count[slot])
        tokens = slots.tokens[slot, :count].cpu().numpy()
        values = slots.values[slot, :count].cpu().numpy()
        # Where the number of tokens was drawn, the cell is complete.
        tail = [self.end] if self.config.rule == "set" else []
        entity = np.concatenate([prompt, tokens, tail]).astype(np.int64)
        return entity, np.concatenate([np.zeros(len(prompt), np.int64), values, [0] * len(tail)]), len(prompt)

    # -- passes ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, slots: DecodingSlots) -> None:
        """Run the passes until the next look at which rows have ended, and learn from them."""
        length = min(self.draft_length.next(), self.max_tokens)
        slots.cache.lengths = slots.cache.lengths * slots.running
        slots.cache.refresh_used()
        slots.noise.fill(slots.count.cpu().numpy(), self.passes_per_check * length)
        counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        begin = time.perf_counter()
        for i in range(self.passes_per_check):
            self._pass(slots, length, counts, wait=i == 0)
        row_passes, tokens, verified, accepted = counts.tolist()
        self.draft_length.update(
            length,
            time.perf_counter() - begin,
            passes=self.passes_per_check,
            row_passes=row_passes,
            tokens=tokens,
            verified=verified,
            accepted=accepted,
        )

    def _pass(self, slots: DecodingSlots, length: int, counts: Tensor, *, wait: bool) -> None:
        """Draft and read ``length`` tokens of each row, and keep those that are verified.

        Only with ``wait`` the host looks at what the device has, to finish tokens that their candidate list left
        undecided. Without, such a row pauses.
        """
        token, value, started = self._next_token(slots, wait)
        if length > 1:
            token, value = self._draft(slots, token, value, length)
        else:
            token, value = token[:, None], value[:, None]
        slots.cache.reserve(length, slots.max_length)
        hidden = self.network(token, value, slots.cache)
        kept = started.long()
        if length > 1:
            noise = slots.noise.read(slots.count, 1, length - 1)
            true_token, decided = self.sampler.sample(hidden[:, :-1], noise, slots.excluded, token, 1)
            true_value = self._pick_value(hidden[:, :-1], true_token, noise.values)
            column = torch.arange(1, length, device=self.device)
            goes_on = (token[:, :-1] != self.end) & (slots.count[:, None] + column < slots.limit[:, None])
            right = decided & goes_on & self.accepts(token[:, 1:], value[:, 1:], true_token, true_value)
            accepted = right.long().cumprod(1) * started[:, None]
            kept = kept + accepted.sum(1)
            verified = torch.cat((started[:, None], accepted[:, :-1] > 0), 1) & goes_on
            counts[2] += verified.sum()
            counts[3] += accepted.sum()
        self._keep(slots, token, value, hidden, kept)
        counts[0] += started.sum()
        counts[1] += kept.sum()

    def _next_token(self, slots: DecodingSlots, wait: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's certain next token and value, and which rows have one (all that run, if ``wait``)."""
        noise = slots.noise.read(slots.count, 0, 1)
        no_draft = slots.tokens[:, :0]
        token, decided = self.sampler.sample(slots.hidden[:, None], noise, slots.excluded, no_draft, 0)
        token, started = token[:, 0], slots.running & decided[:, 0]
        if wait and self.sampler.lazy:
            for slot in (slots.running & ~started).nonzero()[:, 0].tolist():
                beyond = slots.noise.times_beyond(slot, int(slots.count[slot]))
                token[slot] = self.sampler.finish(slots.hidden[slot], noise, slots.excluded, slot, beyond)
            started = slots.running
        return token, self._pick_value(slots.hidden, token, noise.values[:, 0]), started

    def _draft(self, slots: DecodingSlots, token: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return ``length`` tokens and values ``[B, length]``: the certain next one, then drafted ones."""
        return self.draft_model.draft(
            self.sampler,
            slots.noise.read(slots.count, 1, length - 1),
            slots.excluded,
            slots.mean_hidden,
            slots.mean_input,
            token,
            value,
            sample_values=self.sample_values,
        )

    def _pick_value(self, hidden: Tensor, token: Tensor, noise: Tensor) -> Tensor:
        picked = pick_value(self.network, hidden, token, noise if self.sample_values else None)
        return picked.masked_fill(token == self.end, 0)

    def _keep(self, slots: DecodingSlots, token: Tensor, value: Tensor, hidden: Tensor, kept: Tensor) -> None:
        """Add the first ``kept`` tokens of each row to its sentence, and forget that the network read the others."""
        column = torch.arange(token.shape[1], device=kept.device)
        real = column < kept[:, None]
        index = slots.count[:, None] + column  # what lies beyond the tokens kept is overwritten, or never looked at
        slots.tokens.scatter_(1, index, token)
        slots.values.scatter_(1, index, value)
        slots.excluded |= torch.zeros_like(slots.excluded).scatter_(
            1, token.where(real, token[:, :1]), (kept[:, None] > 0).expand_as(token)
        )
        slots.cache.accept(kept)
        last = (kept - 1).clamp(min=0)[:, None]
        newest = hidden.gather(1, last[..., None].expand(-1, 1, hidden.shape[2]))[:, 0]
        slots.hidden = torch.where((kept > 0)[:, None], newest, slots.hidden)
        if self.draft_length.fixed != 1:
            self._teach_draft_model(slots, token, value, hidden, real[..., None])
        ended = (token.gather(1, last)[:, 0] == self.end) & (kept > 0)
        slots.count = slots.count + kept
        slots.running = slots.running & ~ended & (slots.count < slots.limit)

    def _teach_draft_model(
        self, slots: DecodingSlots, token: Tensor, value: Tensor, hidden: Tensor, real: Tensor
    ) -> None:
        """Let the draft model learn from tokens kept, and update the means from which it predicts."""
        hidden, inputs = hidden.float(), self.draft_model.inputs(token, value)
        self.draft_model.update(
            ((hidden - slots.mean_hidden[:, None]) * real).flatten(0, 1),
            ((inputs - slots.mean_input[:, None]) * real).flatten(0, 1),
            self.stats.tokens,
        )
        before = slots.count.clamp(max=AVERAGED_TOKENS)[:, None]
        number = (before + real.sum(1)).clamp(min=1)
        slots.mean_hidden = (slots.mean_hidden * before + (hidden * real).sum(1)) / number
        slots.mean_input = (slots.mean_input * before + (inputs * real).sum(1)) / number

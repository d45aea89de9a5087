"""Batches of sentences of similar length, as large as suits the device and as memory allows."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmulan._machine import GIB, memory
from scmulan.errors import ScmulanError
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.sentences import Sentences

# On a CPU a layer's activations should stay in the caches of the cores that compute them; a GPU wants to be filled.
CACHE_BYTES_PER_THREAD = 2**21
# Products with few rows per core do not reach its best speed (a width of 1,120 on two cores in fp32: a fifth more at
# 1,800 tokens than at 300). In fewer bits that is reached earlier, and the stream that stays in fp32 wants the caches.
TOKENS_PER_THREAD = {"fp32": 900, "bf16": 256, "int8": 256}
# Largest batch, in padded tokens and in rows.
MAX_TOKENS, MAX_ROWS = 65_536, 256
# Part of the free memory that a batch may take: other programs need some too.
MAX_MEMORY_FRACTION = 0.5


def bytes_per_token(config: MulanConfig) -> int:
    """Estimate the bytes that a token of a batch takes at the peak of a forward pass in float32, from above.

    The stream before and after attention with its parts, its norm, and the hidden layer of the feed-forward before and
    after its activation; at the input, the running sums of a set state take no more. Entities and values are int64.
    """
    return 4 * 14 * config.width + 3 * 8


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; half of all memory where the system does not tell what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    found = memory()
    half = None if found["total_gib"] is None else found["total_gib"] / 2
    known = [gib for gib in (found["available_gib"] or half, found["container_limit_gib"]) if gib is not None]
    return int(min(known, default=4.0) * GIB)


def suitable_tokens(network: Mulan) -> int:
    """Return the padded tokens per forward pass that suit a network on its device, within the free memory."""
    config, device = network.config, network.device
    suitable = MAX_TOKENS
    if device.type == "cpu":
        threads = torch.get_num_threads()
        suitable = max(
            TOKENS_PER_THREAD[network.precision] * threads, CACHE_BYTES_PER_THREAD * threads // (16 * config.width)
        )
    fitting = int(free_bytes(device) * MAX_MEMORY_FRACTION) // bytes_per_token(config)
    return max(1, min(suitable, MAX_TOKENS, fitting))


def padded_tensors(prompts: Sentences, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return entities and values, int64 ``[sentences, longest]``, and lengths on a device."""
    entity, value, lengths = (torch.from_numpy(array).to(device) for array in prompts.padded())
    return entity, value, lengths


def buckets(lengths: np.ndarray, max_tokens: int, max_rows: int = MAX_ROWS) -> Iterator[np.ndarray]:
    """Divide rows into batches of similar length.

    Parameters
    ----------
    lengths
        Tokens of each row.
    max_tokens
        Padded tokens per batch; a longer row is a batch of its own.
    max_rows
        Rows per batch.

    Yields
    ------
    ndarray
        Row indices of a batch, shortest rows first.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and end - start < max_rows and (end - start + 1) * lengths[order[end]] <= max_tokens:
            end += 1
        yield order[start:end]
        start = end


@dataclass(kw_only=True, slots=True)
class TokenBudget:
    """Limit of a forward pass, lowered where memory turns out to be short."""

    max_tokens: int
    """Padded tokens per batch."""
    max_rows: int = MAX_ROWS
    """Rows per batch."""

    @classmethod
    def of(cls, network: Mulan, max_tokens: int | None = None) -> "TokenBudget":
        """Return the budget of a job: ``max_tokens`` if given, else what suits the network's device and memory."""
        return cls(max_tokens=max_tokens or suitable_tokens(network))

    def for_each(self, lengths: np.ndarray, work: Callable[[np.ndarray], None]) -> None:
        """Call ``work`` with batches of rows until all are done; a batch that finds no memory is tried in halves.

        Parameters
        ----------
        lengths
            Tokens of each row.
        work
            Called with row indices (int64); must give a row the same result whatever rows come with it.

        Raises
        ------
        ScmulanError
            If a single row does not fit into memory.
        """
        waiting = list(buckets(lengths, self.max_tokens, self.max_rows))[::-1]
        while waiting:
            rows = waiting.pop()
            if not _run_if_it_fits(work, rows):
                if len(rows) == 1:
                    raise ScmulanError(
                        f"a cell of {int(lengths[rows[0]]):,} words does not fit into memory: close other programs,"
                        " or use a smaller model"
                    )
                self.max_tokens = max(1, len(rows) * int(lengths[rows].max()) // 2)
                left = np.concatenate([rows, *waiting[::-1]])
                waiting = [left[part] for part in buckets(lengths[left], self.max_tokens, self.max_rows)][::-1]


def _run_if_it_fits(work: Callable[[np.ndarray], None], rows: np.ndarray) -> bool:
    """Return whether there was memory for some rows; if not, all that they took is freed."""
    try:
        work(rows)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # the failed pass is let go, now that no traceback holds it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch or Python says that memory could not be had."""
    text = str(error).lower()
    phrases = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(phrase in text for phrase in phrases)

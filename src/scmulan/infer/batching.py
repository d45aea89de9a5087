"""How many words go through a network at a time: what suits its device, as far as there is memory for them."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from scmulan._machine import GIB, memory
from scmulan.errors import ScmulanError
from scmulan.model.network import Mulan, MulanConfig

# On a CPU a layer's activations should stay in the caches of the cores that compute them; a GPU wants to be filled.
CACHE_BYTES_PER_THREAD = 2**21
# Products with few rows per core do not reach its best speed (a width of 1,120 on two cores in fp32: a fifth more at
# 1,800 words than at 300). In fewer bits that is reached earlier, and the stream that stays in fp32 wants the caches.
WORDS_PER_THREAD = {"fp32": 900, "bf16": 256, "int8": 256}
MOST_WORDS = 65_536
# Of the memory that is free, what a batch may take: others live here too.
MAX_MEMORY_FRACTION = 0.5


def bytes_per_token(config: MulanConfig) -> int:
    """Bytes that one word of a batch takes at the peak of a forward pass, in float32 (an upper estimate).

    The stream before and after attention with its parts, its norm, and the hidden layer of the feed-forward before and
    after its activation; at the input, the running sums of a set state take no more. Words and values come as int64.
    """
    return 4 * 14 * config.width + 3 * 8


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on a device now; half of all memory where the system does not tell what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    seen = memory()
    half = None if seen["total_gib"] is None else seen["total_gib"] / 2
    known = [gib for gib in (seen["available_gib"] or half, seen["container_limit_gib"]) if gib is not None]
    return int(min(known, default=4.0) * GIB)


def suitable_tokens(network: Mulan) -> int:
    """Padded words per forward pass that suit a network on its device, within the memory that is free."""
    config, device = network.config, network.word.weight.device
    wanted = MOST_WORDS
    if device.type == "cpu":
        threads = torch.get_num_threads()
        wanted = max(
            WORDS_PER_THREAD[network.precision] * threads, CACHE_BYTES_PER_THREAD * threads // (16 * config.width)
        )
    fitting = int(free_bytes(device) * MAX_MEMORY_FRACTION) // bytes_per_token(config)
    return max(1, min(wanted, MOST_WORDS, fitting))


def buckets(lengths: np.ndarray, words: int, most: int = 256) -> Iterator[np.ndarray]:
    """Rows in batches of similar length: at most ``words`` padded words (but at least one row) in each.

    Parameters
    ----------
    lengths
        Words of each row.
    words
        Padded words per batch.
    most
        Rows per batch.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and end - start < most and (end - start + 1) * lengths[order[end]] <= words:
            end += 1
        yield order[start:end]
        start = end


@dataclass(kw_only=True, slots=True)
class TokenBudget:
    """Padded words per forward pass, made smaller where memory turns out to be short."""

    words: int
    """Most words of one batch, padding included."""
    rows: int = 256
    """Most rows of one batch."""

    def for_each(self, lengths: np.ndarray, work: Callable[[np.ndarray], None]) -> None:
        """Call ``work`` with batches of rows until all are done; a batch that finds no memory is tried in halves.

        Parameters
        ----------
        lengths
            Words of each row.
        work
            Does some rows (int64 indices), the same result for each whatever rows come with it.

        Raises
        ------
        ScmulanError
            If a single row does not fit into memory.
        """
        waiting = list(buckets(lengths, self.words, self.rows))[::-1]
        while waiting:
            rows = waiting.pop()
            if not _fits(work, rows):
                if len(rows) == 1:
                    raise ScmulanError(
                        f"a cell of {int(lengths[rows[0]]):,} words does not fit into memory: close other programs,"
                        " or use a smaller model"
                    )
                self.words = max(1, len(rows) * int(lengths[rows].max()) // 2)
                left = np.concatenate([rows, *waiting[::-1]])
                waiting = [left[part] for part in buckets(lengths[left], self.words, self.rows)][::-1]


def _fits(work: Callable[[np.ndarray], None], rows: np.ndarray) -> bool:
    """Do some rows; False if there was no memory for them, all that they had being given back."""
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
    """Whether an error of torch or Python says that memory could not be had."""
    text = str(error).lower()
    short = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in text for word in short)

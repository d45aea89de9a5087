"""Batches of words from cells in memory or on disk, made ahead by threads.

Reading, choosing and binning are compiled passes without the interpreter's lock, so threads suffice: they share the
memory-mapped corpus, and nothing is copied between processes. What a batch holds follows from the order alone, and
batches come in its order however many threads make them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from scmulan.data.sampling import EpochOrder, SamplerState
from scmulan.data.store import CellSource
from scmulan.vocab.binning import GeneTokens, tokenize

T = TypeVar("T")
U = TypeVar("U")


def made_ahead(make: Callable[[T], U], items: Iterable[T], *, workers: int, ahead: int) -> Iterator[U]:
    """``make`` of each item, in their order, made by threads while earlier ones are used.

    Parameters
    ----------
    make
        Called in threads.
    items
        What of; read as far as is made.
    workers
        Number of threads; 0 makes each when it is asked for.
    ahead
        Results that wait at most.
    """
    if workers == 0:
        yield from map(make, items)
        return
    waiting: deque[Future[U]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        try:
            waiting.extend(pool.submit(make, item) for item in islice(source, max(ahead, 1)))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(make, item) for item in islice(source, 1))
                yield done
        finally:  # the reader may have stopped before the end
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class LoadedBatch:
    """Cells of a batch, or one rank's share of them.

    Parameters
    ----------
    state
        From which the order continues after this batch.
    cells
        int64 ``[rows]``: their places in the corpus.
    words
        Gene words of each.
    metadata
        int32 ``[rows, families]``: word ids, −1 where unknown.
    """

    state: SamplerState
    cells: np.ndarray
    words: GeneTokens
    metadata: np.ndarray


def read_words(cells: CellSource, chosen: np.ndarray) -> GeneTokens:
    """Gene words of some cells, in the order given."""
    rows = cells.rows(chosen)
    genes = rows.shape[1]
    columns = np.arange(genes, dtype=np.int32)
    return tokenize(rows, columns, genes, matrix_kind=cells.logged[chosen], total=cells.total[chosen])


class Loader:
    """Batches of gene words in an order.

    Parameters
    ----------
    cells
        In memory or on disk.
    order
        Which cells a batch has.
    workers
        Threads that make batches.
    ahead
        Batches that wait at most (default: four per thread).
    """

    def __init__(self, cells: CellSource, order: EpochOrder, *, workers: int = 2, ahead: int | None = None) -> None:
        self.cells = cells
        self.order = order
        self.workers = workers
        self.ahead = 4 * workers if ahead is None else ahead

    def batch(self, epoch: int, step: int, *, rank: int = 0, world: int = 1) -> LoadedBatch:
        """Rows ``rank``, ``rank + world``, … of a batch: of all ranks together, each cell of the batch once."""
        chosen = self.order.batch(epoch, step)[rank::world]
        last = step + 1 == self.order.steps
        after = self.order.state(epoch + 1, 0) if last else self.order.state(epoch, step + 1)
        return LoadedBatch(after, chosen, read_words(self.cells, chosen), np.asarray(self.cells.metadata[chosen]))

    def epoch(self, epoch: int = 0, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[LoadedBatch]:
        """Batches of an epoch from step ``start`` on."""
        steps = range(start, self.order.steps)
        yield from made_ahead(
            lambda step: self.batch(epoch, step, rank=rank, world=world), steps, workers=self.workers, ahead=self.ahead
        )

    def resume(self, state: SamplerState, *, rank: int = 0, world: int = 1) -> Iterator[LoadedBatch]:
        """The rest of the epoch that a state is in; ranks and workers may be others than before.

        Raises
        ------
        RecipeError
            If the state is of another seed or corpus.
        """
        self.order.check(state)
        return self.epoch(state.epoch, start=state.step, rank=rank, world=world)

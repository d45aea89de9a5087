"""One process or many: PyTorch's own engine (torchrun, DDP, ``fully_shard``) behind a few questions that the loop asks.

A process that torchrun did not start is alone: no process group is made, and every answer is its own.

Several processes under ``torchrun``: each takes its share of a job, results come back in the input's order.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scmulan.errors import ScmulanError

T = TypeVar("T")


class RankError(ScmulanError):
    """Another process of the job is gone."""


@dataclass(kw_only=True)
class Ranks:
    """The processes of a job, as seen by one of them.

    Parameters
    ----------
    rank, world
        Number of this process, and how many there are.
    device
        Where this process computes.
    group, io_group
        Process groups on the CPU: for the loop's small questions, and for checkpoints written meanwhile; None if alone.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    io_group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """Sums over all processes."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def most(self, *numbers: float) -> list[float]:
        """Maxima over all processes."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def _reduce(self, numbers: tuple[float, ...], operation: Any) -> list[float]:
        if self.world == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def owns(self, number: int) -> bool:
        """Whether the piece of work of this number is this process's."""
        return number % self.world == self.rank

    def gather(self, content: Any) -> list[Any]:
        """Gather what each process gives, in the order of the ranks, in all of them. Waits until all are here."""
        if self.world == 1:
            return [content]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, content, group=self.group)
        return gathered

    def same(self, thing: Any) -> Any:
        """What the first process has, in all of them."""
        if self.world == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """Let the first process do something for all; its result, or its error, is that of all of them."""
        found: Any = None
        if self.first:
            try:
                found = True, work()
            except ScmulanError as error:
                found = False, error
        good, thing = self.same(found)
        if not good:
            raise thing
        return thing

    def sum_array(self, array: torch.Tensor) -> torch.Tensor:
        """Sum an array on the CPU over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(array, group=self.group)
        return array


@contextmanager
def process_group(timeout: float) -> Iterator[Ranks]:
    """Join the job that torchrun started, if it did, and leave it at the end.

    Parameters
    ----------
    timeout
        Seconds after which a process that waits for another one in vain gives up.

    Raises
    ------
    RankError
        Where another process died or fell silent, in one line.
    """
    cuda = torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield Ranks(device=torch.device("cuda" if cuda else "cpu"))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    wait = timedelta(seconds=timeout)
    try:
        store, _, world = next(dist.rendezvous("env://", timeout=wait))
        # After a restart, torchrun's store still has the addresses of processes that are gone.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
        # Checkpoints are written beside the loop: their messages must not mix with its own.
        groups = [dist.new_group(backend="gloo", timeout=t) for t in (wait, timedelta(hours=1))]
        yield Ranks(rank=rank, world=dist.get_world_size(), device=device, group=groups[0], io_group=groups[1])
    except RuntimeError as error:  # what gloo and nccl raise; ScmulanError is a ValueError
        if not _of_a_connection(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise RankError(
            f"rank {rank} on {socket.gethostname()} lost another process of the job ({reason}); torchrun says above or "
            "below which one failed and how, and the same command continues from the last checkpoint"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _of_a_connection(error: RuntimeError) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    text = str(error).lower()
    return isinstance(error, kinds) or any(
        sign in text for sign in ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
    )


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Find the place of this process under ``torchrun``; alone where there is no other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield Ranks()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")  # results are few: they go over the host, whatever computed them
    try:
        yield Ranks(rank=dist.get_rank(), world=dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()

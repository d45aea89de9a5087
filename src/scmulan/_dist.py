"""The processes of a torchrun job, as one of them sees them.

A process joins by :func:`training_ranks` (gloo on the CPU and nccl on GPUs, a timeout, a second group for checkpoints)
or by :func:`inference_ranks` (gloo only: cells are read independently, only results meet). A process that torchrun
did not start is alone: no process group is made, and every collective returns what it was given.
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

CHECKPOINT_TIMEOUT = timedelta(hours=1)
"""Longest wait for another process that writes its part of a checkpoint."""


class RankError(ScmulanError):
    """Another process of the job is gone."""


@dataclass(kw_only=True)
class Ranks:
    """The processes of a job, as one of them sees them. Every collective has to be called by all of them.

    Parameters
    ----------
    rank, world
        Number of this process, and number of processes.
    device
        Where this process computes.
    group, io_group
        Process groups on the CPU: for collectives, and for checkpoints written meanwhile; None if alone.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    io_group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Return whether the piece of work of this number is this process's."""
        return number % self.world == self.rank

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over all processes."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, *numbers: float) -> list[float]:
        """Take the maximum of each number over all processes."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def _reduce(self, numbers: tuple[float, ...], operation: Any) -> list[float]:
        if self.world == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def sum_array(self, array: torch.Tensor) -> torch.Tensor:
        """Sum an array on the CPU over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(array, group=self.group)
        return array

    def gather(self, content: Any) -> list[Any]:
        """Gather an object of each process, in the order of the ranks, in all of them."""
        if self.world == 1:
            return [content]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, content, group=self.group)
        return gathered

    def broadcast(self, content: Any) -> Any:
        """Return the first process' object in all of them."""
        if self.world == 1:
            return content
        box = [content]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run something in the first process only; its result, or its error, is that of all of them."""
        outcome: Any = None
        if self.first:
            try:
                outcome = True, work()
            except ScmulanError as error:
                outcome = False, error
        succeeded, result = self.broadcast(outcome)
        if not succeeded:
            raise result
        return result


@contextmanager
def training_ranks(timeout: float) -> Iterator[Ranks]:
    """Join the job that torchrun started, if it did, and leave it at the end.

    Parameters
    ----------
    timeout
        Seconds after which a process that waits for another one in vain gives up.

    Yields
    ------
    Ranks
        With this process' GPU as device, where there is one.

    Raises
    ------
    RankError
        If another process died or fell silent, in one line.
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
        groups = [dist.new_group(backend="gloo", timeout=t) for t in (wait, CHECKPOINT_TIMEOUT)]
        yield Ranks(rank=rank, world=dist.get_world_size(), device=device, group=groups[0], io_group=groups[1])
    except RuntimeError as error:  # what gloo and nccl raise; ScmulanError is a ValueError
        if not _is_lost_connection(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise RankError(
            f"rank {rank} on {socket.gethostname()} lost another process of the job ({reason}); torchrun says above or "
            "below which one failed and how, and the same command continues from the last checkpoint"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    text = str(error).lower()
    return isinstance(error, kinds) or any(
        sign in text for sign in ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
    )


@contextmanager
def inference_ranks() -> Iterator[Ranks]:
    """Join the job that torchrun started, if it did, to divide independent work.

    Yields
    ------
    Ranks
        A group that exists already is used, and kept.
    """
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

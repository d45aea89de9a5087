"""Several processes under ``torchrun``: each takes its share of a job, results come back in the input's order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """A process among those of one job.

    Parameters
    ----------
    rank
        Number of this process, from 0.
    world
        Number of processes.
    """

    rank: int = 0
    world: int = 1

    def mine(self, number: int) -> bool:
        """Whether a piece of work is this process's."""
        return number % self.world == self.rank

    def share(self, content: Any) -> list[Any]:
        """What each process gives, in the order of their ranks, for all of them. Waits until all are here."""
        if self.world == 1:
            return [content]
        given: list[Any] = [None] * self.world
        dist.all_gather_object(given, content)
        return given


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

"""Run independent jobs here, on processes of this machine, or on a Dask cluster.

A job is done when its record, a JSON file, exists: an interrupted run continues with the jobs that have none, whoever
did the others.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from scmulan._io.adata import write_json
from scmulan._progress import Advance
from scmulan.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A call whose result is kept on disk."""

    record: Path
    """File of the result."""
    size: int
    """Number of cells (or other units), for progress."""
    work: Callable[..., dict[str, Any]]
    """Function of a module, as other processes look it up by its name."""
    arguments: Mapping[str, Any]
    """Its arguments."""

    def run(self) -> Any:
        """Do the work unless it is done, and return its record."""
        if not self.record.exists():
            write_json(self.work(**self.arguments), self.record)
        return json.loads(self.record.read_text(encoding="utf-8"))


class Runner:
    """Context that runs jobs; processes and the connection to a cluster are kept while it is open.

    Parameters
    ----------
    processes : int
        Processes of this machine.
    dask : str, optional
        Address of a Dask scheduler, whose workers see the same folders; used instead of ``processes``.

    Raises
    ------
    InputError
        If there is no such scheduler, or the package is missing.
    """

    def __init__(self, processes: int = 1, dask: str | None = None) -> None:
        self.processes = processes
        self.dask = dask
        self._pool: ProcessPoolExecutor | None = None
        self._client: Any = None

    def __enter__(self) -> "Runner":
        if self.dask:
            self._client = _connect(self.dask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[Any]:
        """Run all jobs that have no record.

        Parameters
        ----------
        jobs : sequence of Job
            Their results do not depend on each other.
        advance : Advance
            Called with the size of each job that is done, in whatever order they end.

        Returns
        -------
        list
            The record of each job, in order.

        Raises
        ------
        ScmulanError
            If a job raised it, or a worker ended. Jobs that were done stay done.
        """
        missing = []
        for job in jobs:
            if job.record.exists():
                advance(job.size)
            else:
                missing.append(job)
        if self._client is not None:
            done = self._on_cluster(missing)
        elif self.processes == 1 or (len(missing) < 2 and self._pool is None):
            done = self._here(missing)
        else:
            done = self._on_processes(missing)
        for job in done:
            advance(job.size)
        return [job.run() for job in jobs]

    def _here(self, jobs: Sequence[Job]) -> Iterator[Job]:
        for job in jobs:
            job.run()
            yield job

    def _on_processes(self, jobs: Sequence[Job]) -> Iterator[Job]:
        if self._pool is None:
            # Spawned, not forked: forked copies of threads and open HDF5 files do harm.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context, initializer=_end_with_parent)
        try:
            futures = {self._pool.submit(job.run): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenExecutor:
            raise InputError(
                "a worker process was ended from outside, perhaps for lack of memory; what is done is kept: run the "
                "same command again, with fewer --jobs"
            ) from None

    def _on_cluster(self, jobs: Sequence[Job]) -> Iterator[Job]:
        import distributed

        futures = dict(zip(self._client.map(Job.run, jobs, pure=False), jobs, strict=True))
        try:
            for future in distributed.as_completed(futures, loop=self._client.loop):
                future.result()
                yield futures[future]
        except distributed.KilledWorker as error:
            raise InputError(
                f"Dask workers ended again and again ({error}); see their logs, and give them more memory"
            ) from None


def _connect(address: str) -> Any:
    try:
        import distributed
    except ImportError:
        raise InputError("--dask needs the package distributed; pip install 'scmulan[dask]'") from None
    try:
        return distributed.Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {address} ({' '.join(str(error).split())})") from None


def _end_with_parent() -> None:
    """Let a worker end when the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Run independent tasks here, on processes of this machine, or on a Dask cluster; each leaves its result on disk.

A task is done when its record, a JSON file, is there. So an interrupted run goes on where it was, whoever did the work.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from scmulan._io.adata import write_json
from scmulan.errors import InputError


class Job(Protocol):
    """Something to do, once."""

    record: Path
    cells: int

    def run(self) -> dict[str, Any]:
        """Do it; what is returned becomes its record."""
        ...


def perform(task: Job) -> dict[str, Any]:
    """Do a task unless that was done, and return its record."""
    if not task.record.exists():
        write_json(task.run(), task.record)
    return json.loads(task.record.read_text(encoding="utf-8"))


class Runner:
    """Does tasks; a context in which processes, or the connection to a cluster, are kept.

    Parameters
    ----------
    jobs
        Processes of this machine.
    dask
        Address of a Dask scheduler, whose workers see the same folders; used instead of ``jobs``.
    """

    def __init__(self, jobs: int = 1, dask: str | None = None) -> None:
        self.jobs = jobs
        self.dask = dask
        self._pool: ProcessPoolExecutor | None = None
        self._client: Any = None

    def __enter__(self) -> "Runner":
        if self.dask:
            self._client = _client(self.dask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def __call__(self, jobs: Sequence[Job], progress: Callable[[int], Any] = lambda cells: None) -> list[dict]:
        """Do all tasks that are not done.

        Parameters
        ----------
        tasks
            In any order; their results do not depend on each other.
        progress
            Told the number of cells of each task that is done.

        Returns
        -------
        list of dict
            The record of each task, in order.

        Raises
        ------
        ScmulanError
            What a task raised; or if a worker ended. Tasks that were done stay done.
        """
        missing = []
        for task in jobs:
            if task.record.exists():
                progress(task.cells)
            else:
                missing.append(task)
        if self._client is not None:
            done = self._on_cluster(missing)
        elif self.jobs == 1 or (len(missing) < 2 and self._pool is None):
            done = self._here(missing)
        else:
            done = self._on_processes(missing)
        for task in done:
            progress(task.cells)
        return [perform(task) for task in jobs]

    def _here(self, jobs: Sequence[Job]) -> Iterator[Job]:
        for task in jobs:
            perform(task)
            yield task

    def _on_processes(self, jobs: Sequence[Job]) -> Iterator[Job]:
        if self._pool is None:
            # Started anew rather than forked: forked copies of threads and open HDF5 files do harm.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_end_with_parent)
        try:
            futures = {self._pool.submit(perform, task): task for task in jobs}
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

        futures = dict(zip(self._client.map(perform, jobs, pure=False), jobs, strict=True))
        try:
            for future in distributed.as_completed(futures, loop=self._client.loop):
                future.result()
                yield futures[future]
        except distributed.KilledWorker as error:
            raise InputError(
                f"Dask workers ended again and again ({error}); see their logs, and give them more memory"
            ) from None


def _client(address: str) -> Any:
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

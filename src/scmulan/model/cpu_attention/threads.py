"""One job for all threads that the network's library already has.

Threads of one's own would compete with those of the library, which stay awake between two of its operations and wait
for the next. Where the library's threads are those of OpenMP (every build of torch for Linux), its team is asked; where
they cannot be found, helpers of Python do the work.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any


def run(job: Callable[[int], None], address: int, frame: int, threads: int) -> None:
    """Let so many threads run a compiled job, each with the same argument; back when all are done.

    Parameters
    ----------
    job
        Called with ``frame``, without the interpreter's lock.
    address
        Of the same job as a C function of one pointer.
    frame
        Address of what the threads share.
    threads
        How many.
    """
    team = _team()
    if threads == 1:
        job(frame)
    elif team is not None:
        team(address, frame, threads, 0)
    else:
        helpers = [_helpers(os.getpid(), threads - 1).submit(job, frame) for _ in range(threads - 1)]
        job(frame)
        for helper in helpers:
            helper.result()


@lru_cache
def _team() -> Any:
    """OpenMP's way to start a parallel region (GCC's name, which other OpenMP libraries have too), or None."""
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


@lru_cache(maxsize=1)
def _helpers(process: int, number: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(number, thread_name_prefix=f"scmulan-{process}")

"""Run a compiled job on the OpenMP threads that torch already has.

Threads of one's own would compete with those of torch, which stay awake between two of its operations and wait for the
next. Where torch's threads are those of OpenMP (every build of torch for Linux), its thread team runs the job; where
OpenMP cannot be found, a pool of Python threads does.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any


def run_on_threads(job: Callable[[int], None], c_function: Callable[[], Any], frame: int, threads: int) -> None:
    """Run a job on several threads at once, each with the same argument, and wait for all of them.

    Parameters
    ----------
    job
        Compiled function; is called with ``frame`` and releases the interpreter's lock.
    c_function
        Returns the same job as numba C callback of one pointer; only asked for where OpenMP runs it.
    frame
        Address of what the threads share.
    threads
        Number of threads, this one included.
    """
    parallel = gomp_parallel()
    if threads == 1:
        job(frame)
    elif parallel is not None:
        parallel(c_function().address, frame, threads, 0)
    else:
        pool = _thread_pool(os.getpid(), threads - 1)
        others = [pool.submit(job, frame) for _ in range(threads - 1)]
        job(frame)
        for other in others:
            other.result()


@lru_cache
def gomp_parallel() -> Any:
    """Return ``GOMP_parallel``, which starts a parallel region (other OpenMP libraries have it too), or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@lru_cache(maxsize=1)
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"scmulan-{process}")

"""Loops compiled by numba, kept on disk for the next process where there is room.

numba keeps what it has compiled beside the module, or in the user's cache folder. Where the disk is full that is no
reason to stop: the loop is there, and the next process compiles it again.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that is compiled when it is first called, and runs without the interpreter's lock.

    Parameters
    ----------
    options
        Of :func:`numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(nogil=True, cache=True, **options)(function)
        save = dispatcher._cache.save_overload

        def save_if_there_is_room(*args: Any) -> None:
            with contextlib.suppress(OSError):
                save(*args)

        dispatcher._cache.save_overload = save_if_there_is_room
        return dispatcher

    return decorate


def callback(function: Callable[..., Any], signature: Any) -> Any:
    """Compile a function that other languages can call."""
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except OSError:
        return numba.cfunc(signature, error_model="numpy")(function)

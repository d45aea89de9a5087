"""Functions compiled by numba and cached on disk, also where the disk is full or no folder can be written to.

numba caches beside the module, or in the user's cache folder if the install folder is read-only. It raises where the
disk is full (also under ``NUMBA_CACHE_DIR``, which moves the cache and no more), where it finds no folder at all, and
where a cached index cannot be read: it is pickled, and an earlier version's names argument types that may be gone. None
is a reason to stop: the function is compiled by then, or is compiled anew.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function to be compiled at its first call and to run without the interpreter's lock.

    Parameters
    ----------
    options
        Of :func:`numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            dispatcher: Any = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache
            return numba.njit(nogil=True, **options)(function)
        load, save = dispatcher._cache.load_overload, dispatcher._cache.save_overload

        def load_if_possible(*args: Any) -> Any:
            try:
                return load(*args)
            except Exception:  # noqa: BLE001 (whatever unpickling an old or damaged index raises)
                with contextlib.suppress(OSError):
                    dispatcher._cache.flush()
                return None

        def save_if_possible(*args: Any) -> None:
            with contextlib.suppress(OSError):
                save(*args)

        dispatcher._cache.load_overload, dispatcher._cache.save_overload = load_if_possible, save_if_possible
        return dispatcher

    return decorate


def callback(function: Callable[..., Any], signature: Any) -> Any:
    """Compile a function that C code can call."""
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except (OSError, RuntimeError):
        return numba.cfunc(signature, error_model="numpy")(function)

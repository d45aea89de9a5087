"""Compiled functions work where they cannot be cached."""

import errno

import numba
import pytest
from numba.core import caching

from scmulan._numba import callback, compiled


def add(a, b):
    return a + b


@pytest.fixture(params=["full disk", "no folder"])
def no_cache(request, monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if request.param == "full disk":
        monkeypatch.setattr(caching.Cache, "save_overload", save)
    else:
        monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])


@pytest.mark.usefixtures("no_cache")
def test_a_function_is_compiled_without_a_cache():
    assert compiled()(add)(1, 2) == 3


@pytest.mark.usefixtures("no_cache")
def test_a_callback_is_compiled_without_a_cache():
    made = callback(add, numba.int64(numba.int64, numba.int64))
    assert made.ctypes(1, 2) == 3

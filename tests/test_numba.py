"""Compiled loops work where nothing can be kept of them."""

import errno

import numba
import pytest
from numba.core import caching

from scmulan._numba import callback, compiled


def add(a, b):
    return a + b


@pytest.fixture
def full_disk(monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.Cache, "save_overload", save)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_no_reason_to_stop():
    assert compiled()(add)(1, 2) == 3


@pytest.mark.usefixtures("full_disk")
def test_nor_for_a_callback():
    made = callback(add, numba.int64(numba.int64, numba.int64))
    assert made.ctypes(1, 2) == 3

"""Compiled functions work where they cannot be cached, and where what is cached is of another version."""

import errno
import subprocess
import sys

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


MODULE = """
from typing import NamedTuple

from scmulan._numba import compiled


class {name}(NamedTuple):
    a: int
    b: int


@compiled()
def add(numbers):
    return numbers.a + numbers.b


print(add({name}(1, 2)), sum(add.stats.cache_hits.values()))
"""


def test_a_cache_that_names_types_of_an_earlier_version_is_made_anew(tmp_path):
    def run(name=None):
        if name is not None:
            (tmp_path / "module.py").write_text(MODULE.format(name=name))
        done = subprocess.run([sys.executable, "-c", "import module"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run("Earlier") == ["3", "0"]
    assert run("Later") == ["3", "0"]
    assert run() == ["3", "1"]

"""The tool that proves that a refactoring leaves results as they are sees what changed."""

import importlib.util

import numpy as np
import pytest


@pytest.fixture(scope="module")
def golden(root):
    spec = importlib.util.spec_from_file_location("golden", root / "tools" / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "other",
    [
        np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], np.float32),
        np.array([1.0, 2.0]),
        np.array([[1.0, 2.0]], np.float32),
    ],
    ids=["last bit", "type", "shape"],
)
def test_a_digest_tells_arrays_apart(golden, other):
    array = np.array([1.0, 2.0], np.float32)
    assert golden.digest(array) == golden.digest(array.copy()) != golden.digest(other)


def test_texts_are_told_apart_by_what_they_say(golden):
    assert golden.digest(np.array(["a", "bc"])) == golden.digest(np.array(["a", "bc"], object))
    assert golden.digest(np.array(["a", "bc"])) != golden.digest(np.array(["ab", "c"]))


def test_leaves_of_json_but_for_what_changes_from_run_to_run(golden):
    found = golden.results_of_json('{"a": [1, {"b": 2.5}], "seconds": 3}', without=("seconds",))
    assert found == {"/a/0": "1", "/a/1/b": "2.5"}

"""Benchmarks as people call them: the last line is one JSON object with the figures that its docs name."""

import json

import pytest

from scmulan.cli.__main__ import main

MACHINE = {"cpu", "cores", "torch", "gemm_gflops"}


def line(capsys, *args):
    assert main(["bench", *args]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_tokenize(capsys):
    told = line(capsys, "tokenize", "--quick")
    assert told["benchmark"] == "tokenize" and told["quick"] is True
    assert set(told["machine"]) >= MACHINE
    # Far below what is measured undisturbed: a pass that is slower than scipy is broken, not unlucky.
    assert told["ratio_scipy"] > 1 and told["ratio_release"] > 10 and told["cells_per_second"] > 0


def test_loader(capsys):
    told = line(capsys, "loader", "--quick", "--cells", "3000")
    assert told["cells"] == 3000 and told["padding"] < 0.2
    assert told["cells_per_second_cold"] > 0 and told["cells_per_second_warm"] > 0 and told["ratio_anndata"] > 0


def test_corpus(capsys):
    told = line(capsys, "corpus", "--quick", "--cells", "2000")
    assert told["cells"] == 2000 and told["peak_mib"] > 0 and told["cells_per_second"] > 0


def test_attention(capsys):
    """It compares what the two kernels give before it tells their times."""
    told = line(capsys, "attention", "--quick")
    assert told["new_words"]["mini"]["1"]["ratio"] > 0 and told["sentences"]["368M"]["185"]["gflops"] > 0


@pytest.mark.parametrize("name", ["train", "resume", "annotate", "embed", "generate", "growth", "attention"])
def test_the_others_tell_what_they_are(capsys, name):
    assert main(["bench", name, "--help"]) == 0
    assert "--quick" in capsys.readouterr().out

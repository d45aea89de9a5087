"""Benchmarks on the command line: the last line is one JSON object with the documented figures."""

import json

import pytest

from scmulan.cli.__main__ import main

MACHINE = {"cpu", "cores", "torch", "gemm_gflops"}


def last_line(capsys, *args):
    assert main(["bench", *args]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_tokenize(capsys):
    figures = last_line(capsys, "tokenize", "--quick")
    assert figures["benchmark"] == "tokenize" and figures["quick"] is True
    assert set(figures["machine"]) >= MACHINE
    # Far below what is measured undisturbed: a pass that is slower than scipy is broken, not unlucky.
    assert figures["ratio_scipy"] > 1 and figures["ratio_release"] > 10 and figures["cells_per_second"] > 0


def test_loader(capsys):
    figures = last_line(capsys, "loader", "--quick", "--cells", "3000")
    assert figures["cells"] == 3000 and figures["padding"] < 0.2
    assert (
        figures["cells_per_second_cold"] > 0 and figures["cells_per_second_warm"] > 0 and figures["ratio_anndata"] > 0
    )


def test_corpus(capsys):
    figures = last_line(capsys, "corpus", "--quick", "--cells", "2000")
    assert figures["cells"] == 2000 and figures["peak_mib"] > 0 and figures["cells_per_second"] > 0


def test_attention(capsys):
    """The results of the two kernels are compared before they are timed."""
    figures = last_line(capsys, "attention", "--quick")
    assert figures["new_words"]["mini"]["1"]["ratio"] > 0 and figures["sentences"]["368M"]["185"]["gflops"] > 0


@pytest.mark.parametrize("name", ["train", "resume", "annotate", "embed", "generate", "growth", "attention"])
def test_the_others_have_help(capsys, name):
    assert main(["bench", name, "--help"]) == 0
    assert "--quick" in capsys.readouterr().out

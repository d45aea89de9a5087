"""Help, version and descriptions of models: there at once, without torch or tables."""

import json
import subprocess
import sys

import pytest

import scmulan as package

VERBS = [
    "annotate",
    "embed",
    "generate",
    "report",
    "finetune",
    "pretrain",
    "doctor",
    "evaluate annotation",
    "evaluate integration",
    "evaluate generation",
    "model list",
    "model info",
    "model import",
    "model verify",
]
HEAVY = ["torch", "numba", "anndata", "pandas", "scipy", "h5py", "rich"]
SCRIPT = """
import json, sys
import scmulan
from scmulan.cli.__main__ import main
codes = [main(args) for args in json.loads(sys.argv[1])]
print(json.dumps({"codes": codes, "loaded": sorted(set(sys.modules) & set(json.loads(sys.argv[2])))}))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(scmulan, verb):
    run = scmulan(*verb.split(), "--help")
    assert run.code == 0
    assert not run.err
    assert run.out.startswith(f"Usage: scmulan {verb} ")
    assert run.out == scmulan(*verb.split(), "-h").out
    if verb != "doctor" and not verb.startswith("model"):
        assert "--json" in run.out


def test_help_lists_the_verbs(scmulan):
    run = scmulan("--help")
    assert run.code == 0
    for verb in VERBS:
        assert f"\n  {verb.split()[0]} " in run.out
    assert scmulan().out == run.out


def test_version(scmulan):
    assert scmulan("--version").out == f"scmulan {package.__version__}\n"


def test_help_and_descriptions_load_nothing_heavy(tiny):
    light = [["--help"], ["--version"], [], *([*verb.split(), "--help"] for verb in VERBS)]
    described = [["model", "list"], ["model", "list", "--json"], ["model", "info", str(tiny)]]
    for commands, heavy in ((light, [*HEAVY, "numpy"]), (described, HEAVY)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(heavy)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said = json.loads(done.stdout.splitlines()[-1])
        assert said == {"codes": [0] * len(commands), "loaded": []}


@pytest.mark.parametrize("start", [["-m", "scmulan"], ["-m", "scmulan.cli"]])
def test_as_a_module(start):
    done = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"scmulan {package.__version__}\n", "")

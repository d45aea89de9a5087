"""Help, version and descriptions of models are fast: they load neither torch nor pandas."""

import json
import subprocess
import sys

import pytest

import scmulan as package

COMMANDS = [
    "annotate",
    "embed",
    "perturb",
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
    "model export",
    "model verify",
    "corpus build",
    "corpus inspect",
    "corpus verify",
    "corpus split",
]
HEAVY = ["torch", "numba", "anndata", "pandas", "scipy", "h5py", "rich"]
SCRIPT = """
import json, sys
import scmulan
from scmulan.cli.__main__ import main
codes = [main(args) for args in json.loads(sys.argv[1])]
print(json.dumps({"codes": codes, "loaded": sorted(set(sys.modules) & set(json.loads(sys.argv[2])))}))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(scmulan, command):
    run = scmulan(*command.split(), "--help")
    assert run.code == 0
    assert not run.err
    assert run.out.startswith(f"Usage: scmulan {command} ")
    assert run.out == scmulan(*command.split(), "-h").out
    if command != "doctor" and not command.startswith("model"):
        assert "--json" in run.out


def test_help_lists_the_commands(scmulan):
    run = scmulan("--help")
    assert run.code == 0
    for command in COMMANDS:
        assert f"\n  {command.split()[0]} " in run.out
    assert scmulan().out == run.out


def test_version(scmulan):
    assert scmulan("--version").out == f"scmulan {package.__version__}\n"


def test_help_and_descriptions_load_nothing_heavy(tiny):
    light = [["--help"], ["--version"], [], *([*command.split(), "--help"] for command in COMMANDS)]
    described = [["model", "list"], ["model", "list", "--json"], ["model", "info", str(tiny)]]
    for calls, heavy in ((light, [*HEAVY, "numpy"]), (described, HEAVY)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(calls), json.dumps(heavy)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1])
        assert result == {"codes": [0] * len(calls), "loaded": []}


@pytest.mark.parametrize("start", [["-m", "scmulan"], ["-m", "scmulan.cli"]])
def test_as_a_module(start):
    done = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"scmulan {package.__version__}\n", "")

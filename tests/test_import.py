"""What ``import scmulan`` costs and shows."""

import subprocess
import sys

import pytest

import scmulan

LIGHT = ["import scmulan; dir(scmulan)", "from scmulan.cli.__main__ import main; main(['--help'])"]


@pytest.mark.parametrize("code", LIGHT)
def test_a_light_start_loads_no_torch(code):
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    script += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "False"


def test_the_package_lists_what_one_may_use():
    types, modules = ["FinetuneConfig", "LoadedModel", "Progress"], ["errors", "evaluate", "report", "tl"]
    assert dir(scmulan) == sorted([*types, *modules, "__version__", "finetune", "load", "pretrain"])
    for name in dir(scmulan):
        assert getattr(scmulan, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        scmulan.nothing  # noqa: B018

"""What `import scmulan` costs."""

import subprocess
import sys

import pytest

LIGHT = ["import scmulan", "from scmulan.cli.__main__ import main; main(['--help'])"]


@pytest.mark.parametrize("code", LIGHT)
def test_a_light_start_loads_no_torch(code):
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    script += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "False"

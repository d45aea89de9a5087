"""How commands end: defects, signals, closed pipes; and what is printed on standard error."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import warnings

import pytest

import scmulan.tl._files as on_disk
from scmulan.vocab.genes import CoverageWarning


def test_a_defect_keeps_its_traceback(scmulan, folder, cells, monkeypatch):
    def defect(*args, **options):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(on_disk, "annotate_file", defect)
    with pytest.raises(ZeroDivisionError):
        scmulan("annotate", cells, "-o", "out.h5ad")


def test_only_our_own_warnings_are_shown(scmulan, folder, tiny, cells, monkeypatch):
    annotate_file = on_disk.annotate_file

    def noisy(*args, **options):
        warnings.warn("of pandas", FutureWarning, stacklevel=2)
        warnings.warn("of numpy", RuntimeWarning, stacklevel=1)
        warnings.warn_explicit("of anndata", UserWarning, "/site-packages/anndata/core.py", 1)
        warnings.warn_explicit("two\nlines", CoverageWarning, "/site-packages/other.py", 1)
        return annotate_file(*args, **options)

    monkeypatch.setattr(on_disk, "annotate_file", noisy)
    run = scmulan("annotate", cells, "-o", "out.h5ad", "--model", tiny)
    assert run.code == 0
    assert run.err == "scmulan: warning: two lines\n"


def start_on_terminal(folder, tiny, *args) -> tuple[subprocess.Popen, int, str]:
    """Start a long command with its standard error on a terminal; wait until its progress bar moves."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "scmulan", *args, "-o", "out.h5ad", "--model", str(tiny)],
        cwd=folder, stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    output = ""
    while not re.search(r"\| [1-9]\d*/", output):
        chunk = os.read(ours, 4096).decode(errors="replace")
        assert chunk, output
        output += chunk
    return process, ours, output


def read_rest(terminal: int) -> str:
    text = ""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # Linux: the other end is closed
            chunk = b""
        if not chunk:
            os.close(terminal)
            return text
        text += chunk.decode(errors="replace")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_nothing_behind(folder, tiny, number, code):
    process, terminal, output = start_on_terminal(folder, tiny, "generate", "-n", "3000")
    process.send_signal(number)
    rest = read_rest(terminal)
    assert process.wait() == code
    assert process.stdout.read() == ""
    process.stdout.close()
    assert re.search(r"[1-9]\d*/3000 \[\d\d:\d\d<\d+:\d\d.*cells", output)  # speed and time left
    assert "Traceback" not in rest
    assert ("scmulan: interrupted" in rest) == (number == signal.SIGINT)
    assert not os.listdir(folder)


def test_a_closed_pipe(tiny):
    process = subprocess.Popen(
        [sys.executable, "-m", "scmulan", "model", "info", str(tiny), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1

"""Output of commands: results on standard output, everything else on standard error."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from scmulan._progress import Advance, Progress


class ConsoleProgress(Progress):
    """Progress on standard error: a bar with speed and time left on a terminal, elsewhere a line now and then.

    Parameters
    ----------
    every
        Seconds between the lines where there is no terminal.
    """

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self._figures = ""
        self._bar: Any = None

    def log(self, line: str) -> None:
        """Print a line, above the bar if one is shown."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, total: int, unit: str = "cells") -> Iterator[Advance]:
        """Show a bar, or write lines, while the context is open."""
        from tqdm import tqdm

        shown = sys.stderr.isatty()
        finished, written = 0, time.monotonic()

        def advance(number: int) -> None:
            nonlocal finished, written
            self._bar.update(number)
            finished += number
            if not shown and time.monotonic() - written >= self.every and finished < total:
                written = time.monotonic()
                self.log(f"{finished:,} of {total:,} {unit}{self._figures and ', '}{self._figures}")

        with tqdm(total=total, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=not shown) as self._bar:
            yield advance
        self._bar, self._figures = None, ""

    def note(self, figures: str) -> None:
        """Show figures beside the bar, or in the next line."""
        self._figures = figures
        if self._bar is not None:
            self._bar.set_postfix_str(figures)


PROGRESS = ConsoleProgress()
"""Argument ``progress`` of all functions that commands call."""


def message(kind: str, text: str) -> None:
    """Print an error or a warning as one line on standard error."""
    print(f"scmulan: {kind}: {' '.join(text.split(chr(10)))}", file=sys.stderr)


def result(content: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result of a command on standard output.

    Parameters
    ----------
    content
        The result in plain types.
    text
        The result as text.
    as_json
        Print the content as one JSON object instead of the text.
    """
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) if as_json else text)


def describe_run(account: Mapping[str, Any]) -> str:
    """Return a line with the number of cells, the model and the speed."""
    speed = f" ({account['cells_per_second']:,.0f} cells/s)" if account["cells_per_second"] else ""
    return f"{account['cells']:,} cells read by {account['model']} in {account['seconds']:.1f} s{speed}"


def describe_input(account: Mapping[str, Any]) -> dict[str, str]:
    """Return the genes and the matrix that were used, as fields."""
    return {"genes": account["summary"], "matrix": account["matrix"]["reason"]}


def list_paths(*paths: Any) -> str:
    """Return paths on one line, without those that are None."""
    return ", ".join(str(path) for path in paths if path is not None)

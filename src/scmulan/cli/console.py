"""Output of commands: results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from scmulan._progress import Advance, Progress


class ConsoleProgress(Progress):
    """Progress on standard error: lines always, bars with speed and time left if it is a terminal."""

    def log(self, line: str) -> None:
        """Print a line, above the bar if one is shown."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, total: int, unit: str = "cells") -> Iterator[Advance]:
        """Show a bar while the context is open."""
        from tqdm import tqdm

        shown = sys.stderr.isatty()
        with tqdm(total=total, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=not shown) as bar:

            def advance(finished: int) -> None:
                bar.update(finished)

            yield advance


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

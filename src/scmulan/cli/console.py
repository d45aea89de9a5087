"""How the command line talks: results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from scmulan._progress import Advance, Progress
from scmulan._text import format_fields

table = format_fields  # until all verbs use it


def tell(kind: str, text: str) -> None:
    """Print an error or a warning as one line on standard error."""
    print(f"scmulan: {kind}: {' '.join(text.split(chr(10)))}", file=sys.stderr)


def log(text: str) -> None:
    """Print a line about the work that is going on to standard error."""
    print(text, file=sys.stderr)


class ConsoleProgress(Progress):
    """Progress on standard error: lines always, bars with speed and time left while it is a terminal."""

    def log(self, line: str) -> None:
        """Print a line, above a bar that is shown."""
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
"""What every verb gets as ``progress``."""


def result(content: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a verb's result to standard output.

    Parameters
    ----------
    content
        The result in plain types.
    text
        The same for people.
    as_json
        Whether to print the content, as one JSON object, and not the text.
    """
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) if as_json else text)


@contextmanager
def progress(total: int, unit: str = "cells") -> Iterator[Callable[[int], Any]]:
    """Show a bar with speed and time left while standard error is a terminal; yield what is told of each advance."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def heading(account: Mapping[str, Any]) -> str:
    """Say which cells went through which model, and how fast."""
    speed = f" ({account['cells_per_second']:,.0f} cells/s)" if account["cells_per_second"] else ""
    return f"{account['cells']:,} cells read by {account['model']} in {account['seconds']:.1f} s{speed}"


def reading(account: Mapping[str, Any]) -> dict[str, str]:
    """Say which genes and which matrix were used."""
    return {"genes": account["summary"], "matrix": account["matrix"]["reason"]}


def written(*paths: Any) -> str:
    """Name the files written, those that were not asked for left out."""
    return ", ".join(str(path) for path in paths if path is not None)

"""Progress of long work: one type for lines and bars, silent unless the command line shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of cells (or other units) that were finished since the last call."""


class Progress:
    """Progress of long work. This base class shows nothing."""

    def log(self, line: str) -> None:
        """Show a line about the work that is going on."""

    @contextmanager
    def bar(self, total: int, unit: str = "cells") -> Iterator[Advance]:
        """Show a bar while the context is open.

        Parameters
        ----------
        total
            Number of units until the work is done.
        unit
            What is counted.

        Yields
        ------
        Advance
            To be called with the number of units just finished.
        """
        yield lambda finished: None

    def note(self, figures: str) -> None:
        """Show figures beside the open bar, such as the loss."""


SILENT = Progress()

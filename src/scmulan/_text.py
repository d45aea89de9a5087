"""Results as aligned text, for a terminal or a report."""

from collections.abc import Sequence
from typing import Any

__all__ = ["grid", "shorten"]


def grid(header: Sequence[str], rows: Sequence[Sequence[Any]], *, text: int = 1) -> str:
    """Lay out rows as an aligned table.

    Parameters
    ----------
    header
        Names of the columns.
    rows
        Entries: floats are shown with three decimals, whole numbers with thousands separators, None as a dash.
    text
        Number of leading columns that are text and stand left; all others stand right.

    Returns
    -------
    str
        Lines without a line break at the end.
    """
    shown = [list(header), *([_shown(entry) for entry in row] for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(header))]
    lines = []
    for number, row in enumerate(shown):
        cells = [c.ljust(w) if i < text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("─" * width for width in widths))
    return "\n".join(lines)


def shorten(text: str, most: int = 40) -> str:
    """Cut a long name so that tables stay readable."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _shown(entry: Any) -> str:
    if entry is None:
        return "–"
    if isinstance(entry, bool) or not isinstance(entry, (int, float)):
        return str(entry)
    return f"{entry:,}" if isinstance(entry, int) else f"{entry:.3f}"

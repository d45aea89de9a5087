"""Results as aligned text, for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["format_fields", "format_table", "shorten"]


def format_fields(fields: Mapping[str, Any]) -> str:
    """Lay out names and values in two columns.

    Parameters
    ----------
    fields
        Name → value. A value may have several lines; fields whose value is None or empty are left out.

    Returns
    -------
    str
        Lines without a line break at the end.
    """
    width = max(len(name) for name in fields)
    lines = []
    for name, value in fields.items():
        if value not in (None, ""):
            first, *rest = str(value).splitlines()
            lines += [f"{name:<{width}}  {first}", *(f"{'':<{width}}  {line}" for line in rest)]
    return "\n".join(lines)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, text_columns: int = 1) -> str:
    """Lay out rows as an aligned table.

    Parameters
    ----------
    header
        Names of the columns.
    rows
        Entries: floats are shown with three decimals, whole numbers with thousands separators, None as a dash.
    text_columns
        Number of leading columns that are aligned left; all others are aligned right.

    Returns
    -------
    str
        Lines without a line break at the end.
    """
    texts = [list(header), *([_format_entry(entry) for entry in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if i < text_columns else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(texts[0]), "  ".join("─" * width for width in widths), *map(line, texts[1:])])


def _format_entry(entry: Any) -> str:
    if entry is None:
        return "–"
    if isinstance(entry, bool) or not isinstance(entry, (int, float)):
        return str(entry)
    return f"{entry:,}" if isinstance(entry, int) else f"{entry:.3f}"


def shorten(text: str, max_length: int = 40) -> str:
    """Cut a long name, so that tables stay readable."""
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"

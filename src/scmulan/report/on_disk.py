"""A report from file to file."""

import os
from contextlib import ExitStack
from pathlib import Path

from scmulan.errors import OutputError
from scmulan.files import check_output, open_input
from scmulan.model.folder import read_card, resolve_model
from scmulan.report.page import write_report


def report_file(
    annotated: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    generated: str | os.PathLike[str] | None = None,
    model: str | Path | None = None,
    title: str | None = None,
    command: str = "",
    force: bool = False,
) -> None:
    """Write a report on a file of annotated cells.

    Parameters
    ----------
    annotated
        What ``scmulan annotate`` wrote; its matrices are never loaded whole.
    out
        HTML file.
    generated
        What ``scmulan generate`` wrote.
    model
        Model that was used, whose card says what it knows; a packaged one is found without being named.
    title, command
        As in :func:`scmulan.report.write_report`.
    force
        Replace a page that exists.

    Raises
    ------
    ScmulanError
        If anything cannot be used as given; then nothing is written.
    """
    inputs = [Path(path) for path in (annotated, generated) if path is not None]
    if any(os.path.realpath(path) == os.path.realpath(out) for path in inputs):
        raise OutputError(f"{out}: is an input too; give another path for the page")
    check_output(out, force, suffixes=(".html", ".htm"))
    card = None if model is None else read_card(resolve_model(model))
    with ExitStack() as stack:
        opened = [open_input(path, backed=True) for path in inputs]
        for adata in opened:
            if adata.isbacked:
                stack.callback(adata.file.close)
        cells, written = (*opened, None)[:2]
        write_report(cells, out, generated=written, command=command, title=title, card=card)

"""``scmulan report``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from scmulan.cli import console, options


def report(
    context: typer.Context,
    annotated: Annotated[
        Path, typer.Argument(metavar="ANNOTATED.h5ad", help="What scmulan annotate wrote.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="report.html", help="Where to write the page.", show_default=False)
    ],
    generated: Annotated[
        Path | None,
        typer.Option(metavar="GENERATED.h5ad", help="Cells of scmulan generate to compare with.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model that was used.", show_default="found if it is a packaged one"),
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Title of the page.", show_default=False)] = None,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Make one page to read about annotated cells.

    What came in, what was found, how sure that is, and how it was made.

    The page is a single HTML file that needs no network. Needs: pip install 'scmulan[report]'.
    """
    from scmulan.report.page import report_file

    command = shlex.join(["scmulan", *context.obj])
    report_file(annotated, out, generated=generated, model=model, title=title, command=command, force=force)
    console.result({"output": str(out)}, f"written: {out}", as_json)

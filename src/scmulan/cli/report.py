"""``scmulan report``: one HTML page about annotated cells."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from scmulan.cli import console, options


def report(
    context: typer.Context,
    annotated: Annotated[
        Path, typer.Argument(metavar="ANNOTATED.h5ad", help="Output of scmulan annotate.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="report.html", help="Page to write.", show_default=False)],
    generated: Annotated[
        Path | None,
        typer.Option(metavar="GENERATED.h5ad", help="Output of scmulan generate, to compare.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model that was used.", show_default="found among the packaged ones"),
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Title of the page.", show_default=False)] = None,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Write an HTML page about annotated cells: input, cell types, confidence, markers, methods.

    The page is a single file that needs no network. Needs: pip install 'scmulan[report]'.
    """
    from scmulan.report.page import report_file

    command = shlex.join(["scmulan", *context.obj])
    report_file(annotated, out, generated=generated, model=model, title=title, command=command, force=force)
    console.result({"output": str(out)}, f"written: {out}", as_json)

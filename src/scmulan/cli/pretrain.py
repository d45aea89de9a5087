"""``scmulan pretrain``: train a model by a recipe."""

import os
from pathlib import Path
from typing import Annotated

import typer

from scmulan.cli import console, options


def pretrain(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="Recipe: model, data and training.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Run folder.", show_default="runs/NAME of the recipe"),
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            show_default=False,
            help="Replace a setting of the recipe, such as optimizer.steps=200; may be given again.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained and its cost, and stop.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Train a model by a recipe.

    The same command continues an interrupted run. The finished model is the folder 'model' of the run folder.
    Several processes: torchrun --nproc-per-node N -m scmulan pretrain RECIPE.toml
    """
    from scmulan.train.pretrain import describe, pretrain

    report = pretrain(recipe, out, changes=what or [], dry_run=dry_run, progress=console.PROGRESS)
    first = os.environ.get("RANK", "0") == "0"  # of a torchrun job, one process prints
    if report["model"] is None and not dry_run:
        if first:
            console.PROGRESS.log("scmulan: interrupted; the same command continues from the last checkpoint")
        raise typer.Exit(130)
    if first:
        console.result(report, describe(report), as_json)

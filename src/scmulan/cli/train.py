"""Commands that train: ``scmulan pretrain``, ``finetune``."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scmulan._text import format_fields
from scmulan.cli import console, options
from scmulan.train.finetune_config import FinetuneConfig

FINETUNE = FinetuneConfig()
"""Defaults."""


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


def finetune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model to start from: a name or a folder.", show_default=False)
    ],
    data: Annotated[Path, typer.Argument(metavar="DATA.h5ad", help="Labelled cells.", show_default=False)],
    labels: Annotated[str, typer.Option(metavar="COLUMN", help="obs column of cell types.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Model folder to write.", show_default=False)],
    coarse: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="obs column of coarse types.", show_default="from the Cell Ontology"),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            show_default="columns with the names of fields",
            help="obs column of a further field, such as organ=tissue; may be given again.",
        ),
    ] = None,
    donor: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Hold out whole donors by this obs column.", show_default=False),
    ] = None,
    method: Annotated[Literal["full"], typer.Option(help="full: all weights are trained.")] = FINETUNE.method,
    epochs: Annotated[
        float | None,
        typer.Option(help="Maximum number of passes over the labelled cells.", show_default="20, 200–3,000 steps"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of optimiser steps.", show_default=False)
    ] = None,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = FINETUNE.rate,
    validation_share: Annotated[
        float, typer.Option(help="Fraction of the labelled cells that is held out for validation.")
    ] = FINETUNE.validation_share,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after so many validations without improvement.")
    ] = FINETUNE.patience,
    ontology: Annotated[bool, typer.Option("--ontology", help="Count a type finer than the label as correct.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same weights.")] = FINETUNE.seed,
    layer: options.Layer = None,
    matrix_kind: options.MatrixKind = None,
    min_genes: options.MinGenes = FINETUNE.min_genes,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Train a model on the labels of your own cells.

    Labels that its vocabulary lacks become new words. The result is a model folder like any other. The same command
    continues an interrupted run.
    """
    from scmulan.train.finetune import finetune

    report = finetune(
        model, data, labels, out, coarse=coarse, metadata=options.fields(metadata, "--metadata", "COLUMN"), donor=donor,
        method=method, epochs=epochs, steps=steps, rate=rate, validation_share=validation_share, patience=patience,
        ontology=ontology, seed=seed, layer=layer, matrix_kind=matrix_kind, min_genes=min_genes, force=force,
        progress=console.PROGRESS,
    )  # fmt: skip
    if report["model"] is None:
        console.PROGRESS.log("scmulan: interrupted; the same command continues from the last checkpoint")
        raise typer.Exit(130)
    console.result(report, _describe_finetuning(report), as_json)


def _describe_finetuning(report: dict[str, Any]) -> str:
    recall = report["validation"]["recall"]
    rows = {
        name: f"{cells:,} cells" + (f", {recall[name]:.0%} of those held out named so" if name in recall else "")
        for name, cells in report["labels"].items()
    }
    accuracy = f"{report['validation']['accuracy']:.1%} of {report['held_out']:,} held-out cells named as labelled"
    return f"{accuracy} (step {report['best_step']:,})\n{format_fields(rows)}\nwritten: {report['model']}"

"""``scmulan evaluate …``: score a model on labelled cells, beside a baseline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from scmulan.cli import console, options

app = typer.Typer(help="Score a model on labelled cells, beside a baseline.", rich_markup_mode=None)

# Options that take several values.
SEVERAL = ("--data", "--train")


class SeveralFiles(TyperCommand):
    """Command whose ``--data a b c`` means ``--data a --data b --data c``, which Typer does not support."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments."""
        return super().parse_args(ctx, list(_repeat_options(args)))


def _repeat_options(args: Sequence[str]) -> Iterator[str]:
    option, n_values = "", 0
    for arg in args:
        if arg.startswith("-"):
            option, n_values = arg if arg in SEVERAL else "", 0
        elif option:
            n_values += 1
            if n_values > 1:
                yield option
        yield arg


Data = Annotated[list[Path], typer.Option(metavar="FILE…", help="Labelled h5ad files to score.", show_default=False)]
Labels = Annotated[str, typer.Option(metavar="COLUMN", help="obs column of the true cell types.", show_default=False)]
Mapping = Annotated[
    str | None,
    typer.Option(
        metavar="TABLE",
        show_default=False,
        help="Meaning of the labels: a TSV with label and cl_id (or lineage), or the name of a packaged table.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random draws.")]


@app.command(cls=SeveralFiles)
def annotation(
    data: Data,
    labels: Labels,
    model: options.Model = "mini",
    mapping: Mapping = None,
    lineages: Annotated[bool, typer.Option("--lineages", help="Score lineages (T, B, NK …) too.")] = False,
    train: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE…", help="Labelled files to train logistic regression on, to compare.", show_default=False
        ),
    ] = None,
    train_labels: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="obs column of their cell types.", show_default="as for --data")
    ] = None,
    train_mapping: Mapping = None,
    rule: Annotated[Literal["default", "release"], typer.Option(help="Rule, as for scmulan annotate.")] = "default",
    smooth: Annotated[bool, typer.Option("--smooth", help="Score the types smoothed over neighbours too.")] = False,
    min_genes: options.MinGenes = 20,
    seed: Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Score predicted cell types: accuracy, macro-F1, scores per type, confusion.

    A prediction finer than the label counts as correct; scores of exact matches are shown too.
    """
    from scmulan.evaluate.annotation import evaluate_annotation

    result = evaluate_annotation(
        model, data, labels=labels, mapping=mapping, lineages=lineages, train=train or [], train_labels=train_labels,
        train_mapping=train_mapping, rule=rule, smooth=smooth, min_genes=min_genes, seed=seed,
        progress=console.PROGRESS,
    )  # fmt: skip
    console.result(result.to_json(), result.table(), as_json)


@app.command(cls=SeveralFiles)
def integration(
    data: Data,
    labels: Labels,
    batch: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="obs column of batches.", show_default="each file is one")
    ] = None,
    model: options.Model = "mini",
    mapping: Mapping = None,
    max_cells: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of cells, drawn at random.")
    ] = 1200,
    kbet: Annotated[bool, typer.Option("--kbet", help="Compute kBET per label too, which is slow.")] = False,
    min_genes: options.MinGenes = 20,
    seed: Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Score whether the embedding keeps types together and mixes batches.

    The metrics are those of scib-metrics; PCA is the baseline.
    """
    from scmulan.evaluate.integration import evaluate_integration

    result = evaluate_integration(
        model, data, labels=labels, batch=batch, mapping=mapping, max_cells=max_cells, kbet=kbet, min_genes=min_genes,
        seed=seed, progress=console.PROGRESS,
    )  # fmt: skip
    console.result(result.to_json(), result.table(), as_json)


@app.command(cls=SeveralFiles)
def generation(
    data: Data,
    labels: Labels,
    model: options.Model = "mini",
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            show_default="columns whose names say what they are",
            help="obs column of a field of the prompt, such as technology=assay; may be given again.",
        ),
    ] = None,
    mapping: Mapping = None,
    n: Annotated[int, typer.Option("-n", "--cells", min=1, metavar="N", help="Maximum number of cells per type.")] = 50,
    rule: Annotated[Literal["default", "release"], typer.Option(help="As for scmulan generate.")] = "default",
    values: Annotated[Literal["sample", "mean"], typer.Option(help="As for scmulan generate.")] = "sample",
    temperature: Annotated[float, typer.Option(help="As for scmulan generate.")] = 1.0,
    max_words: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of genes of a cell.")] = 1_550,
    min_genes: options.MinGenes = 20,
    seed: Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Score how similar generated cells are to real ones.

    The baseline is cells whose genes are drawn independently.
    """
    from scmulan.evaluate.generation import evaluate_generation

    columns = options.fields(field, "--field", "COLUMN")
    result = evaluate_generation(
        model, data, labels=labels, fields=None if columns is None else {c: f for f, c in columns.items()},
        mapping=mapping, n=n, rule=rule, values=values, temperature=temperature, max_words=max_words,
        min_genes=min_genes, seed=seed, progress=console.PROGRESS,
    )  # fmt: skip
    console.result(result.to_json(), result.table(), as_json)

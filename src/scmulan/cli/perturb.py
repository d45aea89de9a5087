"""``scmulan perturb``: predict cell types with genes at another level."""

from typing import Annotated

import typer

from scmulan._text import format_fields
from scmulan.cli import console, options


def perturb(
    cells: options.Cells,
    out: options.Out,
    gene: Annotated[
        list[str],
        typer.Option(
            metavar="GENE=LEVEL",
            show_default=False,
            help="Level of a gene: 0 is silent, 10 as high as the cell's highest gene; may be given again.",
        ),
    ],
    model: options.Model = "mini",
    layer: options.Layer = None,
    matrix_kind: options.MatrixKind = None,
    min_genes: options.MinGenes = 20,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = options.AUTO,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Predict cell types again with a gene silent (or high), and compare.

    The output is a copy of the input with scmulan_perturbed, …_cell_type, …_probability, …_probability_before and
    …_shift in obs. No other gene is changed: the result tells what a gene means to the model, not what a living cell
    would do.

    The same command continues an interrupted job.
    """
    from scmulan.tl._files import ReadOptions, perturb_file

    account = perturb_file(
        cells,
        out,
        _parse_levels(gene),
        model=model,
        reading=ReadOptions(
            layer=layer,
            matrix_kind=matrix_kind,
            min_genes=min_genes,
            precision=precision,
            batch_tokens=batch_size,
        ),
        device=device,
        force=force,
        progress=console.PROGRESS,
    )
    rows = {
        **console.describe_input(account),
        "changed": f"{account['changed']:,} cells, {account['other_type']:,} of them of another type now; "
        f"mean shift {account['mean_shift']}",
        "written": account["output"],
    }
    if account["rank"] == 0:
        console.result(account, f"{console.describe_run(account)}\n{format_fields(rows)}", as_json)


def _parse_levels(texts: list[str]) -> dict[str, int]:
    levels = {}
    for text in texts:
        name, _, level = text.partition("=")
        if not name or not level.isdigit():
            raise typer.BadParameter(f"{text!r}: expected GENE=LEVEL, such as GATA1=0", param_hint="--gene")
        levels[name] = int(level)
    return levels

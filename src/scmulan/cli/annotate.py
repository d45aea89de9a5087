"""``scmulan annotate``: predict cell types."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scmulan._text import format_fields
from scmulan.cli import console, options


def annotate(
    cells: options.Cells,
    out: options.Out,
    model: options.Model = "mini",
    table: Annotated[
        Path | None,
        typer.Option(metavar="T.csv", help="Also write the cell types as CSV or TSV.", show_default=False),
    ] = None,
    rule: Annotated[
        Literal["default", "stepwise", "release"],
        typer.Option(
            help="default: the type with the largest probability; stepwise: fine type after the coarse one; "
            "release: the words that the published release decodes."
        ),
    ] = "default",
    threshold: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Mark types with a lower probability as uncertain.")
    ] = 0.5,
    embed: Annotated[bool, typer.Option("--embed", help="Also store the embedding, as scmulan embed does.")] = False,
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Also store the type of most of each cell's nearest neighbours.")
    ] = False,
    layer: options.Layer = None,
    matrix_kind: options.MatrixKind = None,
    min_genes: options.MinGenes = 20,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = options.AUTO,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Predict cell types.

    The output is a copy of the input with scmulan_cell_type, …_coarse, …_probability, …_status and …_ontology_id
    in obs, and parameters in uns['scmulan']. With --smooth, …_smoothed and …_smoothed_share too.

    The same command continues an interrupted job.
    """
    from scmulan.tl._files import ReadOptions, annotate_file

    account = annotate_file(
        cells,
        out,
        model=model,
        table=table,
        rule=rule,
        threshold=threshold,
        embed=embed,
        smooth=smooth,
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
    if account["rank"] == 0:
        console.result(account, _summary(account), as_json)


def _summary(account: dict[str, Any]) -> str:
    cells = account["cells"]
    types = [f"{name} {count / cells:.0%}" for name, count in account["cell_types"].items()]
    more = f"; and {len(types) - 8} more" if len(types) > 8 else ""
    status = [f"{count / cells:.1%} {name}" for name, count in account["status"].items() if count]
    return "\n".join(
        [
            console.describe_run(account),
            format_fields(
                {
                    **console.describe_input(account),
                    "types": "; ".join(types[:8]) + more,
                    "status": ", ".join(status),
                    "written": console.list_paths(account["output"], account["table"]),
                }
            ),
        ]
    )

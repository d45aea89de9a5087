"""``scmulan annotate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scmulan.cli import console, options


def annotate(
    cells: options.Cells,
    out: options.Out,
    model: options.Model = "mini",
    table: Annotated[
        Path | None,
        typer.Option(metavar="T.csv", help="Also write the types alone, as CSV or TSV.", show_default=False),
    ] = None,
    rule: Annotated[
        Literal["default", "stepwise", "release"],
        typer.Option(
            help="default: every type's probability; stepwise: fine types after the coarse one; "
            "release: the words that the published release decodes."
        ),
    ] = "default",
    threshold: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Types with a lower probability are marked as uncertain.")
    ] = 0.5,
    embed: Annotated[bool, typer.Option("--embed", help="Also store the embedding, as scmulan embed does.")] = False,
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Also store the types that each cell's nearest neighbours vote for.")
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
    """Annotate cells: predict cell types with probabilities.

    The output is a copy of the input with scmulan_cell_type, …_coarse, …_probability, …_status and …_ontology_id
    in obs, and how they were made in uns['scmulan']. With --smooth, …_smoothed and …_smoothed_share too.

    A job that was interrupted goes on where it was when the same command is run again.
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
            console.heading(account),
            console.table(
                {
                    **console.reading(account),
                    "types": "; ".join(types[:8]) + more,
                    "status": ", ".join(status),
                    "written": console.written(account["output"], account["table"]),
                }
            ),
        ]
    )

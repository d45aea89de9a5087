"""``scmulan embed``: compute an embedding of the cells."""

from typing import Annotated, Literal

import typer

from scmulan._text import format_fields
from scmulan.cli import console, options


def embed(
    cells: options.Cells,
    out: options.Out,
    model: options.Model = "mini",
    rule: Annotated[
        Literal["default", "release"],
        typer.Option(
            help="default: the hidden state that predicts the cell type; release: the one of the published release."
        ),
    ] = "default",
    layer: options.Layer = None,
    matrix_kind: options.MatrixKind = None,
    min_genes: options.MinGenes = 20,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = options.AUTO,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Compute an embedding that is comparable across studies.

    The output is a copy of the input with X_scmulan in obsm, to be used in place of X_pca, and parameters in
    uns['scmulan'].

    The same command continues an interrupted job.
    """
    from scmulan.tl._files import ReadOptions, embed_file

    account = embed_file(
        cells,
        out,
        model=model,
        rule=rule,
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
        "embedding": f"obsm[{account['obsm'][0]!r}], {account['width']} numbers per cell",
        "written": account["output"],
    }
    if account["rank"] == 0:
        console.result(account, f"{console.describe_run(account)}\n{format_fields(rows)}", as_json)

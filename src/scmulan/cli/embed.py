"""``scmulan embed``."""

from typing import Annotated, Literal

import typer

from scmulan.cli import console, options


def embed(
    cells: options.Cells,
    out: options.Out,
    model: options.Model = "mini",
    rule: Annotated[
        Literal["default", "release"],
        typer.Option(
            help="default: the hidden state that annotates the cell; release: the one that the published release gives."
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
    """Embed cells: compute coordinates that are comparable across studies.

    The output is a copy of the input with X_scmulan in obsm, to be used in place of X_pca, and how it was made in
    uns['scmulan'].

    A job that was interrupted goes on where it was when the same command is run again.
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
        **console.reading(account),
        "embedding": f"obsm[{account['obsm'][0]!r}], {account['width']} numbers per cell",
        "written": account["output"],
    }
    if account["rank"] == 0:
        console.result(account, f"{console.heading(account)}\n{console.table(rows)}", as_json)

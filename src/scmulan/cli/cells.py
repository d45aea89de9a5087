"""Commands on cells: ``scmulan annotate``, ``embed``, ``perturb``, ``generate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scmulan._text import format_fields
from scmulan.cli import console, options

if TYPE_CHECKING:
    from scmulan.tl._blockwise import ReadOptions


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
    from scmulan.tl._files import annotate_file

    account = annotate_file(
        cells, out, model=model, table=table, rule=rule, threshold=threshold, embed=embed, smooth=smooth, device=device,
        reading=_reading(layer, matrix_kind, min_genes, precision, batch_size), force=force, progress=console.PROGRESS,
    )  # fmt: skip
    types = [f"{name} {count / account['cells']:.0%}" for name, count in account["cell_types"].items()]
    more = f"; and {len(types) - 8} more" if len(types) > 8 else ""
    status = [f"{count / account['cells']:.1%} {name}" for name, count in account["status"].items() if count]
    rows = {
        **console.describe_input(account),
        "types": "; ".join(types[:8]) + more,
        "status": ", ".join(status),
        "written": console.list_paths(account["output"], account["table"]),
    }
    _show(account, console.describe_run(account), rows, as_json)


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
    from scmulan.tl._files import embed_file

    account = embed_file(
        cells, out, model=model, rule=rule, device=device,
        reading=_reading(layer, matrix_kind, min_genes, precision, batch_size), force=force, progress=console.PROGRESS,
    )  # fmt: skip
    rows = {
        **console.describe_input(account),
        "embedding": f"obsm[{account['obsm'][0]!r}], {account['width']} numbers per cell",
        "written": account["output"],
    }
    _show(account, console.describe_run(account), rows, as_json)


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
    from scmulan.tl._files import perturb_file

    account = perturb_file(
        cells, out, _parse_levels(gene), model=model, device=device,
        reading=_reading(layer, matrix_kind, min_genes, precision, batch_size), force=force, progress=console.PROGRESS,
    )  # fmt: skip
    rows = {
        **console.describe_input(account),
        "changed": f"{account['changed']:,} cells, {account['other_type']:,} of them of another type now; "
        f"mean shift {account['mean_shift']}",
        "written": account["output"],
    }
    _show(account, console.describe_run(account), rows, as_json)


def generate(
    out: options.Out,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=WORD",
            show_default=False,
            help="Prompt, once for each field: organ, region, age, sex, status, technology, "
            "cell_type, cell_type_coarse.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--cells", min=1, metavar="N", help="Number of cells.")] = 100,
    model: options.Model = "mini",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same cells.")] = 0,
    temperature: Annotated[
        float, typer.Option(help="Temperature of sampling: below 1, likely genes are preferred.")
    ] = 1.0,
    rule: Annotated[
        Literal["default", "exact", "release"],
        typer.Option(
            help="default: what suits the model; exact: each word given those before it; "
            "release: as the published release does."
        ),
    ] = "default",
    values: Annotated[
        Literal["sample", "mean"], typer.Option(help="Draw the level of each gene, or take its mean.")
    ] = "sample",
    genes_from: Annotated[
        Path | None,
        typer.Option(metavar="FILE.h5ad", help="Generate only genes measured in this file.", show_default=False),
    ] = None,
    max_words: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of genes of a cell.")] = 1_550,
    draft: Annotated[
        int | None,
        typer.Option(
            parser=options.auto_or("a positive number"),
            metavar="WORDS",
            help="Words drafted and verified in one pass, for rules that draw them one by one; 1 turns it off. "
            "The cells are the same.",
        ),
    ] = options.AUTO,
    batch_size: Annotated[
        int | None,
        typer.Option(
            parser=options.auto_or("a positive number"),
            metavar="CELLS",
            help="Cells generated at a time; they do not depend on it.",
        ),
    ] = options.AUTO,
    precision: Annotated[
        Literal["fp32", "bf16", "int8", "auto"],
        typer.Option(help="Precision. Another one generates other cells."),
    ] = "fp32",
    device: options.Device = "auto",
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Generate cells from metadata.

    X holds log1p values of counts per 10,000, layers['level'] the model's own levels 1 … 10, obs the prompt.
    List the words that a model knows: scmulan model info MODEL.

    Example: scmulan generate -o b.h5ad --set organ=Blood --set cell_type="B cell" -n 100
    """
    from scmulan.tl._files import generate_file

    account = generate_file(
        out, options.fields(what, "--set") or {}, model=model, n=n, seed=seed, temperature=temperature, rule=rule,
        values=values, genes_from=genes_from, max_words=max_words, draft=draft, batch_size=batch_size,
        precision=precision, device=device, force=force, progress=console.PROGRESS,
    )  # fmt: skip
    n_genes = account["words_per_cell"]
    requested = ", ".join(f"{field.replace('_', ' ')} {word}" for field, word in account["prompt"].items())
    incomplete = account["cells"] - account["complete"]
    rows = {
        "requested": requested or "any cell",
        "words": f"{n_genes['mean']:,.0f} ± {n_genes['sd']:,.0f} genes per cell",
        "unfinished": f"{incomplete:,} cells stopped at {max_words:,} genes" if incomplete else None,
        "written": account["output"],
    }
    heading = f"{account['cells']:,} cells generated by {account['model']} in {account['seconds']:.1f} s"
    _show(account, heading, rows, as_json)


def _reading(
    layer: str | None, matrix_kind: Any, min_genes: int, precision: Any, batch_tokens: int | None
) -> "ReadOptions":
    from scmulan.tl._blockwise import ReadOptions

    return ReadOptions(
        layer=layer, matrix_kind=matrix_kind, min_genes=min_genes, precision=precision, batch_tokens=batch_tokens
    )


def _show(account: dict[str, Any], heading: str, rows: dict[str, Any], as_json: bool) -> None:
    """Print what a command did; of a torchrun job, one process prints."""
    if account["rank"] == 0:
        console.result(account, f"{heading}\n{format_fields(rows)}", as_json)


def _parse_levels(texts: list[str]) -> dict[str, int]:
    levels = {}
    for text in texts:
        name, _, level = text.partition("=")
        if not name or not level.isdigit():
            raise typer.BadParameter(f"{text!r}: expected GENE=LEVEL, such as GATA1=0", param_hint="--gene")
        levels[name] = int(level)
    return levels

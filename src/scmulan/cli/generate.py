"""``scmulan generate``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from scmulan.cli import console, options


def _words(text: str) -> int | None:
    if text == options.AUTO:
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor a positive number")
    return int(text)


def generate(
    out: options.Out,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=WORD",
            show_default=False,
            help="What the cells should be, again for each field: organ, region, age, sex, status, technology, "
            "cell_type, cell_type_coarse.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--cells", min=1, metavar="N", help="Number of cells.")] = 100,
    model: options.Model = "mini",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same cells.")] = 0,
    temperature: Annotated[float, typer.Option(help="Below 1 the likely genes are preferred.")] = 1.0,
    rule: Annotated[
        Literal["default", "exact", "release"],
        typer.Option(
            help="default: what suits the model; exact: each word given those before it; "
            "release: as the published release."
        ),
    ] = "default",
    values: Annotated[Literal["sample", "mean"], typer.Option(help="Draw each value, or take its mean.")] = "sample",
    genes_from: Annotated[
        Path | None,
        typer.Option(metavar="FILE.h5ad", help="Write only genes that this file measured.", show_default=False),
    ] = None,
    max_words: Annotated[int, typer.Option(min=1, metavar="N", help="Most genes of a cell.")] = 1_550,
    draft: Annotated[
        int | None,
        typer.Option(
            parser=_words,
            metavar="WORDS",
            help="Words that are guessed and checked in one pass where a rule says them one by one; 1 does without. "
            "Cells are the same.",
        ),
    ] = options.AUTO,
    batch_size: Annotated[
        int | None,
        typer.Option(parser=_words, metavar="CELLS", help="Cells written side by side; they do not depend on it."),
    ] = options.AUTO,
    precision: Annotated[
        Literal["fp32", "bf16", "int8", "auto"],
        typer.Option(help="Precision; another one writes other cells."),
    ] = "fp32",
    device: options.Device = "auto",
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Write new cells.

    X holds log1p values of counts per 10,000, layers['level'] the model's own levels 1 … 10, obs what was asked for.
    Words that a model knows: scmulan model info MODEL.

    Example: scmulan generate -o b.h5ad --set organ=Blood --set cell_type="B cell" -n 100
    """
    from scmulan.tl._files import generate_file

    account = generate_file(
        out, options.fields(what, "--set") or {}, model=model, n=n, seed=seed, temperature=temperature, rule=rule,
        values=values, genes_from=genes_from, max_words=max_words, draft=draft, batch=batch_size, precision=precision,
        device=device, force=force, progress=console.progress,
    )  # fmt: skip
    words = account["words_per_cell"]
    asked = ", ".join(f"{field.replace('_', ' ')} {word}" for field, word in account["prompt"].items()) or "any cell"
    open_ended = account["cells"] - account["complete"]
    rows = {
        "asked for": asked,
        "words": f"{words['mean']:,.0f} ± {words['sd']:,.0f} genes per cell",
        "unfinished": f"{open_ended:,} cells stopped at {max_words:,} genes" if open_ended else None,
        "written": account["output"],
    }
    heading = f"{account['cells']:,} cells written by {account['model']} in {account['seconds']:.1f} s"
    if account["rank"] == 0:
        console.result(account, f"{heading}\n{console.table(rows)}", as_json)

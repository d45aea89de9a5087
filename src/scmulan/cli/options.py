"""Options that several commands share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

AUTO: Any = "auto"  # default of options that are parsed to an int or None


def auto_or(expected: str) -> Callable[[str], int | None]:
    """Return a parser of an option that is a positive number or ``auto`` (None); ``expected`` is named in errors."""

    def parse(text: str) -> int | None:
        if text == AUTO:
            return None
        if not text.isdigit() or int(text) < 1:
            raise typer.BadParameter(f"{text!r} is neither 'auto' nor {expected}")
        return int(text)

    return parse


def fields(texts: Sequence[str] | None, option: str, value: str = "WORD") -> dict[str, str] | None:
    """Parse values such as ``organ=Blood`` of an option that may be given once per field.

    Parameters
    ----------
    texts
        Values of the option.
    option
        Name of the option, for errors.
    value
        Name of what is right of the equals sign, for errors.

    Returns
    -------
    dict or None
        Field → text; None without values.

    Raises
    ------
    typer.BadParameter
        If a value has no equals sign, or two are about the same field.
    """
    from scmulan.vocab.vocabulary import family_of_field

    if not texts:
        return None
    parsed: dict[str, str] = {}
    families: dict[str, str] = {}
    for text in texts:
        field, sign, word = text.partition("=")
        if not sign:
            raise typer.BadParameter(f"{text!r}: expected FIELD={value}, such as organ=…", param_hint=option)
        first = families.setdefault(family_of_field(field), text)
        if first is not text:
            raise typer.BadParameter(f"{text!r} and {first!r} are about the same field: give one", param_hint=option)
        parsed[field] = word
    return parsed


Cells = Annotated[
    Path, typer.Argument(metavar="IN.h5ad", help="Cells: an h5ad file, or a zarr folder.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="OUT.h5ad", help="File to write, in .h5ad or .zarr.", show_default=False),
]
Model = Annotated[str, typer.Option(metavar="MODEL", help="Name of a packaged model, or a model folder.")]
Layer = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Matrix to use: X, raw, or a layer.", show_default="chosen by its values"),
]
MatrixKind = Annotated[
    Literal["counts", "log1p"] | None,
    typer.Option("--state", help="Kind of values in the matrix.", show_default="told from the values"),
]
MinGenes = Annotated[int, typer.Option(min=0, metavar="N", help="Refuse an input with fewer of the model's genes.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Device: auto, cpu, cuda, cuda:1, mps …")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        parser=auto_or("a positive number of words"),
        metavar="WORDS",
        help="Genes of all cells in one batch; fewer need less memory.",
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "int8"],
    typer.Option(help="Precision. auto picks the fastest that reproduces the fp32 labels on a sample."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing outputs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

"""Options that several verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

AUTO: Any = "auto"  # what a batch size is before it is parsed


def _words(text: str) -> int | None:
    if text == AUTO:
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor a positive number of words")
    return int(text)


def fields(texts: Sequence[str] | None, option: str, value: str = "WORD") -> dict[str, str] | None:
    """Parse texts such as ``organ=Blood`` of an option that may be given for each field once.

    Parameters
    ----------
    texts
        What was given.
    option
        Name of the option, for errors.
    value
        What stands right of the equals sign, for errors.

    Returns
    -------
    dict or None
        Field to what was said of it; None where nothing was given.
    """
    from scmulan.vocab.vocabulary import family_of_field

    if not texts:
        return None
    said: dict[str, str] = {}
    families: dict[str, str] = {}
    for text in texts:
        field, sign, word = text.partition("=")
        if not sign:
            raise typer.BadParameter(f"{text!r}: expected FIELD={value}, such as organ=…", param_hint=option)
        first = families.setdefault(family_of_field(field), text)
        if first is not text:
            raise typer.BadParameter(f"{text!r} and {first!r} are about the same field: give one", param_hint=option)
        said[field] = word
    return said


Cells = Annotated[
    Path, typer.Argument(metavar="IN.h5ad", help="Cells: an h5ad file, or a zarr folder.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--out", metavar="OUT.h5ad", help="Where to write; a name in .h5ad or .zarr.", show_default=False
    ),
]
Model = Annotated[str, typer.Option(metavar="MODEL", help="Name of a packaged model, or a model folder.")]
Layer = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Matrix to read: X, raw, or a layer.", show_default="found by looking"),
]
MatrixKind = Annotated[
    Literal["counts", "log1p"] | None,
    typer.Option("--state", help="What the matrix holds.", show_default="found by looking"),
]
MinGenes = Annotated[int, typer.Option(min=0, metavar="N", help="Refuse cells with fewer genes of the model's.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps …")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        parser=_words, metavar="WORDS", help="Genes of all cells together in one pass; fewer need less memory."
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "int8"],
    typer.Option(help="Precision. auto picks the fastest that reproduces the fp32 labels on a sample."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

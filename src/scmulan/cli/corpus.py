"""``scmulan corpus …``: build, inspect, verify and split cells on disk for pre-training."""

from pathlib import Path
from typing import Annotated

import typer

from scmulan.cli import console, options

app = typer.Typer(
    help="Build, inspect, verify and split a corpus: cells on disk for pre-training.", rich_markup_mode=None
)

Folder = Annotated[Path, typer.Argument(metavar="CORPUS/", help="Folder of a corpus.", show_default=False)]


@app.command()
def build(
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC.toml", help="Files and the meaning of their columns; or a recipe.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="Folder to write.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of processes.")] = 1,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Dask scheduler to use instead of processes, such as tcp://host:8786.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Write the cells of many files as one corpus. The same command continues an interrupted build."""
    from scmulan.data.build import build
    from scmulan.data.inspect import describe, inspect
    from scmulan.data.spec import read_corpus_spec

    build(read_corpus_spec(spec), out, jobs=jobs, dask=dask, force=force, progress=console.PROGRESS)
    about = inspect(out)
    console.result(about, describe(about), as_json)


@app.command()
def inspect(corpus: Folder, as_json: options.Json = False) -> None:
    """Describe a corpus: cells, genes and words by study, and what was lost on the way."""
    from scmulan.data.inspect import describe, inspect

    about = inspect(corpus)
    console.result(about, describe(about), as_json)


@app.command()
def verify(
    corpus: Folder,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of files to read at a time.")] = 2,
    as_json: options.Json = False,
) -> None:
    """Compare every file with its checksum; the exit code is 1 if one was altered or is missing."""
    from scmulan.data.inspect import verify

    found = verify(corpus, jobs)
    for problem in found["problems"]:
        console.message("error", problem)
    text = (
        f"{corpus}: {len(found['problems'])} files altered or missing"
        if found["problems"]
        else (f"{corpus}: {found['files']:,} files, {found['bytes'] / 2**20:,.0f} MiB, all as they were written")
    )
    console.result(found, text, as_json)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def split(
    spec: Annotated[
        Path,
        typer.Argument(metavar="SPEC.toml", help="Studies and donors to hold out.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="SPLIT.json", help="File to write.", show_default="split.json in the corpus"
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Hold out studies and donors for validation and test."""
    from scmulan.data.split import split_corpus

    found = split_corpus(spec, out)
    if found["shared_donors"]:
        names = ", ".join("/".join(donor) for donor in found["shared_donors"][:5])
        console.message("warning", f"{len(found['shared_donors'])} donors have cells in several parts: {names}")
    cells = ", ".join(f"{part} {n:,}" for part, n in found["cells"].items())
    console.result(found, f"{found['file']}: {cells} cells", as_json)

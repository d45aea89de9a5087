"""``scmulan bench …``: how fast it is on this machine, beside yardsticks of the same run; the last line is JSON."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Time a part beside its yardsticks; the last line of the output is one JSON object.", rich_markup_mode=None
)

Quick = Annotated[bool, typer.Option("--quick", help="Smaller shapes, under a minute; marked as such in the result.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="CELLS.h5ad", help="Real cells for mini; by default it writes some.", show_default=False),
]


def report(name: str, *, module: str | None = None, **options: Any) -> None:
    """Run ``scmulan.benchmarks.MODULE.run(**options)`` (by default the module called ``name``); print JSON last."""
    figures = importlib.import_module(f"scmulan.benchmarks.{module or name}").run(**options)
    typer.echo(json.dumps({"benchmark": name, "quick": options.get("quick", False), **figures}, allow_nan=False))


@app.command()
def tokenize(quick: Quick = False) -> None:
    """Expression to words, beside vectorised scipy and the release's way."""
    report("tokenize", quick=quick)


@app.command()
def corpus(
    quick: Quick = False,
    cells: Annotated[int | None, typer.Option(min=1, metavar="N", help="Cells; by default a million.")] = None,
) -> None:
    """Build a corpus from h5ad files: cells per second, memory, bytes."""
    report("corpus", quick=quick, cells=cells)


@app.command()
def loader(
    quick: Quick = False,
    cells: Annotated[int | None, typer.Option(min=1024, metavar="N", help="Cells; by default a million.")] = None,
    folder: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the corpus is written for the time of the run.")
    ] = None,
) -> None:
    """Words of shuffled batches from a corpus on disk, cold and warm, beside AnnData's own loader."""
    report("loader", quick=quick, cells=cells, folder=folder)


@app.command()
def train(quick: Quick = False) -> None:
    """Training steps of the published shape and of the small model: share of the machine's matrix products, memory."""
    report("train", quick=quick)


@app.command()
def resume(quick: Quick = False) -> None:
    """Kill a run at random moments, change its number of processes, and compare with one that nothing disturbed."""
    report("resume", quick=quick)


@app.command()
def annotate(quick: Quick = False, data: Data = None) -> None:
    """Cells named, beside the release's way; the published shape with random weights, and mini from file to file."""
    report("annotate", quick=quick, data=data)


@app.command()
def embed(quick: Quick = False, data: Data = None) -> None:
    """Cells placed, beside the release's way; as annotate."""
    report("embed", module="annotate", verb="embed", quick=quick, data=data)


@app.command()
def growth(
    quick: Quick = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="P.png", help="Draw the curves (needs matplotlib).", show_default=False)
    ] = None,
) -> None:
    """How annotation's time and memory grow with cells, words and batch."""
    report("growth", quick=quick, plot=plot)


@app.command()
def generate(quick: Quick = False) -> None:
    """Words written per second, beside the release's way with its key-value cache; block decoding."""
    report("generate", quick=quick)


@app.command()
def attention(quick: Quick = False) -> None:
    """Attention of new words and of whole sentences, beside torch's kernel."""
    report("attention", quick=quick)

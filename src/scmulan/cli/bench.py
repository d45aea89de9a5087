"""``scmulan bench …``: benchmarks, each beside reference implementations timed in the same run."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Benchmark a part beside reference implementations; the last line of the output is one JSON object.",
    rich_markup_mode=None,
)

Quick = Annotated[bool, typer.Option("--quick", help="Smaller shapes, in under a minute; the result says so.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="CELLS.h5ad", help="Real cells for mini; by default they are generated.", show_default=False),
]


def report(name: str, *, module: str | None = None, **options: Any) -> None:
    """Run ``scmulan.benchmarks.MODULE.run(**options)`` (by default the module called ``name``); print JSON last."""
    figures = importlib.import_module(f"scmulan.benchmarks.{module or name}").run(**options)
    typer.echo(json.dumps({"benchmark": name, "quick": options.get("quick", False), **figures}, allow_nan=False))


@app.command()
def tokenize(quick: Quick = False) -> None:
    """Turn expression into words, beside vectorised scipy and the release's implementation."""
    report("tokenize", quick=quick)


@app.command()
def corpus(
    quick: Quick = False,
    cells: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of cells; by default a million.")
    ] = None,
) -> None:
    """Build a corpus from h5ad files: cells per second, memory and size."""
    report("corpus", quick=quick, cells=cells)


@app.command()
def loader(
    quick: Quick = False,
    cells: Annotated[
        int | None, typer.Option(min=1024, metavar="N", help="Number of cells; by default a million.")
    ] = None,
    folder: Annotated[str | None, typer.Option(metavar="DIR", help="Folder for the temporary corpus.")] = None,
) -> None:
    """Read training batches from a corpus on disk, cold and warm, beside AnnData's own loader."""
    report("loader", quick=quick, cells=cells, folder=folder)


@app.command()
def train(quick: Quick = False) -> None:
    """Train the published shape and the small model: fraction of peak matrix products, and memory."""
    report("train", quick=quick)


@app.command()
def resume(quick: Quick = False) -> None:
    """Kill a training run at random times, change its number of processes, and compare with an undisturbed run."""
    report("resume", quick=quick)


@app.command()
def annotate(quick: Quick = False, data: Data = None) -> None:
    """Annotate, beside the release's implementation: the published shape with random weights, and mini on files."""
    report("annotate", quick=quick, data=data)


@app.command()
def embed(quick: Quick = False, data: Data = None) -> None:
    """Embed, beside the release's implementation; as for annotate."""
    report("embed", module="annotate", verb="embed", quick=quick, data=data)


@app.command()
def growth(
    quick: Quick = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="P.png", help="Draw the curves (needs matplotlib).", show_default=False)
    ] = None,
) -> None:
    """Measure how time and memory of annotation grow with cells, words and batch size."""
    report("growth", quick=quick, plot=plot)


@app.command()
def generate(quick: Quick = False) -> None:
    """Generate: words per second, beside the release's implementation with a key-value cache; block decoding."""
    report("generate", quick=quick)


@app.command()
def attention(quick: Quick = False) -> None:
    """Compute attention of new words and of whole sentences, beside torch's kernel."""
    report("attention", quick=quick)

"""``scmulan bench …``: how fast it is on this machine, beside yardsticks of the same run; the last line is JSON."""

import importlib
import json
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Time a part beside its yardsticks; the last line of the output is one JSON object.", rich_markup_mode=None
)

Quick = Annotated[bool, typer.Option("--quick", help="Smaller shapes, under a minute; marked as such in the result.")]


def report(name: str, **options: Any) -> None:
    """Run the benchmark ``scmulan.benchmarks.NAME.run(**options)`` and print its result as the last line."""
    figures = importlib.import_module(f"scmulan.benchmarks.{name}").run(**options)
    typer.echo(json.dumps({"benchmark": name, "quick": options.get("quick", False), **figures}, allow_nan=False))

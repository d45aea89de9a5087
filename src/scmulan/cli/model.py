"""``scmulan model …``: list, describe, import, export and verify models."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from scmulan._text import format_fields
from scmulan.cli import console, options

app = typer.Typer(help="List, describe, import, export and verify models.", rich_markup_mode=None)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of a packaged model, or a model folder.", show_default=False)
]


@app.command("list")
def list_models(as_json: options.Json = False) -> None:
    """List the packaged models."""
    from scmulan.model.folder import describe_model, packaged_models

    models = {name: describe_model(folder) for name, folder in packaged_models().items()}
    rows = {name: f"{_size(about)}. {about['description']}" for name, about in models.items()}
    content = {name: {k: v for k, v in about.items() if k not in ("card", "words")} for name, about in models.items()}
    console.result({"models": content}, format_fields(rows) if rows else "no packaged models", as_json)


@app.command()
def info(model: Model, as_json: options.Json = False) -> None:
    """Describe a model: size, training data and vocabulary."""
    from scmulan.model.folder import describe_model

    about = describe_model(model)
    card = about["card"]
    rows = {
        "folder": about["folder"],
        "about": textwrap.fill(about["description"], 90),
        "size": f"{_size(about)}, {about['mebibytes']} MiB, weights stored as {', '.join(about['stored_as'])}",
        "network": ", ".join(f"{name} {value}" for name, value in about["config"].items()),
        "objective": about["objective"],
        "made by": card.get("made_by"),
        "trained on": f"{card['cells']:,} cells of {len(card['data'])} files" if "data" in card else None,
        "weights": f"sha256 {about['weights_hash']}",
        **{
            name.replace("_", " "): _list_words(words, card.get("cell_types", {}))
            for name, words in about["words"].items()
        },
    }
    console.result(about, f"{about['name']}\n{format_fields(rows)}", as_json)


def _size(about: dict[str, Any]) -> str:
    types = f"{len(about['words']['fine_type'])} cell types"
    return f"{about['parameters']:,} parameters, {about['genes']:,} genes, {types}"


def _list_words(words: list[str], cells: dict[str, int]) -> str:
    shown = [f"{word} ({cells[word]:,} cells)" if cells.get(word) else word for word in words]
    return textwrap.fill("; ".join(shown), 90, break_long_words=False, break_on_hyphens=False)


@app.command("import")
def import_model(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT.pt", help="Checkpoint of the published release.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="Model folder to write.", show_default=False)],
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Convert a checkpoint of the published release into a model folder.

    No code in the checkpoint is run: a file that contains code is refused.
    """
    from scmulan._io.outputs import check_output
    from scmulan.model.folder import describe_model
    from scmulan.model.release import import_release

    check_output(out, force, folder=True)
    about = describe_model(import_release(checkpoint, out, force=force))
    console.result({k: v for k, v in about.items() if k != "words"}, f"{_size(about)}\nwritten: {out}", as_json)


@app.command("export")
def export_model(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of pretrain.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="Model folder to write.", show_default=False)],
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Export the newest checkpoint of a training run, finished or not, as a model folder with its card."""
    from scmulan._io.outputs import check_output
    from scmulan.train.export import export_run

    check_output(out, force, folder=True)
    found = export_run(run, out, force=force)
    text = f"{found['parameters']:,} parameters after {found['step']:,} steps, {found['words']:,} words\nwritten: {out}"
    console.result(found, text, as_json)


@app.command()
def verify(
    model: Model,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FIXTURE.npz", help="Stored outputs to compare with.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Device: cpu, cuda, cuda:1, mps …")] = "cpu",
    as_json: options.Json = False,
) -> None:
    """Check a model's files, and compare its outputs with stored ones.

    Exit code 0: the same; 1: different, the first difference is shown; 2: cannot be used.
    """
    from scmulan.infer import parity

    found = parity.verify(model, against, device=device)
    console.result(found.to_json(), str(found), as_json)
    if not found.passed:
        raise typer.Exit(1)

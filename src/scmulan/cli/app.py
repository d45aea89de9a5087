"""The verbs together, and what an error or a warning looks like."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import scmulan
from scmulan.cli import (
    annotate,
    bench,
    console,
    corpus,
    doctor,
    embed,
    evaluate,
    finetune,
    generate,
    model,
    perturb,
    pretrain,
    report,
)
from scmulan.errors import ScmulanError

PACKAGE = str(Path(scmulan.__file__).parent)
# Typer brings Click along under another name in each of its versions; this is its UsageError in all of them.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="scmulan",
    help="A generative language model of single cells: name them, place them, write them.",
    epilog="A verb's own options: scmulan VERB --help",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (annotate, embed, generate, perturb, report, finetune, pretrain):
    app.command()(getattr(verb, verb.__name__.rpartition(".")[2]))
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(model.app, name="model")
app.add_typer(corpus.app, name="corpus")
app.add_typer(bench.app, name="bench")
app.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"scmulan {scmulan.__version__}")
        raise typer.Exit


@app.callback()
def scmulan_(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take what concerns all verbs."""


def run(args: list[str]) -> int:
    """Run a verb; return its exit code.

    Parameters
    ----------
    args
        Arguments without the program's name; without any, help is shown.
    """
    command: Any = typer.main.get_command(app)
    args = args or ["--help"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _show_warning
        try:
            # Not command.main(): it would answer Ctrl-C and errors in its own way.
            with command.make_context("scmulan", list(args), obj=args) as context:
                command.invoke(context)
        except typer.Exit as end:
            return end.exit_code
        except ScmulanError as error:
            console.tell("error", str(error))
            return 2
        except UsageError as error:
            path = error.ctx.command_path if error.ctx else "scmulan"
            console.tell("error", f"{error.format_message()} (see {path} --help)")
            return 2
    return 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show our own warnings as one line; those of other packages are for their developers, not for users."""
    ours = category.__module__.startswith("scmulan") or (category is UserWarning and filename.startswith(PACKAGE))
    if ours:
        console.tell("warning", str(message))

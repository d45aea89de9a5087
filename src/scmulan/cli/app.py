"""All commands together, and how errors and warnings are shown."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import scmulan
from scmulan.cli import bench, cells, console, corpus, doctor, evaluate, model, report, train
from scmulan.errors import ScmulanError

PACKAGE = str(Path(scmulan.__file__).parent)
# Versions of Typer bring Click along under different names; this is its UsageError in all of them.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="scmulan",
    help="A generative language model of single cells: annotate, embed and generate cells.",
    epilog="Options of a command: scmulan COMMAND --help",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    cells.annotate, cells.embed, cells.generate, cells.perturb, report.report, train.finetune, train.pretrain
):  # fmt: skip
    app.command()(command)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(model.app, name="model")
app.add_typer(corpus.app, name="corpus")
app.add_typer(bench.app, name="bench")
app.command()(doctor.doctor)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"scmulan {scmulan.__version__}")
        raise typer.Exit


@app.callback()
def scmulan_(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options of ``scmulan`` itself."""


def run(args: list[str]) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    args
        Arguments without the program's name; the help is shown without any.
    """
    command: Any = typer.main.get_command(app)
    args = args or ["--help"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _show_warning
        try:
            # Not command.main(): it would handle Ctrl-C and errors in its own way.
            with command.make_context("scmulan", list(args), obj=args) as context:
                command.invoke(context)
        except typer.Exit as end:
            return end.exit_code
        except ScmulanError as error:
            console.message("error", str(error))
            return 2
        except UsageError as error:
            path = error.ctx.command_path if error.ctx else "scmulan"
            console.message("error", f"{error.format_message()} (see {path} --help)")
            return 2
    return 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show scmulan's own warnings as one line, and none of other packages: those are for developers."""
    own = category.__module__.startswith("scmulan") or (category is UserWarning and filename.startswith(PACKAGE))
    if own:
        console.message("warning", str(message))

"""``scmulan doctor``: versions, machine and models, for bug reports."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

import scmulan
from scmulan._text import format_fields
from scmulan.cli import console, options
from scmulan.errors import ModelError


def doctor(as_json: options.Json = False) -> None:
    """Show what a bug report needs: versions, the machine, the models.

    The exit code is 1 if there is a problem.
    """
    facts = diagnose()
    console.result(facts, _describe(facts), as_json)
    if facts["problems"]:
        raise typer.Exit(1)


def diagnose() -> dict[str, Any]:
    """Collect what a bug report needs, in plain types.

    Returns
    -------
    dict
        ``scmulan``, ``python``, ``platform``, ``packages``, ``extras``, ``cpu``, ``memory``, ``accelerators``,
        ``models``, and ``problems``: one line each.
    """
    from scmulan import _machine
    from scmulan.model.folder import packaged_models

    packages, extras = _machine.installed()
    torch = _machine.accelerators()
    models = model_states(packaged_models())
    missing = [name for name, version in packages.items() if version is None]
    return {
        "scmulan": scmulan.__version__,
        "installed_at": str(Path(scmulan.__file__).parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "cpu": _machine.cpu(),
        "memory": _machine.memory(),
        "accelerators": torch,
        "models": models,
        "problems": [
            *(f"{name} is missing: pip install {name}" for name in missing),
            *([torch["problem"]] if "problem" in torch else []),
            *(state["problem"] for state in models.values() if state["problem"]),
            *([] if models else ["no packaged model: install scmulan again"]),
        ],
    }


def model_states(models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Check the files of models: folder, hash of the weights, and the problem (None if there is none) of each."""
    from scmulan.model.folder import verify_hashes

    out: dict[str, dict[str, Any]] = {}
    for name, folder in models.items():
        try:
            state = {"weights_hash": verify_hashes(folder)["model.safetensors"], "problem": None}
        except ModelError as error:
            state = {"weights_hash": None, "problem": str(error)}
        out[name] = {"folder": str(folder), **state}
    return out


def _describe(facts: dict[str, Any]) -> str:
    cpu, memory, torch = facts["cpu"], facts["memory"], facts["accelerators"]
    details = [f"{name} {torch[name]}" for name in ("threads", "cpu_capability", "cuda") if torch.get(name)]
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in torch.get("gpus", [])]
    rows = {
        "scmulan": f"{facts['scmulan']} in {facts['installed_at']}",
        "python": f"{facts['python']} ({facts['executable']})",
        "platform": facts["platform"],
        "cpu": f"{cpu['model']} ({cpu['architecture']}), {cpu['usable_cores']} of {cpu['cores']} cores",
        "flags": "unknown" if cpu["flags"] is None else ", ".join(cpu["flags"]) or "none that matter",
        "memory": ", ".join(
            f"{value} GiB {name.removesuffix('_gib').replace('_', ' ')}" for name, value in memory.items() if value
        ),
        "gpu": "\n".join(gpus) or ("MPS" if torch.get("mps") else "none"),
        "torch": f"{facts['packages']['torch'] or 'missing'} ({', '.join(details)})",
        **{name: version or "missing" for name, version in facts["packages"].items() if name != "torch"},
        **{f"[{extra}]": _list_missing(packages) for extra, packages in facts["extras"].items()},
        **{
            f"model {name}": state["problem"] or f"files are right, weights {state['weights_hash'][:12]}…"
            for name, state in facts["models"].items()
        },
        "problems": "\n".join(facts["problems"]) or "none found",
    }
    return format_fields(rows)


def _list_missing(packages: dict[str, str | None]) -> str:
    missing = [name for name, version in packages.items() if version is None]
    return f"missing: {', '.join(missing)}" if missing else "all there"

"""``scmulan doctor``."""

from typing import Any

import typer

from scmulan.cli import console, options


def doctor(as_json: options.Json = False) -> None:
    """Say what a bug report needs: versions, the machine, the models.

    Exit code 1 if something is not as it should be.
    """
    from scmulan._machine import diagnose

    facts = diagnose()
    console.result(facts, _sentences(facts), as_json)
    if facts["problems"]:
        raise typer.Exit(1)


def _sentences(facts: dict[str, Any]) -> str:
    cpu, memory, torch = facts["cpu"], facts["memory"], facts["accelerators"]
    seen = [f"{name} {torch[name]}" for name in ("threads", "cpu_capability", "cuda") if torch.get(name)]
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
        "torch": f"{facts['packages']['torch'] or 'missing'} ({', '.join(seen)})",
        **{name: version or "missing" for name, version in facts["packages"].items() if name != "torch"},
        **{f"[{extra}]": _presence(packages) for extra, packages in facts["extras"].items()},
        **{
            f"model {name}": state["problem"] or f"files are right, weights {state['weights_hash'][:12]}…"
            for name, state in facts["models"].items()
        },
        "problems": "\n".join(facts["problems"]) or "none found",
    }
    return console.table(rows)


def _presence(packages: dict[str, str | None]) -> str:
    missing = [name for name, version in packages.items() if version is None]
    return f"missing: {', '.join(missing)}" if missing else "all there"

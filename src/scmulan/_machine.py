"""What this computer is and has: the facts that a bug report or a benchmark needs.

What was found out about this machine before: a small JSON file in the user's cache folder.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import scmulan
from scmulan.errors import ModelError
from scmulan.model.folder import packaged_models, verify_hashes

# Instructions that decide how fast matrix products are, as Linux names them (x86, then ARM).
FLAGS = (
    "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "sve", "bf16", "i8mm",
)  # fmt: skip
GIB = 2**30


def diagnose() -> dict[str, Any]:
    """Everything that a bug report needs, in plain types.

    Returns
    -------
    dict
        ``scmulan``, ``python``, ``platform``, ``packages``, ``extras``, ``cpu``, ``memory``, ``accelerators``,
        ``models``, and ``problems``: one line for each thing that is not as it should be.
    """
    packages, extras = installed()
    torch = accelerators()
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
        "cpu": cpu(),
        "memory": memory(),
        "accelerators": torch,
        "models": models,
        "problems": [
            *(f"{name} is missing: pip install {name}" for name in missing),
            *([torch["problem"]] if "problem" in torch else []),
            *(state["problem"] for state in models.values() if state["problem"]),
            *([] if models else ["no packaged model: install scmulan again"]),
        ],
    }


def installed(distribution: str = "scmulan") -> tuple[dict[str, str | None], dict[str, dict[str, str | None]]]:
    """Versions of the packages that a distribution needs, and of those of each of its extras; None where missing."""
    core: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = {}
    for line in importlib.metadata.requires(distribution) or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w.-]+)", line)
        wanted = core if extra is None else extras.setdefault(extra[1], {})
        wanted[name] = _version(name)
    return core, extras


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def model_states(models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Folder of each model, the hash of its weights, and what is wrong with its files (None if nothing is)."""
    out: dict[str, dict[str, Any]] = {}
    for name, folder in models.items():
        try:
            state = {"weights_hash": verify_hashes(folder)["model.safetensors"], "problem": None}
        except ModelError as error:
            state = {"weights_hash": None, "problem": str(error)}
        out[name] = {"folder": str(folder), **state}
    return out


def cpu() -> dict[str, Any]:
    """Model, architecture, cores, and which of the instructions that matter it has (None where unknown)."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "model": model[1].strip() if model else platform.processor() or None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags[1].split()] if flags else None,
    }


def memory() -> dict[str, float | None]:
    """Memory in GiB: what there is, what is available now, and the limit of a container."""
    total = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total_gib": None if total is None else round(total / GIB, 1),
        "available_gib": round(int(available[1]) * 1024 / GIB, 1) if available else None,
        "container_limit_gib": round(int(limit) / GIB, 1) if limit.isdigit() else None,
    }


def accelerators() -> dict[str, Any]:
    """Ask torch what it sees: threads, the CPU capability it was compiled for, GPUs with their memory, MPS."""
    try:
        import torch
    except ImportError as error:
        return {"problem": f"torch cannot be imported ({error})"}
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / GIB, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cache_folder() -> Path:
    """Where this platform keeps what programs can find out again; ``XDG_CACHE_HOME`` wins everywhere."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "scmulan"


class Notebook:
    """Entries by key. A file that is damaged counts as empty, one that cannot be written is done without.

    Parameters
    ----------
    name
        Of the file in the cache folder.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / name

    def get(self, key: str) -> Any:
        """Entry of a key, or None."""
        return self._read().get(key)

    def put(self, key: str, entry: Any) -> None:
        """Keep an entry, whole or not at all: others may read the file meanwhile."""
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**self._read(), key: entry}, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

"""Facts about this computer that a bug report or a benchmark needs, and what was measured on it before."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import platformdirs

from scmulan._io.outputs import atomic_path
from scmulan.errors import OutputError

# Instructions that decide how fast matrix products are, as Linux names them (x86, then ARM).
CPU_FLAGS = (
    "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "sve", "bf16", "i8mm",
)  # fmt: skip
GIB = 2**30


def installed(distribution: str = "scmulan") -> tuple[dict[str, str | None], dict[str, dict[str, str | None]]]:
    """Return versions of the packages that a distribution needs, and that each of its extras needs; None if missing."""
    core: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = {}
    for line in importlib.metadata.requires(distribution) or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w.-]+)", line)
        group = core if extra is None else extras.setdefault(extra[1], {})
        group[name] = _version(name)
    return core, extras


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Return model, architecture and cores of the CPU, and which of ``CPU_FLAGS`` it has (None where unknown)."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "model": model[1].strip() if model else platform.processor() or None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags[1].split()] if flags else None,
    }


def memory() -> dict[str, float | None]:
    """Return total and available memory and the limit of the container, in GiB (None where unknown)."""
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
    """Return what torch finds: threads, the CPU capability it uses, GPUs with their memory, MPS."""
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


class MeasurementCache:
    """Measurements of this machine, kept for later processes as a JSON file in the user's cache folder.

    A file that is damaged counts as empty; one that cannot be written is done without.

    Parameters
    ----------
    name
        File name.
    """

    def __init__(self, name: str) -> None:
        self.path = platformdirs.user_cache_path("scmulan", appauthor=False) / name

    def get(self, key: str) -> Any:
        """Return the entry of a key, or None."""
        return self._read().get(key)

    def put(self, key: str, entry: Any) -> None:
        """Store an entry; other processes may read the file meanwhile."""
        with contextlib.suppress(OSError, OutputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({**self._read(), key: entry}, indent=1), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

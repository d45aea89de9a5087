"""The state of a run on disk: written so that a kill at any moment leaves a usable checkpoint.

A checkpoint is one file in ``checkpoints/``, written under another name, flushed, then renamed. The newest that
reads back whole is used; random numbers need no state, because batches are a function of (seed, step).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from scmulan.errors import OutputError, RecipeError

PATTERN = "step-{:09d}.pt"


class RunFolder:
    """Folder of one run: ``recipe.json``, ``vocabulary.json``, ``log.jsonl``, ``checkpoints/``.

    Parameters
    ----------
    path
        The folder; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the run folder {path}: {error.strerror}") from None

    def claim(self, recipe: dict[str, Any]) -> None:
        """Record the recipe, or check that the folder's earlier run followed the same one.

        Raises
        ------
        RecipeError
            If another recipe was followed here; names the first setting that differs.
        """
        file = self.path / "recipe.json"
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(recipe))
            if before != now:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe ({_first_difference(before, now)}); "
                    "use another --out, or remove the folder to start anew"
                )
        else:
            _write(file, json.dumps(recipe, indent=1).encode())

    def save(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint and drop all but the newest ``keep``."""
        target = self.checkpoints / PATTERN.format(step)
        partial = target.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()
            _write(target.with_suffix(".sha256"), digest.encode())
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(
                f"cannot write the checkpoint {target}: {error.strerror}; the one before it is still good"
            ) from None
        for old in sorted(self.checkpoints.glob("step-*.pt"))[:-keep]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Newest whole checkpoint, or None where there is none."""
        for file in sorted(self.checkpoints.glob("step-*.pt"), reverse=True):
            digest = file.with_suffix(".sha256")
            if digest.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == digest.read_text():
                state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
                return state
        return None


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log that lie beyond ``step``, as after a kill they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except json.JSONDecodeError:  # the line that was being written at the kill
            break
    _write(path, "".join(f"{line}\n" for line in kept).encode())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _first_difference(a: Any, b: Any, where: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {a!r}, is {b!r}"[:200]

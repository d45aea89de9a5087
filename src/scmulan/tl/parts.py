"""Results of finished blocks of cells, kept until the job is through; on disk, they outlive an interruption."""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scmulan.errors import OutputError

# Where a job's parts lie: a hidden folder beside its output.
PREFIX = ".scmulan-parts-"


class Parts:
    """Arrays of each block, by the block's number.

    Parameters
    ----------
    folder
        Where to keep them; in memory by default. Made with the first part.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[int, Mapping[str, np.ndarray]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._kept or (self.folder is not None and self._path(number).exists())

    def put(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a block's arrays, whole or not at all."""
        if self.folder is None:
            self._kept[number] = arrays
            return
        self._write(self._path(number), lambda path: _save(path, arrays))

    def get(self, number: int, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Arrays of a block, or some of them."""
        if self.folder is None:
            kept = self._kept[number]
            return {name: kept[name] for name in names or kept}
        with np.load(self._path(number), allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}

    @property
    def settled(self) -> dict[str, Any]:
        """What an earlier run of the job has decided."""
        if self.folder is None:
            return {}
        try:
            return dict(json.loads((self.folder / "settled.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def settle(self, decided: Mapping[str, Any]) -> None:
        """Keep a decision for those who go on with the job."""
        if self.folder is not None:
            text = json.dumps(dict(decided))
            self._write(self.folder / "settled.json", lambda path: path.write_text(text, encoding="utf-8"))

    def take_in(self, others: list["Parts"]) -> None:
        """Add the parts that other processes keep in memory."""
        for other in others:
            self._kept.update(other._kept)

    def remove(self) -> None:
        """Forget the parts: the job is through. Those of other jobs for the same output will not be wanted either."""
        self._kept = {}
        if self.folder is not None:
            name, _, _ = self.folder.name.rpartition("-")
            for folder in self.folder.parent.glob(f"{glob.escape(name)}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:07d}.npz"

    def _write(self, path: Path, write: Any) -> None:
        temporary = path.with_name(f"tmp-{secrets.token_hex(4)}{path.suffix}")
        try:
            path.parent.mkdir(exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise OutputError(
                f"{path.parent}: results so far cannot be written ({error.strerror or error}); make room,"
                " then run the same command again"
            ) from error


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def parts_of(source: str | os.PathLike[str], out: str | os.PathLike[str], job: Mapping[str, Any]) -> Parts:
    """Parts of a job from file to file, those of an interrupted run among them.

    Parameters
    ----------
    source
        The input; a file that changed is another input.
    out
        The output.
    job
        All that decides the results: weights, parameters, software. JSON types.
    """
    source, target = Path(source).expanduser(), Path(os.path.realpath(Path(out).expanduser()))
    stat = source.stat()
    key = {"source": os.path.realpath(source), "size": stat.st_size, "changed": stat.st_mtime_ns, **job}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Parts(target.with_name(f"{PREFIX}{target.name}-{digest}"))

"""Results of the finished blocks of a job; on disk, they outlive an interruption."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scmulan._io.outputs import atomic_path
from scmulan.errors import OutputError

PREFIX = ".scmulan-parts-"
"""Begin of the name of a job's hidden folder beside its output."""


class BlockStore:
    """Store of the arrays of each block, by the block's number.

    Parameters
    ----------
    folder
        Where to keep them, made with the first block; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._blocks: dict[int, Mapping[str, np.ndarray]] = {}

    @classmethod
    def of_job(
        cls, source: str | os.PathLike[str], out: str | os.PathLike[str], job: Mapping[str, Any]
    ) -> "BlockStore":
        """Open the store of a job from file to file, with what an interrupted run of the same job has left.

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
        return cls(target.with_name(f"{PREFIX}{target.name}-{digest}"))

    def __contains__(self, number: int) -> bool:
        return number in self._blocks or (self.folder is not None and self._path(number).exists())

    def put(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a block's arrays, whole or not at all.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        if self.folder is None:
            self._blocks[number] = arrays
        else:
            self._write(self._path(number), lambda path: np.savez(path, allow_pickle=False, **arrays))

    def get(self, number: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return some arrays of a block."""
        if self.folder is None:
            return {name: self._blocks[number][name] for name in names}
        with np.load(self._path(number), allow_pickle=False) as file:
            return {name: file[name] for name in names}

    def chosen_precision(self) -> str | None:
        """Return the precision that an earlier run of the job has chosen, None if there was none."""
        if self.folder is None:
            return None
        try:
            return str(json.loads((self.folder / "settled.json").read_text(encoding="utf-8"))["precision"])
        except (OSError, ValueError, KeyError):
            return None

    def keep_precision(self, precision: str) -> None:
        """Keep the precision chosen for those who continue the job."""
        if self.folder is not None:
            text = json.dumps({"precision": precision})
            self._write(self.folder / "settled.json", lambda path: path.write_text(text, encoding="utf-8"))

    def merge(self, others: list["BlockStore"]) -> None:
        """Add the blocks that other processes keep in memory."""
        for other in others:
            self._blocks.update(other._blocks)

    def remove(self) -> None:
        """Forget all blocks: the job is done. Those of other jobs for the same output will not be needed either."""
        self._blocks = {}
        if self.folder is not None:
            name, _, _ = self.folder.name.rpartition("-")
            for folder in self.folder.parent.glob(f"{glob.escape(name)}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:07d}.npz"

    @staticmethod
    def _write(path: Path, write: Callable[[Path], Any]) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                write(temporary)
        except (OSError, OutputError) as error:
            cause = error.__cause__ if isinstance(error, OutputError) else error
            raise OutputError(
                f"{path.parent}: results so far cannot be written ({getattr(cause, 'strerror', None) or cause}); make"
                " room, then run the same command again"
            ) from error

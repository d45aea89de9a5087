"""The state of a run on disk: a kill at any moment leaves a usable checkpoint.

A checkpoint is a folder of safetensors files (one per process that wrote it; PyTorch's distributed checkpoint reads
them into any number of processes), ``facts.json`` and ``hashes.json``. It is written under another name while training
goes on, flushed, hashed, then renamed. The newest that reads back whole is used. Random numbers need no state, because
batches are a function of (seed, step).
"""

import json
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from scmulan._dist import Ranks
from scmulan._io.outputs import atomic_path, lock_file, sha256
from scmulan.errors import OutputError, RecipeError

CHECKPOINT_NAME = "step-{:09d}"
ALONE = Ranks()


def _warn(line: str) -> None:
    print(f"scmulan: {line}", file=sys.stderr)


class RunFolder:
    """Folder of one run: ``recipe.json``, ``vocabulary.json``, ``log.jsonl``, ``checkpoints/``.

    Used as a context, it is released at the end.

    Parameters
    ----------
    path
        The folder; made if it does not exist.
    warn
        Called with one line about each checkpoint that is damaged and passed over.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = _warn) -> None:
        self.path = path
        self.warn = warn
        self.checkpoints = path / "checkpoints"
        self._lock: FileLock | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the run folder {path}: {error.strerror}") from None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- whose folder it is ------------------------------------------------------------------------------------------

    def claim(
        self,
        recipe: dict[str, Any],
        *,
        free: Iterable[str] = (),
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Lock the folder for this process; record the recipe, or check that the earlier run followed the same one.

        Parameters
        ----------
        recipe
            All settings.
        free
            Sections that may differ when a run is continued.
        complete
            Adds to a recipe that an earlier version wrote the settings that it lacks.

        Raises
        ------
        OutputError
            If another process is writing here.
        RecipeError
            If another recipe was followed here; names the first setting that differs.
        """
        self.lock()
        file = self.path / "recipe.json"
        now = json.loads(json.dumps(recipe))
        if file.exists():
            before = complete(json.loads(file.read_text(encoding="utf-8")))
            old, new = ({k: v for k, v in r.items() if k not in set(free)} for r in (before, now))
            if old != new:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe ({_first_difference(old, new)}); "
                    "use another --out, or remove the folder to start anew"
                )
        write_text(file, json.dumps(recipe, indent=1))

    def lock(self) -> None:
        """Keep other processes out until :meth:`release`, or until this process is gone, however it ends.

        Raises
        ------
        OutputError
            If another process holds the folder; names it.
        """
        if self._lock is not None:
            return
        holder_file = self.path / ".holder"  # not the locked file, which a process that tries its luck may empty
        holder = holder_file.read_text(encoding="utf-8") if holder_file.exists() else "another process"
        self._lock = lock_file(
            self.path / ".lock",
            f"{self.path}: a run is going on in this folder ({holder}); wait for it, or give another --out",
        )
        holder_file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        for left in [*self.checkpoints.glob(".*"), *self.path.glob(".tmp-*")]:  # of a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- writing -----------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        facts: Mapping[str, Any],
        keep: int,
        *,
        ranks: Ranks = ALONE,
        name: str = "",
    ) -> None:
        """Begin to write a checkpoint; :meth:`wait` ends it. All but the newest ``keep`` are dropped then.

        Parameters
        ----------
        step
            Steps done.
        tensors
            State by name; copied before this returns, so that training may go on. Sharded over processes or not.
        facts
            Plain numbers and texts to keep with it.
        keep
            Checkpoints kept.
        ranks
            Processes that write together; all have to call.
        name
            Of the folder, in place of the step's.
        """
        self.wait()
        target = self.checkpoints / (name or CHECKPOINT_NAME.format(step))
        partial = target.with_name(f".{target.name}.partial")

        def make_folder() -> None:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            except OSError as error:
                raise _write_error(target, error) from None

        ranks.run_on_first(make_folder)
        if ranks.world == 1:
            copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            write: Callable[[], Any] = lambda: save_file(copies, partial / "shard-00001.safetensors")  # noqa: E731
        else:
            storage = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            saving = dcp.async_save(dict(tensors), storage_writer=storage, process_group=ranks.io_group)
            write = saving.result  # type: ignore[union-attr]
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        facts = {"step": step, **facts}
        self._pending = self._writer.submit(self._finish, write, partial, target, facts, keep, ranks.first)

    def _finish(
        self, write: Callable[[], Any], partial: Path, target: Path, facts: Mapping[str, Any], keep: int, first: bool
    ) -> None:
        try:
            write()
            if not first:
                return
            (partial / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            hashes = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            (partial / "hashes.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
            for file in [*partial.iterdir(), partial]:
                _flush(file)
            _remove(target)  # of a run that was continued from before it
            os.replace(partial, target)
            _flush(self.checkpoints)
            for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
                _remove(old)
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _write_error(target, error) from None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is written.

        Raises
        ------
        OutputError
            If it cannot be written; the one before is untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    # -- reading -----------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """Find the newest checkpoint that is whole, or None; warn of damaged ones."""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            if not folder.is_dir():
                continue
            damage = find_damage(folder)
            if damage is None:
                return folder
            self.warn(f"{damage}; the checkpoint before it is used")
        return None

    def last_facts(self) -> dict[str, Any]:
        """Read the facts of the newest checkpoint, whether its tensors are whole or not; none without a checkpoint."""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            try:
                return read_facts(folder)
            except (OSError, ValueError):
                continue
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor], *, ranks: Ranks = ALONE) -> dict[str, Any] | None:
        """Read the newest whole checkpoint into tensors of this process, sharded or not; return its facts, or None.

        Raises
        ------
        RecipeError
            If it holds another network.
        """
        folder: Path | None = ranks.broadcast(self.newest() if ranks.first else None)
        if folder is None:
            return None
        read_tensors(folder, tensors, ranks=ranks)
        return read_facts(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the numbers and texts that were kept with a checkpoint."""
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


def read_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, ranks: Ranks = ALONE) -> None:
    """Read some of a checkpoint's tensors, in place.

    Parameters
    ----------
    folder
        Of the checkpoint.
    tensors
        By name; filled, sharded or not.
    ranks
        Processes that read together.

    Raises
    ------
    RecipeError
        If the checkpoint lacks one of them, or has it in another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():  # that one process is no job is no surprise
            warnings.simplefilter("ignore")
            dcp.load(dict(tensors), storage_reader=reader, process_group=ranks.group, no_dist=ranks.world == 1)
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        raise RecipeError(f"{folder}: not the state of this network ({str(error).splitlines()[0][:200]})") from None


def find_damage(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint, naming the file; None if it is whole."""
    try:
        hashes = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
        for name, wanted in hashes.items():
            if not (folder / name).is_file():
                return f"{folder / name}: missing"
            if sha256(folder / name) != wanted:
                return f"{folder / name}: altered since it was written (another sha256 than in hashes.json)"
    except (OSError, ValueError, AttributeError):
        return f"{folder / 'hashes.json'}: missing or not readable"
    return None


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log that lie beyond a step: after a kill they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except json.JSONDecodeError:  # the line that was being written at the kill
            break
    write_text(path, "".join(f"{line}\n" for line in kept))


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill leaves no half of it under its name."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        os.replace(folder, old)
        shutil.rmtree(old)


def _write_error(target: Path, error: BaseException) -> OutputError:
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
    return OutputError(f"cannot write the checkpoint {target}: {reason}; the one before it is still good")


def _first_difference(a: Any, b: Any, where: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {a!r}, is {b!r}"[:200]

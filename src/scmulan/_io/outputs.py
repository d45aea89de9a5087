"""Check outputs before any work starts, write them whole or not at all, hash and lock files."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from scmulan.errors import OutputError

FULL = "disk full or file too large"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# HDF5 and Rust libraries report the system's error in their text only.
_FULL_TEXT = re.compile(rf"(errno = |os error )({'|'.join(map(str, _FULL))})\b")


def check_output(
    path: str | os.PathLike[str], force: bool = False, *, folder: bool = False, suffixes: Sequence[str] = ()
) -> None:
    """Check, before any work starts, that an output may and can be written.

    Parameters
    ----------
    path
        Path of the output.
    force
        Whether an output that exists may be replaced.
    folder
        Whether the output is a folder; an empty one may exist.
    suffixes
        Allowed ends of the name; any by default.

    Raises
    ------
    OutputError
        If it exists and ``force`` is not given, is not of the right kind, or its folder is missing or not writable.
    """
    path = Path(path).expanduser()
    if suffixes and not path.name.lower().endswith(tuple(suffixes)):
        raise OutputError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.exists():
        if not (path.is_dir() or path.is_file()):
            raise OutputError(f"{path}: neither a file nor a folder; give another path")
        replaceable = folder or path.suffix == ".zarr"
        if path.is_dir() and not replaceable:
            raise OutputError(f"{path}: a folder; give the path of a file")
        if folder and path.is_file():
            raise OutputError(f"{path}: a file; give the path of a folder")
        if not force and not (folder and not any(path.iterdir())):
            raise OutputError(f"{path}: exists already; give --force to replace it, or another path")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{path}: there is no folder {parent}; make it first (mkdir -p)")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OutputError(f"{path}: the folder {parent} cannot be written to ({error.strerror})") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside the target, which replaces the target on success and is removed on error.

    Parameters
    ----------
    path
        Path of the output, a file or a folder. A link is followed.

    Yields
    ------
    pathlib.Path
        A path that does not exist yet, in the same folder and with the same end; write a file or a folder there.

    Raises
    ------
    OutputError
        If the disk is full, or the file would be larger than the system or a quota allows, or cannot be written.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
    try:
        with _quiet_hdf5():
            yield temporary
        if temporary.is_file():
            # Some file systems report a full disk only here.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _replace(temporary, target)
    except Exception as error:
        # An output inside this one has reported already which of them found no room.
        reported = isinstance(error, OutputError) and FULL in str(error)
        if _is_full(error) and not reported:
            raise OutputError(
                f"{path}: {FULL}; nothing was written. Make room, or give a path on another disk"
            ) from error
        if isinstance(error, OSError) and error.filename in (str(temporary), temporary):
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        raise
    finally:
        _remove(temporary)


@contextmanager
def _quiet_hdf5() -> Iterator[None]:
    """Silence the traceback that HDF5 prints for each of its objects that cannot be flushed to a full disk.

    The first of these errors is raised and becomes one line; the others come while objects are freed, where Python can
    only print them.
    """
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _is_full(error):
            excepthook(kind, error, trace)

    def print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        if not _is_full(unraisable.exc_value):
            unraisablehook(unraisable)

    sys.excepthook, sys.unraisablehook = print_exception, print_unraisable
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def _replace(temporary: Path, target: Path) -> None:
    """Move a finished output to its path; an old folder is moved aside first, as the system replaces only files."""
    if not target.is_dir():
        os.replace(temporary, target)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is an exhausted disk, quota or file size."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def sha256(path: str | os.PathLike[str]) -> str:
    """Compute the sha256 of a file, read in chunks; hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(path: Path, busy: str) -> FileLock:
    """Lock a file for this process, on every system; the lock ends with the process, however that ends.

    Parameters
    ----------
    path
        The lock file; it is made if needed, and stays empty.
    busy
        Message for when another process holds it.

    Returns
    -------
    filelock.FileLock
        Held; ``release()`` it, or use it as a context.

    Raises
    ------
    OutputError
        If another process holds the lock, or its folder cannot be written to.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(busy) from None
    except OSError as error:
        raise OutputError(f"cannot write into {path.parent}: {error.strerror}") from None
    return lock

"""Files of a model folder: find, read, verify, write and describe them, without torch.

``config.json`` (shape of the network), ``vocabulary.json``, ``card.json`` (training card: what the model knows and
where it is from), ``model.safetensors`` (weights) and ``hashes.json`` (sha256 of each of these). How weights become a
network is in :mod:`scmulan.model.loading`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scmulan._io.outputs import atomic_path, check_output, sha256
from scmulan.errors import ModelError, OutputError, ScmulanError
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

FORMAT = "scmulan-model/1"
WEIGHTS = "model.safetensors"
HASHED = ("config.json", "vocabulary.json", "card.json", WEIGHTS)
HASHES = "hashes.json"

# -- finding models -------------------------------------------------------------------------------------------------


def packaged_models() -> dict[str, Path]:
    """Return the folders of the models that ship with scmulan, by name."""
    resources = Path(str(files("scmulan.resources")))
    return {path.parent.name: path.parent for path in sorted(resources.glob("*/config.json"))}


def resolve_model(name_or_path: str | Path) -> Path:
    """Find the folder of a model.

    Parameters
    ----------
    name_or_path
        A local model folder, which wins, or the name of a model that ships with scmulan.

    Raises
    ------
    ModelError
        If there is neither; the message lists the models that ship.
    """
    path = Path(name_or_path)
    packaged = packaged_models()
    # A folder that only happens to be called like a packaged model must not hide it.
    if path.is_dir() and ((path / "config.json").exists() or str(name_or_path) not in packaged):
        return path
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)]
    if path.exists():
        raise ModelError(
            f"{path}: a file, expected a model folder; `scmulan model import {path} OUT` reads a published checkpoint"
        )
    known = ", ".join(packaged) or "none"
    raise ModelError(f"no model {str(name_or_path)!r}: neither a folder nor one of the packaged models ({known})")


# -- reading --------------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the shape of the network: ``config.json`` without its format key."""
    raw = _read_object(Path(folder), "config.json")
    found = raw.pop("format", None)
    if found != FORMAT:
        raise ModelError(f"{Path(folder) / 'config.json'}: format is {found!r}, expected {FORMAT!r}")
    return raw


def read_card(folder: str | Path) -> dict[str, Any]:
    """Read the training card."""
    return _read_object(Path(folder), "card.json")


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Read the vocabulary of a model."""
    raw = _read_object(Path(folder), "vocabulary.json")
    try:
        return Vocabulary.from_json(raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # Errors of scmulan (ValueErrors too) explain themselves; others come from JSON that is no vocabulary at all.
        reason = str(error) if isinstance(error, ScmulanError) else f"not a vocabulary ({error!r})"
        raise ModelError(f"{Path(folder) / 'vocabulary.json'}: {reason}") from None


def read_hashes(folder: str | Path) -> dict[str, str]:
    """Read the stored sha256 of each file, without reading the files."""
    folder = Path(folder)
    hashes = _read_object(folder, HASHES)
    for name in HASHED:
        if not isinstance(hashes.get(name), str):
            raise ModelError(f"{folder / HASHES}: no hash of {name}; fetch or export the model again")
    return hashes


def verify_hashes(folder: str | Path) -> dict[str, str]:
    """Compare every file with its stored sha256, and return the hashes.

    Raises
    ------
    ModelError
        If a file is missing or was altered; the message names the first one.
    """
    folder = Path(folder)
    hashes = read_hashes(folder)
    for name in HASHED:
        found = sha256(existing_file(folder, name))
        if found != hashes[name]:
            raise ModelError(
                f"{folder / name}: altered since the model was written (sha256 {found[:12]}…, "
                f"{HASHES} says {hashes[name][:12]}…); fetch or export the model again"
            )
    return hashes


def existing_file(folder: Path, name: str) -> Path:
    """Return the path of one of the folder's files; raise a :class:`ModelError` if it is missing."""
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{folder}: {name} is missing; a model folder holds {', '.join((*HASHED, HASHES))}")
    return path


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the folder's JSON files, which has to hold an object."""
    path = existing_file(folder, name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not JSON (it is no UTF-8 text)") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds a JSON {type(raw).__name__}, expected an object")
    return raw


# -- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def writing_folder(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder that replaces the model folder when the block ends without an error.

    Parameters
    ----------
    folder
        Path of the model folder.
    force
        Replace what is there, if that is a model folder or empty. Other folders are never removed.

    Yields
    ------
    Path
        Empty folder for :func:`write_json`, the weights and :func:`write_hashes`.

    Raises
    ------
    OutputError
        If ``folder`` holds something (and is not to be replaced) or cannot be written; nothing is left behind then.
    """
    folder = Path(folder).expanduser()
    check_output(folder, force, folder=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / HASHES).is_file():
        raise OutputError(f"{folder}: holds other things than a model, so --force does not replace it")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        yield temporary


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write one of the folder's JSON files."""
    text = json.dumps(content, ensure_ascii=False, indent=None if name == "vocabulary.json" else 2)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def write_hashes(folder: Path) -> None:
    """Write ``hashes.json``: sha256 of each of the other files."""
    write_json(folder, HASHES, {name: sha256(folder / name) for name in HASHED})


# -- describing -----------------------------------------------------------------------------------------------------


def describe_model(name_or_path: str | Path) -> dict[str, Any]:
    """Describe a model in plain types, without reading its weights into memory.

    Parameters
    ----------
    name_or_path
        Path of a model folder, or the name of a packaged model.

    Returns
    -------
    dict
        ``name``, ``folder``, ``description``, ``parameters``, ``mebibytes``, ``stored_as`` (types of the weights),
        ``weights_hash``, ``config``, ``objective``, ``genes`` (number), ``words`` (metadata tokens by family) and
        ``card``. The files are not compared with their hashes: ``scmulan model verify`` does that.

    Raises
    ------
    ModelError
        If there is no such model, or a file of it is missing or unreadable.
    """
    folder = resolve_model(name_or_path)
    config, card, vocabulary = read_config(folder), read_card(folder), read_vocabulary(folder)
    parameters, dtypes = _weights(folder / WEIGHTS)
    return {
        "name": str(card.get("name", folder.name)),
        "folder": str(folder),
        "description": str(card.get("description") or card.get("summary") or ""),
        "parameters": parameters,
        "mebibytes": round(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 2**20, 2),
        "stored_as": dtypes,
        "weights_hash": read_hashes(folder)[WEIGHTS],
        "config": config,
        "objective": str(card.get("objective", "published")),
        "genes": len(vocabulary.ids(Family.GENE)),
        "words": {str(family): vocabulary.names(family) for family in METADATA},
        "card": card,
    }


def _weights(path: Path) -> tuple[int, list[str]]:
    """Return the number of weights and their types, from the head of the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = [file.get_slice(name) for name in file.keys()]
            return sum(math.prod(s.get_shape()) for s in slices), sorted({s.get_dtype() for s in slices})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not readable as safetensors, perhaps cut off ({error})") from None

"""Stored outputs of the published release: read, and checked for sense, before anything is compared.

A fixture is an ``.npz`` without pickles: ``config`` (JSON), ``expression`` (cells × genes, log1p), ``prompt_ids`` and
``prompt_values`` (padded with −1), ``entity_logits`` and ``value_outputs`` at the last prompt position,
``annotation_ids``, ``annotation_values`` and ``annotation_ids_kv`` (both decoding rules), ``embedding``,
``generation_prompts`` (JSON), ``generated_ids`` and ``generated_values`` (prompt included).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scmulan.errors import InputError
from scmulan.language.sentence import Sentences

PADDED = ("prompt_ids", "prompt_values", "annotation_ids", "annotation_values", "annotation_ids_kv")
NUMBERS = ("entity_logits", "value_outputs", "embedding")
GENERATED = ("generated_ids", "generated_values")
# Not among what the release's fixtures hold, but compared where a file has it.
EXTRA = ("annotation_values_kv",)

# Settings of `config` under our names; its other entries (the seed) say nothing about the network's shape.
SETTINGS = {
    "layers": "layers",
    "heads": "heads",
    "width": "width",
    "bias": "bias",
    "levels": "levels",
    "vocab": "vocabulary",
    "vocabulary": "vocabulary",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixture:
    """Contents of a fixture."""

    path: Path
    """The file."""
    settings: dict[str, int]
    """Shape of the network that made it, under our names, as far as the file tells."""
    arrays: dict[str, np.ndarray]
    """Arrays to compare with, each two-dimensional: one row per cell or generation prompt."""
    expression: np.ndarray | None
    """log1p values ``[cells, genes]``."""
    generation_prompts: list[list[str]]
    """Metadata words of each generation prompt; empty where the file has none."""

    @property
    def cells(self) -> int:
        """Number of cells."""
        if self.expression is not None:
            return len(self.expression)
        return max((len(a) for n, a in self.arrays.items() if n not in GENERATED), default=0)

    def prompts(self, vocabulary: int, levels: int) -> Sentences | None:
        """Prompts as stored, or None where they are not.

        Raises
        ------
        InputError
            If they hold ids or bins that the network has no embedding for.
        """
        if not {"prompt_ids", "prompt_values"} <= set(self.arrays):
            return None
        ids, values = self.arrays["prompt_ids"], self.arrays["prompt_values"]
        lengths = _lengths(ids)
        inside = np.arange(ids.shape[1]) < lengths[:, None]
        for name, array, limit in (("prompt_ids", ids, vocabulary), ("prompt_values", values, levels + 1)):
            wrong = inside & ((array < 0) | (array >= limit))
            if wrong.any() or array.shape != ids.shape or lengths.min() == 0:
                raise InputError(
                    f"fixture {self.path}: {name} of cell {int(np.argmax(wrong.any(1)))} "
                    f"is no prompt, expected at least one number of 0 … {limit - 1}, then −1"
                )
        return Sentences.join([(ids[i, :n], values[i, :n], int(n)) for i, n in enumerate(lengths)])

    def new_words(self, prompt_lengths: np.ndarray, end: int) -> np.ndarray:
        """How many words may be said after each generation prompt: the file shows it without saying it.

        Sentences that do not stop at the end word stop at a limit, of new words or of all words: whichever explains
        more of the rows.
        """
        ids = self.arrays["generated_ids"]
        total = _lengths(ids)
        new = total - prompt_lengths
        if new.min() < 1:
            raise InputError(
                f"fixture {self.path}: row {int(np.argmax(new < 1))} of generated_ids ends with its prompt"
            )
        cut = ids[np.arange(len(ids)), total - 1] != end
        if not cut.any():
            return np.full(len(ids), new.max())
        (limit_new, rows_new), (limit_total, rows_total) = _most_common(new[cut]), _most_common(total[cut])
        return np.full(len(ids), limit_new) if rows_new >= rows_total else limit_total - prompt_lengths


def read_fixture(path: str | Path) -> Fixture:
    """Read a fixture; any of the arrays to compare may be absent.

    Raises
    ------
    InputError
        If the file is no fixture or contradicts itself; one line that names the array.
    """
    path = Path(path)
    raw = _load(path)
    arrays = {name: raw[name] for name in (*PADDED, *NUMBERS, *GENERATED, *EXTRA) if name in raw}
    expression = raw.get("expression")
    prompts = _json(path, raw, "generation_prompts", list) if "generation_prompts" in raw else []
    if not all(isinstance(p, list) and all(isinstance(word, str) for word in p) for p in prompts):
        raise InputError(f"fixture {path}: generation_prompts is no list of lists of words")
    if expression is None and not {"prompt_ids", "prompt_values"} <= set(arrays) and not prompts:
        raise InputError(f"fixture {path}: neither expression nor prompts, nothing to compare a model with")
    _check_arrays(path, arrays, expression, len(prompts))
    settings = _settings(path, _json(path, raw, "config", dict), arrays)
    return Fixture(path=path, settings=settings, arrays=arrays, expression=expression, generation_prompts=prompts)


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"fixture {path}: no such file, expected an .npz of stored outputs")
    try:
        with open(path, "rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if isinstance(file, np.lib.npyio.NpzFile):
                return {name: file[name] for name in file.files}
    except Exception as error:  # noqa: BLE001 - any bytes may be in the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"fixture {path}: not readable as .npz without pickles ({reason})") from None
    raise InputError(f"fixture {path}: a single array, expected an .npz of stored outputs")


def _json(path: Path, raw: dict[str, np.ndarray], name: str, kind: type) -> Any:
    try:
        content = json.loads(str(raw[name]))
    except KeyError:
        raise InputError(f"fixture {path}: no {name}; it holds {', '.join(raw) or 'nothing'}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"fixture {path}: {name} is not JSON ({error.msg})") from None
    if not isinstance(content, kind):
        raise InputError(f"fixture {path}: {name} is a JSON {type(content).__name__}, expected a {kind.__name__}")
    return content


def _settings(path: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, int]:
    settings: dict[str, int] = {}
    told = [(SETTINGS[key], value, f"config {key}") for key, value in config.items() if key in SETTINGS]
    seen = [("vocabulary", n) for n in ("entity_logits", "value_outputs")] + [("width", "embedding")]
    told += [(name, arrays[array].shape[1], f"the width of {array}") for name, array in seen if array in arrays]
    for name, value, source in told:
        if not isinstance(value, int):
            raise InputError(f"fixture {path}: {source} is {value!r}, expected a whole number or true or false")
        if settings.setdefault(name, value) != value:
            raise InputError(f"fixture {path}: {source} is {value}, but another part says {settings[name]}")
    return settings


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], expression: np.ndarray | None, prompts: int) -> None:
    """Dimensions, types and row counts; what the numbers say is for the comparison to find."""
    if prompts == 0:
        for name in GENERATED:
            arrays.pop(name, None)  # sentences without their prompts cannot be asked for
    everything = arrays if expression is None else {"expression": expression, **arrays}
    cells: int | None = None
    for name, array in everything.items():
        wanted = np.floating if name in (*NUMBERS, "expression") else np.integer
        if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, wanted):
            raise InputError(
                f"fixture {path}: {name} is {array.dtype} {list(array.shape)}, "
                f"expected {'floating-point' if wanted is np.floating else 'whole'} numbers in rows"
            )
        rows = prompts if name in GENERATED else len(array) if cells is None else cells
        cells = cells if name in GENERATED else rows
        if len(array) != rows:
            raise InputError(f"fixture {path}: {name} has {len(array)} rows, expected {rows}")
    if expression is not None and not (np.isfinite(expression).all() and (expression >= 0).all()):
        raise InputError(f"fixture {path}: expression has values below zero or that are no numbers, expected log1p")


def _lengths(ids: np.ndarray) -> np.ndarray:
    """Numbers of each row up to the last that is no padding."""
    return (np.arange(1, ids.shape[1] + 1) * (ids >= 0)).max(1)


def _most_common(numbers: np.ndarray) -> tuple[int, int]:
    values, counts = np.unique(numbers, return_counts=True)
    return int(values[counts.argmax()]), int(counts.max())

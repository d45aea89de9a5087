"""The reviewable text that says which files are training cells and what their columns mean (TOML).

::

    folder = "../shared/data/train"        # relative to the file that says so

    [columns]                              # obs column of each metadata family, for all files
    organ = "organ"
    fine_type = "label"
    donor = "donor"                        # no word, but what splits go by

    [rename.technology]                    # value → word; "" drops the value
    "10X" = "10x"

    [[study]]
    file = "one.h5ad"                      # may have its own [study.columns], [study.rename.…], fixed values …
    fixed = { organ = "Blood" }
    name = "Kang 2018, labelled"           # in reports; default: the file's name
    group = "Kang 2018"                    # files of one group share their donors; default: the study's name
    layer = "counts"                       # which matrix (and `state`, "counts" or "log1p"); default: found by looking
    obs = "one_cells.csv"                  # a table of cells for a file that has none (10x output)
    where = "is_primary_data == True"      # which cells, of a SOMA experiment

The text of a corpus may also say ``vocabulary`` or ``genes``, ``unknown``, ``duplicates`` and ``shard_cells``
(:class:`CorpusSpec`). A training recipe has the same text in its ``[data]``.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from scmulan.errors import RecipeError
from scmulan.vocab.vocabulary import METADATA, Family, family_of_field

DONOR = "donor"
MatrixKind = Literal["counts", "log1p"]
CHOICES = {"unknown": ("drop", "add", "refuse"), "duplicates": ("keep", "drop")}


@dataclass(kw_only=True, slots=True)
class StudySpec:
    """One file of cells."""

    file: Path
    """h5ad file, zarr folder, 10x output (h5, or a folder with matrix.mtx), or SOMA experiment."""
    name: str
    """Name of the study in reports."""
    columns: dict[Family, str]
    """obs column of each metadata family."""
    rename: dict[Family, dict[str, str]] = field(default_factory=dict)
    """Value → word; an empty word drops the value."""
    fixed: dict[Family, str] = field(default_factory=dict)
    """Word that all cells of the file share."""
    group: str = ""
    """Files of one group share their donors; by default each file is a group of its own."""
    donor_column: str | None = None
    """obs column of donors."""
    donor: str = ""
    """Donor of all cells of the file."""
    layer: str | None = None
    """Which matrix to read; found by looking unless given."""
    matrix_kind: MatrixKind | None = None
    """What it holds; found by looking unless given."""
    where: str = ""
    """Which cells of a SOMA experiment: a filter of obs as TileDB-SOMA understands it."""
    obs: Path | None = None
    """Table of cells (CSV or TSV, names in the first column) that is joined to the file's own."""

    def metadata(self, obs: pd.DataFrame) -> dict[Family, pd.Series]:
        """Words of each family per cell, as strings; an empty string means unknown."""
        out = {}
        for family in METADATA:
            if family in self.fixed:
                words = np.full(len(obs), self.fixed[family], dtype=object)
            elif family in self.columns and self.columns[family] in obs:
                words = _texts(obs[self.columns[family]])
            else:
                continue
            out[family] = pd.Series(words, index=obs.index, dtype=object).replace(self.rename.get(family, {}))
        return out

    def donors(self, obs: pd.DataFrame) -> np.ndarray:
        """Donor of each cell, as strings; an empty string means unknown."""
        if self.donor or self.donor_column not in obs:
            return np.full(len(obs), self.donor, dtype=object)
        return _texts(obs[self.donor_column])


def _texts(column: pd.Series) -> np.ndarray:
    """Values as stripped texts, "" where missing; each different value is looked at once."""
    codes, values = pd.factorize(column)
    return np.array([*(str(value).strip() for value in values), ""], dtype=object)[codes]


@dataclass(kw_only=True, slots=True)
class CorpusSpec:
    """A corpus: its studies, and how they are written."""

    studies: list[StudySpec]
    """Files, in the order of their cells."""
    vocabulary: str = ""
    """Vocabulary JSON, or "published"; "" makes a new one of ``genes`` gene words and all metadata words."""
    genes: int = 4000
    """Gene words of a new vocabulary, the most variable over all studies."""
    unknown: str = "drop"
    """What to do with metadata words that a given vocabulary lacks: "drop", "add" or "refuse"."""
    duplicates: str = "keep"
    """Whether cells that repeat an earlier one stay: "keep" or "drop"."""
    shard_cells: int = 60_000
    """Largest number of cells in a shard."""


def read_corpus_spec(path: Path) -> CorpusSpec:
    """Read the TOML of a corpus, or the ``[data]`` and ``[vocabulary]`` of a training recipe.

    Raises
    ------
    RecipeError
        If it is no TOML, a setting is unknown or has a wrong value, or a file does not exist.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); expected the TOML text of a corpus") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from None
    if "data" in raw and "study" not in raw:
        words = raw.get("vocabulary", {})
        own = {"vocabulary": words.get("file", "")} | ({"genes": words["genes"]} if "genes" in words else {})
        raw = own | raw["data"]
    own = {key: raw.pop(key) for key in ("vocabulary", "genes", *CHOICES, "shard_cells") if key in raw}
    for key, choices in CHOICES.items():
        if own.get(key, choices[0]) not in choices:
            raise RecipeError(f"{path}: {key} = {own[key]!r}; expected {' or '.join(map(repr, choices))}")
    for key in ("genes", "shard_cells"):
        if not (isinstance(own.get(key, 1), int) and own.get(key, 1) > 0):
            raise RecipeError(f"{path}: {key} = {own[key]!r}; expected a whole number above 0")
    if own.get("vocabulary", "") not in ("", "published"):
        file = path.parent / own["vocabulary"]
        if not file.is_file():
            raise RecipeError(f"{path}: vocabulary {file} not found; give a vocabulary JSON, or 'published'")
        own["vocabulary"] = str(file.resolve())
    studies = read_spec(raw, path.parent)
    names = [study.name for study in studies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{path}: two studies have the name {twice!r}; give them different ones (`name`)")
    return CorpusSpec(studies=studies, **own)


def read_spec(raw: Mapping[str, Any], base: Path) -> list[StudySpec]:
    """Studies of a parsed TOML table; relative paths start at ``base``.

    Raises
    ------
    RecipeError
        If a setting is unknown or a file does not exist.
    """
    _only(raw, {"folder", "columns", "rename", "study"}, "[data]")
    folder = (base / raw.get("folder", ".")).resolve()
    columns, donor_column = _families(raw.get("columns", {}))
    rename, _ = _families(raw.get("rename", {}))
    studies = []
    known = {"file", "name", "columns", "rename", "fixed", "group", "layer", "state", "where", "obs"}
    for entry in raw.get("study", []):
        _only(entry, known, "[[study]]")
        if "file" not in entry:
            raise RecipeError("a [[study]] without `file`: name its h5ad file, relative to `folder`")
        path = folder / entry["file"]
        table = _table(folder, base, entry["obs"]) if "obs" in entry else None
        for wanted in (path, table):
            if wanted is not None and not wanted.exists():
                raise RecipeError(
                    f"training cells not found: {wanted} (see `folder` and `file` in the recipe's [data])"
                )
        if entry.get("state", "counts") not in ("counts", "log1p"):
            raise RecipeError(f"{entry['file']}: state = {entry['state']!r}; expected 'counts' or 'log1p'")
        own_columns, own_donor = _families(entry.get("columns", {}))
        fixed, donor = _families(entry.get("fixed", {}))
        own = {f: {**rename.get(f, {}), **m} for f, m in _families(entry.get("rename", {}))[0].items()}
        name = entry.get("name", path.stem)
        studies.append(
            StudySpec(
                file=path,
                name=name,
                columns={**columns, **own_columns},
                rename={**rename, **own},
                fixed=fixed,
                group=entry.get("group", name),
                donor_column=own_donor or donor_column,
                donor=donor or "",
                layer=entry.get("layer"),
                matrix_kind=cast("MatrixKind | None", entry.get("state")),
                where=entry.get("where", ""),
                obs=table,
            )
        )
    if not studies:
        raise RecipeError("the recipe's [data] names no [[study]]: there is nothing to train on")
    return studies


def _table(folder: Path, base: Path, name: str) -> Path:
    """A table of cells lies beside the data, or, where those are nobody's to write to, beside the recipe."""
    beside = base / name
    return beside.resolve() if beside.is_file() and not (folder / name).is_file() else folder / name


def _families(raw: Mapping[str, Any]) -> tuple[dict[Family, Any], Any]:
    """What is said of each family, and of donors."""
    said = {family_of_field(key): value for key, value in raw.items() if key != DONOR}
    return said, raw.get(DONOR)


def _only(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = set(raw) - known
    if unknown:
        raise RecipeError(f"unknown setting {sorted(unknown)[0]!r} in {where}: expected {', '.join(sorted(known))}")

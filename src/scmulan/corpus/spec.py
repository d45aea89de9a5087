"""The reviewable text that says which files are training cells and what their columns mean (TOML).

::

    folder = "../shared/data/train"        # relative to the file that says so

    [columns]                              # obs column of each metadata family, for all files
    organ = "organ"
    fine_type = "label"

    [rename.technology]                    # value → word; "" drops the value
    "10X" = "10x"

    [[study]]
    file = "one.h5ad"                      # may have its own [study.columns], [study.rename.…], fixed values …
    fixed = { organ = "Blood" }
    name = "Kang 2018, labelled"           # in reports; default: the file's name
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from scmulan.errors import RecipeError
from scmulan.language.vocabulary import METADATA, Family, family_of_field


@dataclass(kw_only=True, slots=True)
class StudySpec:
    """One file of cells."""

    file: Path
    """h5ad file."""
    name: str
    """Name of the study in reports."""
    columns: dict[Family, str]
    """obs column of each metadata family."""
    rename: dict[Family, dict[str, str]] = field(default_factory=dict)
    """Value → word; an empty word drops the value."""
    fixed: dict[Family, str] = field(default_factory=dict)
    """Word that all cells of the file share."""

    def metadata(self, obs: pd.DataFrame) -> dict[Family, pd.Series]:
        """Words of each family per cell, as strings; an empty string means unknown."""
        out = {}
        for family in METADATA:
            if family in self.fixed:
                words = pd.Series(self.fixed[family], index=obs.index, dtype=object)
            elif family in self.columns and self.columns[family] in obs:
                words = obs[self.columns[family]].astype(object).where(obs[self.columns[family]].notna(), "")
                words = words.astype(str).str.strip()
            else:
                continue
            out[family] = words.replace(self.rename.get(family, {}))
        return out


def read_spec(raw: Mapping[str, Any], base: Path) -> list[StudySpec]:
    """Studies of a parsed TOML table; relative paths start at ``base``.

    Raises
    ------
    RecipeError
        If a setting is unknown or a file does not exist.
    """
    _only(raw, {"folder", "columns", "rename", "study"}, "[data]")
    folder = (base / raw.get("folder", ".")).resolve()
    columns = _families(raw.get("columns", {}))
    rename = _families(raw.get("rename", {}))
    studies = []
    for entry in raw.get("study", []):
        _only(entry, {"file", "name", "columns", "rename", "fixed"}, "[[study]]")
        if "file" not in entry:
            raise RecipeError("a [[study]] without `file`: name its h5ad file, relative to `folder`")
        path = folder / entry["file"]
        if not path.is_file():
            raise RecipeError(f"training cells not found: {path} (see `folder` and `file` in the recipe's [data])")
        own = {f: {**rename.get(f, {}), **m} for f, m in _families(entry.get("rename", {})).items()}
        studies.append(
            StudySpec(
                file=path,
                name=entry.get("name", path.stem),
                columns={**columns, **_families(entry.get("columns", {}))},
                rename={**rename, **own},
                fixed=_families(entry.get("fixed", {})),
            )
        )
    if not studies:
        raise RecipeError("the recipe's [data] names no [[study]]: there is nothing to train on")
    return studies


def _families(raw: Mapping[str, Any]) -> dict[Family, Any]:
    return {family_of_field(key): value for key, value in raw.items()}


def _only(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = set(raw) - known
    if unknown:
        raise RecipeError(f"unknown setting {sorted(unknown)[0]!r} in {where}: expected {', '.join(sorted(known))}")

"""Corpus spec: the reviewable text that says which files are training cells and what their columns mean (TOML).

::

    folder = "../shared/data/train"        # relative to the file that says so

    [columns]                              # obs column of each metadata family, for all files
    organ = "organ"
    fine_type = "label"
    donor = "donor"                        # no token: splits go by it

    [rename.technology]                    # value → name; "" drops the value
    "10X" = "10x"

    [[study]]
    file = "one.h5ad"                      # may have its own [study.columns], [study.rename.…], fixed values …
    fixed = { organ = "Blood" }
    name = "Kang 2018, labelled"           # in reports; default: the file's name
    group = "Kang 2018"                    # files of one group share their donors; default: the study's name
    layer = "counts"                       # which matrix; default: detected
    matrix_kind = "counts"                 # or "log1p": what it holds; default: detected
    obs = "one_cells.csv"                  # a table of cells for a file that has none (10x output)
    where = "is_primary_data == True"      # which cells, of a SOMA experiment

A corpus has further settings, see :class:`CorpusText`. A training recipe has the same text in its ``[data]``.

:class:`StudyText` and :class:`CorpusText` are what may be written; :class:`StudySpec` and :class:`CorpusSpec` are what
it means, with defaults applied, paths resolved and metadata families known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd

from scmulan._settings import Meta, convert, nearest, read_toml
from scmulan.errors import RecipeError, VocabularyError
from scmulan.vocab.matrix import MatrixKind
from scmulan.vocab.vocabulary import FIELD_NAMES, METADATA, Family, family_of_field

DONOR = "donor"


# -- the text -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True, slots=True)
class StudyText:
    """Settings of one ``[[study]]``."""

    file: str = ""
    """h5ad file, zarr folder, 10x output (h5, or a folder with matrix.mtx), or SOMA experiment, in ``folder``."""
    name: str | None = None
    """Name of the study in reports; default: that of the file."""
    group: str | None = None
    """Files of one group share their donors; default: the study's name."""
    columns: dict[str, str] = field(default_factory=dict)
    """obs column of each metadata family, and of ``donor``, beside those for all files."""
    rename: dict[str, dict[str, str]] = field(default_factory=dict)
    """Value → name for each family, beside that for all files; an empty name drops the value."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Name that all cells of the file share, for some families and ``donor``."""
    layer: str | None = None
    """Which matrix to read; default: detected."""
    matrix_kind: MatrixKind | None = None
    """What it holds; default: detected."""
    where: str = ""
    """Which cells of a SOMA experiment: a filter of obs as TileDB-SOMA understands it."""
    obs: str | None = None
    """Table of cells (CSV or TSV, names in the first column) that is joined to the file's own."""


@dataclass(kw_only=True, frozen=True, slots=True)
class StudiesText:
    """Settings of files: ``[data]`` of a recipe."""

    folder: str = "."
    """Where the files are, relative to the text."""
    columns: dict[str, str] = field(default_factory=dict)
    """obs column of each metadata family, and of ``donor``, for all files."""
    rename: dict[str, dict[str, str]] = field(default_factory=dict)
    """Value → name for each family, for all files."""
    study: list[StudyText] = field(default_factory=list)
    """The files."""


@dataclass(kw_only=True, frozen=True, slots=True)
class CorpusText(StudiesText):
    """Settings of a corpus and its files."""

    vocabulary: str = ""
    """Vocabulary JSON, or "published"; "" makes a new one of ``genes`` genes and all metadata names."""
    genes: Annotated[int, Meta(ge=1)] = 4000
    """Number of genes of a new vocabulary, the most variable over all studies."""
    unknown: Literal["drop", "add", "refuse"] = "drop"
    """What to do with metadata names that a given vocabulary lacks."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether cells that repeat an earlier one stay."""
    shard_cells: Annotated[int, Meta(ge=1)] = 60_000
    """Largest number of cells in a shard."""


# -- what it means --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class StudySpec:
    """One file of cells; see :class:`StudyText`."""

    file: Path
    """An existing file or folder."""
    name: str
    """Name of the study in reports."""
    columns: dict[Family, str]
    """obs column of each metadata family."""
    rename: dict[Family, dict[str, str]] = field(default_factory=dict)
    """Value → name; an empty name drops the value."""
    fixed: dict[Family, str] = field(default_factory=dict)
    """Name that all cells of the file share."""
    group: str = ""
    """Files of one group share their donors."""
    donor_column: str | None = None
    """obs column of donors."""
    donor: str = ""
    """Donor of all cells of the file."""
    layer: str | None = None
    """Which matrix to read; None: detected."""
    matrix_kind: MatrixKind | None = None
    """What it holds; None: detected."""
    where: str = ""
    """Which cells of a SOMA experiment."""
    obs: Path | None = None
    """Table of cells that is joined to the file's own."""

    def metadata(self, obs: pd.DataFrame) -> dict[Family, pd.Series]:
        """Return the name of each known family per cell, as strings; an empty string means unknown."""
        out = {}
        for family in METADATA:
            if family in self.fixed:
                names = np.full(len(obs), self.fixed[family], dtype=object)
            elif family in self.columns and self.columns[family] in obs:
                names = _to_strings(obs[self.columns[family]])
            else:
                continue
            out[family] = pd.Series(names, index=obs.index, dtype=object).replace(self.rename.get(family, {}))
        return out

    def donors(self, obs: pd.DataFrame) -> np.ndarray:
        """Return the donor of each cell, as strings; an empty string means unknown."""
        if self.donor or self.donor_column not in obs:
            return np.full(len(obs), self.donor, dtype=object)
        return _to_strings(obs[self.donor_column])


def _to_strings(column: pd.Series) -> np.ndarray:
    """Convert values to stripped strings, "" where missing; each different value is converted once."""
    codes, values = pd.factorize(column)
    return np.array([*(str(value).strip() for value in values), ""], dtype=object)[codes]


@dataclass(kw_only=True, slots=True)
class CorpusSpec:
    """A corpus: its studies, and how they are written; see :class:`CorpusText`."""

    studies: list[StudySpec]
    """Files, in the order of their cells."""
    vocabulary: str = ""
    """Path of a vocabulary, "published", or "" for a new one."""
    genes: int = 4000
    """Number of genes of a new vocabulary."""
    unknown: Literal["drop", "add", "refuse"] = "drop"
    """What to do with metadata names that a given vocabulary lacks."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether cells that repeat an earlier one stay."""
    shard_cells: int = 60_000
    """Largest number of cells in a shard."""


def read_corpus_spec(path: Path) -> CorpusSpec:
    """Read the TOML of a corpus, or the ``[data]`` and ``[vocabulary]`` of a training recipe.

    Raises
    ------
    RecipeError
        If the file is no TOML, a setting or a metadata field is unknown, a value is wrong, or a file does not exist.
    """
    raw = read_toml(path, "a corpus")
    if "data" in raw and "study" not in raw:  # a recipe
        keys = {"file": "vocabulary", "genes": "genes"}
        raw = {new: raw["vocabulary"][old] for old, new in keys.items() if old in raw.get("vocabulary", {})} | raw[
            "data"
        ]
    text = convert(CorpusText, raw, str(path), renamed=_renamed(raw))
    _check_fields(text, str(path), "")
    vocabulary = text.vocabulary
    if vocabulary not in ("", "published"):
        file = path.parent / vocabulary
        if not file.is_file():
            raise RecipeError(f"{path}: vocabulary {file} not found; give a vocabulary JSON, or 'published'")
        vocabulary = str(file.resolve())
    studies = _resolve_studies(text, path.parent)
    names = [study.name for study in studies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{path}: two studies have the name {twice!r}; give them different ones (`name`)")
    return CorpusSpec(
        studies=studies,
        vocabulary=vocabulary,
        genes=text.genes,
        unknown=text.unknown,
        duplicates=text.duplicates,
        shard_cells=text.shard_cells,
    )


def read_spec(
    raw: Mapping[str, Any], base: Path, *, source: str = "the recipe", section: str = "data"
) -> list[StudySpec]:
    """Read the studies of a parsed TOML table.

    Parameters
    ----------
    raw : mapping
        The table.
    base : Path
        Folder of the text, where relative paths start.
    source, section : str
        Names of the text and of the table in it, for errors.

    Raises
    ------
    RecipeError
        If a setting or a metadata field is unknown, a value is wrong, or a file does not exist.
    """
    return _resolve_studies(parse_studies(raw, source, section), base)


def parse_studies(raw: Mapping[str, Any], source: str, section: str = "") -> StudiesText:
    """Check a parsed TOML table of studies, without looking for their files; see :func:`read_spec`."""
    text = convert(StudiesText, raw, source, section=section, renamed=_renamed(raw, f"{section}." if section else ""))
    _check_fields(text, source, section)
    return text


def _check_fields(text: StudiesText, source: str, section: str) -> None:
    """Refuse names of metadata fields that mean no family."""
    prefix = f"{section}." if section else ""
    tables: dict[str, Mapping[str, Any]] = {f"{prefix}columns": text.columns, f"{prefix}rename": text.rename}
    for number, study in enumerate(text.study, 1):
        where = f"{prefix}study[{number}]"
        tables |= {f"{where}.columns": study.columns, f"{where}.rename": study.rename, f"{where}.fixed": study.fixed}
    for table, fields in tables.items():
        for name in fields:
            try:
                _by_family({name: None})
            except VocabularyError as error:
                near = nearest(name, [*map(str, METADATA), *FIELD_NAMES, DONOR])
                suggestion = "" if near is None else f"; did you mean {near!r}?"
                raise RecipeError(f"{source}: {table}: {error}{suggestion}") from None


def _renamed(raw: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return former keys with their new ones."""
    studies = raw.get("study", [])
    return {f"{prefix}study[{i}].state": "matrix_kind" for i in range(1, 1 + len(studies))}


def _resolve_studies(text: StudiesText, base: Path) -> list[StudySpec]:
    """Apply what holds for all files to each of them, and find them."""
    if not text.study:
        raise RecipeError("the recipe's [data] names no [[study]]: there is nothing to train on")
    folder = (base / text.folder).resolve()
    columns, donor_column = _by_family(text.columns)
    rename, _ = _by_family(text.rename)
    studies = []
    for study in text.study:
        if not study.file:
            raise RecipeError("a [[study]] without `file`: name its h5ad file, relative to `folder`")
        path = folder / study.file
        table = None if study.obs is None else _table(folder, base, study.obs)
        for wanted in (path, table):
            if wanted is not None and not wanted.exists():
                raise RecipeError(
                    f"training cells not found: {wanted} (see `folder` and `file` in the recipe's [data])"
                )
        own_columns, own_donor_column = _by_family(study.columns)
        own_rename, _ = _by_family(study.rename)
        fixed, donor = _by_family(study.fixed)
        name = path.stem if study.name is None else study.name
        studies.append(
            StudySpec(
                file=path,
                name=name,
                columns={**columns, **own_columns},
                rename={**rename, **{family: {**rename.get(family, {}), **own} for family, own in own_rename.items()}},
                fixed=fixed,
                group=name if study.group is None else study.group,
                donor_column=own_donor_column or donor_column,
                donor=donor or "",
                layer=study.layer,
                matrix_kind=study.matrix_kind,
                where=study.where,
                obs=table,
            )
        )
    return studies


def _table(folder: Path, base: Path, name: str) -> Path:
    """Find a table of cells beside the data, or, where those are nobody's to write to, beside the text."""
    beside = base / name
    return beside.resolve() if beside.is_file() and not (folder / name).is_file() else folder / name


def _by_family(raw: Mapping[str, Any]) -> tuple[dict[Family, Any], Any]:
    """Return the entries of metadata families, and that of donors."""
    return {family_of_field(key): value for key, value in raw.items() if key != DONOR}, raw.get(DONOR)

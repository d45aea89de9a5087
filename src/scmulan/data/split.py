"""Hold out studies and donors of a corpus for validation and test, as a short TOML text says.

::

    corpus = "atlas"                 # folder of the corpus, relative to the file that says so
    seed = 0

    [studies]                        # whole studies; * and ? match anything
    test = ["Kang 2018*"]

    [donors]                         # a donor's name, or "group/name"
    validation = ["lupus 101"]

    [fractions]                      # of the donors that nothing above names
    by = "donor"                     # or "study": studies of one group stay together
    validation = 0.05
    test = 0.05

All else is ``train``. Cells of unknown donor stay together with those of their group. Which donors a fraction takes
follows from the seed and their names, not from their order.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from scmulan._io.adata import write_json
from scmulan._settings import Meta, convert, read_toml
from scmulan.data.store import Corpus, Selection
from scmulan.errors import InputError, RecipeError

FORMAT = "scmulan-split/1"
SPLIT = "split.json"
PARTS = ("train", "validation", "test")
HELD_OUT = PARTS[1:]
UNKNOWN_DONOR = ""

Unit = tuple[str, str]
"""Group of studies and name of a donor: what a split keeps together."""


@dataclass(kw_only=True, frozen=True, slots=True)
class HeldOut:
    """Names of studies or donors that are held out."""

    validation: list[str] = field(default_factory=list)
    """Names for validation."""
    test: list[str] = field(default_factory=list)
    """Names for test."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Fractions:
    """Fractions of the donors (or studies) that are not named."""

    by: Literal["donor", "study"] = "donor"
    """What is counted."""
    validation: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Fraction for validation."""
    test: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Fraction for test."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SplitSpec:
    """The text of a split."""

    corpus: str = field(metadata={"hint": "the folder of the corpus, relative to this file"})
    """Folder of the corpus, relative to the text."""
    seed: int = 0
    """Seed of the fractions."""
    studies: HeldOut = field(default_factory=HeldOut)
    """Whole studies; ``*`` and ``?`` match anything."""
    donors: HeldOut = field(default_factory=HeldOut)
    """Donors, by name or ``group/name``; ``*`` and ``?`` match anything."""
    fractions: Fractions = field(default_factory=Fractions)
    """Fractions of everything that is not named."""

    def __post_init__(self) -> None:
        held_out = [getattr(self.fractions, part) for part in HELD_OUT]
        if sum(held_out) >= 1:
            raise ValueError(f"[fractions] are from 0 to 1 and leave something to train on; found {held_out}")


def split_corpus(spec: Path, out: Path | None = None) -> dict[str, Any]:
    """Split a corpus as a text says, and write the split.

    Parameters
    ----------
    spec : Path
        TOML file, see this module.
    out : Path, optional
        File to write; default: ``split.json`` in the corpus.

    Returns
    -------
    dict
        ``file``, ``cells`` of each part, and ``shared_donors``: groups and names of donors with cells in several parts.

    Raises
    ------
    RecipeError
        If the text has a wrong setting, or names what the corpus lacks.
    InputError
        If there is no corpus.
    """
    settings = convert(SplitSpec, read_toml(spec, "a split"), str(spec))
    corpus = Corpus(spec.parent / settings.corpus)
    split = assign_parts(corpus, settings, str(spec))
    part = part_of_cells(corpus, split)
    target = out if out is not None else corpus.path / SPLIT
    write_json(split, target)
    return {
        "file": str(target),
        "cells": {name: int((part == i).sum()) for i, name in enumerate(PARTS)},
        "shared_donors": _shared_donors(corpus, part),
    }


def assign_parts(corpus: Corpus, settings: SplitSpec, source: str) -> dict[str, Any]:
    """Assign studies and donors to parts; what is not held out is ``train``.

    Parameters
    ----------
    corpus : Corpus
        Its studies and donors are assigned, not its files: a corpus that is built again keeps its split.
    settings : SplitSpec
        The text.
    source : str
        Name of the text, for errors.

    Returns
    -------
    dict
        Content of ``split.json``.

    Raises
    ------
    RecipeError
        If a name matches nothing, or is held out twice.
    """
    groups = _groups(corpus)
    studies: dict[str, str] = {}
    for part in HELD_OUT:
        for pattern in getattr(settings.studies, part):
            found = [name for name in corpus.studies if fnmatchcase(name, pattern)]
            _require(found, pattern, corpus.studies, "study", source)
            _assign(studies, found, part, source)
    units = _units(corpus, groups, studies)
    named = [unit for unit in units if unit[1] != UNKNOWN_DONOR]
    donors: dict[Unit, str] = {}
    for part in HELD_OUT:
        for pattern in getattr(settings.donors, part):
            found_units = [u for u in named if fnmatchcase(u[1], pattern) or fnmatchcase("/".join(u), pattern)]
            _require(found_units, pattern, [unit[1] for unit in named], "donor", source)
            _assign(donors, found_units, part, source)
    free = [unit for unit in units if unit not in donors]
    by_study = settings.fractions.by == "study"
    choices: list[Any] = sorted({unit[0] for unit in free} if by_study else free)
    choices.sort(key=lambda choice: hashlib.sha256(json.dumps([settings.seed, choice]).encode()).digest())
    start = 0
    for part in HELD_OUT:
        fraction = getattr(settings.fractions, part)
        stop = start + (max(round(fraction * len(choices)), 1) if fraction else 0)
        chosen = set(choices[start:stop])
        donors |= {unit: part for unit in free if (unit[0] if by_study else unit) in chosen}
        start = stop
    return {
        "format": FORMAT,
        "corpus": _identity(corpus),
        "seed": settings.seed,
        "studies": studies,
        "donors": [[*unit, part] for unit, part in sorted(donors.items())],
    }


def _groups(corpus: Corpus) -> list[str]:
    """Return the group of each study."""
    return [study.get("group", study["name"]) for study in corpus.manifest["studies"]]


def _units(corpus: Corpus, groups: list[str], held_out: Mapping[str, str]) -> list[Unit]:
    """List the donors with cells in studies that are not held out; the unknown donors of a group are one."""
    free = np.array([name not in held_out for name in corpus.studies])
    study, donor = np.asarray(corpus.study), np.asarray(corpus.donor)
    inside = free[study]
    units = {corpus.donors[d] for d in np.unique(donor[inside & (donor >= 0)])}
    units |= {(groups[s], UNKNOWN_DONOR) for s in np.unique(study[inside & (donor < 0)])}
    return sorted(units)


def _require(found: list[Any], pattern: str, names: Iterable[str], kind: str, source: str) -> None:
    if not found:
        near = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `scmulan corpus inspect`"
        raise RecipeError(f"{source}: no {kind} {pattern!r} in the corpus; {hint}")


def _assign(parts: dict[Any, str], names: list[Any], part: str, source: str) -> None:
    for name in names:
        if parts.setdefault(name, part) != part:
            raise RecipeError(f"{source}: {name!r} is in {parts[name]} and in {part}; name it once")


def _identity(corpus: Corpus) -> str:
    """Hash what a split refers to: studies and donors."""
    about = [[(s["name"], s["cells"]) for s in corpus.manifest["studies"]], corpus.donors, len(corpus)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def select_part(corpus: Corpus, part: str, path: str | os.PathLike[str] | None = None) -> Selection:
    """Select the cells of a part of a split.

    Parameters
    ----------
    corpus : Corpus
        Cells to select from.
    part : {"train", "validation", "test"}
        Which cells.
    path : path-like, optional
        File that ``scmulan corpus split`` wrote; default: ``split.json`` in the corpus.

    Returns
    -------
    Selection
        View of the cells, in the order of the corpus.

    Raises
    ------
    InputError
        If there is no such split or part, or the split was made for another corpus.
    """
    split = read_split(corpus, path)
    if part not in PARTS:
        raise InputError(f"no part {part!r} in a split; expected {', '.join(PARTS)}")
    return Selection(corpus, np.flatnonzero(part_of_cells(corpus, split) == PARTS.index(part)))


def read_split(corpus: Corpus, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Read a split of a corpus.

    Raises
    ------
    InputError
        If there is none, or it was made for another corpus.
    """
    file = Path(path) if path is not None else corpus.path / SPLIT
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{file}: no such file; make a split first (scmulan corpus split SPEC.toml)") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON ({error.msg}); make the split again") from None
    if split.get("format") != FORMAT:
        raise InputError(f"{file}: format {split.get('format')!r}, expected {FORMAT!r}; make the split again")
    if split["corpus"] != _identity(corpus):
        raise InputError(f"{file}: a split of another corpus than {corpus.path}; make it again from its text")
    return split


def part_of_cells(corpus: Corpus, split: Mapping[str, Any]) -> np.ndarray:
    """Return the part of each cell: uint8 ``[cells]``, index in ``PARTS``."""
    code = {name: i for i, name in enumerate(PARTS)}
    by_unit = {(group, donor): code[part] for group, donor, part in split["donors"]}
    of_donor = np.array([*(by_unit.get(unit, 0) for unit in corpus.donors), 0], dtype=np.uint8)
    of_unknown = np.array([by_unit.get((group, UNKNOWN_DONOR), 0) for group in _groups(corpus)], dtype=np.uint8)
    of_study = np.array([code[split["studies"].get(name, "train")] for name in corpus.studies], dtype=np.uint8)
    whole_study = np.array([name in split["studies"] for name in corpus.studies])
    study, donor = corpus.study, corpus.donor
    part = np.where(np.asarray(donor) < 0, of_unknown[study], of_donor[donor])
    return np.where(whole_study[study], of_study[study], part).astype(np.uint8)


def _shared_donors(corpus: Corpus, part: np.ndarray) -> list[list[str]]:
    """List the donors with cells in several parts."""
    donor = np.asarray(corpus.donor)
    seen = np.zeros((len(corpus.donors), len(PARTS)), dtype=bool)
    seen[donor[donor >= 0], part[donor >= 0]] = True
    return [list(corpus.donors[i]) for i in np.flatnonzero(seen.sum(1) > 1)]

"""Which cells train, validate and test: by study and by donor, as a short text says.

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
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scmulan._io.adata import write_json
from scmulan.errors import InputError, RecipeError

if TYPE_CHECKING:
    from scmulan.data.store import Corpus

FORMAT = "scmulan-split/1"
PARTS = ("train", "validation", "test")
HELD = PARTS[1:]
UNKNOWN = ""

Unit = tuple[str, str]


def split_corpus(spec: Path, out: Path | None = None) -> dict[str, Any]:
    """Split a corpus as a text says, and write the split.

    Parameters
    ----------
    spec
        TOML file, see this module.
    out
        File to write; default: ``split.json`` in the corpus.

    Returns
    -------
    dict
        ``file``, ``cells`` of each part, and ``shared_donors``: groups and names of donors with cells in several parts.

    Raises
    ------
    RecipeError
        If the text cannot be followed.
    InputError
        If there is no corpus.
    """
    from scmulan.data.store import SPLIT, Corpus

    try:
        raw = tomllib.loads(spec.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{spec}: cannot be read ({error.strerror}); expected the TOML text of a split") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{spec}: not TOML ({error})") from None
    _check(raw, spec)
    corpus = Corpus(spec.parent / raw["corpus"])
    split = plan(corpus, raw, str(spec))
    part = part_of(corpus, split)
    cells = {name: int((part == i).sum()) for i, name in enumerate(PARTS)}
    target = out if out is not None else corpus.path / SPLIT
    write_json(split, target)
    return {"file": str(target), "cells": cells, "shared_donors": _shared(corpus, part)}


def _check(raw: Mapping[str, Any], spec: Path) -> None:
    known = {
        "": {"corpus", "seed", "studies", "donors", "fractions"},
        "studies": set(HELD),
        "donors": set(HELD),
        "fractions": {"by", *HELD},
    }
    for table, keys in known.items():
        entries = raw.get(table, {}) if table else raw
        unknown = sorted(set(entries) - keys)
        if unknown:
            where = f" in [{table}]" if table else ""
            raise RecipeError(f"{spec}: unknown setting {unknown[0]!r}{where}; expected {', '.join(sorted(keys))}")
    if "corpus" not in raw:
        raise RecipeError(f"{spec}: no `corpus`; name its folder, relative to this file")
    fractions = raw.get("fractions", {})
    if fractions.get("by", "donor") not in ("donor", "study"):
        raise RecipeError(f"{spec}: by = {fractions['by']!r} in [fractions]; expected 'donor' or 'study'")
    shares = [fractions.get(part, 0.0) for part in HELD]
    if not all(isinstance(share, (int, float)) and 0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise RecipeError(
            f"{spec}: [fractions] are shares from 0 to 1 that leave something to train on; found {shares}"
        )


def plan(corpus: "Corpus", raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Parts of studies and donors, ready for JSON: what is not named is ``train``."""
    groups = [study.get("group", study["name"]) for study in corpus.manifest["studies"]]
    studies: dict[str, str] = {}
    for part in HELD:
        for pattern in raw.get("studies", {}).get(part, ()):
            found = [name for name in corpus.studies if fnmatchcase(name, pattern)]
            _need(found, pattern, corpus.studies, "study", source)
            _assign(studies, found, part, source)
    units = _units(corpus, groups, studies)
    donors: dict[Unit, str] = {}
    for part in HELD:
        for pattern in raw.get("donors", {}).get(part, ()):
            named = [unit for unit in units if unit[1] != UNKNOWN]
            found_units = [u for u in named if fnmatchcase(u[1], pattern) or fnmatchcase("/".join(u), pattern)]
            _need(found_units, pattern, [unit[1] for unit in named], "donor", source)
            _assign(donors, found_units, part, source)
    fractions, seed = raw.get("fractions", {}), raw.get("seed", 0)
    free = [unit for unit in units if unit not in donors]
    by_study = fractions.get("by", "donor") == "study"
    choices: list[Any] = sorted({unit[0] for unit in free} if by_study else free)
    choices.sort(key=lambda unit: hashlib.sha256(json.dumps([seed, unit]).encode()).digest())
    start = 0
    for part in HELD:
        share = fractions.get(part, 0.0)
        stop = start + (max(round(share * len(choices)), 1) if share else 0)
        chosen = set(choices[start:stop])
        donors |= {unit: part for unit in free if (unit[0] if by_study else unit) in chosen}
        start = stop
    return {
        "format": FORMAT,
        "corpus": _identity(corpus),
        "seed": seed,
        "studies": studies,
        "donors": [[*unit, part] for unit, part in sorted(donors.items())],
    }


def _units(corpus: "Corpus", groups: list[str], held: Mapping[str, str]) -> list[Unit]:
    """Group and name of donors with cells in studies that are not held out; a group's unknown donors are one."""
    free = np.array([name not in held for name in corpus.studies])
    study, donor = np.asarray(corpus.study), np.asarray(corpus.donor)
    inside = free[study]
    units = {corpus.donors[d] for d in np.unique(donor[inside & (donor >= 0)])}
    units |= {(groups[s], UNKNOWN) for s in np.unique(study[inside & (donor < 0)])}
    return sorted(units)


def _need(found: list[Any], pattern: str, names: Iterable[str], kind: str, source: str) -> None:
    if not found:
        near = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `scmulan corpus inspect`"
        raise RecipeError(f"{source}: no {kind} {pattern!r} in the corpus; {hint}")


def _assign(parts: dict[Any, str], names: list[Any], part: str, source: str) -> None:
    for name in names:
        if parts.setdefault(name, part) != part:
            raise RecipeError(f"{source}: {name!r} is in {parts[name]} and in {part}; name it once")


def _identity(corpus: "Corpus") -> str:
    """Hash of what a split speaks of: studies and donors, not the files."""
    about = [[(s["name"], s["cells"]) for s in corpus.manifest["studies"]], corpus.donors, len(corpus)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def read_split(corpus: "Corpus", path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Read a split of a corpus.

    Raises
    ------
    InputError
        If there is none, or it belongs to another corpus.
    """
    from scmulan.data.store import SPLIT

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


def part_of(corpus: "Corpus", split: Mapping[str, Any]) -> np.ndarray:
    """Part of each cell: uint8 ``[cells]``, place in ``PARTS``."""
    code = {name: i for i, name in enumerate(PARTS)}
    by_unit = {(group, donor): code[part] for group, donor, part in split["donors"]}
    groups = [study.get("group", study["name"]) for study in corpus.manifest["studies"]]
    donors = np.array([*(by_unit.get(unit, 0) for unit in corpus.donors), 0], dtype=np.uint8)
    unknown = np.array([by_unit.get((group, UNKNOWN), 0) for group in groups], dtype=np.uint8)
    held = np.array([code[split["studies"].get(name, "train")] for name in corpus.studies], dtype=np.uint8)
    whole = np.array([name in split["studies"] for name in corpus.studies])
    study, donor = corpus.study, corpus.donor
    part = np.where(np.asarray(donor) < 0, unknown[study], donors[donor])
    return np.where(whole[study], held[study], part).astype(np.uint8)


def cells_of(corpus: "Corpus", split: Mapping[str, Any], part: str) -> np.ndarray:
    """Places of the cells of a part, int64, ascending."""
    if part not in PARTS:
        raise InputError(f"no part {part!r} in a split; expected {', '.join(PARTS)}")
    return np.flatnonzero(part_of(corpus, split) == PARTS.index(part))


def _shared(corpus: "Corpus", part: np.ndarray) -> list[list[str]]:
    """Donors with cells in more than one part."""
    donor = np.asarray(corpus.donor)
    seen = np.zeros((len(corpus.donors), len(PARTS)), dtype=bool)
    seen[donor[donor >= 0], part[donor >= 0]] = True
    return [list(corpus.donors[i]) for i in np.flatnonzero(seen.sum(1) > 1)]

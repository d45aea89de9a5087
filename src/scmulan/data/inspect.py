"""Describe a corpus, for programs and for people, and compare its files with their checksums."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scmulan._io.outputs import sha256
from scmulan._text import format_table
from scmulan.data.store import Corpus, read_manifest
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import METADATA

MAX_LISTED = 8
"""Names and pairs of studies in the text for people; the JSON has all."""


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a corpus from its manifest; no shard is read.

    Parameters
    ----------
    path : path-like
        Folder of the corpus.

    Returns
    -------
    dict
        ``cells``, ``words``, ``bytes``, ``studies``, ``metadata`` (number of tokens of each family), ``donors``,
        ``duplicates``, ``settings``, ``shards`` (their number by encoding).

    Raises
    ------
    InputError
        If the folder is no corpus, or a file is missing or cut off.
    """
    corpus = Corpus(path)
    manifest = corpus.manifest
    encodings = [shard["encoding"] for shard in manifest["shards"]]
    return {
        "folder": str(corpus.path),
        "made_by": manifest.get("made_by"),
        "cells": len(corpus),
        "words": manifest["words"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "genes": len(corpus.vocabulary.genes),
        "metadata": {str(family): len(corpus.vocabulary.ids(family)) for family in METADATA},
        "shards": {name: encodings.count(name) for name in sorted(set(encodings))},
        "donors": len(corpus.donors),
        "duplicates": manifest.get("duplicates"),
        "settings": manifest["settings"],
        "studies": manifest["studies"],
    }


def describe(about: dict[str, Any]) -> str:
    """Write what :func:`inspect` returned as text for people."""
    size = about["bytes"] / max(about["cells"], 1)
    lines = [
        f"{about['folder']}: {about['cells']:,} cells, {about['words']:,} words, {about['bytes'] / 2**20:,.0f} MiB "
        f"({size:,.0f} bytes per cell)",
        f"{about['genes']:,} genes; "
        + ", ".join(f"{n} {family.replace('_', ' ')}" for family, n in about["metadata"].items() if n)
        + f"; {about['donors']:,} donors",
        "shards: " + ", ".join(f"{n} of {name}" for name, n in about["shards"].items()),
        "",
        _describe_studies(about["studies"]),
    ]
    for study in about["studies"]:
        for family, names in study.get("unknown_words", {}).items():
            listed = [f"{name!r} ({n:,} cells)" for name, n in list(names.items())[:MAX_LISTED]]
            more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            lines.append(f"{study['name']}: not in the vocabulary, {family}: {', '.join(listed)}{more}")
    return "\n".join([*lines, *_describe_repeats(about)])


def _describe_studies(studies: Sequence[dict[str, Any]]) -> str:
    header = ("study", "values", "cells", "genes found", "renamed", "lost", "counts covered", "words/cell", "donors")
    rows: list[list[Any]] = []
    for study in studies:
        genes = study.get("genes")
        if genes is None:  # made by a benchmark
            rows.append([study["name"], "", study["cells"], *[""] * 6])
            continue
        rows.append(
            [
                study["name"],
                study["matrix"]["state"],
                study["cells"],
                f"{genes['found']:,} ({genes['fraction_of_vocabulary']:.0%})",
                genes["renamed"]["count"],
                genes["unknown"]["count"] + genes["ambiguous"]["count"],
                f"{study['covered']:.1%}",
                round(study["words_per_cell"]),
                study["donors"],
            ]
        )
    return format_table(header, rows, text_columns=2)


def _describe_repeats(about: dict[str, Any]) -> list[str]:
    found = about["duplicates"]
    if not found or not found["cells"]:
        return []
    done = "left out" if about["settings"].get("duplicates") == "drop" else "kept"
    lines = [
        f"{found['cells']:,} cells repeat an earlier one word for word ({found['across_studies']:,} of another study); "
        f"they are {done}"
    ]
    for pair in found["pairs"][:MAX_LISTED]:
        one, two = pair["studies"]
        lines.append(f"  {pair['cells']:,} in {two}" + (f", first in {one}" if one != two else ""))
    return lines


def verify(path: str | os.PathLike[str], jobs: int = 2) -> dict[str, Any]:
    """Read all files of a corpus and compare them with the checksums of its manifest.

    Parameters
    ----------
    path : path-like
        Folder of the corpus.
    jobs : int
        Number of files to read at a time.

    Returns
    -------
    dict
        ``files`` and ``bytes`` compared, and ``problems``: a line for each file that is missing or altered.
    """
    folder = Path(path)
    try:
        files = read_manifest(folder)["files"]
    except InputError as error:
        return {"files": 0, "bytes": 0, "problems": [str(error)]}

    def check(name: str) -> str | None:
        file = folder / name
        if not file.is_file():
            return f"{file}: missing; copy or build the corpus again"
        size, expected = file.stat().st_size, files[name]["bytes"]
        if size != expected:
            return f"{file}: {size:,} bytes, expected {expected:,}; copy or build the corpus again"
        if sha256(file) != files[name]["sha256"]:
            return f"{file}: altered since the corpus was built (its sha256 differs); copy or build the corpus again"
        return None

    with ThreadPoolExecutor(jobs) as pool:
        problems = [problem for problem in pool.map(check, files) if problem]
    return {"files": len(files) + 1, "bytes": sum(entry["bytes"] for entry in files.values()), "problems": problems}

"""What a corpus holds, and what was lost on the way: for people, and as plain types.

Compare every file of a corpus with its checksum.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scmulan._io.outputs import sha256
from scmulan.data.store import Corpus, read_manifest
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import METADATA

# Words and pairs of studies that are shown to people; the JSON has all.
SHOWN = 8


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a corpus from its manifest; no shard is read.

    Returns
    -------
    dict
        ``cells``, ``words``, ``bytes``, ``studies``, ``metadata`` (words of each family), ``donors``, ``duplicates``,
        ``settings``, ``shards`` (their number by encoding).
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
    """What :func:`inspect` found, for people."""
    size = about["bytes"] / max(about["cells"], 1)
    lines = [
        f"{about['folder']}: {about['cells']:,} cells, {about['words']:,} words, {about['bytes'] / 2**20:,.0f} MiB "
        f"({size:,.0f} bytes per cell)",
        f"{about['genes']:,} genes; "
        + ", ".join(f"{n} {family.replace('_', ' ')}" for family, n in about["metadata"].items() if n)
        + f"; {about['donors']:,} donors",
        "shards: " + ", ".join(f"{n} of {name}" for name, n in about["shards"].items()),
        "",
        *_studies(about["studies"]),
    ]
    for study in about["studies"]:
        for family, words in study.get("unknown_words", {}).items():
            shown = [f"{word!r} ({n:,} cells)" for word, n in list(words.items())[:SHOWN]]
            more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
            lines.append(f"{study['name']}: not in the vocabulary, {family}: {', '.join(shown)}{more}")
    return "\n".join([*lines, *_repeats(about)])


def _studies(studies: Sequence[dict[str, Any]]) -> list[str]:
    head = ("study", "cells", "values", "genes found", "renamed", "lost", "counts covered", "words/cell", "donors")
    rows = []
    for study in studies:
        genes = study.get("genes")
        if genes is None:  # made by a benchmark
            rows.append([study["name"], f"{study['cells']:,}", *[""] * 7])
            continue
        lost = genes["unknown"]["count"] + genes["ambiguous"]["count"]
        rows.append(
            [
                study["name"],
                f"{study['cells']:,}",
                study["matrix"]["state"],
                f"{genes['found']:,} ({genes['fraction_of_vocabulary']:.0%})",
                f"{genes['renamed']['count']:,}",
                f"{lost:,}",
                f"{study['covered']:.1%}",
                f"{study['words_per_cell']:,.0f}",
                f"{study['donors']:,}",
            ]
        )
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i in (0, 2) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return [line.rstrip() for line in text]


def _repeats(about: dict[str, Any]) -> list[str]:
    found = about["duplicates"]
    if not found or not found["cells"]:
        return []
    done = "left out" if about["settings"].get("duplicates") == "drop" else "kept"
    lines = [
        f"{found['cells']:,} cells repeat an earlier one word for word ({found['across_studies']:,} of another study); "
        f"they are {done}"
    ]
    for pair in found["pairs"][:SHOWN]:
        one, two = pair["studies"]
        lines.append(f"  {pair['cells']:,} in {two}" + (f", first in {one}" if one != two else ""))
    return lines


def verify(path: str | os.PathLike[str], jobs: int = 2) -> dict[str, Any]:
    """Read all of a corpus and compare it with the checksums of its manifest.

    Parameters
    ----------
    path
        Folder of the corpus.
    jobs
        Files to read at a time.

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

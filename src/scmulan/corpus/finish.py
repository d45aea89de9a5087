"""From finished shards to a corpus: the table of all cells, and the manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scmulan.corpus.duplicates import Repeats
from scmulan.corpus.shards import create, open_arrays, sha256
from scmulan.corpus.store import CELLS, CHECKSUM, FORMAT, MANIFEST, VOCABULARY
from scmulan.files import write_json
from scmulan.language.vocabulary import METADATA
from scmulan.outputs import atomic_path


def write_table(folder: Path, shards: Sequence[dict[str, Any]], measured: np.ndarray, repeats: Repeats | None) -> None:
    """Write the columns of all cells into one file, shard by shard.

    Parameters
    ----------
    folder
        Of the corpus, with its shards.
    shards
        Record of each; ``kept``, the number of its cells that stay, is set here.
    measured
        Bool ``[studies, vocabulary genes]``.
    repeats
        Cells to leave out; none by default.
    """
    keep: list[Any] = [slice(None)] * len(shards)
    first = 0
    for i, shard in enumerate(shards):
        last = first + shard["cells"]
        if repeats is not None:
            keep[i] = ~repeats.later[first:last]
        shard["kept"] = int(np.count_nonzero(keep[i])) if repeats is not None else shard["cells"]
        first = last
    n = sum(shard["kept"] for shard in shards)
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "start": ("<i8", (n,)),
        "lengths": ("<i8", (n,)),
        "total": ("<f4", (n,)),
        "study": ("<i4", (n,)),
        "donor": ("<i4", (n,)),
        "metadata": ("<i4", (n, len(METADATA))),
        "logged": ("|b1", (n,)),
        "measured": ("|b1", measured.shape),
    }
    with atomic_path(folder / CELLS) as temporary:
        table = create(temporary, shapes, {"format": "scmulan-cells/1"})
        table["measured"][:] = measured
        start = 0
        for shard, kept in zip(shards, keep, strict=True):
            arrays = open_arrays(folder / shard["file"])[0]
            rows = slice(start, start + shard["kept"])
            table["start"][rows] = arrays["indptr"][:-1][kept]
            table["lengths"][rows] = np.diff(arrays["indptr"])[kept]
            for name in ("total", "donor", "metadata"):
                table[name][rows] = arrays[name][kept]
            table["study"][rows] = shard["study"]
            table["logged"][rows] = shard["encoding"] == "log1p"
            start = rows.stop


def write_manifest(folder: Path, shards: Sequence[dict[str, Any]], content: Mapping[str, Any]) -> None:
    """Write the manifest with the hash of every file, and the manifest's own checksum (as ``sha256sum`` reads it).

    Parameters
    ----------
    folder
        Of the corpus; all else is in it.
    shards
        Record of each shard.
    content
        What else is to be said: ``studies``, ``donors``, ``settings`` …
    """
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in (VOCABULARY, CELLS)
    }
    files |= {shard["file"]: {"sha256": shard["sha256"], "bytes": shard["bytes"]} for shard in shards}
    fields = ("file", "study", "first", "encoding", "cells", "kept", "words", "rounded")
    manifest = {
        "format": FORMAT,
        "cells": sum(shard["kept"] for shard in shards),
        "words": sum(shard["words"] for shard in shards),
        **content,
        "shards": [{name: shard[name] for name in fields} for shard in shards],
        "files": files,
    }
    write_json(manifest, folder / MANIFEST)
    with atomic_path(folder / CHECKSUM) as temporary:
        temporary.write_text(f"{sha256(folder / MANIFEST)}  {MANIFEST}\n", encoding="ascii")

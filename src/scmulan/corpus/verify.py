"""Compare every file of a corpus with its checksum."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scmulan.corpus.shards import sha256
from scmulan.corpus.store import read_manifest
from scmulan.errors import InputError


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

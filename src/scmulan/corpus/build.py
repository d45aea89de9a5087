"""Build a corpus: from a spec and its files to a folder of shards.

Work goes on in a folder beside the output, ``.OUT.building``, in which every step leaves a record; the corpus is put in
its place when all is done. A build that was ended in any way is continued by the same call.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import scmulan
from scmulan.corpus.duplicates import find_repeats
from scmulan.corpus.finish import write_manifest, write_table
from scmulan.corpus.plan import donor_codes, surveys, writes
from scmulan.corpus.readers import BLOCK_VALUES, stamp
from scmulan.corpus.spec import CorpusSpec
from scmulan.corpus.tasks import Runner
from scmulan.corpus.words import choose_vocabulary
from scmulan.errors import OutputError
from scmulan.files import to_json, write_json
from scmulan.language.vocabulary import Family, Vocabulary
from scmulan.outputs import atomic_path, check_output

Progress = Callable[[str, int], Any]


def build(
    spec: CorpusSpec,
    out: str | os.PathLike[str],
    *,
    jobs: int = 1,
    dask: str | None = None,
    force: bool = False,
    block_values: int = BLOCK_VALUES,
    progress: Progress = lambda step, cells: None,
) -> dict[str, Any]:
    """Write a corpus, or go on with one that was begun.

    Each process holds one block of cells at a time (``block_values`` values, were it dense), its file's ``obs`` and the
    columns of one shard's cells, whatever the size of the files; the caller holds one byte for every cell besides.
    What is written does not depend on ``jobs``, on Dask or on interruptions, bit by bit.

    Parameters
    ----------
    spec
        Files and settings.
    out
        Folder to write.
    jobs
        Processes.
    dask
        Address of a Dask scheduler to use instead; its workers have to see the same folders.
    force
        Replace ``out`` if it exists, and start again if it was begun in another way.
    block_values
        Size of blocks.
    progress
        Told the step (``"look"``, ``"genes"``, ``"write"``) and how many cells (files, for ``"look"``) more are done.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    InputError, MatrixError, GeneError
        If a file cannot be used.
    VocabularyError
        If ``unknown = "refuse"`` and a word is not in the vocabulary.
    OutputError
        If the output cannot be written, or was begun with other inputs or settings.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_output(out, force, folder=True)
    work = out.with_name(f".{out.name}.building")
    with _claimed(work, spec, force), Runner(jobs, dask) as runner:

        def run(step: str, tasks: Sequence[Any]) -> list[dict[str, Any]]:
            return runner(tasks, lambda cells: progress(step, cells))

        found = run("look", surveys(spec, work))
        vocabulary = choose_vocabulary(spec, found, work, run, block_values)
        donors = donor_codes(spec, found)
        tasks = list(writes(spec, found, donors, work, block_values))
        records = run("write", tasks)
        folder = work / "corpus"
        manifest = _finish(spec, found, list(donors), vocabulary, [task.study for task in tasks], records, folder)
        with atomic_path(out) as temporary:
            os.replace(folder, temporary)
    shutil.rmtree(work)
    return manifest


@contextlib.contextmanager
def _claimed(work: Path, spec: CorpusSpec, force: bool) -> Iterator[None]:
    """Make or take over the folder of work: one process at a time, one plan."""
    plan = json.loads(to_json(_plan(spec)))
    work.mkdir(exist_ok=True)
    lock = (work / "lock").open("w")
    try:
        with contextlib.suppress(ImportError):  # systems without such locks
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(f"{work}: another process builds this corpus; wait for it, or end it") from None
        file = work / "plan.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if before != plan:
            if before is not None and not force and any((work / "records").glob("write-*")):
                changed = next(key for key in plan if plan[key] != before.get(key))
                raise OutputError(
                    f"{work}: a build that was begun with other inputs or settings ({changed} differs), and has "
                    "written cells; give --force to start again"
                )
            for path in work.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("records", "imported", "corpus/shards"):
            (work / name).mkdir(parents=True, exist_ok=True)
        for left in work.rglob(".tmp-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(plan, file)
        yield
    finally:
        lock.close()


def _plan(spec: CorpusSpec) -> dict[str, Any]:
    """All that decides what is written."""
    settings = ("vocabulary", "genes", "unknown", "duplicates", "shard_cells")
    studies = [{name: getattr(s, name) for name in s.__dataclass_fields__} for s in spec.studies]
    return {
        "scmulan": scmulan.__version__,
        **{name: getattr(spec, name) for name in settings},
        "vocabulary_file": Path(spec.vocabulary).read_text("utf-8") if os.sep in spec.vocabulary else "",
        "studies": studies,
        "inputs": [stamp(s.file) + (stamp(s.obs) if s.obs else []) for s in spec.studies],
    }


def _finish(
    spec: CorpusSpec,
    found: Sequence[dict[str, Any]],
    donors: list[tuple[str, str]],
    vocabulary: Vocabulary,
    study_of: Sequence[int],
    records: Sequence[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Write the table of cells and the manifest."""
    shards = [shard for record in records for shard in record["shards"]]
    measured = np.zeros((len(spec.studies), len(vocabulary.genes)), dtype=bool)
    accounts: dict[int, dict[str, Any]] = {}
    for i, record in zip(study_of, records, strict=True):
        measured[i, record["genes"]["measured"]] = True
        accounts[i] = {key: value for key, value in record["genes"].items() if key != "measured"}
    repeats = find_repeats(folder, shards)
    write_table(folder, shards, measured, repeats if spec.duplicates == "drop" else None)
    studies = []
    for i, (study, survey) in enumerate(zip(spec.studies, found, strict=True)):
        own = [shard for shard in shards if shard["study"] == i]
        unknown = {
            family: {word: n for word, n in words.items() if word and vocabulary.find(Family(family), word) is None}
            for family, words in survey["words"].items()
        }
        studies.append(
            {
                "name": study.name,
                "group": study.group,
                "file": study.file.name,
                "sha256": survey["sha256"],
                "cells": survey["cells"],
                "kept": sum(shard["kept"] for shard in own),
                "matrix": survey["matrix"],
                "genes": accounts[i],
                "covered": sum(shard["covered"] for shard in own) / survey["cells"],
                "words_per_cell": sum(shard["words"] for shard in own) / survey["cells"],
                "rounded": sum(shard["rounded"] for shard in own),
                "donors": len(survey["donors"]),
                "unknown_words": {family: words for family, words in unknown.items() if words},
            }
        )
    settings = {name: getattr(spec, name) for name in ("genes", "unknown", "duplicates", "shard_cells")}
    settings["vocabulary"] = Path(spec.vocabulary).name if spec.vocabulary else "new"
    content = {
        "made_by": f"scmulan {scmulan.__version__}",
        "settings": settings,
        "studies": studies,
        "donors": donors,
        "duplicates": repeats.report([study.name for study in spec.studies]),
    }
    write_manifest(folder, shards, content)
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))

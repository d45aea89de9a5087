"""Build a corpus: from a spec and its files to a folder of shards.

Work goes on in a folder beside the output, ``.OUT.building``, in which every step leaves a record; the corpus is put in
its place when all is done. A build that was ended in any way is continued by the same call.

Which tasks a build consists of: to look at each file, to add up its genes, to write its cells.

The vocabulary of a corpus: given, given and extended, or new.

From finished shards to a corpus: the table of all cells, and the manifest.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import scmulan
from scmulan._io.adata import to_json, write_json
from scmulan._io.outputs import atomic_path, check_output, sha256
from scmulan.data.build_jobs import Measure, Survey, Write
from scmulan.data.duplicates import Repeats, find_repeats
from scmulan.data.gene_selection import GeneScores
from scmulan.data.readers import BLOCK_VALUES, stamp
from scmulan.data.runner import Runner
from scmulan.data.shards import create, open_arrays
from scmulan.data.spec import CorpusSpec
from scmulan.data.store import CELLS, CHECKSUM, FORMAT, MANIFEST, VOCABULARY
from scmulan.errors import OutputError, VocabularyError
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

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

        def run(step: str, todo: Sequence[Any]) -> list[dict[str, Any]]:
            return runner(todo, lambda cells: progress(step, cells))

        found = run("look", surveys(spec, work))
        vocabulary = choose_vocabulary(spec, found, work, run, block_values)
        donors = donor_codes(spec, found)
        write_jobs = list(writes(spec, found, donors, work, block_values))
        records = run("write", write_jobs)
        folder = work / "corpus"
        manifest = _finish(spec, found, list(donors), vocabulary, [job.study for job in write_jobs], records, folder)
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


def surveys(spec: CorpusSpec, work: Path) -> list[Survey]:
    """Tasks that look at each file."""
    return [
        Survey(record=work / "records" / f"look-{i:05d}.json", spec=study, imported=work / "imported" / f"{i:05d}.h5ad")
        for i, study in enumerate(spec.studies)
    ]


def _parts(survey: dict[str, Any], shard_cells: int) -> Iterator[tuple[int, int]]:
    """First row and number of cells of each task: of a shard's, or of all where rows cannot be read one by one."""
    step = survey["cells"] if survey["by_column"] else shard_cells
    for first in range(0, survey["cells"], step):
        yield first, min(step, survey["cells"] - first)


def _imported(survey: dict[str, Any], work: Path, i: int) -> Path | None:
    return work / "imported" / f"{i:05d}.h5ad" if survey["imported"] else None


def measures(spec: CorpusSpec, surveys: Sequence[dict[str, Any]], work: Path, block_values: int) -> list[list[Measure]]:
    """Tasks that add up the genes of each study."""
    return [
        [
            Measure(
                record=work / "records" / f"genes-{i:05d}-{part:05d}.json",
                spec=study,
                imported=_imported(survey, work, i),
                first=first,
                cells=cells,
                values=block_values,
            )
            for part, (first, cells) in enumerate(_parts(survey, spec.shard_cells))
        ]
        for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True))
    ]


def donor_codes(spec: CorpusSpec, surveys: Sequence[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Code of each donor: group of studies and name."""
    number = count()
    out: dict[tuple[str, str], int] = {}
    for study, survey in zip(spec.studies, surveys, strict=True):
        for name in survey["donors"]:
            if (study.group, name) not in out:
                out[study.group, name] = next(number)
    return out


def writes(
    spec: CorpusSpec,
    surveys: Sequence[dict[str, Any]],
    donors: dict[tuple[str, str], int],
    work: Path,
    block_values: int,
) -> Iterator[Write]:
    """Tasks that write the cells of each study, their shards numbered in the order of the corpus."""
    number = 0
    for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True)):
        for first, cells in _parts(survey, spec.shard_cells):
            yield Write(
                record=work / "records" / f"write-{number:06d}.json",
                spec=study,
                imported=_imported(survey, work, i),
                folder=work / "corpus",
                study=i,
                number=number,
                first=first,
                cells=cells,
                shard_cells=spec.shard_cells,
                donors={name: donors[study.group, name] for name in survey["donors"]},
                values=block_values,
            )
            number += -(-cells // spec.shard_cells)


# Genes that 16 bits tell apart.
LARGEST = 2**16


def choose_vocabulary(
    spec: CorpusSpec,
    surveys: Sequence[dict[str, Any]],
    work: Path,
    run: Callable[[str, Sequence[Any]], Any],
    block_values: int,
) -> Vocabulary:
    """Words of the corpus, new or given; written into it."""
    path = work / "corpus" / VOCABULARY
    found: dict[Family, Counter[str]] = {family: Counter() for family in METADATA}
    for survey in surveys:
        for family, words in survey["words"].items():
            found[Family(family)].update({word: n for word, n in words.items() if word})
    if spec.vocabulary:
        vocabulary = Vocabulary.published() if spec.vocabulary == "published" else Vocabulary.load(spec.vocabulary)
        for family, words in found.items():
            new = sorted(word for word in words if vocabulary.find(family, word) is None)
            if new and spec.unknown == "refuse":
                _refuse(spec, surveys, family, new, vocabulary)
            if spec.unknown == "add":
                vocabulary = vocabulary.extend(family, new)
    else:
        scores = GeneScores()
        studies = measures(spec, surveys, work, block_values)
        run("genes", [part for parts in studies for part in parts])
        for parts in studies:
            genes, moments = parts[0].moments()
            for part in parts[1:]:
                moments.merge(part.moments()[1])
            scores.add_moments(genes, moments)
        vocabulary = Vocabulary.build(
            scores.best(spec.genes), {family: sorted(words) for family, words in found.items()}
        )
    if len(vocabulary.genes) > LARGEST:
        raise VocabularyError(f"{len(vocabulary.genes):,} genes, but shards can name {LARGEST:,}: choose fewer")
    with atomic_path(path) as temporary:
        vocabulary.save(temporary)
    return vocabulary


def _refuse(
    spec: CorpusSpec, surveys: Sequence[dict[str, Any]], family: Family, new: list[str], vocabulary: Vocabulary
) -> None:
    word = new[0]
    where = next(i for i, survey in enumerate(surveys) if word in survey["words"].get(str(family), {}))
    try:
        vocabulary.id(family, word)
    except VocabularyError as error:
        hint = str(error).partition("; ")[2]
    else:
        hint = "it differs in upper or lower case only"
    raise VocabularyError(
        f"{spec.studies[where].file}: {family} {word!r} is not in the vocabulary, nor are {len(new) - 1} others of "
        f"{family}; rename them in [rename.{family}], or say unknown = 'drop' or 'add' ({hint})"
    )


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

"""Build a corpus: from a spec and its files to a folder of shards.

The steps of :func:`build`, in the order of this module:

1. Survey each file: its matrix, metadata names, donors, hash. Formats other than AnnData are converted to h5ad first.
2. Choose the vocabulary: one that exists, or the most variable genes over all studies and every name that occurs.
3. Write the cells as shards.
4. Find cells that repeat an earlier one.
5. Write the table of all cells.
6. Write the manifest.

Steps 1 to 3 consist of independent jobs, which leave a record each in ``.OUT.building``, a folder beside the output. A
build that was interrupted continues with the jobs that have no record. The corpus is renamed to its final path when all
is done.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import scipy.sparse as sp

import scmulan
from scmulan._io.adata import to_json, write_json
from scmulan._io.outputs import atomic_path, check_output, lock_file, sha256
from scmulan._progress import SILENT, Progress
from scmulan.data.gene_selection import GeneScores, Moments
from scmulan.data.jobs import Job, Runner
from scmulan.data.memory import token_ids
from scmulan.data.readers import (
    BLOCK_VALUES,
    blocks,
    convert_to_h5ad,
    find_converter,
    hash_input,
    matrix_of,
    open_study,
    resolve_columns,
    stamp,
    stored_by_column,
)
from scmulan.data.shards import NotWhole, ShardWriter, create_arrays, fold, open_arrays
from scmulan.data.spec import CorpusSpec, StudySpec
from scmulan.data.store import CELLS, CHECKSUM, FORMAT, MANIFEST, VOCABULARY
from scmulan.errors import InputError, OutputError, VocabularyError
from scmulan.vocab.genes import GeneMatch, GeneTable, match_genes
from scmulan.vocab.matrix import ExpressionMatrix
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

MAX_GENES = 2**16
"""Genes that the 16 bits of a token tell apart."""
OBS_ROWS = 100_000
"""Rows of ``obs`` whose names are counted together."""
MIN_REPEATED_TOKENS = 20
"""Cells of fewer tokens may agree by chance and are no repeats."""
MAX_HASHES = 8_000_000
"""Content hashes that are compared at a time (64 MB); more cells are compared in several passes."""


def build(
    spec: CorpusSpec,
    out: str | os.PathLike[str],
    *,
    jobs: int = 1,
    dask: str | None = None,
    force: bool = False,
    block_values: int = BLOCK_VALUES,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write a corpus, or continue a build that was interrupted.

    Parameters
    ----------
    spec : CorpusSpec
        Files and settings.
    out : path-like
        Folder to write.
    jobs : int
        Number of processes.
    dask : str, optional
        Address of a Dask scheduler to use instead; its workers have to see the same folders.
    force : bool
        Replace ``out`` if it exists, and start again if the build was begun with other inputs or settings.
    block_values : int
        Largest number of values of a block of cells, were it dense.
    progress : Progress
        Shows the steps.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    InputError, MatrixError, GeneError
        If a file cannot be used.
    VocabularyError
        If ``unknown = "refuse"`` and a name is not in the vocabulary.
    OutputError
        If the output cannot be written, was begun with other inputs or settings, or is being built by another process.

    Notes
    -----
    Each process holds one block of cells, its file's ``obs`` and the tables of one shard's cells, whatever the size of
    the files; the caller holds one byte for every cell besides. The bytes written depend neither on the number of
    processes nor on Dask, blocks or interruptions.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_output(out, force, folder=True)
    work = out.with_name(f".{out.name}.building")
    folder = work / "corpus"
    with _work_folder(work, spec, force), Runner(jobs, dask) as runner:
        steps = _Steps(runner, progress)
        surveys = steps.run("files surveyed", survey_jobs(spec, work))
        vocabulary = choose_vocabulary(spec, surveys, work, steps, block_values)
        write_jobs, donors = shard_jobs(spec, surveys, work, block_values)
        written = steps.run("cells written", write_jobs)
        shards = [shard for record in written for shard in record["shards"]]
        repeats = find_repeats(folder, shards)
        measured = np.zeros((len(spec.studies), len(vocabulary.genes)), dtype=bool)
        for record in written:
            measured[record["study"], record["measured"]] = True
        write_table(folder, shards, measured, repeats.later if spec.duplicates == "drop" else None)
        genes = {record["study"]: record["genes"] for record in written}
        content = describe_corpus(spec, surveys, vocabulary, shards, genes, donors, repeats)
        manifest = write_manifest(folder, shards, content)
        with atomic_path(out) as temporary:
            os.replace(folder, temporary)
    shutil.rmtree(work)
    return manifest


@contextmanager
def _work_folder(work: Path, spec: CorpusSpec, force: bool) -> Iterator[None]:
    """Make the work folder or take it over, for one process at a time and one set of inputs and settings."""
    begun_with = json.loads(to_json(_inputs_and_settings(spec)))
    work.mkdir(exist_ok=True)
    busy = f"{work}: another process builds this corpus; wait for it, or end it"
    with lock_file(work / "lock", busy):
        file = work / "begun_with.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if before != begun_with:
            if before is not None and not force and any((work / "records").glob("write-*")):
                changed = next(key for key in begun_with if begun_with[key] != before.get(key))
                raise OutputError(
                    f"{work}: a build that was begun with other inputs or settings ({changed} differs), and has "
                    "written cells; give --force to start again"
                )
            for path in work.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("records", "converted", "corpus/shards"):
            (work / name).mkdir(parents=True, exist_ok=True)
        for left in work.rglob(".tmp-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(begun_with, file)
        yield


def _inputs_and_settings(spec: CorpusSpec) -> dict[str, Any]:
    """Return everything that decides what is written."""
    settings = asdict(spec)
    studies = settings.pop("studies")
    return {
        "scmulan": scmulan.__version__,
        **settings,
        "vocabulary_file": Path(spec.vocabulary).read_text("utf-8") if os.sep in spec.vocabulary else "",
        "studies": studies,
        "inputs": [stamp(study.file) + (stamp(study.obs) if study.obs else []) for study in spec.studies],
    }


@dataclass(frozen=True)
class _Steps:
    """Run the jobs of one step after another, and show how far each is."""

    runner: Runner
    progress: Progress

    def run(self, unit: str, jobs: Sequence[Job]) -> list[Any]:
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            bar(size)
            self.progress.log(f"{done:,} {unit}")

        with self.progress.bar(sum(job.size for job in jobs), unit) as bar:
            return self.runner.run(jobs, advance)


# -- 1: survey the files ------------------------------------------------------------------------------------------


class Survey(TypedDict):
    """Account of a file: its cells, genes, matrix, names and donors."""

    cells: int
    genes: int
    matrix: dict[str, str]
    """``where`` it is, its ``state`` (counts or log1p) and the ``reason`` for both."""
    converted: str | None
    """The h5ad file that was made from it, where it is of another format."""
    by_column: bool
    """Whether reading some cells means reading all."""
    words: dict[str, dict[str, int]]
    """Number of cells of each name of each metadata family; "" where unknown."""
    donors: list[str]
    sha256: str


def survey_jobs(spec: CorpusSpec, work: Path) -> list[Job]:
    """List the jobs that survey the files."""
    return [
        Job(
            record=work / "records" / f"look-{i:05d}.json",
            size=1,
            work=survey_file,
            arguments={"study": study, "converted": work / "converted" / f"{i:05d}.h5ad"},
        )
        for i, study in enumerate(spec.studies)
    ]


def survey_file(study: StudySpec, converted: Path) -> dict[str, Any]:
    """Survey a file; its cells are converted to h5ad where it is of another format.

    Parameters
    ----------
    study : StudySpec
        The file.
    converted : Path
        Where to write the h5ad file.

    Returns
    -------
    dict
        See :class:`Survey`.
    """
    foreign = find_converter(study.file) is not None
    if study.where and not foreign:
        raise InputError(f"{study.file}: `where` chooses cells of SOMA experiments only; leave it out")
    if foreign and not converted.exists():
        convert_to_h5ad(study.file, converted, study.where)
    with open_study(study, converted if foreign else None) as adata:
        matrix = matrix_of(adata, study)
        names: dict[str, Counter[str]] = {}
        donors: set[str] = set()
        for first in range(0, adata.n_obs, OBS_ROWS):
            obs = adata.obs.iloc[first : first + OBS_ROWS]
            for family, values in study.metadata(obs).items():
                names.setdefault(str(family), Counter()).update(values)
            donors.update(study.donors(obs))
        survey = Survey(
            cells=adata.n_obs,
            genes=matrix.n_genes,
            matrix={"where": matrix.where, "state": matrix.matrix_kind, "reason": matrix.reason},
            converted=str(converted) if foreign else None,
            by_column=stored_by_column(matrix),
            words={family: dict(sorted(found.items())) for family, found in names.items()},
            donors=sorted(donors - {""}),
            sha256=hash_input(study.file),
        )
    return dict(survey)


def _converted(survey: Survey) -> Path | None:
    return Path(survey["converted"]) if survey["converted"] else None


def _row_ranges(survey: Survey, shard_cells: int) -> Iterator[tuple[int, int]]:
    """Divide a file into jobs: first row and number of cells; all rows where they cannot be read one by one."""
    step = survey["cells"] if survey["by_column"] else shard_cells
    for first in range(0, survey["cells"], step):
        yield first, min(step, survey["cells"] - first)


# -- 2: choose the vocabulary ---------------------------------------------------------------------------------------


def choose_vocabulary(
    spec: CorpusSpec, surveys: Sequence[Survey], work: Path, steps: _Steps, block_values: int
) -> Vocabulary:
    """Choose the tokens of the corpus and write them into it: a vocabulary that exists, or a new one.

    Raises
    ------
    VocabularyError
        If ``unknown = "refuse"`` and a name is not in the vocabulary, or it has too many genes.
    """
    names: dict[Family, set[str]] = {family: set() for family in METADATA}
    for survey in surveys:
        for name, counts in survey["words"].items():
            names[Family(name)] |= set(counts) - {""}
    if spec.vocabulary:
        vocabulary = Vocabulary.published() if spec.vocabulary == "published" else Vocabulary.load(spec.vocabulary)
        for family, found in names.items():
            unknown = sorted(name for name in found if vocabulary.find(family, name) is None)
            if unknown and spec.unknown == "refuse":
                _refuse(spec, surveys, family, unknown, vocabulary)
            if spec.unknown == "add":
                vocabulary = vocabulary.extend(family, unknown)
    else:
        genes = choose_genes(spec, surveys, work, steps, block_values)
        vocabulary = Vocabulary.build(genes, {family: sorted(found) for family, found in names.items()})
    if len(vocabulary.genes) > MAX_GENES:
        raise VocabularyError(f"{len(vocabulary.genes):,} genes, but shards can name {MAX_GENES:,}: choose fewer")
    with atomic_path(work / "corpus" / VOCABULARY) as temporary:
        vocabulary.save(temporary)
    return vocabulary


def _refuse(
    spec: CorpusSpec, surveys: Sequence[Survey], family: Family, unknown: list[str], vocabulary: Vocabulary
) -> None:
    name = unknown[0]
    where = next(i for i, survey in enumerate(surveys) if name in survey["words"].get(str(family), {}))
    try:
        vocabulary.id(family, name)
    except VocabularyError as error:
        hint = str(error).partition("; ")[2]
    else:
        hint = "it differs in upper or lower case only"
    raise VocabularyError(
        f"{spec.studies[where].file}: {family} {name!r} is not in the vocabulary, nor are {len(unknown) - 1} others of "
        f"{family}; rename them in [rename.{family}], or say unknown = 'drop' or 'add' ({hint})"
    )


def choose_genes(
    spec: CorpusSpec, surveys: Sequence[Survey], work: Path, steps: _Steps, block_values: int
) -> list[str]:
    """Choose the most variable genes over all studies."""
    jobs_of_study = [
        [
            Job(
                record=work / "records" / f"genes-{i:05d}-{part:05d}.json",
                size=cells,
                work=sum_genes,
                arguments={
                    "study": study,
                    "converted": _converted(survey),
                    "rows": (first, first + cells),
                    "block_values": block_values,
                    "sums": work / "records" / f"genes-{i:05d}-{part:05d}.npz",
                },
            )
            for part, (first, cells) in enumerate(_row_ranges(survey, spec.shard_cells))
        ]
        for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True))
    ]
    steps.run("cells added up", [job for jobs in jobs_of_study for job in jobs])
    scores = GeneScores()
    for jobs in jobs_of_study:
        parts = (Moments.load(job.arguments["sums"]) for job in jobs)
        moments = next(parts)
        for part in parts:
            moments.merge(part)
        scores.add_moments(jobs[0].run()["genes"], moments)
    return scores.best(spec.genes)


def sum_genes(
    study: StudySpec, converted: Path | None, rows: tuple[int, int], block_values: int, sums: Path
) -> dict[str, Any]:
    """Add up the genes of some cells of a file.

    Parameters
    ----------
    study, converted
        The file, and the h5ad file that was made from it, if any.
    rows : (int, int)
        First row, and the one after the last.
    block_values : int
        Largest number of values of a block.
    sums : Path
        Where to write the moments.

    Returns
    -------
    dict
        ``genes``: the approved symbols that the moments are of.
    """
    with open_study(study, converted) as adata:
        matrix = matrix_of(adata, study)
        genes, columns = resolve_columns(matrix.var, GeneTable.load())
        moments = Moments.of_none(len(genes))
        for _, block in blocks(matrix, *rows, values=block_values):
            cells = fold(block, columns, len(genes), logged=matrix.matrix_kind == "log1p")
            moments.add(cells.to_csr(len(genes)), cells.total, matrix.matrix_kind)
    moments.save(sums)
    return {"genes": genes}


# -- 3: write the shards ----------------------------------------------------------------------------------------------


class Shard(TypedDict, total=False):
    """Description of a shard; all but ``kept`` is in the record of its job."""

    file: str
    study: int
    first: int
    """Row of its first cell in the study's file."""
    encoding: str
    cells: int
    kept: int
    """Number of cells that stay in the table of cells; set by :func:`write_table`."""
    words: int
    """Number of tokens."""
    rounded: int
    """Number of counts that were too large to be kept exactly."""
    covered: float
    """Sum over cells of the fraction of their total that lies in the vocabulary's genes."""
    sha256: str
    bytes: int


Donors = dict[tuple[str, str], int]
"""Code of each donor, by group of studies and name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """Cells of a file that become shards: one, or several if the file is stored by column."""

    study: StudySpec
    index: int
    """Of the study in the corpus."""
    converted: Path | None
    """The h5ad file that was made from it, if any."""
    donors: dict[str, int]
    """Code of each donor of the study."""
    folder: Path
    """Of the corpus."""
    first: int
    """First row."""
    last: int
    """Row after the last one."""
    number: int
    """Number of the first shard."""
    shard_cells: int
    block_values: int


def shard_jobs(spec: CorpusSpec, surveys: Sequence[Survey], work: Path, block_values: int) -> tuple[list[Job], Donors]:
    """List the jobs that write shards, numbered in the order of the corpus, and give each donor a code."""
    donors: Donors = {}
    jobs = []
    number = 0
    for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True)):
        for name in survey["donors"]:
            donors.setdefault((study.group, name), len(donors))
        for first, cells in _row_ranges(survey, spec.shard_cells):
            job = ShardJob(
                study=study,
                index=i,
                converted=_converted(survey),
                donors={name: donors[study.group, name] for name in survey["donors"]},
                folder=work / "corpus",
                first=first,
                last=first + cells,
                number=number,
                shard_cells=spec.shard_cells,
                block_values=block_values,
            )
            record = work / "records" / f"write-{number:06d}.json"
            jobs.append(Job(record=record, size=cells, work=write_shards, arguments={"job": job}))
            number += -(-cells // spec.shard_cells)
    return jobs, donors


def write_shards(job: ShardJob) -> dict[str, Any]:
    """Write the shards of a job.

    Returns
    -------
    dict
        ``study``: its index; ``genes``: account of its genes; ``measured``: vocabulary genes that it has, as indices;
        ``shards``: a :class:`Shard` each.
    """
    vocabulary = Vocabulary.load(job.folder / VOCABULARY)
    with open_study(job.study, job.converted) as adata:
        matrix = matrix_of(adata, job.study)
        match = match_genes(matrix.var, vocabulary.genes, warn_below=0, source=str(job.study.file))
        try:
            encoding = "log1p" if matrix.matrix_kind == "log1p" else "counts"
            shards = _encode_shards(job, adata.obs, matrix, match, vocabulary, encoding)
        except NotWhole:  # found only by reading, as a few fractions may be anywhere
            shards = _encode_shards(job, adata.obs, matrix, match, vocabulary, "amounts")
    index = {gene: i for i, gene in enumerate(vocabulary.genes)}
    return {
        "study": job.index,
        "genes": _gene_account(match),
        "measured": [index[gene] for gene in match.found],
        "shards": shards,
    }


def _encode_shards(
    job: ShardJob,
    obs: pd.DataFrame,
    matrix: ExpressionMatrix,
    match: GeneMatch,
    vocabulary: Vocabulary,
    encoding: str,
) -> list[Shard]:
    shards: list[Shard] = []
    pieces = _cut(blocks(matrix, job.first, job.last, values=job.block_values), job.first, job.shard_cells)
    for first in range(job.first, job.last, job.shard_cells):
        last = min(first + job.shard_cells, job.last)
        name = f"shards/{job.number + len(shards):06d}.safetensors"
        covered, row = 0.0, first
        with atomic_path(job.folder / name) as temporary, temporary.open("wb") as file:
            writer = ShardWriter(file, last - first, encoding)
            while row < last:
                block = next(pieces)
                rows = obs.iloc[row : row + block.shape[0]]
                cells = fold(block, match.columns, len(vocabulary.genes), logged=encoding == "log1p")
                names = {family: column.to_numpy(dtype=object) for family, column in job.study.metadata(rows).items()}
                writer.add(
                    cells,
                    donor=np.array([job.donors.get(donor, -1) for donor in job.study.donors(rows)], dtype=np.int32),
                    metadata=token_ids(len(rows), vocabulary, names),
                )
                covered += float((cells.inside / np.maximum(cells.total, 1e-9)).sum())
                row += len(rows)
            tokens = writer.finish({"study": job.study.name, "first": str(first)})
        shards.append(
            Shard(
                file=name,
                study=job.index,
                first=first,
                encoding=encoding,
                cells=last - first,
                words=tokens,
                rounded=writer.rounded,
                covered=covered,
                sha256=sha256(job.folder / name),
                bytes=(job.folder / name).stat().st_size,
            )
        )
    return shards


def _cut(blocks: Iterator[tuple[int, sp.csr_matrix]], first: int, size: int) -> Iterator[sp.csr_matrix]:
    """Cut blocks of consecutive cells where a shard of ``size`` cells ends."""
    for row, block in blocks:
        start = 0
        while start < block.shape[0]:
            stop = start + size - (row + start - first) % size
            yield block[start:stop]
            start = stop


def _gene_account(match: GeneMatch) -> dict[str, Any]:
    """Describe what became of a file's genes."""
    report = match.report()
    numbers = (
        "names_from",
        "id_type",
        "input_genes",
        "matched_columns",
        "outside_vocabulary",
        "fraction_of_vocabulary",
    )
    lists = ("missing", "renamed", "unknown", "ambiguous", "duplicates")
    return {
        **{key: report[key] for key in numbers},
        "found": len(match.found),
        **{key: report[key] for key in lists},
    }


# -- 4: find repeats ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Repeats:
    """Cells that repeat an earlier one: the same tokens with the same values.

    Parameters
    ----------
    later : numpy.ndarray, bool [cells]
        Whether a cell repeats an earlier one; over the cells of all shards.
    pairs : Counter
        Number of such cells by (study of the first cell, study of the repeat).
    """

    later: np.ndarray
    pairs: Counter[tuple[int, int]]

    def report(self, studies: Sequence[str]) -> dict[str, Any]:
        """Return the numbers for the manifest: all, across studies, within studies, and by pair of studies."""
        across = sum(n for (a, b), n in self.pairs.items() if a != b)
        order = sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))
        return {
            "cells": int(self.later.sum()),
            "across_studies": across,
            "within_studies": int(self.later.sum()) - across,
            "pairs": [{"studies": [studies[a], studies[b]], "cells": n} for (a, b), n in order],
        }


def find_repeats(folder: Path, shards: Sequence[Shard], max_hashes: int = MAX_HASHES) -> Repeats:
    """Find repeats by the content hashes of all cells.

    Parameters
    ----------
    folder : Path
        Of the corpus.
    shards : sequence of Shard
        In order.
    max_hashes : int
        Approximate number of hashes to hold at a time: every pass compares those of one residue class.

    Returns
    -------
    Repeats
    """
    n_cells = sum(shard["cells"] for shard in shards)
    later = np.zeros(n_cells, dtype=bool)
    pairs: Counter[tuple[int, int]] = Counter()
    ends = np.cumsum([shard["cells"] for shard in shards])
    study_of_shard = np.array([shard["study"] for shard in shards], dtype=np.int64)
    passes = max(-(-n_cells // max_hashes), 1)
    for residue in range(passes):
        hashes, cells = [], []
        first = 0
        for shard in shards:
            arrays = open_arrays(folder / shard["file"])[0]
            enough = np.diff(arrays["indptr"]) >= MIN_REPEATED_TOKENS
            mine = np.flatnonzero(enough & (arrays["content"] % np.uint64(passes) == residue))
            hashes.append(arrays["content"][mine])
            cells.append(mine + first)
            first += shard["cells"]
        content, cell = np.concatenate(hashes), np.concatenate(cells)
        order = np.argsort(content, kind="stable")  # within equal hashes, cells keep their order
        content, cell = content[order], cell[order]
        repeated = np.flatnonzero(np.r_[False, content[1:] == content[:-1]])
        later[cell[repeated]] = True
        original = cell[np.searchsorted(content, content[repeated], side="left")]
        one, two = (study_of_shard[np.searchsorted(ends, c, side="right")] for c in (original, cell[repeated]))
        pairs.update(zip(one.tolist(), two.tolist(), strict=True))
    return Repeats(later, pairs)


# -- 5: write the table of cells --------------------------------------------------------------------------------------


def write_table(folder: Path, shards: Sequence[Shard], measured: np.ndarray, drop: np.ndarray | None = None) -> None:
    """Write the columns of all cells into one file, shard by shard.

    Parameters
    ----------
    folder : Path
        Of the corpus, with its shards.
    shards : sequence of Shard
        In order; ``kept`` is set.
    measured : numpy.ndarray, bool [studies, vocabulary genes]
        Genes that each study measured.
    drop : numpy.ndarray, bool [cells], optional
        Cells to leave out, over the cells of all shards.
    """
    keep: list[Any] = [slice(None)] * len(shards)
    first = 0
    for i, shard in enumerate(shards):
        if drop is not None:
            keep[i] = ~drop[first : first + shard["cells"]]
        shard["kept"] = shard["cells"] if drop is None else int(np.count_nonzero(keep[i]))
        first += shard["cells"]
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
        table = create_arrays(temporary, shapes, {"format": "scmulan-cells/1"})
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


# -- 6: write the manifest --------------------------------------------------------------------------------------------


def describe_corpus(
    spec: CorpusSpec,
    surveys: Sequence[Survey],
    vocabulary: Vocabulary,
    shards: Sequence[Shard],
    genes: Mapping[int, dict[str, Any]],
    donors: Donors,
    repeats: Repeats,
) -> dict[str, Any]:
    """Describe settings, studies, donors and duplicates for the manifest; ``genes`` has an account by study."""
    studies = []
    for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True)):
        own = [shard for shard in shards if shard["study"] == i]
        unknown = {
            family: {name: n for name, n in found.items() if name and vocabulary.find(Family(family), name) is None}
            for family, found in survey["words"].items()
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
                "genes": genes[i],
                "covered": sum(shard["covered"] for shard in own) / survey["cells"],
                "words_per_cell": sum(shard["words"] for shard in own) / survey["cells"],
                "rounded": sum(shard["rounded"] for shard in own),
                "donors": len(survey["donors"]),
                "unknown_words": {family: found for family, found in unknown.items() if found},
            }
        )
    settings = {name: getattr(spec, name) for name in ("genes", "unknown", "duplicates", "shard_cells")}
    settings["vocabulary"] = Path(spec.vocabulary).name if spec.vocabulary else "new"
    return {
        "made_by": f"scmulan {scmulan.__version__}",
        "settings": settings,
        "studies": studies,
        "donors": list(donors),
        "duplicates": repeats.report([study.name for study in spec.studies]),
    }


def write_manifest(folder: Path, shards: Sequence[Shard], content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest with the hash of every file, and its own checksum (as ``sha256sum`` reads it).

    Parameters
    ----------
    folder : Path
        Of the corpus; all else is in it.
    shards : sequence of Shard
        In order, with ``kept``.
    content : mapping
        Further entries: ``studies``, ``donors``, ``settings`` …

    Returns
    -------
    dict
        The manifest as it is read from its file.
    """
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in (VOCABULARY, CELLS)
    }
    files |= {shard["file"]: {"sha256": shard["sha256"], "bytes": shard["bytes"]} for shard in shards}
    keys = ("file", "study", "first", "encoding", "cells", "kept", "words", "rounded")
    manifest = {
        "format": FORMAT,
        "cells": sum(shard["kept"] for shard in shards),
        "words": sum(shard["words"] for shard in shards),
        **content,
        "shards": [{key: dict(shard)[key] for key in keys} for shard in shards],
        "files": files,
    }
    write_json(manifest, folder / MANIFEST)
    with atomic_path(folder / CHECKSUM) as temporary:
        temporary.write_text(f"{sha256(folder / MANIFEST)}  {MANIFEST}\n", encoding="ascii")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest

"""Cells that training reads: :class:`CellSource`, the protocol; :class:`Corpus`, which satisfies it from disk."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from scmulan._io.outputs import sha256
from scmulan.data.shards import code_values, gather_rows, open_arrays
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


@runtime_checkable
class CellSource(Protocol):
    """Labelled cells in the genes of one vocabulary, in memory or on disk.

    Attributes
    ----------
    lengths : numpy.ndarray, int64 [cells]
        Number of vocabulary genes expressed in each cell.
    total : numpy.ndarray, float32 [cells]
        Sum over all genes of the cell's file (counts, or counts per 10,000).
    logged : numpy.ndarray, bool [cells]
        Whether values are log1p, not counts.
    study : numpy.ndarray, integer [cells]
        Index in ``studies``; every file counts as a study, as it has its own genes.
    studies : list of str
        Names of the studies.
    measured : numpy.ndarray, bool [studies, vocabulary genes]
        Genes that each study measured.
    metadata : numpy.ndarray, int32 [cells, families]
        Token id of each family of ``METADATA``, −1 where unknown.

    Notes
    -----
    Training plans its batches from these tables and calls :meth:`rows` for the cells of one batch only. A source of
    cells that are averages of others would enter here, too: as it knows ``lengths`` only once :meth:`rows` has made a
    cell, its batches would be sorted by length inside a pool after reading, not before.
    """

    lengths: np.ndarray
    total: np.ndarray
    logged: np.ndarray
    study: np.ndarray
    studies: list[str]
    measured: np.ndarray
    metadata: np.ndarray

    def __len__(self) -> int: ...

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Return values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order requested."""
        ...

    def tokens(self, family: Family) -> np.ndarray:
        """Return the token id of a family per cell, int32, −1 where unknown."""
        return self.metadata[:, METADATA.index(family)]

    def covered(self, max_cells: int | None = None) -> float:
        """Return the mean fraction of a cell's total in the vocabulary's genes, over all or at most so many cells."""
        step = 1 if max_cells is None else -(-len(self) // max_cells)
        fractions = []
        for start in range(0, len(self), step * 4096):
            cells = np.arange(start, min(start + step * 4096, len(self)), step)
            rows = self.rows(cells)
            logged = np.repeat(self.logged[cells], np.diff(rows.indptr))
            # Of log1p values only: that of a large count is infinite.
            rows.data = np.expm1(rows.data, where=logged, out=rows.data.astype(np.float32))
            fractions.append(np.asarray(rows.sum(1)).ravel() / np.maximum(self.total[cells], 1e-9))
        return float(np.concatenate(fractions).mean())


FORMAT = "scmulan-corpus/1"
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
VOCABULARY = "vocabulary.json"
CELLS = "cells.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a corpus, after comparing it with its checksum.

    Raises
    ------
    InputError
        If the folder holds no corpus, or its manifest was altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "no manifest.json in it" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}; expected a folder that `scmulan corpus build` wrote")
    try:
        expected = (folder / CHECKSUM).read_text(encoding="ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise InputError(f"{folder / CHECKSUM}: missing or damaged; copy the corpus again") from None
    if sha256(path) != expected:
        raise InputError(f"{path}: does not match {CHECKSUM}, one of the two was altered; copy the corpus again")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise InputError(f"{path}: format {manifest['format']!r}, expected {FORMAT!r}; build the corpus again")
    return manifest


class Corpus(CellSource):
    """Cells of a folder that ``scmulan corpus build`` wrote.

    Opening reads the manifest and maps the files; their contents are read where cells are requested. All arrays are
    memory-mapped and read-only. Another process receives the path and maps the files itself.

    Parameters
    ----------
    path : path-like
        Folder of the corpus.

    Attributes
    ----------
    lengths, total, logged, study, studies, measured, metadata
        See :class:`CellSource`.
    donor : numpy.ndarray, int32 [cells]
        Index in ``donors``, −1 where unknown.
    donors : list of (str, str)
        Group of studies and name of each donor.
    manifest : dict
        Provenance, settings and files.

    Raises
    ------
    InputError
        If the folder is no corpus, or a file is missing or cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.studies: list[str] = [study["name"] for study in self.manifest["studies"]]
        self.donors: list[tuple[str, str]] = [(group, name) for group, name in self.manifest["donors"]]
        self._check_sizes()
        shards = self.manifest["shards"]
        _allow_open_files(len(shards))
        table = open_arrays(self.path / CELLS)[0]
        self.lengths = table["lengths"]
        self.total = table["total"]
        self.logged = table["logged"]
        self.study = table["study"]
        self.donor = table["donor"]
        self.metadata = table["metadata"]
        self.measured = table["measured"]
        self._start = table["start"]  # first token of each cell in its shard
        self._tokens = [open_arrays(self.path / shard["file"])[0]["words"] for shard in shards]
        self._values = [code_values(shard["encoding"]) for shard in shards]
        self._last = np.cumsum([shard["kept"] for shard in shards], dtype=np.int64)

    def _check_sizes(self) -> None:
        for name, entry in self.manifest["files"].items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != entry["bytes"]:
                what = "no such file" if found is None else f"{found:,} bytes, expected {entry['bytes']:,}"
                raise InputError(f"{path}: {what}; the corpus is incomplete, copy or build it again")

    def __len__(self) -> int:
        return len(self.total)

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.path,)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the corpus."""
        return Vocabulary.load(self.path / VOCABULARY)

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Return values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order requested."""
        cells = np.asarray(cells, dtype=np.int64)
        indptr = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum(self.lengths[cells], out=indptr[1:])
        indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        start = self._start[cells]
        shard = np.searchsorted(self._last, cells, side="right")
        by_shard = np.argsort(shard, kind="stable")
        for rows in np.split(by_shard, np.flatnonzero(np.diff(shard[by_shard])) + 1):
            if len(rows):
                number = shard[rows[0]]
                gather_rows(self._tokens[number], start[rows], self._values[number], rows, indptr, indices, data)
        if indptr[-1] < 2**31:
            indptr = indptr.astype(np.int32)
        out = sp.csr_matrix((data, indices, indptr), shape=(len(cells), self.measured.shape[1]))
        out.has_canonical_format = True
        return out


class Selection(CellSource):
    """View of some cells of a source, in the order of ``index``: copies their tables, not their values.

    Parameters
    ----------
    source : CellSource
        Where the cells are.
    index : numpy.ndarray, int64
        Indices of the cells to keep.
    """

    def __init__(self, source: CellSource, index: np.ndarray) -> None:
        self.source = source
        self.index = np.asarray(index, dtype=np.int64)
        self.lengths = source.lengths[self.index]
        self.total = source.total[self.index]
        self.logged = source.logged[self.index]
        self.study = source.study[self.index]
        self.studies = source.studies
        self.measured = source.measured
        self.metadata = source.metadata[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Return values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order requested."""
        return self.source.rows(self.index[cells])


def _allow_open_files(number: int) -> None:
    """Raise the limit of open files as far as needed and allowed, as each mapped file stays open."""
    try:
        import resource
    except ImportError:  # systems without such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise InputError(f"{number:,} shards, but only {hard:,} files may be open (ulimit -n): raise that limit")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

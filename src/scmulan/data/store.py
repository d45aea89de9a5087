"""A corpus on disk, opened in no time and read by whoever asks for cells.

What training asks of cells, wherever they are: in memory, or on disk.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from scmulan._io.outputs import sha256
from scmulan.data.shards import decoded, gather, open_arrays
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


@runtime_checkable
class CellSource(Protocol):
    """Labelled cells in the genes of one vocabulary.

    Attributes
    ----------
    lengths
        int64 ``[cells]``: vocabulary genes seen in each cell.
    total
        float32 ``[cells]``: total over all genes of the cell's file (counts, or counts per 10,000).
    logged
        Bool ``[cells]``: whether values are log1p, not counts.
    study
        Integers ``[cells]``: place in ``studies``; every file counts as a study, as it has its own genes.
    studies
        Study names.
    measured
        Bool ``[studies, vocabulary genes]``: what each study could have seen.
    metadata
        int32 ``[cells, families]``: word id of each family of ``METADATA``, −1 where unknown.
    """

    @property
    def lengths(self) -> np.ndarray: ...  # noqa: D102

    total: np.ndarray
    logged: np.ndarray
    study: np.ndarray
    studies: list[str]
    measured: np.ndarray
    metadata: np.ndarray

    def __len__(self) -> int: ...

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Measured values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order given."""
        ...

    def words(self, family: Family) -> np.ndarray:
        """Word id of a family per cell, −1 where unknown."""
        ...


FORMAT = "scmulan-corpus/1"
MANIFEST, CHECKSUM, VOCABULARY, CELLS, SPLIT = (
    "manifest.json",
    "manifest.sha256",
    "vocabulary.json",
    "cells.safetensors",
    "split.json",
)


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


class Corpus:
    """Cells of a folder that ``scmulan corpus build`` wrote; satisfies :class:`scmulan.data.store.CellSource`.

    Opening reads the manifest and maps files; their contents are read where cells are asked for. All arrays are
    mapped and read-only.

    Parameters
    ----------
    path
        Folder of the corpus.

    Attributes
    ----------
    lengths, total, logged, study, metadata
        See :class:`scmulan.data.store.CellSource`.
    donor
        int32 ``[cells]``: place in ``donors``, −1 where unknown.
    donors
        Group of studies and name of each donor.
    studies, measured
        Study names, and the genes that each could have seen.
    manifest
        What the corpus was made from.

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
        _allow_open_files(len(self.manifest["shards"]))
        table = open_arrays(self.path / CELLS)[0]
        self.lengths = table["lengths"]
        self.total = table["total"]
        self.logged = table["logged"]
        self.study = table["study"]
        self.donor = table["donor"]
        self.metadata = table["metadata"]
        self.measured = table["measured"]
        self._start = table["start"]
        self._words, self._decode = [], []
        for shard in self.manifest["shards"]:
            self._words.append(open_arrays(self.path / shard["file"])[0]["words"])
            self._decode.append(decoded(shard["encoding"]))
        self._ends = np.cumsum([shard["kept"] for shard in self.manifest["shards"]], dtype=np.int64)

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
        return Corpus, (self.path,)  # another process maps the files itself

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Words that the corpus is written in."""
        return Vocabulary.load(self.path / VOCABULARY)

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Measured values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order given."""
        cells = np.asarray(cells, dtype=np.int64)
        indptr = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum(self.lengths[cells], out=indptr[1:])
        start = self._start[cells]
        shard = np.searchsorted(self._ends, cells, side="right")
        order = np.argsort(shard, kind="stable")
        cuts = np.flatnonzero(np.diff(shard[order])) + 1
        indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        for place in np.split(order, cuts):
            if len(place):
                number = shard[place[0]]
                words, decode = self._words[number], self._decode[number]
                gather(words, start[place], place, decode, indptr, indices, data)
        if indptr[-1] < 2**31:
            indptr = indptr.astype(np.int32)
        out = sp.csr_matrix((data, indices, indptr), shape=(len(cells), self.measured.shape[1]))
        out.has_canonical_format = True
        return out

    def words(self, family: Family) -> np.ndarray:
        """Word id of a family per cell, −1 where unknown."""
        return self.metadata[:, METADATA.index(family)]

    def covered(self) -> float:
        """Mean share of a cell's total that lies in the vocabulary's genes."""
        studies = self.manifest["studies"]
        return float(sum(s["covered"] * s["cells"] for s in studies) / max(sum(s["cells"] for s in studies), 1))

    def subset(self, part: str, split: str | os.PathLike[str] | None = None) -> "Selection":
        """Cells of a part of a split.

        Parameters
        ----------
        part
            ``"train"``, ``"validation"`` or ``"test"``.
        split
            File that ``scmulan corpus split`` wrote; default: ``split.json`` in the corpus.

        Raises
        ------
        InputError
            If there is no such split or part, or it was made for another corpus.
        """
        from scmulan.data.split import cells_of, read_split

        return Selection(self, cells_of(self, read_split(self, split), part))


class Selection:
    """Some cells of others, in the order given: a view that copies their columns, not their words.

    Parameters
    ----------
    cells
        Where they are.
    index
        int64: places of the cells to keep.
    """

    def __init__(self, cells: CellSource, index: np.ndarray) -> None:
        self.base = cells
        self.index = np.asarray(index, dtype=np.int64)
        self.total = cells.total[self.index]
        self.logged = cells.logged[self.index]
        self.study = cells.study[self.index]
        self.metadata = cells.metadata[self.index]
        self.studies = cells.studies
        self.measured = cells.measured
        self.lengths = cells.lengths[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Measured values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order given."""
        return self.base.rows(self.index[cells])

    def words(self, family: Family) -> np.ndarray:
        """Word id of a family per cell, −1 where unknown."""
        return self.metadata[:, METADATA.index(family)]


def _allow_open_files(number: int) -> None:
    """Each mapped file stays open: use what the system allows this process, which is more than the default."""
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

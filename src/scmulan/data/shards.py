"""The format of a shard, and writing and reading one.

A shard is a safetensors file with cells of one study, memory-mapped where it is read. Its ``words`` are pairs of uint16
(place of the gene among the vocabulary's genes, value), so that a cell lies in one piece; what a value stands for is
the shard's encoding:

``counts``
    Whole counts: exact up to 60,000, in steps of 0.1 % above (reads of one gene pass 65,535 in full-length protocols).
``amounts``
    Fractional counts, CPM, TPM: log1p of the amount as float16, given back as amounts.
``log1p``
    Log1p values of a study that has no counts, as float16.

Bins are not stored: they follow from values and total while loading, and another rule needs no new corpus.

Compiled passes over cells: fold genes, gather rows of a shard, hash contents, moments of genes.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse as sp

from scmulan._numba import compiled
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import METADATA

FORMAT = "scmulan-shard/1"
ENCODINGS = ("counts", "amounts", "log1p")
# Counts up to here stand for themselves; each code above for 0.1 % more than the one below, up to 15 million.
EXACT = 60_000
STEP = 1.001
# Room for the header of a file whose number of words is known only at its end; its arrays begin on a page.
HEADER = 4096
DTYPES = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "F32": "<f4", "U16": "<u2", "BOOL": "|b1"}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class NotWhole(Exception):
    """Values that were taken for whole counts are not."""


def encode(values: np.ndarray, encoding: str) -> tuple[np.ndarray, int]:
    """Turn values above zero into uint16 codes.

    Parameters
    ----------
    values
        float32: counts, amounts or log1p values.
    encoding
        One of ``ENCODINGS``.

    Returns
    -------
    codes : numpy.ndarray
        uint16, never 0.
    rounded : int
        Counts that were too large to be kept exactly.

    Raises
    ------
    NotWhole
        If a count is no whole number.
    """
    if encoding == "counts":
        whole = np.rint(values)
        if not np.array_equal(whole, values):
            raise NotWhole
        large = np.flatnonzero(whole > EXACT)
        codes = np.minimum(whole, EXACT).astype(np.uint16)
        steps = np.rint(np.log(whole[large].astype(np.float64) / EXACT) / np.log(STEP))
        codes[large] = np.minimum(EXACT + steps, 65_535).astype(np.uint16)
        return codes, len(large)
    logs = np.log1p(values) if encoding == "amounts" else values
    return np.maximum(logs.astype(np.float16).view(np.uint16), 1), 0


@functools.cache
def decoded(encoding: str) -> np.ndarray:
    """What each of the 65,536 codes stands for, float32."""
    codes = np.arange(65_536, dtype=np.uint16)
    if encoding == "counts":
        above = np.maximum(codes.astype(np.float64) - EXACT, 0)
        out = np.where(codes > EXACT, np.rint(EXACT * STEP**above), codes).astype(np.float32)
    else:
        logs = codes.view(np.float16).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # codes that no value has
            out = np.expm1(logs) if encoding == "amounts" else logs
    out.flags.writeable = False
    return out


class ShardWriter:
    """Write the cells of one shard block by block: what is held in memory are its cells' columns, not their words.

    Parameters
    ----------
    file
        Open for writing, at its beginning.
    cells
        Number of cells that will come.
    encoding
        One of ``ENCODINGS``.
    """

    def __init__(self, file: BinaryIO, cells: int, encoding: str) -> None:
        self.encoding = encoding
        self.cells = 0
        self.rounded = 0
        self._file = file
        self._arrays = {
            "indptr": np.zeros(cells + 1, "<i8"),
            "content": np.zeros(cells, "<u8"),
            "total": np.zeros(cells, "<f4"),
            "donor": np.zeros(cells, "<i4"),
            "metadata": np.zeros((cells, len(METADATA)), "<i4"),
        }
        file.seek(HEADER + sum(a.nbytes for a in self._arrays.values()))

    def add(
        self,
        lengths: np.ndarray,
        gene: np.ndarray,
        value: np.ndarray,
        *,
        total: np.ndarray,
        donor: np.ndarray,
        metadata: np.ndarray,
    ) -> None:
        """Append cells.

        Parameters
        ----------
        lengths
            Words of each cell.
        gene, value
            Place among the vocabulary's genes and value of each word, ascending by gene within a cell.
        total, donor, metadata
            Columns of the shard, a row per cell.
        """
        codes, rounded = encode(value, self.encoding)
        words = np.empty((len(gene), 2), "<u2")
        words[:, 0] = gene
        words[:, 1] = codes
        rows = slice(self.cells, self.cells + len(lengths))
        ends = np.cumsum(lengths, dtype=np.int64)
        first = self._arrays["indptr"][rows.start]
        self._arrays["indptr"][rows.start + 1 : rows.stop + 1] = first + ends
        self._arrays["content"][rows] = content_hashes(words, ends)
        self._arrays["total"][rows] = total
        self._arrays["donor"][rows] = donor
        self._arrays["metadata"][rows] = metadata
        self._file.write(words.data)
        self.cells = rows.stop
        self.rounded += rounded

    def finish(self, about: Mapping[str, str]) -> int:
        """Write the columns and the header; return the number of words."""
        words = int(self._arrays["indptr"][-1])
        shapes = {name: (array.dtype, array.shape) for name, array in self._arrays.items()}
        shapes["words"] = (np.dtype("<u2"), (words, 2))
        self._file.seek(0)
        self._file.write(_header(shapes, {"format": FORMAT, "encoding": self.encoding, **about}))
        for array in self._arrays.values():
            self._file.write(array.data)
        return words


def content_hashes(words: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each cell's words: uint64 ``[cells]`` of uint16 ``[words, 2]`` and the end of each cell."""
    out = np.empty(len(ends), np.uint64)
    _hash(np.ascontiguousarray(words).view("<u4").ravel(), ends, out)
    return out


def _hash(words: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:

    hash_rows(words, ends, out)


def create(
    path: Path, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], about: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Create a safetensors file whose shapes are known, and map its arrays for writing.

    Parameters
    ----------
    path
        File to create.
    shapes
        Name to dtype and shape, those of the widest type first.
    about
        Texts of the header.
    """
    shapes = {name: (np.dtype(dtype), shape) for name, (dtype, shape) in shapes.items()}
    header = _header(shapes, about)
    size = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes.values())
    with path.open("wb") as file:
        file.write(header)
        os.posix_fallocate(file.fileno(), 0, HEADER + size) if hasattr(os, "posix_fallocate") else file.truncate(
            HEADER + size
        )
    return _views(np.asarray(np.memmap(path, np.uint8, "r+")), json.loads(header[8:]))


def _header(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], about: Mapping[str, str]) -> bytes:
    out: dict[str, Any] = {"__metadata__": dict(about)}
    start = 0
    for name, (dtype, shape) in shapes.items():
        stop = start + dtype.itemsize * int(np.prod(shape))
        out[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(out, separators=(",", ":")).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def open_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map the arrays of a shard, or of another safetensors file, without reading them.

    Returns
    -------
    arrays : dict
        Name to read-only array on the file.
    about : dict
        Texts of the header.

    Raises
    ------
    InputError
        If it is not there, or is shorter than its header says.
    """
    try:
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + length].tobytes())
        return _views(raw, header), header["__metadata__"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the corpus is incomplete, build it or copy it again") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: damaged or cut off ({error}); build the corpus or copy it again") from None


def _views(raw: np.ndarray, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    base = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if base + last > len(raw):
                raise ValueError(f"{len(raw):,} bytes, expected at least {base + last:,}")
            out[name] = raw[base + first : base + last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out


@compiled()
def hash_rows(words, ends, out):
    """Hash the words (uint32) of each row; ``out`` is uint64."""
    k = 0
    for row in range(len(ends)):
        h = np.uint64(0x9E3779B97F4A7C15)
        while k < ends[row]:
            # The finaliser of splitmix64, once per word.
            h ^= np.uint64(words[k])
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h ^= h >> np.uint64(31)
            k += 1
        out[row] = h


@compiled()
def gather(words, start, place, decode, indptr, indices, data):
    """Copy cells of one shard to their places in a CSR matrix.

    ``start`` is where each cell's words begin in the shard, ``place`` the row it gets.
    """
    for i in range(len(start)):
        k = start[i]
        for out in range(indptr[place[i]], indptr[place[i] + 1]):
            indices[out] = words[k, 0]
            data[out] = decode[words[k, 1]]
            k += 1


@compiled()
def _fold(data, indices, indptr, columns, genes, logged, gene, value, length, total, inside):
    scratch = np.zeros(genes, dtype=np.float64)
    n = 0
    for row in range(len(indptr) - 1):
        everything = 0.0
        known = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            x = float(data[k])
            amount = np.expm1(x) if logged else x
            everything += amount
            g = columns[indices[k]]
            if g >= 0:
                if scratch[g] == 0:
                    # One column per gene is the rule: its value stays as it is, to the last bit.
                    scratch[g] = x
                elif logged:
                    scratch[g] = np.log1p(np.expm1(scratch[g]) + amount)
                else:
                    scratch[g] += x
                known += amount
        first = n
        for g in range(genes):
            if scratch[g] > 0:
                gene[n] = g
                value[n] = scratch[g]
                scratch[g] = 0.0
                n += 1
        length[row] = n - first
        total[row] = everything
        inside[row] = known
    return n


def fold(
    block: sp.csr_matrix, columns: np.ndarray, genes: int, *, logged: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bring cells into the genes of a vocabulary; columns of one gene are summed, on counts.

    Parameters
    ----------
    block
        CSR float32 ``[cells, columns]``, without stored zeros.
    columns
        int32 ``[columns]``: place among the genes, or −1.
    genes
        Number of genes.
    logged
        Whether values are log1p.

    Returns
    -------
    lengths, gene, value : numpy.ndarray
        int64 ``[cells]``, and int32 and float32 ``[words]``, ascending by gene within a cell.
    total, inside : numpy.ndarray
        float64 ``[cells]``: sum over all columns, and over those of genes (of counts, or counts per 10,000).
    """
    cells = block.shape[0]
    gene, value = np.empty(block.nnz, np.int32), np.empty(block.nnz, np.float32)
    lengths = np.zeros(cells, np.int64)
    total, inside = np.zeros(cells), np.zeros(cells)
    n = _fold(block.data, block.indices, block.indptr, columns, genes, logged, gene, value, lengths, total, inside)
    return lengths, gene[:n], value[:n], total, inside

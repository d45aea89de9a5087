"""The format of a shard: write one, map one, and the compiled passes over its cells.

A shard is a safetensors file with cells of one study, memory-mapped where it is read. Its array ``words`` has the gene
tokens as pairs of uint16 (index of the gene in the vocabulary, code of the value), so that a cell lies in one piece.
What a code stands for is the shard's encoding:

``counts``
    Whole counts: exact up to 60,000, in steps of 0.1 % above (reads of one gene pass 65,535 in full-length protocols).
``amounts``
    Fractional counts, CPM, TPM: log1p of the amount as float16, decoded to amounts.
``log1p``
    Log1p values of a study that has no counts, as float16.

Bins are not stored: they follow from values and total while batches are made, and another rule needs no new corpus.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import scipy.sparse as sp

from scmulan._numba import compiled
from scmulan._rng import GOLDEN, mix
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import METADATA

FORMAT = "scmulan-shard/1"
ENCODINGS = ("counts", "amounts", "log1p")
MAX_EXACT_COUNT = 60_000
"""Counts up to here are their own code; each code above stands for 0.1 % more than the one below, up to 15 million."""
COUNT_STEP = 1.001
HEADER = 4096
"""Bytes reserved for the header, as the number of tokens is known only at the end; the arrays begin on a page."""
DTYPES = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "F32": "<f4", "U16": "<u2", "BOOL": "|b1"}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class NotWhole(Exception):
    """Values that were taken for whole counts are not."""


def encode(values: np.ndarray, encoding: str) -> tuple[np.ndarray, int]:
    """Encode values above zero as uint16.

    Parameters
    ----------
    values : numpy.ndarray, float32
        Counts, amounts or log1p values.
    encoding : str
        One of ``ENCODINGS``.

    Returns
    -------
    codes : numpy.ndarray
        uint16, never 0.
    rounded : int
        Number of counts that were too large to be kept exactly.

    Raises
    ------
    NotWhole
        If a count is no whole number.
    """
    if encoding == "counts":
        whole = np.rint(values)
        if not np.array_equal(whole, values):
            raise NotWhole
        large = np.flatnonzero(whole > MAX_EXACT_COUNT)
        codes = np.minimum(whole, MAX_EXACT_COUNT).astype(np.uint16)
        steps = np.rint(np.log(whole[large].astype(np.float64) / MAX_EXACT_COUNT) / np.log(COUNT_STEP))
        codes[large] = np.minimum(MAX_EXACT_COUNT + steps, 65_535).astype(np.uint16)
        return codes, len(large)
    logs = np.log1p(values) if encoding == "amounts" else values
    return np.maximum(logs.astype(np.float16).view(np.uint16), 1), 0


@functools.cache
def code_values(encoding: str) -> np.ndarray:
    """Return the value of each of the 65,536 codes, float32."""
    codes = np.arange(65_536, dtype=np.uint16)
    if encoding == "counts":
        above = np.maximum(codes.astype(np.float64) - MAX_EXACT_COUNT, 0)
        values = np.rint(MAX_EXACT_COUNT * COUNT_STEP**above)
        out = np.where(codes > MAX_EXACT_COUNT, values, codes).astype(np.float32)
    else:
        logs = codes.view(np.float16).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # codes that no value has
            out = np.expm1(logs) if encoding == "amounts" else logs
    out.flags.writeable = False
    return out


class ShardWriter:
    """Write the cells of one shard block by block; held in memory are its tables, not its tokens.

    Parameters
    ----------
    file : file object
        Open for writing in binary mode, at its beginning.
    cells : int
        Number of cells that will be added.
    encoding : str
        One of ``ENCODINGS``.
    """

    def __init__(self, file: BinaryIO, cells: int, encoding: str) -> None:
        self.encoding = encoding
        self.cells = 0
        self.rounded = 0
        self._file = file
        self._tables = {
            "indptr": np.zeros(cells + 1, "<i8"),
            "content": np.zeros(cells, "<u8"),
            "total": np.zeros(cells, "<f4"),
            "donor": np.zeros(cells, "<i4"),
            "metadata": np.zeros((cells, len(METADATA)), "<i4"),
        }
        file.seek(HEADER + sum(table.nbytes for table in self._tables.values()))

    def add(self, cells: "FoldedCells", *, donor: np.ndarray, metadata: np.ndarray) -> None:
        """Append cells.

        Parameters
        ----------
        cells : FoldedCells
            Values in the genes of the vocabulary.
        donor : numpy.ndarray, int32 [cells]
            Code of each cell's donor, −1 where unknown.
        metadata : numpy.ndarray, int32 [cells, families]
            Token ids, −1 where unknown.

        Raises
        ------
        NotWhole
            If the encoding is ``counts`` and a value is no whole number.
        """
        codes, rounded = encode(cells.value, self.encoding)
        tokens = np.empty((len(cells.gene), 2), "<u2")
        tokens[:, 0] = cells.gene
        tokens[:, 1] = codes
        rows = slice(self.cells, self.cells + len(cells.lengths))
        ends = np.cumsum(cells.lengths, dtype=np.int64)
        indptr = self._tables["indptr"]
        indptr[rows.start + 1 : rows.stop + 1] = indptr[rows.start] + ends
        self._tables["content"][rows] = content_hashes(tokens, ends)
        self._tables["total"][rows] = cells.total
        self._tables["donor"][rows] = donor
        self._tables["metadata"][rows] = metadata
        self._file.write(tokens.data)
        self.cells = rows.stop
        self.rounded += rounded

    def finish(self, about: Mapping[str, str]) -> int:
        """Write the tables and the header, with the texts of ``about``; return the number of tokens."""
        tokens = int(self._tables["indptr"][-1])
        shapes = {name: (table.dtype, table.shape) for name, table in self._tables.items()}
        shapes["words"] = (np.dtype("<u2"), (tokens, 2))
        self._file.seek(0)
        self._file.write(_header(shapes, {"format": FORMAT, "encoding": self.encoding, **about}))
        for table in self._tables.values():
            self._file.write(table.data)
        return tokens


def content_hashes(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash the content of each cell to 64 bits.

    Parameters
    ----------
    tokens : numpy.ndarray, uint16 [tokens, 2]
        Gene and code of each token.
    ends : numpy.ndarray, int64 [cells]
        End of each cell among the tokens.

    Returns
    -------
    numpy.ndarray
        uint64 ``[cells]``.
    """
    out = np.empty(len(ends), np.uint64)
    _hash_cells(np.ascontiguousarray(tokens).view("<u4").ravel(), ends, out)
    return out


@compiled()
def _hash_cells(tokens, ends, out):
    k = 0
    for row in range(len(ends)):
        h = GOLDEN
        while k < ends[row]:
            h = mix(h ^ np.uint64(tokens[k]))  # once per token (a uint32)
            k += 1
        out[row] = h


def create_arrays(
    path: Path, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], about: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Create a safetensors file of known shapes, and map its arrays for writing.

    Parameters
    ----------
    path : Path
        File to create.
    shapes : mapping
        Name to dtype and shape, the widest types first.
    about : mapping
        Texts of the header.

    Returns
    -------
    dict
        Name to writable array on the file.
    """
    shapes = {name: (np.dtype(dtype), shape) for name, (dtype, shape) in shapes.items()}
    header = _header(shapes, about)
    size = HEADER + sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes.values())
    with path.open("wb") as file:
        file.write(header)
        if hasattr(os, "posix_fallocate"):  # a full disk is reported here, not when a page is written
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
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
def gather_rows(tokens, start, values, rows, indptr, indices, data):
    """Copy cells of one shard into rows of a CSR matrix.

    Parameters
    ----------
    tokens : uint16 [tokens, 2]
        Of the shard.
    start : int64 [cells]
        First token of each cell.
    values : float32 [65536]
        Value of each code.
    rows : int64 [cells]
        Row of each cell in the matrix.
    indptr, indices, data
        The matrix; ``indices`` and ``data`` are written.
    """
    for i in range(len(start)):
        k = start[i]
        for out in range(indptr[rows[i]], indptr[rows[i] + 1]):
            indices[out] = tokens[k, 0]
            data[out] = values[tokens[k, 1]]
            k += 1


class FoldedCells(NamedTuple):
    """Cells in the genes of a vocabulary, ragged: the tokens of one cell follow those of the one before."""

    lengths: np.ndarray
    """int64 ``[cells]``: number of tokens."""
    gene: np.ndarray
    """int32 ``[tokens]``: index of the gene, ascending within a cell."""
    value: np.ndarray
    """float32 ``[tokens]``: above 0, of the kind of the input."""
    total: np.ndarray
    """float64 ``[cells]``: sum over all columns of the file, of counts or counts per 10,000."""
    inside: np.ndarray
    """float64 ``[cells]``: the part of the total that lies in the genes."""

    def to_csr(self, n_genes: int) -> sp.csr_matrix:
        """Return the values as CSR float32 ``[cells, genes]``."""
        indptr = np.r_[0, np.cumsum(self.lengths)]
        return sp.csr_matrix((self.value, self.gene, indptr), shape=(len(self.lengths), n_genes))


def fold(block: sp.csr_matrix, columns: np.ndarray, n_genes: int, *, logged: bool) -> FoldedCells:
    """Bring cells into the genes of a vocabulary; columns of one gene are summed on counts.

    Parameters
    ----------
    block : scipy.sparse.csr_matrix, float32 [cells, columns]
        Without stored zeros.
    columns : numpy.ndarray, int32 [columns]
        Index of each column's gene, or −1.
    n_genes : int
        Number of genes.
    logged : bool
        Whether values are log1p.

    Returns
    -------
    FoldedCells
    """
    cells = block.shape[0]
    out = FoldedCells(
        lengths=np.zeros(cells, np.int64),
        gene=np.empty(block.nnz, np.int32),
        value=np.empty(block.nnz, np.float32),
        total=np.zeros(cells),
        inside=np.zeros(cells),
    )
    n = _fold(block.data, block.indices, block.indptr, columns, n_genes, logged, out)
    return out._replace(gene=out.gene[:n], value=out.value[:n])


@compiled()
def _fold(data, indices, indptr, columns, n_genes, logged, out):
    scratch = np.zeros(n_genes, dtype=np.float64)
    n = 0
    for row in range(len(indptr) - 1):
        total = 0.0
        inside = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            x = float(data[k])
            amount = np.expm1(x) if logged else x
            total += amount
            g = columns[indices[k]]
            if g >= 0:
                if scratch[g] == 0:
                    # One column per gene is the rule: its value stays as it is, to the last bit.
                    scratch[g] = x
                elif logged:
                    scratch[g] = np.log1p(np.expm1(scratch[g]) + amount)
                else:
                    scratch[g] += x
                inside += amount
        first = n
        for g in range(n_genes):
            if scratch[g] > 0:
                out.gene[n] = g
                out.value[n] = scratch[g]
                scratch[g] = 0.0
                n += 1
        out.lengths[row] = n - first
        out.total[row] = total
        out.inside[row] = inside
    return n

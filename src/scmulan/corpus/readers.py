"""Open the cells of a study wherever they are, and read them in blocks of bounded size.

h5ad files and zarr folders of AnnData are read as they lie. Everything else is turned, block by block, into an h5ad
file beside the corpus that is being built, and read from there (:mod:`scmulan.corpus.imports`).
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSCDataset

from scmulan.corpus.shards import sha256
from scmulan.corpus.spec import StudySpec
from scmulan.errors import InputError, MatrixError
from scmulan.files import open_input
from scmulan.language.matrix import ExpressionMatrix, choose_matrix
from scmulan.language.storage import read_rows

# A block holds at most so many values even where it is dense: 32 MiB as float32.
BLOCK_VALUES = 2**23


@contextmanager
def opened(spec: StudySpec, imported: Path | None = None) -> Iterator[ad.AnnData]:
    """Open the cells of a study, with their matrices on disk.

    Parameters
    ----------
    spec
        Where they are.
    imported
        The h5ad file that was made from it, where it is of another kind.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    with warnings.catch_warnings():
        # A corpus does not keep the names of cells.
        warnings.filterwarnings("ignore", message=".*names of cells repeat", category=UserWarning)
        adata = open_input(imported or spec.file, backed=True)
    try:
        if spec.obs is not None:
            adata.obs = _joined(adata.obs, spec.obs)
        yield adata
    finally:
        if adata.isbacked:
            adata.file.close()


def _joined(obs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Columns of a table, for the cells of another; a cell that the table lacks keeps what it had.

    Its first column has the names of the cells, or is called ``row`` and counts them from 0 in the order of the data.
    """
    separator = "\t" if ".tsv" in path.name.lower() else ","
    table = pd.read_csv(path, sep=separator, index_col=0, dtype=str, keep_default_na=False)
    if table.index.name == "row":
        rows = pd.to_numeric(table.index, errors="coerce")
        wrong = table.index[~np.isin(rows, np.arange(len(obs)))]
        if len(wrong):
            raise InputError(f"{path}: row '{wrong[0]}' is none of the {len(obs):,} cells, counted from 0")
        table.index = obs.index[rows.astype(int)]
    table.index = table.index.astype(str)
    found = table.index.intersection(obs.index)
    if not len(found):
        raise InputError(
            f"{path}: none of its {len(table):,} cells ({', '.join(table.index[:2])}, …) is in the data "
            f"({', '.join(obs.index[:2])}, …): put the same names into its first column"
        )
    table = table[~table.index.duplicated()].reindex(obs.index)
    for column in table.columns.intersection(obs.columns):
        table[column] = table[column].fillna(obs[column].astype(object))
    return pd.concat([obs.drop(columns=table.columns, errors="ignore"), table], axis=1)


def matrix_of(adata: ad.AnnData, spec: StudySpec) -> ExpressionMatrix:
    """Choose the matrix of a study, as its spec says or by looking.

    Raises
    ------
    MatrixError
        If none holds usable expression; names the file.
    """
    try:
        return choose_matrix(adata, layer=spec.layer, state=spec.state)
    except MatrixError as error:
        raise MatrixError(f"{spec.file}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Window:
    """Some consecutive rows of a matrix on disk, as if they were all of it."""

    values: Any
    first: int
    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        return read_rows(self.values, slice(self.first + rows.start, self.first + rows.stop))


def stored_by_column(matrix: ExpressionMatrix) -> bool:
    """Whether reading some of its cells means reading the whole matrix."""
    return isinstance(matrix._values, CSCDataset)


def blocks(
    matrix: ExpressionMatrix, first: int, last: int, *, values: int = BLOCK_VALUES
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Read consecutive cells in blocks.

    Parameters
    ----------
    matrix
        What to read; if it is stored by column, all its cells (0 to the last).
    first, last
        Rows to read.
    values
        Largest number of values of a block, were it dense.

    Yields
    ------
    tuple of int and scipy.sparse.csr_matrix
        Row of the matrix that the block begins with, and its values, see :meth:`ExpressionMatrix.chunks`.
    """
    if (first, last) != (0, matrix.n_cells):
        window = _Window(matrix._values, first, (last - first, matrix.n_genes))
        matrix = replace(matrix, n_cells=last - first, _values=window, _cells=matrix._cells[first:last])
    for rows, block in matrix.chunks(int(np.clip(values // matrix.n_genes, 16, 4096))):
        yield first + rows.start, block


def hash_input(path: Path) -> str:
    """sha256 of a file; of a folder, that of the list of its files and their hashes."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = (f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stamp(path: Path) -> list[int]:
    """Bytes and time of the last change of a file, or of the files of a folder together."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stats = [file.stat() for file in files]
    return [sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]

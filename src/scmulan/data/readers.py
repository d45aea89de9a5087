"""Open the cells of a study wherever they are, and read them in blocks of bounded size.

h5ad files and zarr folders of AnnData are read as they are. 10x Genomics output (h5, or a folder with ``matrix.mtx``),
SOMA experiments (so also the CELLxGENE Census; needs the extra ``soma``) and collections of annbatch are converted,
block by block, to an h5ad file that is read in their stead.
"""

import gzip
import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSCDataset
from anndata.io import sparse_dataset, write_elem

from scmulan._io.adata import open_input
from scmulan._io.outputs import atomic_path, sha256
from scmulan.data.spec import StudySpec
from scmulan.errors import InputError, MatrixError
from scmulan.vocab.genes import GeneTable, choose_names
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix
from scmulan.vocab.storage import read_rows, row_chunks

BLOCK_VALUES = 2**23
"""Largest number of values of a block if it were dense: 32 MiB as float32."""


class ConversionBlock(NamedTuple):
    """Size of the blocks in which other formats are converted."""

    cells: int = 4096
    """Number of cells."""
    entries: int = 4_000_000
    """Number of lines of a text file (MatrixMarket)."""


CONVERSION_BLOCK = ConversionBlock()


@contextmanager
def open_study(spec: StudySpec, converted: Path | None = None) -> Iterator[ad.AnnData]:
    """Open the cells of a study, with their matrices on disk.

    Parameters
    ----------
    spec : StudySpec
        Where they are.
    converted : Path, optional
        The h5ad file that was made from the study's file, if that is no AnnData; by default a temporary one is made.

    Yields
    ------
    AnnData
        Backed; its ``obs`` has the columns of the study's table of cells, too.

    Raises
    ------
    InputError
        If the file or the table cannot be read.
    """
    with ExitStack() as stack:
        if converted is None and find_converter(spec.file) is not None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="scmulan-"))
            converted = Path(scratch) / "cells.h5ad"
            convert_to_h5ad(spec.file, converted, spec.where)
        with warnings.catch_warnings():
            # A corpus does not keep the names of cells.
            warnings.filterwarnings("ignore", message=".*names of cells repeat", category=UserWarning)
            adata = open_input(converted or spec.file, backed=True)
        if adata.isbacked:
            stack.callback(adata.file.close)
        if spec.obs is not None:
            adata.obs = _join_table(adata.obs, spec.obs)
        yield adata


def _join_table(obs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Join the columns of a CSV or TSV file; a cell that the file lacks keeps what it had.

    The first column of the file has the names of the cells, or is called ``row`` and has their index, from 0.
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
    """Choose the matrix of a study: the one that its spec names, or the one that is detected.

    Raises
    ------
    MatrixError
        If none holds usable expression; the message names the file.
    """
    try:
        return choose_matrix(adata, layer=spec.layer, matrix_kind=spec.matrix_kind)
    except MatrixError as error:
        raise MatrixError(f"{spec.file}: {error}") from None


def resolve_columns(var: pd.DataFrame, table: GeneTable) -> tuple[list[str], np.ndarray]:
    """Resolve the genes of a file without a vocabulary.

    Returns
    -------
    genes : list of str
        Approved symbols that occur, sorted.
    columns : numpy.ndarray
        int32, one per row of ``var``: index of its gene, or −1 where the name is unknown.
    """
    symbols = table.resolve(choose_names(var)[0])
    genes = sorted({symbol for symbol in symbols if symbol is not None})
    index = {gene: i for i, gene in enumerate(genes)}
    return genes, np.array([-1 if s is None else index[s] for s in symbols], dtype=np.int32)


def stored_by_column(matrix: ExpressionMatrix) -> bool:
    """Return whether reading some cells means reading the whole matrix (CSC)."""
    return isinstance(matrix._values, CSCDataset)


@dataclass(frozen=True, slots=True)
class _RowRange:
    """Consecutive rows of a matrix on disk, sliced from 0."""

    values: Any
    first: int
    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        return read_rows(self.values, slice(self.first + rows.start, self.first + rows.stop))


def blocks(
    matrix: ExpressionMatrix, first: int, last: int, *, values: int = BLOCK_VALUES
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Read consecutive cells in blocks.

    Parameters
    ----------
    matrix : ExpressionMatrix
        Matrix to read; if it is stored by column, all its cells have to be read at once.
    first, last : int
        Range of rows, ``last`` excluded.
    values : int
        Largest number of values of a block, were it dense; a block has 16 to 4,096 cells.

    Yields
    ------
    row : int
        First row of the block.
    block : scipy.sparse.csr_matrix
        Its values, see :meth:`ExpressionMatrix.chunks`.
    """
    if (first, last) != (0, matrix.n_cells):
        window = _RowRange(matrix._values, first, (last - first, matrix.n_genes))
        matrix = replace(matrix, n_cells=last - first, _values=window, _cells=matrix._cells[first:last])
    for rows, block in matrix.chunks(int(np.clip(values // matrix.n_genes, 16, 4096))):
        yield first + rows.start, block


def hash_input(path: Path) -> str:
    """Compute the sha256 of a file; of a folder, that of the list of its files and their hashes."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = (f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stamp(path: Path) -> list[int]:
    """Return bytes and time of the last change (ns) of a file, or of the files of a folder together."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stats = [file.stat() for file in files]
    return [sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


# -- other formats ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Cells of another format: tables of cells and genes, and the matrix in blocks (CSR float32) of cells."""

    obs: pd.DataFrame
    var: pd.DataFrame
    blocks: Iterator[sp.csr_matrix]


Opener = Callable[[Path, str, ConversionBlock], Source]


def find_converter(path: Path) -> Opener | None:
    """Return the function that opens a path of another format; None for AnnData, and for unknown formats."""
    if path.is_dir():
        if _matrix_market(path) is not None:
            return open_mtx
        if (path / "__tiledb_group.tdb").exists() or (path / "__group").is_dir():
            return open_soma
        if _zarr_kind(path) == "annbatch-preshuffled":
            return open_annbatch
        return None
    if path.suffix == ".h5" and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            return None if "obs" in file else open_10x_h5
    return None


def convert_to_h5ad(path: Path, target: Path, where: str = "", *, block: ConversionBlock = CONVERSION_BLOCK) -> None:
    """Write the cells of another format as an h5ad file with a CSR matrix, holding a block at a time.

    Parameters
    ----------
    path : Path
        File or folder to read.
    target : Path
        File to write.
    where : str
        Which cells of a SOMA experiment: ``"tissue_general == 'lung' and is_primary_data == True"``.
    block : ConversionBlock
        Size of a block.

    Raises
    ------
    InputError
        If the cells cannot be read.
    """
    opener = find_converter(path)
    assert opener is not None
    if where and opener is not open_soma:
        raise InputError(f"{path}: `where` chooses cells of SOMA experiments only; leave it out")
    try:
        source = opener(path, where, block)
        with atomic_path(target) as temporary:
            ad.AnnData(obs=source.obs, var=source.var).write_h5ad(temporary)
            with h5py.File(temporary, "r+") as file:
                empty = sp.csr_matrix((0, len(source.var)), dtype=np.float32)
                # Later blocks may bring more values than 32 bits count.
                write_elem(file, "X", empty, dataset_kwargs={"indptr_dtype": np.int64, "chunks": (2**18,)})
                stored = cast("Any", sparse_dataset(file["X"]))
                for cells in source.blocks:
                    stored.append(cells)
    except (OSError, KeyError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); get or write it again") from error


# -- 10x Genomics ---------------------------------------------------------------------------------------------------


def open_10x_h5(path: Path, where: str, block: ConversionBlock) -> Source:
    """Open ``filtered_feature_bc_matrix.h5`` (version 3) or the file of one genome (version 2)."""
    file = h5py.File(path, "r")
    group = file["matrix"] if "matrix" in file else file[next(iter(file))] if len(file) == 1 else None
    if group is None or "barcodes" not in group:
        found = ", ".join(file)
        file.close()
        raise InputError(f"{path}: neither AnnData nor 10x output of one genome (it holds {found}); write it as h5ad")
    features = group["features"] if "features" in group else None
    names = features["name"] if features is not None else group["gene_names"]
    ids = features["id"] if features is not None else group["genes"]
    var = pd.DataFrame({"gene_symbols": names.asstr()[:]}, index=pd.Index(ids.asstr()[:], dtype=object))
    kind = features["feature_type"].asstr()[:] if features is not None else np.full(len(var), "Gene Expression")
    genes = np.flatnonzero(kind == "Gene Expression")
    obs = pd.DataFrame(index=pd.Index(group["barcodes"].asstr()[:], dtype=object))

    def blocks() -> Iterator[sp.csr_matrix]:
        with file:
            indptr = group["indptr"][:]
            for first in range(0, len(obs), block.cells):
                ends = indptr[first : first + block.cells + 1]
                part = slice(ends[0], ends[-1])
                shape = (len(ends) - 1, len(var))
                cells = sp.csr_matrix((group["data"][part], group["indices"][part], ends - ends[0]), shape=shape)
                yield _select_genes(cells, genes)

    return Source(obs, var.iloc[genes], blocks())


def _select_genes(cells: sp.csr_matrix, genes: np.ndarray) -> sp.csr_matrix:
    """Leave out antibodies and guides, and convert values to float32."""
    cells = cells if len(genes) == cells.shape[1] else cells[:, genes]
    cells = sp.csr_matrix(cells, dtype=np.float32)
    cells.sort_indices()
    return cells


def _matrix_market(path: Path) -> Path | None:
    return next((path / name for name in ("matrix.mtx.gz", "matrix.mtx") if (path / name).is_file()), None)


def open_mtx(path: Path, where: str, block: ConversionBlock) -> Source:
    """Open a folder with ``matrix.mtx``, ``barcodes.tsv`` and ``features.tsv`` (or ``genes.tsv``), gzipped or not."""
    matrix = _matrix_market(path)
    assert matrix is not None
    barcodes = _table(path, "barcodes.tsv")
    features = _table(path, "features.tsv", "genes.tsv")
    kind = features[2].to_numpy() if 2 in features else np.full(len(features), "Gene Expression")
    genes = np.flatnonzero(kind == "Gene Expression")
    var = pd.DataFrame(index=pd.Index(features[0].to_numpy(), dtype=object))
    if 1 in features:
        var["gene_symbols"] = features[1].to_numpy()
    obs = pd.DataFrame(index=pd.Index(barcodes[0].to_numpy(), dtype=object))
    with _text(matrix) as file:
        skip = 1
        while (line := file.readline()).startswith("%"):
            skip += 1
    shape = tuple(int(n) for n in line.split()[:2])
    if shape != (len(features), len(barcodes)):
        raise InputError(
            f"{matrix}: {shape[0]:,} × {shape[1]:,}, but {len(features):,} features and {len(barcodes):,} barcodes "
            "beside it; expected features × barcodes, as 10x Genomics writes them"
        )
    return Source(obs, var.iloc[genes], _mtx_blocks(matrix, skip, shape, genes, block.entries))


def _mtx_blocks(
    path: Path, skip: int, shape: tuple[int, ...], genes: np.ndarray, entries: int
) -> Iterator[sp.csr_matrix]:
    """Read entries that are in the order of cells; a block is as many whole cells as a piece of the text has."""
    done, pending = 0, pd.DataFrame({0: [], 1: [], 2: []}, dtype=np.float64)

    def whole_cells(entries: pd.DataFrame, last: int) -> sp.csr_matrix:
        cell = entries[1].to_numpy(np.int64) - 1
        if len(cell) and (cell[0] < done or np.any(np.diff(cell) < 0)):
            raise InputError(f"{path}: entries are not in the order of cells; read it with scanpy and write it as h5ad")
        indptr = np.searchsorted(cell, np.arange(done, last + 1))
        values = entries[2].to_numpy(np.float32), entries[0].to_numpy(np.int64) - 1, indptr
        return _select_genes(sp.csr_matrix(values, shape=(last - done, shape[0])), genes)

    for piece in pd.read_csv(path, sep=r"\s+", header=None, skiprows=skip, chunksize=entries):
        pending = pd.concat([pending, piece]) if len(pending) else piece
        last = int(pending[1].iloc[-1]) - 1  # more of this cell may follow
        if last > done:
            complete = pending[1] <= last
            yield whole_cells(pending[complete], last)
            done, pending = last, pending[~complete]
    yield whole_cells(pending, shape[1])


def _table(path: Path, *names: str) -> pd.DataFrame:
    for name in names:
        for file in (path / f"{name}.gz", path / name):
            if file.is_file():
                return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False)
    raise InputError(f"{path}: matrix.mtx without {' or '.join(names)}; expected the three files of 10x output")


def _text(path: Path) -> Any:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")


# -- collections ----------------------------------------------------------------------------------------------------


def open_soma(path: Path, where: str, block: ConversionBlock) -> Source:
    """Open an experiment of TileDB-SOMA, such as an organism of the CELLxGENE Census: its RNA, best the raw layer."""
    try:
        import tiledbsoma
    except ImportError:
        raise InputError(f"{path}: a SOMA experiment; reading it needs pip install 'scmulan[soma]'") from None
    experiment = tiledbsoma.open(str(path))
    if not isinstance(experiment, tiledbsoma.Experiment) or "RNA" not in experiment.ms:
        raise InputError(f"{path}: SOMA, but no experiment with a measurement RNA; name the folder of the experiment")
    rna = experiment.ms["RNA"]
    layer = next((name for name in ("raw", "data") if name in rna.X), next(iter(rna.X)))
    try:
        obs = experiment.obs.read(value_filter=where or None).concat().to_pandas()
    except tiledbsoma.SOMAError as error:
        raise InputError(f"{path}: cells where {where} cannot be read ({str(error).splitlines()[0]})") from None
    if not len(obs):
        raise InputError(f"{path}: no cell where {where}; see the columns of obs and their values")
    var = rna.var.read().concat().to_pandas()
    cells, genes = obs.pop("soma_joinid").to_numpy(), var.pop("soma_joinid").to_numpy()
    for table, column in ((obs, "obs_id"), (var, "var_id")):
        names = table[column] if column in table else table.index
        table.index = pd.Index(names.astype(str), dtype=object, name=None)

    def blocks() -> Iterator[sp.csr_matrix]:
        with experiment:
            for first in range(0, len(cells), block.cells):
                wanted = cells[first : first + block.cells]
                parts = list(rna.X[layer].read((wanted, genes)).tables())
                cell = np.concatenate([part["soma_dim_0"].to_numpy() for part in parts])
                gene = np.concatenate([part["soma_dim_1"].to_numpy() for part in parts])
                value = np.concatenate([part["soma_data"].to_numpy() for part in parts])
                entries = np.searchsorted(wanted, cell), np.searchsorted(genes, gene)
                rows = sp.csr_matrix((value, entries), shape=(len(wanted), len(genes)), dtype=np.float32)
                rows.sort_indices()
                yield rows

    return Source(obs, var, blocks())


def _zarr_kind(path: Path) -> str:
    if not any((path / name).exists() for name in (".zgroup", "zarr.json")):
        return ""
    import zarr  # slow, and needed by few

    return str(zarr.open_group(path, mode="r").attrs.get("encoding-type", ""))


def open_annbatch(path: Path, where: str, block: ConversionBlock) -> Source:
    """Open a collection of annbatch: its datasets are zarr folders of AnnData with the same genes."""
    folders = sorted(path.glob("dataset_*"), key=lambda folder: (len(folder.name), folder.name))
    if not folders:
        raise InputError(f"{path}: a collection of annbatch without any dataset_*; write it again")
    parts = [open_input(folder, backed=True) for folder in folders]
    if not all(part.var_names.equals(parts[0].var_names) for part in parts):
        raise InputError(f"{path}: its datasets differ in genes; name each as a study (file = '{path.name}/dataset_0')")

    def blocks() -> Iterator[sp.csr_matrix]:
        for part in parts:
            for _, rows in row_chunks(part.X, block.cells):
                yield sp.csr_matrix(rows, dtype=np.float32)

    obs = pd.concat([part.obs for part in parts])
    obs.index = obs.index.astype(str)
    return Source(obs, parts[0].var, blocks())

"""Open the cells of a study wherever they are, and read them in blocks of bounded size.

h5ad files and zarr folders of AnnData are read as they lie. Everything else is turned, block by block, into an h5ad
file beside the corpus that is being built, and read from there (:mod:`scmulan.data.readers`).

Cells in other formats than AnnData, turned into an h5ad file block by block.

10x Genomics output (h5, or a folder with ``matrix.mtx``), SOMA experiments (so also the CELLxGENE Census; with the
extra ``soma``), and collections of annbatch, whose parts are zarr folders of AnnData.
"""

import gzip
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

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
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix
from scmulan.vocab.storage import read_rows, row_chunks

# A block holds at most so many values even where it is dense: 32 MiB as float32.
BLOCK_VALUES = 2**23


@contextmanager
def open_study(spec: StudySpec, imported: Path | None = None) -> Iterator[ad.AnnData]:
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
        return choose_matrix(adata, layer=spec.layer, matrix_kind=spec.matrix_kind)
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


ENTRIES = 4_000_000
ROWS = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """Cells of another format: the tables of cells and genes, and the matrix in blocks of cells."""

    obs: pd.DataFrame
    var: pd.DataFrame
    blocks: Iterator[sp.csr_matrix]


def find_converter(path: Path) -> Callable[[Path, str], Source] | None:
    """What can open a path that is no AnnData; None for AnnData, and for what nobody knows."""
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


def convert_to_h5ad(path: Path, target: Path, where: str = "") -> None:
    """Write the cells of another format as an h5ad file with a CSR matrix, holding a block at a time.

    Parameters
    ----------
    path
        Where they are.
    target
        File to write.
    where
        Which cells, of a SOMA experiment: ``"tissue_general == 'lung' and is_primary_data == True"``.

    Raises
    ------
    InputError
        If they cannot be read.
    """
    opener = find_converter(path)
    assert opener is not None
    if where and opener is not open_soma:
        raise InputError(f"{path}: `where` chooses cells of SOMA experiments only; leave it out")
    try:
        source = opener(path, where)
        with atomic_path(target) as temporary:
            ad.AnnData(obs=source.obs, var=source.var).write_h5ad(temporary)
            with h5py.File(temporary, "r+") as file:
                empty = sp.csr_matrix((0, len(source.var)), dtype=np.float32)
                # Later blocks may bring more values than 32 bits count.
                write_elem(file, "X", empty, dataset_kwargs={"indptr_dtype": np.int64, "chunks": (2**18,)})
                stored = cast("Any", sparse_dataset(file["X"]))
                for block in source.blocks:
                    stored.append(block)
    except (OSError, KeyError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); get or write it again") from error


# -- 10x Genomics ---------------------------------------------------------------------------------------------------


def open_10x_h5(path: Path, _: str = "") -> Source:
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
            for first in range(0, len(obs), ROWS):
                ends = indptr[first : first + ROWS + 1]
                part = slice(ends[0], ends[-1])
                shape = (len(ends) - 1, len(var))
                block = sp.csr_matrix((group["data"][part], group["indices"][part], ends - ends[0]), shape=shape)
                yield _genes_only(block, genes)

    return Source(obs, var.iloc[genes], blocks())


def _genes_only(block: sp.csr_matrix, genes: np.ndarray) -> sp.csr_matrix:
    """Leave out antibodies and guides, and bring values to float32."""
    block = block if len(genes) == block.shape[1] else block[:, genes]
    block = sp.csr_matrix(block, dtype=np.float32)
    block.sort_indices()
    return block


def _matrix_market(path: Path) -> Path | None:
    return next((path / name for name in ("matrix.mtx.gz", "matrix.mtx") if (path / name).is_file()), None)


def open_mtx(path: Path, _: str = "") -> Source:
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
    return Source(obs, var.iloc[genes], _mtx_blocks(matrix, skip, shape, genes))


def _mtx_blocks(path: Path, skip: int, shape: tuple[int, ...], genes: np.ndarray) -> Iterator[sp.csr_matrix]:
    """Read entries that are in the order of cells; a block is as many whole cells as a piece of the text has."""
    done, held = 0, pd.DataFrame({0: [], 1: [], 2: []}, dtype=np.float64)
    reader = pd.read_csv(path, sep=r"\s+", header=None, skiprows=skip, chunksize=ENTRIES)

    def block(entries: pd.DataFrame, last: int) -> sp.csr_matrix:
        cell = entries[1].to_numpy(np.int64) - 1
        if len(cell) and (cell[0] < done or np.any(np.diff(cell) < 0)):
            raise InputError(f"{path}: entries are not in the order of cells; read it with scanpy and write it as h5ad")
        indptr = np.searchsorted(cell, np.arange(done, last + 1))
        values = entries[2].to_numpy(np.float32), entries[0].to_numpy(np.int64) - 1, indptr
        return _genes_only(sp.csr_matrix(values, shape=(last - done, shape[0])), genes)

    for piece in reader:
        held = pd.concat([held, piece]) if len(held) else piece
        last = int(held[1].iloc[-1]) - 1  # more of this cell may follow
        if last > done:
            whole = held[1] <= last
            yield block(held[whole], last)
            done, held = last, held[~whole]
    yield block(held, shape[1])


def _table(path: Path, *names: str) -> pd.DataFrame:
    for name in names:
        for file in (path / f"{name}.gz", path / name):
            if file.is_file():
                return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False)
    raise InputError(f"{path}: matrix.mtx without {' or '.join(names)}; expected the three files of 10x output")


def _text(path: Path) -> Any:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")


# -- collections ----------------------------------------------------------------------------------------------------


def open_soma(path: Path, where: str = "") -> Source:
    """Open an experiment of TileDB-SOMA, such as an organism of the CELLxGENE Census: its RNA, the raw layer first."""
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

    def rows() -> Iterator[sp.csr_matrix]:
        with experiment:
            for first in range(0, len(cells), ROWS):
                wanted = cells[first : first + ROWS]
                parts = list(rna.X[layer].read((wanted, genes)).tables())
                cell = np.concatenate([part["soma_dim_0"].to_numpy() for part in parts])
                gene = np.concatenate([part["soma_dim_1"].to_numpy() for part in parts])
                value = np.concatenate([part["soma_data"].to_numpy() for part in parts])
                places = np.searchsorted(wanted, cell), np.searchsorted(genes, gene)
                block = sp.csr_matrix((value, places), shape=(len(wanted), len(genes)), dtype=np.float32)
                block.sort_indices()
                yield block

    return Source(obs, var, rows())


def _zarr_kind(path: Path) -> str:
    if not any((path / name).exists() for name in (".zgroup", "zarr.json")):
        return ""
    import zarr  # slow, and needed by few

    return str(zarr.open_group(path, mode="r").attrs.get("encoding-type", ""))


def open_annbatch(path: Path, _: str = "") -> Source:
    """Open a collection of annbatch: its datasets are zarr folders of AnnData with the same genes."""
    folders = sorted(path.glob("dataset_*"), key=lambda folder: (len(folder.name), folder.name))
    if not folders:
        raise InputError(f"{path}: a collection of annbatch without any dataset_*; write it again")
    parts = [open_input(folder, backed=True) for folder in folders]
    if not all(part.var_names.equals(parts[0].var_names) for part in parts):
        raise InputError(f"{path}: its datasets differ in genes; name each as a study (file = '{path.name}/dataset_0')")

    def rows() -> Iterator[sp.csr_matrix]:
        for part in parts:
            for _, block in row_chunks(part.X, ROWS):
                yield sp.csr_matrix(block, dtype=np.float32)

    obs = pd.concat([part.obs for part in parts])
    obs.index = obs.index.astype(str)
    return Source(obs, parts[0].var, rows())

"""AnnData, tables and JSON: inputs opened with errors that their owners understand, outputs written whole or not."""

import difflib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, read_h5ad, read_zarr, sparse_dataset, write_elem

from scmulan._io.outputs import atomic_path
from scmulan.errors import InputError, ScmulanError

__all__ = [
    "BlockArray",
    "copy_with_results",
    "open_input",
    "read_column",
    "to_json",
    "write_h5ad",
    "write_json",
    "write_table",
]

# How to convert other formats of the field to AnnData, by the end of the file's name.
_OTHER_FORMATS = {
    ".h5": "if it is 10x output, read it with scanpy.read_10x_h5",
    ".mtx": "read the folder with scanpy.read_10x_mtx, or this file with scanpy.read_mtx",
    ".mtx.gz": "read the folder with scanpy.read_10x_mtx, or this file with scanpy.read_mtx",
    ".h5mu": "read it with mudata.read_h5mu and write the modality of RNA",
    ".loom": "read it with anndata.io.read_loom",
    ".csv": "read it with anndata.io.read_csv",
    ".tsv": "read it with anndata.io.read_csv(..., delimiter='\\t')",
    ".txt": "read it with anndata.io.read_text",
    ".rds": "convert it in R, for example with zellkonverter::writeH5AD or anndataR",
    ".rda": "convert it in R, for example with zellkonverter::writeH5AD or anndataR",
}
_AGAIN = "get or write it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockArray:
    """An array on disk or made block by block, never in memory as a whole."""

    shape: tuple[int, ...]
    """Shape, cells first."""
    dtype: Any
    """Data type."""
    blocks: Callable[[], Iterator[np.ndarray]]
    """Iterate over consecutive rows, block by block."""

    def __len__(self) -> int:
        return self.shape[0]

    def load(self) -> np.ndarray:
        """Read the array into memory."""
        out = np.empty(self.shape, dtype=self.dtype)
        start = 0
        for block in self.blocks():
            out[start : start + len(block)] = block
            start += len(block)
        return out


def open_input(path: str | os.PathLike[str], *, backed: bool = False) -> AnnData:
    """Open an h5ad file or a zarr folder of a user.

    Parameters
    ----------
    path
        File ``*.h5ad`` or folder ``*.zarr``, as AnnData writes them.
    backed
        Leave ``X``, ``raw.X``, ``layers`` and ``obsm`` on disk, to be read piece by piece; ``obsp``, ``varm`` and
        ``varp`` are left out. (Of a zarr folder, ``isbacked`` stays False.)

    Returns
    -------
    anndata.AnnData
        At least one cell and one gene. Names of cells are unique, those of genes may not be.

    Raises
    ------
    InputError
        If the path does not exist or holds no AnnData, is damaged, or has no cell or no gene.

    Warns
    -----
    UserWarning
        If names of cells occur more than once and were made unique.
    """
    path = Path(path).expanduser()
    adata = _open(path, backed)
    if not adata.n_obs or not adata.n_vars:
        raise InputError(
            f"{path}: {adata.n_obs:,} cells × {adata.n_vars:,} genes; expected at least one cell and one gene"
        )
    repeated = int(adata.obs_names.duplicated().sum())
    if repeated:
        with _quiet():
            adata.obs_names_make_unique()
        warnings.warn(
            f"{path}: {repeated:,} names of cells repeat earlier ones; made unique with -1, -2, …", stacklevel=2
        )
    return adata


def _open(path: Path, backed: bool) -> AnnData:
    try:
        with _quiet():
            return _open_zarr(path, backed) if path.is_dir() else _open_h5ad(path, backed)
    except (ScmulanError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(f"{path}: reading it needs a package that is missing; pip install {error.name}") from error
    except Exception as error:
        # Whatever a damaged file makes the readers raise, the user has to know which file it is.
        raise InputError(f"{path}: cannot be read, it may be damaged ({_one_line(error)}); {_AGAIN}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of AnnData and zarr that are handled here, or that users cannot act on."""
    with warnings.catch_warnings():
        for message in (
            "(Observation|Variable) names are not unique",
            "Suffix used",
            "Writing zarr v2 data",
            "zarr v3 autosharding",
            "Consolidated metadata is currently not part",
        ):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        warnings.filterwarnings("ignore", category=anndata.OldFormatWarning)
        yield


def _open_h5ad(path: Path, backed: bool) -> AnnData:
    if not path.exists():
        raise InputError(f"{path}: no such file{_similar(path)}")
    hint = next((way for end, way in _OTHER_FORMATS.items() if path.name.lower().endswith(end)), None)
    wanted = f"expected an h5ad file; {hint}, then write_h5ad" if hint else "expected an h5ad file of AnnData"
    try:
        file = h5py.File(path, "r")
    except PermissionError as error:
        raise InputError(f"{path}: permission denied; allow reading it") from error
    except OSError as error:
        if not path.stat().st_size:
            raise InputError(f"{path}: the file is empty; {_AGAIN}") from error
        if "truncated" in str(error):
            size = path.stat().st_size
            raise InputError(f"{path}: the file is cut off (only {size:,} bytes are there); {_AGAIN}") from error
        if "lock" in str(error):
            raise InputError(f"{path}: another program has it open for writing; close it there") from error
        if "signature" in str(error):
            raise InputError(f"{path}: not an HDF5 file; {wanted}") from error
        raise
    with _closed_on_error(file):
        if not {"obs", "var"} <= set(file):
            found = "a MuData file" if "mod" in file else "10x output" if "matrix" in file else "HDF5"
            raise InputError(f"{path}: {found}, but not AnnData (no obs and var in it); {wanted}")
        # Files from before AnnData 0.7 (2020) have tables instead of groups, and fit into memory.
        if backed and isinstance(file["obs"], h5py.Group):
            lazy = _lazy_parts(file, h5py.Group)
            return AnnData(**lazy) if "X" not in file else AnnData(filename=file, **_without_x(lazy))
    file.close()
    return read_h5ad(path)


def _open_zarr(path: Path, backed: bool) -> AnnData:
    if any((path / name).exists() for name in ("matrix.mtx", "matrix.mtx.gz")):
        raise InputError(f"{path}: 10x output; read it with scanpy.read_10x_mtx, then write_h5ad")
    if not any((path / name).exists() for name in (".zgroup", "zarr.json")):
        raise InputError(f"{path}: a folder, but not a zarr store; expected an h5ad file or a zarr folder of AnnData")
    import zarr  # slow, and needed by few

    store = zarr.open_group(path, mode="r")
    if not {"obs", "var"} <= set(store):
        raise InputError(f"{path}: a zarr store, but not AnnData (no obs and var in it); expected one of AnnData")
    return AnnData(**_lazy_parts(store, zarr.Group)) if backed else read_zarr(path)


@contextmanager
def _closed_on_error(file: h5py.File) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def _lazy_parts(store: Any, group: Any) -> dict[str, Any]:
    """Return the parts of an AnnData on disk: tables and uns in memory, matrices backed."""

    def lazy(element: Any) -> Any:
        if not isinstance(element, group):
            return element
        sparse = str(element.attrs.get("encoding-type", "")) in ("csr_matrix", "csc_matrix")
        return sparse_dataset(element) if sparse or "h5sparse_format" in element.attrs else read_elem(element)

    parts: dict[str, Any] = {name: read_elem(store[name]) for name in ("obs", "var", "uns") if name in store}
    for name in ("layers", "obsm"):
        parts[name] = {key: lazy(store[name][key]) for key in store[name]} if name in store else {}
    if "X" in store:
        parts["X"] = lazy(store["X"])
    if "raw" in store and "X" in store["raw"]:
        parts["raw"] = {"X": lazy(store["raw"]["X"]), "var": read_elem(store["raw"]["var"])}
    return parts


def _without_x(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the parts for an AnnData that finds X and raw.X in its file."""
    parts = {name: part for name, part in parts.items() if name != "X"}
    if "raw" in parts:
        parts["raw"] = {"var": parts["raw"]["var"]}
    return parts


def read_column(obs: pd.DataFrame, column: str, source: str) -> np.ndarray:
    """Return a column of ``obs`` as stripped strings (object array), ``""`` where missing.

    Parameters
    ----------
    obs
        One row per cell.
    column
        Name of the column.
    source
        What to call the input in errors, such as its file name.

    Raises
    ------
    InputError
        If there is no such column; the nearest names are suggested.
    """
    if column not in obs:
        names = [str(name) for name in obs]
        folded = {name.casefold(): name for name in names}
        near = difflib.get_close_matches(column.casefold(), list(folded), n=3, cutoff=0.5)
        if near:
            hint = f"did you mean {' or '.join(repr(folded[name]) for name in near)}?"
        else:
            hint = f"it has {', '.join(map(repr, names[:12])) or 'none'}" + (", …" if len(names) > 12 else "")
        raise InputError(f"{source}: no column {column!r} in obs; {hint}")
    values = obs[column].astype(object)
    return np.array(["" if absent else str(v).strip() for v, absent in zip(values, values.isna(), strict=True)], object)


def _similar(path: Path) -> str:
    """Name files beside a missing one that have a similar name."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f", and no folder {folder}"
    close = difflib.get_close_matches(path.name, os.listdir(folder), n=3, cutoff=0.5)
    return f" in {folder}; did you mean {' or '.join(close)}?" if close else f" in {folder}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def write_h5ad(adata: AnnData, path: str | os.PathLike[str]) -> None:
    """Write an AnnData in memory as an h5ad file (compressed), or as a zarr folder where the name ends in ``.zarr``.

    Raises
    ------
    OutputError
        If it cannot be written; then nothing is left behind.
    """
    with atomic_path(path) as temporary:
        if temporary.suffix == ".zarr":
            with _quiet():
                adata.write_zarr(temporary)
        else:
            adata.write_h5ad(temporary, compression="gzip")


def copy_with_results(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    obs: pd.DataFrame | None = None,
    obsm: Mapping[str, Any] | None = None,
    uns: Mapping[str, Any] | None = None,
) -> None:
    """Copy an h5ad file or zarr folder and put results into the copy, without loading its matrices.

    Everything else of the input is kept byte by byte. (Only a file from before AnnData 0.7, and an output that is of
    the other kind than the input, go through memory.)

    Parameters
    ----------
    source
        The input.
    path
        The output; it may be the input itself.
    obs
        New columns, one row per cell in the order of the input. Columns of the same name are replaced, and the names
        of cells too if they differ from those of the input.
    obsm
        New arrays, (n_cells, ...) each, a :class:`BlockArray` among them perhaps; those of the same name are replaced.
    uns
        New entries; those of the same name are replaced.

    Raises
    ------
    OutputError
        If it cannot be written; then nothing is left behind.
    """
    source = Path(source).expanduser()
    is_folder = source.is_dir()
    obs = pd.DataFrame() if obs is None else obs
    results = obs, dict(obsm or {}), dict(uns or {})
    if is_folder != (Path(path).suffix == ".zarr") or not (is_folder or _has_groups(source)):
        adata = _open(source, backed=False)
        if obs.shape[1]:
            adata.obs_names = obs.index
            for column, values in obs.items():
                adata.obs[str(column)] = _storable(values)
        adata.obsm.update({k: v.load() if isinstance(v, BlockArray) else v for k, v in results[1].items()})
        adata.uns.update(results[2])
        write_h5ad(adata, path)
        return
    with atomic_path(path) as temporary, _quiet():
        if is_folder:
            _copy_zarr(source, temporary, *results)
        else:
            shutil.copyfile(source, temporary)
            with h5py.File(temporary, "r+") as file:
                _write_results(file, *results)


def _copy_zarr(source: Path, path: Path, *results: Any) -> None:
    import zarr

    shutil.copytree(source, path)
    store = zarr.open_group(path, mode="r+", use_consolidated=False)
    _write_results(store, *results)
    if zarr.open_group(source, mode="r").metadata.consolidated_metadata is not None:
        # The folder's index of its content must list the results.
        zarr.consolidate_metadata(store.store)


def _has_groups(path: Path) -> bool:
    """Return whether an h5ad file is in today's layout, to which columns can be added one by one."""
    try:
        with h5py.File(path, "r") as file:
            return isinstance(file["obs"], h5py.Group) and file["obs"].attrs.get("encoding-version") == "0.2.0"
    except (OSError, KeyError):
        return False  # open_input says what is wrong


def _write_results(store: Any, obs: pd.DataFrame, obsm: dict[str, Any], uns: dict[str, Any]) -> None:
    """Write results into an open h5ad file or zarr store."""
    table = store["obs"]
    index = str(table.attrs["_index"])
    n_cells = int(table[index].shape[0])
    for name, rows in {"obs": obs if obs.shape[1] else None, **obsm}.items():
        if rows is not None and len(rows) != n_cells:
            raise ValueError(f"results {name!r} have {len(rows)} rows, the input has {n_cells} cells")
    columns = [str(column) for column in table.attrs["column-order"]]
    for column, values in obs.items():
        write_elem(table, str(column), _storable(values))
        if column not in columns:
            columns.append(str(column))
    if obs.shape[1]:
        table.attrs["column-order"] = columns
        if not np.array_equal(read_elem(table[index]), obs.index):
            write_elem(table, index, obs.index.to_numpy(dtype=object))
    for part, entries in (("obsm", obsm), ("uns", uns)):
        if part not in store:
            write_elem(store, part, {})
        for name, entry in entries.items():
            if isinstance(entry, BlockArray):
                _write_blocks(store[part], name, entry)
            else:
                write_elem(store[part], name, entry)


def _write_blocks(group: Any, name: str, array: BlockArray) -> None:
    """Write an array block by block: an empty one of its kind first, then its rows."""
    write_elem(group, name, np.empty((0, *array.shape[1:]), dtype=array.dtype))
    attributes = dict(group[name].attrs)
    del group[name]
    create = group.create_dataset if isinstance(group, h5py.Group) else group.create_array
    stored = create(name, shape=array.shape, dtype=array.dtype)
    stored.attrs.update(attributes)
    start = 0
    for block in array.blocks():
        stored[start : start + len(block)] = block
        start += len(block)


def _storable(values: pd.Series) -> Any:
    """Return the array of a column as AnnData stores it; text becomes categories."""
    if pd.api.types.is_string_dtype(values.dtype):
        return pd.Categorical(values)
    return values.array if pd.api.types.is_extension_array_dtype(values.dtype) else values.to_numpy()


def write_table(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table: tab-separated where the name ends in ``.tsv`` or ``.tsv.gz``, otherwise comma-separated.

    The index is the first column unless it is a plain range.

    Raises
    ------
    OutputError
        If it cannot be written; then nothing is left behind.
    """
    separator = "\t" if Path(path).name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with atomic_path(path) as temporary:
        table.to_csv(temporary, sep=separator, index=not isinstance(table.index, pd.RangeIndex))


def to_json(content: Any) -> str:
    """Format one JSON value: numbers and arrays of NumPy as plain ones, NaN and infinity as null, paths as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, (np.ndarray, np.generic)):
            return plain(value.tolist())
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return str(value) if isinstance(value, os.PathLike) else value

    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write one JSON value, formatted by `to_json`.

    Raises
    ------
    OutputError
        If it cannot be written; then nothing is left behind.
    """
    text = to_json(content)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")

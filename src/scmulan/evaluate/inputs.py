"""Inputs of an evaluation: model, labelled files, and their expression by approved gene symbol."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scmulan._io.adata import open_input
from scmulan._io.outputs import sha256
from scmulan.errors import InputError, ScmulanError
from scmulan.model.loading import LoadedModel, load
from scmulan.vocab.binning import log1p_normalised
from scmulan.vocab.gene_table import GeneTable
from scmulan.vocab.genes import match_genes
from scmulan.vocab.matrix import choose_matrix

__all__ = [
    "Expression",
    "as_model",
    "file_names",
    "ignore_warnings",
    "model_name",
    "open_labelled",
    "optional_packages",
    "read_expression",
    "require_files",
    "trained_on",
    "with_source",
]

Total = Literal["file", "shared"]


def as_model(model: LoadedModel | str | Path) -> LoadedModel:
    """Return the model, loaded if it was given by path or name."""
    return model if isinstance(model, LoadedModel) else load(model)


def model_name(model: LoadedModel) -> str:
    """Return the name of a model in results."""
    return model.name


def trained_on(model: LoadedModel, path: str | Path) -> bool:
    """Return whether the model's card names a file, by its hash, among its training data."""
    path = Path(path)
    hashes = {entry.get("sha256") for entry in _data_entries(model.card) if entry.get("file") == path.name}
    return bool(hashes) and path.is_file() and sha256(path) in hashes


def _data_entries(card: dict[str, Any]) -> list[dict[str, Any]]:
    data = card.get("data", [])
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def require_files(paths: Sequence[str | Path]) -> None:
    """Raise InputError for an empty list of files."""
    if not paths:
        raise InputError("no file given: name at least one labelled h5ad file")


def file_names(paths: Sequence[str | Path]) -> list[str]:
    """Return short names of files: without folder and suffix, numbered where two would be the same."""
    stems = [Path(path).name.removesuffix(".h5ad").removesuffix(".zarr") for path in paths]
    return [s if stems.count(s) == 1 else f"{s}-{stems[: i + 1].count(s)}" for i, s in enumerate(stems)]


def open_labelled(path: str | Path, rows: np.ndarray | None = None) -> ad.AnnData:
    """Open a file backed; with ``rows``, load only these cells into memory."""
    adata = open_input(path, backed=True)
    return adata if rows is None else adata[rows].to_memory()


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """Expression of cells by approved gene symbol."""

    amounts: sp.csr_matrix
    """float32 ``[cells, genes]``: counts, or counts per 10,000 where the file has log1p values; several columns of a
    gene are summed."""
    genes: list[str]
    """Approved symbols of the columns; genes without one are left out."""
    total: np.ndarray
    """float32 ``[cells]``: total over all genes of the file."""

    def rows(self, rows: np.ndarray) -> "Expression":
        """Return the expression of some cells."""
        return Expression(amounts=self.amounts[rows], genes=self.genes, total=self.total[rows])

    def log1p(self, genes: Sequence[str], total: Total = "file") -> sp.csr_matrix:
        """Return log1p of counts per 10,000 of chosen genes; a gene that was not measured is zero.

        Parameters
        ----------
        genes
            Approved symbols, the columns of the result.
        total
            What is scaled to 10,000 per cell: all genes of the file (as scanpy does), or the chosen ones, which makes
            panels of different size comparable.

        Returns
        -------
        scipy.sparse.csr_matrix
            float32 ``[cells, genes]``.
        """
        column_of = {gene: i for i, gene in enumerate(self.genes)}
        pairs = [(column_of[gene], i) for i, gene in enumerate(genes) if gene in column_of]
        rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        select = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(self.genes), len(genes)))
        x = sp.csr_matrix(self.amounts @ select)
        sums = self.total if total == "file" else np.asarray(x.sum(1)).ravel()
        x.data = log1p_normalised(x.data.astype(np.float64), x.indptr, sums).astype(np.float32)
        return x


def read_expression(adata: ad.AnnData, source: str) -> Expression:
    """Read the expression of all cells; the matrix is chosen and genes are matched as for a model.

    Parameters
    ----------
    adata
        Cells, backed or in memory.
    source
        Name of the file, for errors.

    Raises
    ------
    InputError
        If no matrix holds expression, or the names are not those of human genes.
    """
    matrix = choose_matrix(adata)
    symbols = GeneTable.load().symbols
    match = match_genes(matrix.var, symbols, warn_below=0.0, source=source)
    found, index = np.unique(match.columns[match.columns >= 0], return_inverse=True)
    columns = match.columns.copy()
    columns[columns >= 0] = index
    amounts, total = matrix.read_amounts(columns, len(found))
    return Expression(amounts=amounts, genes=[symbols[i] for i in found], total=total)


@contextmanager
def with_source(source: str | Path) -> Iterator[None]:
    """Put the name of a file in front of errors that do not mention it."""
    try:
        yield
    except ScmulanError as error:
        if str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from None


@contextmanager
def optional_packages(purpose: str) -> Iterator[None]:
    """Turn the ImportError of a missing optional package into one line that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise ScmulanError(
            f"{purpose} needs the package {error.name or error}, which is not installed: pip install 'scmulan[bench]'"
        ) from None


@contextmanager
def ignore_warnings(*messages: str) -> Iterator[None]:
    """Silence warnings that begin with one of the given texts, and no other."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield

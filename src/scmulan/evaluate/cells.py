"""Labelled cells of a file, in approved gene symbols, for methods that are no language models."""

import hashlib
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
from scmulan.errors import InputError, ScmulanError
from scmulan.model.loading import LoadedModel, load
from scmulan.vocab.gene_table import GeneTable
from scmulan.vocab.genes import match_genes
from scmulan.vocab.matrix import choose_matrix

__all__ = ["GeneCells", "as_model", "file_names", "named", "need", "open_labelled", "read_genes", "trained_on"]

Total = Literal["file", "shared"]


def as_model(model: LoadedModel | str | Path) -> LoadedModel:
    """Return the model, loaded if it was given by path or name."""
    return model if isinstance(model, LoadedModel) else load(model)


def model_name(model: LoadedModel) -> str:
    """Name of a model in results."""
    return str(model.card.get("name", model.folder.name))


def file_names(paths: Sequence[str | Path]) -> list[str]:
    """Short names of files in results: without folder and ending, numbered where two would be the same."""
    stems = [Path(path).name.removesuffix(".h5ad").removesuffix(".zarr") for path in paths]
    return [s if stems.count(s) == 1 else f"{s}-{stems[: i + 1].count(s)}" for i, s in enumerate(stems)]


@contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Put the name of a file in front of errors that cannot know it."""
    try:
        yield
    except ScmulanError as error:
        if str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from None


@contextmanager
def need(what: str) -> Iterator[None]:
    """Turn a missing optional package into a line that says how to get it."""
    try:
        yield
    except ImportError as error:
        raise ScmulanError(
            f"{what} needs the package {error.name or error}, which is not installed: pip install 'scmulan[bench]'"
        ) from None


def open_labelled(path: str | Path, rows: np.ndarray | None = None) -> ad.AnnData:
    """Open a file; with ``rows`` only these cells, in memory."""
    adata = open_input(path, backed=True)
    return adata if rows is None else adata[rows].to_memory()


def trained_on(model: LoadedModel, path: str | Path) -> bool:
    """Whether a file is among those that the model's card says it was trained on."""
    path = Path(path)
    hashes = {entry.get("sha256") for entry in _entries(model.card) if entry.get("file") == path.name}
    return bool(hashes) and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() in hashes


def _entries(card: dict[str, Any]) -> list[dict[str, Any]]:
    data = card.get("data", [])
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneCells:
    """Expression of cells by approved gene symbol."""

    amounts: sp.csr_matrix
    """float32 ``[cells, genes]``: counts, or counts per 10,000 where the file has log1p values; several columns of a
    gene are summed."""
    genes: list[str]
    """Approved symbols of the columns; genes without one are left out."""
    total: np.ndarray
    """float32 ``[cells]``: total over all genes of the file."""

    def log1p(self, genes: Sequence[str], total: Total = "file") -> sp.csr_matrix:
        """Return log1p of counts per 10,000 for chosen genes; one that was not measured is zero.

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
        place = {gene: i for i, gene in enumerate(self.genes)}
        pairs = [(place[gene], i) for i, gene in enumerate(genes) if gene in place]
        rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        pick = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(self.genes), len(genes)))
        x = sp.csr_matrix(self.amounts @ pick)
        sums = self.total if total == "file" else np.asarray(x.sum(1)).ravel()
        scale = np.divide(1e4, sums, out=np.zeros(len(sums)), where=sums > 0)
        x.data = np.log1p(x.data * np.repeat(scale, np.diff(x.indptr))).astype(np.float32)
        return x


def read_genes(adata: ad.AnnData, source: str) -> GeneCells:
    """Read the expression of all cells, matrix chosen and genes named as for a model.

    Raises
    ------
    InputError
        If no matrix holds expression, or the names are not those of human genes.
    """
    chosen = choose_matrix(adata)
    symbols = GeneTable.load().symbols
    match = match_genes(chosen.var, symbols, warn_below=0.0, source=source)
    used, columns = np.unique(match.columns[match.columns >= 0], return_inverse=True)
    inside = np.flatnonzero(match.columns >= 0)
    fold = sp.csr_matrix((np.ones(len(inside), np.float32), (inside, columns)), shape=(chosen.n_genes, len(used)))
    parts, totals = [], []
    for _, block in chosen.chunks():
        if chosen.matrix_kind == "log1p":
            block.data = np.expm1(block.data)
        totals.append(np.asarray(block.sum(1)).ravel())
        parts.append(sp.csr_matrix(block @ fold))
    amounts = sp.vstack(parts, format="csr").astype(np.float32)
    return GeneCells(amounts=amounts, genes=[symbols[i] for i in used], total=np.concatenate(totals))


@contextmanager
def ignoring(*messages: str) -> Iterator[None]:
    """Silence warnings that begin with given texts, and no other."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield


def need_files(paths: Sequence[str | Path]) -> None:
    """Refuse an empty list of files."""
    if not paths:
        raise InputError("no file given: name at least one labelled h5ad file")

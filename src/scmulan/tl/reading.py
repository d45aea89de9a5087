"""The way in: from an AnnData to blocks of gene words, with an account of what was used."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import anndata as ad
import numpy as np

import scmulan
from scmulan.language.expression import CellWords, tokenize
from scmulan.language.genes import match_genes
from scmulan.language.matrix import choose_matrix
from scmulan.model.checkpoint import LoadedModel

BLOCK = 2048


class CellReader:
    """Gene words of the cells of one AnnData, block by block.

    Parameters
    ----------
    adata
        Cells × genes; backed files are read in blocks.
    model
        Its vocabulary's genes are looked for.
    layer
        Matrix to use: ``"X"``, ``"raw"`` or the name of a layer (default: chosen by looking).
    state
        ``"counts"`` or ``"log1p"`` (default: found by looking).
    min_genes
        Fewest vocabulary genes the input must have.

    Raises
    ------
    MatrixError, GeneError
        If no matrix holds usable expression, or too few genes are known.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        model: LoadedModel,
        *,
        layer: str | None = None,
        state: Literal["counts", "log1p"] | None = None,
        min_genes: int = 20,
    ) -> None:
        self.model = model
        self.matrix = choose_matrix(adata, layer=layer, state=state)
        self.match = match_genes(self.matrix.var, model.vocabulary.genes, minimum=min_genes)

    def __len__(self) -> int:
        return self.matrix.n_cells

    def blocks(
        self, size: int = BLOCK, *, wanted: Callable[[slice], bool] = lambda rows: True
    ) -> Iterator[tuple[slice, CellWords]]:
        """Rows and gene words of consecutive cells, of those blocks that are wanted."""
        for rows, block in self.matrix.chunks(size, wanted=wanted):
            words = tokenize(
                block,
                self.match.columns,
                len(self.model.vocabulary.genes),
                state=self.matrix.state,
                levels=self.model.config.levels,
            )
            yield rows, words

    def account(self, words: int, covered: np.ndarray) -> dict[str, Any]:
        """What was read; plain types that fit into ``uns`` and JSON.

        Parameters
        ----------
        words
            Gene words of all cells together.
        covered
            Share of each cell's total that lies in the vocabulary.
        """
        share = float(covered.mean()) if len(covered) else 0.0
        return {
            "cells": len(self),
            "words_per_cell": words / max(1, len(self)),
            "matrix": {"where": self.matrix.where, "state": self.matrix.state, "reason": self.matrix.reason},
            "genes": self.match.report(share),
            "summary": self.match.summary(share),
        }


def provenance(model: LoadedModel, verb: str, parameters: dict[str, Any], account: dict[str, Any]) -> dict[str, Any]:
    """Contents of ``uns['scmulan']``: which software and weights, on what, with which settings."""
    return {
        "version": scmulan.__version__,
        "model": str(model.card.get("name", model.folder.name)),
        "weights_hash": model.weights_hash,
        **account,
        "parameters": {verb: {k: "" if v is None else v for k, v in parameters.items()}},
    }


def merge_uns(adata: ad.AnnData, new: dict[str, Any]) -> None:
    """Put results into ``uns['scmulan']``, keeping the parameters of verbs that ran before with the same weights."""
    old = adata.uns.get("scmulan", {})
    same = old.get("weights_hash") == new["weights_hash"]
    before = dict(old.get("parameters", {})) if same else {}
    if old and not same:
        warnings.warn("uns['scmulan'] held results of another model; they are replaced", UserWarning, stacklevel=3)
    adata.uns["scmulan"] = {**new, "parameters": {**before, **new["parameters"]}}

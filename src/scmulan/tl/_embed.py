"""``scmulan.tl.embed``: place cells in the model's space, comparable across studies."""

from dataclasses import dataclass
from typing import Any, Literal

import anndata as ad
import numpy as np

from scmulan._keys import EMBEDDING
from scmulan._progress import SILENT, Advance, Progress
from scmulan.infer import release_rule
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision
from scmulan.infer.scoring import last_hidden
from scmulan.model.loading import LoadedModel
from scmulan.tl._block_store import BlockStore
from scmulan.tl._blockwise import ReadOptions, run_blocks, zero_if_empty
from scmulan.tl._record import ModelLike, add_record, as_model, in_place_or_copy
from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.matrix import MatrixKind
from scmulan.vocab.sentences import Sentences


@dataclass(frozen=True)
class Embedding:
    """Embedding of all cells of an input.

    Parameters
    ----------
    values
        float32 ``[cells, width]``; zeros for a cell without gene tokens. A
        :class:`~scmulan._io.adata.BlockArray` where the blocks of the job are on disk.
    uns
        The record for ``uns['scmulan']``.
    """

    values: Any
    uns: dict[str, Any]

    def add_to(self, adata: ad.AnnData, key_added: str | None = None) -> None:
        """Put the results into an AnnData of the same cells, under keys as in :func:`embed`."""
        adata.obsm[key_added or EMBEDDING] = self.values
        add_record(adata, self.uns, key_added)


def embed(
    adata: ad.AnnData,
    model: ModelLike,
    *,
    layer: str | None = None,
    matrix_kind: MatrixKind | None = None,
    rule: Literal["default", "release"] = "default",
    min_genes: int = 20,
    precision: Precision = "auto",
    key_added: str | None = None,
    copy: bool = False,
    progress: Progress = SILENT,
) -> ad.AnnData | None:
    """Embed cells: compute the hidden state of each, for neighbours, clustering and integration.

    Parameters
    ----------
    adata, model, layer, matrix_kind, min_genes, precision, copy, progress
        As in :func:`scmulan.tl.annotate`.
    rule
        ``"default"``: the hidden state that annotates the cell, at the last token of the annotation prompt.
        ``"release"``: as published, the state at the second-to-last position of the last decoding step.
    key_added
        Key of ``obsm``, and of ``uns``. Default: ``X_scmulan``, and ``uns['scmulan']``.

    Returns
    -------
    anndata.AnnData or None
        The copy with ``copy=True``, else None. Added are ``obsm['X_scmulan']`` (float32 ``[cells, width]``; zeros for a
        cell without any gene of the vocabulary) and ``uns['scmulan']``.

    Raises
    ------
    MatrixError, GeneError, ModelError
        If the input, the model or the precision cannot be used; nothing is changed then.

    Notes
    -----
    Cells of different studies are comparable as they are; use it in place of ``X_pca``:
    ``sc.pp.neighbors(adata, use_rep="X_scmulan")``.
    """
    reading = ReadOptions(layer=layer, matrix_kind=matrix_kind, min_genes=min_genes, precision=precision)
    result = embed_cells(adata, as_model(model), rule=rule, reading=reading, progress=progress)
    adata = in_place_or_copy(adata, copy)
    result.add_to(adata, key_added)
    return adata if copy else None


def embed_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    rule: Literal["default", "release"] = "default",
    reading: ReadOptions | None = None,
    store: BlockStore | None = None,
    progress: Progress = SILENT,
) -> Embedding:
    """Embed cells and leave the input as it is; parameters as in :func:`embed`.

    Parameters
    ----------
    reading
        How cells are read.
    store
        Where results of finished blocks are kept, and taken from. If it is on disk, the values are left there.
    """

    def work(
        used: LoadedModel, prompts: Sentences, tokens: GeneTokens, budget: TokenBudget, advance: Advance
    ) -> dict[str, np.ndarray]:
        if rule == "release":
            hidden = release_rule.annotate(used.network, prompts, end=used.vocabulary.end).embedding
            advance(len(tokens))
        else:
            hidden = last_hidden(used, prompts, budget=budget, advance=advance)
        return {"hidden": zero_if_empty(hidden, tokens)}

    results = run_blocks(adata, model, work, reading or ReadOptions(), rule=rule, store=store, progress=progress)
    values = results.hidden(model.config.width)
    return Embedding(
        values=values if results.store.folder else values.load(), uns=results.provenance("embed", {"rule": rule})
    )

"""Where does each cell lie?"""

from dataclasses import dataclass
from typing import Any, Literal

import anndata as ad
import numpy as np

from scmulan._keys import EMBEDDING
from scmulan._progress import Advance as Progress
from scmulan.infer import release_rule
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision
from scmulan.infer.scoring import last_hidden
from scmulan.model.loading import LoadedModel
from scmulan.tl._blockwise import BlockStore, CellReader, merge_uns, provenance, run_blocks, without_empty
from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.sentences import Sentences


@dataclass(frozen=True)
class Embedding:
    """Embedding of all cells of an input.

    Parameters
    ----------
    values
        float32 ``[cells, width]``; zeros for a cell without gene words. On disk, where the parts of the job are.
    uns
        Contents of ``uns['scmulan']``.
    """

    values: Any
    uns: dict[str, Any]


def embed(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    rule: Literal["default", "release"] = "default",
    min_genes: int = 20,
    precision: Precision = "auto",
) -> None:
    """Put an embedding of each cell into ``obsm['X_scmulan']`` (float32, cells × width), in place.

    Parameters
    ----------
    adata, model, layer, matrix_kind, min_genes, precision
        As in :func:`scmulan.tl.annotate`.
    rule
        ``"default"``: the hidden state that names the cell, at the annotation prompt's last word.
        ``"release"``: as published, the state at the second-to-last position of the last decoding step.

    Notes
    -----
    Cells of different studies are comparable as they are; use it in place of ``X_pca``:
    ``sc.pp.neighbors(adata, use_rep="X_scmulan")``.
    """
    result = embed_cells(
        adata, model, layer=layer, matrix_kind=matrix_kind, rule=rule, min_genes=min_genes, precision=precision
    )
    adata.obsm[EMBEDDING] = result.values
    merge_uns(adata, result.uns)


def embed_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    rule: Literal["default", "release"] = "default",
    min_genes: int = 20,
    precision: Precision = "auto",
    batch_tokens: int | None = None,
    parts: BlockStore | None = None,
    progress: Progress = lambda n: None,
) -> Embedding:
    """Embed each cell and leave the input alone; parameters as in :func:`embed`.

    Parameters
    ----------
    batch_tokens, parts, progress
        As in :func:`scmulan.tl._annotate.annotate_cells`. With ``parts`` on disk, the values are left there.
    """
    reader = CellReader(adata, model, layer=layer, matrix_kind=matrix_kind, min_genes=min_genes)

    def work(used: LoadedModel, prompts: Sentences, words: GeneTokens, budget: TokenBudget) -> dict[str, np.ndarray]:
        if rule == "release":
            states = release_rule.annotate(used.network, prompts, end=used.vocabulary.end).embedding
            progress(len(words))
        else:
            states = last_hidden(used, prompts, budget=budget, advance=progress)
        return {"hidden": without_empty(states, words)}

    done = run_blocks(
        reader, model, work, rule=rule, precision=precision, batch_tokens=batch_tokens, parts=parts, progress=progress
    )
    found = done.columns("words", "covered")
    parameters = {
        "rule": rule, "layer": layer, "state": matrix_kind, "min_genes": min_genes, "precision": done.precision,
    }  # fmt: skip
    account = reader.account(int(found["words"].sum()), found["covered"])
    values = done.hidden(model.config.width)
    return Embedding(values if done.parts.folder else values.load(), provenance(model, "embed", parameters, account))

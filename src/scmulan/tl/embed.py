"""Where does each cell lie?"""

from dataclasses import dataclass
from typing import Any, Literal

import anndata as ad
import numpy as np

from scmulan.inference import release_rule
from scmulan.inference.engine import Progress, score_labels
from scmulan.language.sentence import gene_prompts
from scmulan.language.tasks import ANNOTATE
from scmulan.model.checkpoint import LoadedModel
from scmulan.tl.reading import CellReader, merge_uns, provenance

KEY = "X_scmulan"


@dataclass(frozen=True)
class Embedding:
    """Embedding of all cells of an input.

    Parameters
    ----------
    values
        float32 ``[cells, width]``; zeros for a cell without gene words.
    uns
        Contents of ``uns['scmulan']``.
    """

    values: np.ndarray
    uns: dict[str, Any]


def embed(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    state: Literal["counts", "log1p"] | None = None,
    rule: Literal["default", "release"] = "default",
    min_genes: int = 20,
) -> None:
    """Put an embedding of each cell into ``obsm['X_scmulan']`` (float32, cells × width), in place.

    Parameters
    ----------
    adata, model, layer, state, min_genes
        As in :func:`scmulan.tl.annotate`.
    rule
        ``"default"``: the hidden state that names the cell, at the annotation prompt's last word.
        ``"release"``: as published, the state at the second-to-last position of the last decoding step.

    Notes
    -----
    Cells of different studies are comparable as they are; use it in place of ``X_pca``:
    ``sc.pp.neighbors(adata, use_rep="X_scmulan")``.
    """
    result = embed_cells(adata, model, layer=layer, state=state, rule=rule, min_genes=min_genes)
    adata.obsm[KEY] = result.values
    merge_uns(adata, result.uns)


def embed_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    state: Literal["counts", "log1p"] | None = None,
    rule: Literal["default", "release"] = "default",
    min_genes: int = 20,
    batch_words: int = 16_384,
    progress: Progress = lambda n: None,
) -> Embedding:
    """Embed each cell and leave the input alone; parameters as in :func:`embed`."""
    reader = CellReader(adata, model, layer=layer, state=state, min_genes=min_genes)
    out = np.zeros((len(reader), model.config.width), dtype=np.float32)
    for rows, words in reader.blocks():
        prompts = gene_prompts(words, model.vocabulary, ANNOTATE)
        if rule == "release":
            out[rows] = release_rule.annotate(model.network, prompts, end=model.vocabulary.end).embedding
            progress(len(words))
        else:
            out[rows] = score_labels(model, prompts, batch_words=batch_words, progress=progress).state
        out[rows][words.lengths == 0] = 0
    parameters = {"rule": rule, "layer": layer, "state": state, "min_genes": min_genes}
    return Embedding(out, provenance(model, "embed", parameters, reader.account()))

"""What is each cell?"""

from dataclasses import dataclass
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd

from scmulan.errors import ModelError
from scmulan.inference import release_rule
from scmulan.inference.engine import Progress, score_labels
from scmulan.language.ontology import Ontology
from scmulan.language.sentence import gene_prompts
from scmulan.language.tasks import ANNOTATE
from scmulan.language.vocabulary import Family
from scmulan.model.checkpoint import LoadedModel
from scmulan.tl.reading import CellReader, merge_uns, provenance

KEY = "scmulan_cell_type"
STATUSES = ("confident", "uncertain", "conflict", "empty")


@dataclass(frozen=True)
class Annotation:
    """Cell types of all cells of an input.

    Parameters
    ----------
    obs
        One row per cell: ``scmulan_cell_type``, ``…_coarse``, ``…_probability``, ``…_status``, ``…_ontology_id``.
    uns
        Contents of ``uns['scmulan']``.
    state
        The embedding that :func:`scmulan.tl.embed` would give, if it was asked for: float32 ``[cells, width]``.
    """

    obs: pd.DataFrame
    uns: dict[str, Any]
    state: np.ndarray | None = None


def annotate(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    state: Literal["counts", "log1p"] | None = None,
    rule: Literal["default", "release"] = "default",
    threshold: float = 0.5,
    min_genes: int = 20,
) -> None:
    """Name the type of each cell, in place.

    Parameters
    ----------
    adata
        Cells × genes with human gene symbols or Ensembl ids; counts or log1p values in ``X``, ``raw`` or a layer.
    model
        From :func:`scmulan.load`.
    layer, state
        Which matrix, and what it holds; found by looking unless given.
    rule
        ``"default"``: every type's probability from one pass over the cell. ``"release"``: the words that the
        published release would decode (greedy, three words).
    threshold
        Cells whose probability is lower are ``"uncertain"``.
    min_genes
        Fewest genes of the model's vocabulary that the input must have.

    Notes
    -----
    Adds to ``obs``: ``scmulan_cell_type`` and ``scmulan_cell_type_coarse`` (categories),
    ``scmulan_cell_type_probability`` (float32; of the type or a finer one, not calibrated beyond training),
    ``scmulan_cell_type_ontology_id`` (Cell Ontology id, empty where the label has none) and
    ``scmulan_cell_type_status``: ``confident``; ``uncertain``; ``conflict`` (coarse and fine type exclude each
    other); ``empty`` (no gene word: type is ``"unknown"``). Adds ``uns['scmulan']``.

    Raises
    ------
    MatrixError, GeneError, ModelError
        If the input or the model cannot be used; nothing is changed then.
    """
    result = annotate_cells(adata, model, layer=layer, state=state, rule=rule, threshold=threshold, min_genes=min_genes)
    for column in result.obs:
        adata.obs[column] = result.obs[column]
    merge_uns(adata, result.uns)


def annotate_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    state: Literal["counts", "log1p"] | None = None,
    rule: Literal["default", "release"] = "default",
    threshold: float = 0.5,
    min_genes: int = 20,
    batch_words: int = 16_384,
    keep_state: bool = False,
    progress: Progress = lambda n: None,
) -> Annotation:
    """Name the type of each cell and leave the input alone; parameters as in :func:`annotate`.

    Parameters
    ----------
    batch_words
        Padded words per forward pass.
    keep_state
        Return the embedding too: it comes from the same pass.
    progress
        Called with the number of cells just done.
    """
    fine, coarse = (model.vocabulary.names(f) for f in (Family.FINE, Family.COARSE))
    if not fine:
        raise ModelError(f"model {model.folder.name} has no cell types in its vocabulary: it cannot annotate")
    reader = CellReader(adata, model, layer=layer, state=state, min_genes=min_genes)
    namer = _Namer(model, threshold)
    parts = []
    states = np.zeros((len(reader) if keep_state else 0, model.config.width), dtype=np.float32)
    for rows, words in reader.blocks():
        prompts = gene_prompts(words, model.vocabulary, ANNOTATE)
        if rule == "release":
            said = release_rule.annotate(model.network, prompts, end=model.vocabulary.end)
            parts.append(namer.release_table(*_release_types(model, said.entity), words.lengths))
            state_of = said.embedding
            progress(len(words))
        else:
            scores = score_labels(model, prompts, batch_words=batch_words, progress=progress)
            parts.append(namer.table(scores.fine, scores.coarse, words.lengths))
            state_of = scores.state
        if keep_state:
            states[rows] = np.where(words.lengths[:, None] > 0, state_of, 0)
    table = pd.concat(parts, ignore_index=True)
    table.index = adata.obs_names.copy()
    for name, words_of in ((KEY, fine), (f"{KEY}_coarse", coarse)):
        used = set(table[name])
        table[name] = pd.Categorical(table[name], categories=[w for w in (*words_of, "unknown") if w in used])
    table[f"{KEY}_status"] = pd.Categorical(table[f"{KEY}_status"], categories=list(STATUSES))
    parameters = {"rule": rule, "threshold": threshold, "layer": layer, "state": state, "min_genes": min_genes}
    uns = provenance(model, "annotate", parameters, reader.account())
    return Annotation(table, uns, states if keep_state else None)


class _Namer:
    """Turns probabilities into labels, status and ontology ids."""

    def __init__(self, model: LoadedModel, threshold: float) -> None:
        ontology = Ontology.load()
        self.fine = np.array([*model.vocabulary.names(Family.FINE), "unknown"], dtype=object)
        self.coarse = np.array([*model.vocabulary.names(Family.COARSE), "unknown"], dtype=object)
        self.ids = np.array([ontology.find(n) or "" for n in self.fine[:-1]] + [""], dtype=object)
        self.threshold = threshold
        # How much of the probability speaks for a label: its own and that of finer types.
        self.supports = ontology.label_matrix(list(self.fine[:-1])).astype(np.float32)
        coarse_ids = [ontology.find(n) for n in self.coarse[:-1]]
        self.excludes = np.zeros((len(self.fine), len(self.coarse)), dtype=bool)
        for i, f in enumerate(self.ids[:-1]):
            for j, c in enumerate(coarse_ids):
                if f and c:
                    self.excludes[i, j] = not (ontology.is_a(f, c) or ontology.is_a(c, f))

    def table(self, fine: np.ndarray, coarse: np.ndarray, words: np.ndarray) -> pd.DataFrame:
        """Labels of cells from probabilities ``[cells, types]``."""
        best = fine.argmax(1)
        probability = np.take_along_axis(fine @ self.supports.T, best[:, None], 1)[:, 0].clip(0, 1)
        rough = coarse.argmax(1) if coarse.shape[1] else np.full(len(best), len(self.coarse) - 1)
        status = np.where(probability >= self.threshold, "confident", "uncertain").astype(object)
        status[self.excludes[best, rough]] = "conflict"
        empty = words == 0
        best, rough = np.where(empty, len(self.fine) - 1, best), np.where(empty, len(self.coarse) - 1, rough)
        status[empty] = "empty"
        return _columns(self.fine[best], self.coarse[rough], np.where(empty, 0, probability), status, self.ids[best])

    def release_table(self, fine: np.ndarray, coarse: np.ndarray, words: np.ndarray) -> pd.DataFrame:
        """Labels of cells from places among the fine and coarse types (−1: the word said is no such type)."""
        known = (fine >= 0) & (words > 0)
        status = np.where(known, "confident", "uncertain").astype(object)
        status[known & self.excludes[fine, coarse]] = "conflict"
        status[words == 0] = "empty"
        fine, coarse = np.where(known, fine, -1), np.where(words > 0, coarse, -1)
        return _columns(self.fine[fine], self.coarse[coarse], np.full(len(fine), np.nan), status, self.ids[fine])


def _release_types(model: LoadedModel, said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fine and coarse type among the words that the release says, as places in their families, −1 for any other."""
    out = []
    for family, column in ((Family.FINE, 1), (Family.COARSE, 0)):
        place = np.full(len(model.vocabulary) + 1, -1)
        place[model.vocabulary.ids(family)] = np.arange(len(model.vocabulary.ids(family)))
        out.append(place[said[:, column]] if said.shape[1] > column else np.full(len(said), -1))
    return out[0], out[1]


def _columns(fine: Any, coarse: Any, probability: Any, status: Any, ids: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {
            KEY: fine,
            f"{KEY}_coarse": coarse,
            f"{KEY}_probability": np.asarray(probability, dtype=np.float32),
            f"{KEY}_status": status,
            f"{KEY}_ontology_id": ids,
        }
    )

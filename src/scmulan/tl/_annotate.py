"""``scmulan.tl.annotate``: predict cell types with probabilities."""

from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scmulan._io.adata import BlockArray
from scmulan._keys import (
    CELL_TYPE,
    COARSE,
    CONFIDENT,
    CONFLICT,
    EMPTY,
    ONTOLOGY_ID,
    PROBABILITY,
    STATUS,
    STATUSES,
    UNCERTAIN,
    UNKNOWN,
)
from scmulan._progress import SILENT, Advance, Progress
from scmulan.errors import ModelError
from scmulan.infer import release_rule
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision
from scmulan.infer.scoring import score_labels
from scmulan.model.loading import LoadedModel
from scmulan.tl._block_store import BlockStore
from scmulan.tl._blockwise import AnnotationRule, ReadOptions, run_blocks, zero_if_empty
from scmulan.tl._record import ModelLike, add_columns, add_record, as_model, in_place_or_copy
from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.matrix import MatrixKind
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family


@dataclass(frozen=True)
class Annotation:
    """Cell types of all cells of an input.

    Parameters
    ----------
    obs
        One row per cell, columns as in :func:`annotate`.
    uns
        The record for ``uns['scmulan']``.
    hidden
        The embedding that :func:`scmulan.tl.embed` would give, if it was asked for: float32 ``[cells, width]``, read
        block by block.
    """

    obs: pd.DataFrame
    uns: dict[str, Any]
    hidden: BlockArray | None = None

    def add_to(self, adata: ad.AnnData, key_added: str | None = None) -> None:
        """Put the results into an AnnData of the same cells, under keys as in :func:`annotate`."""
        add_columns(adata, self.obs, CELL_TYPE, key_added)
        add_record(adata, self.uns, key_added)


def annotate(
    adata: ad.AnnData,
    model: ModelLike,
    *,
    layer: str | None = None,
    matrix_kind: MatrixKind | None = None,
    rule: AnnotationRule = "default",
    threshold: float = 0.5,
    min_genes: int = 20,
    precision: Precision = "auto",
    key_added: str | None = None,
    copy: bool = False,
    progress: Progress = SILENT,
) -> ad.AnnData | None:
    """Annotate cells: predict cell types with probabilities.

    Parameters
    ----------
    adata
        Cells × genes with human gene symbols or Ensembl ids; counts or log1p values in ``X``, ``raw`` or a layer.
    model
        From :func:`scmulan.load`, or its name or folder.
    layer, matrix_kind
        Which matrix to read (``"X"``, ``"raw"``, the name of a layer), and what it holds; found by looking unless
        given.
    rule
        ``"default"``: the probability of every type, from one pass over the cell. ``"stepwise"``: the most probable
        coarse type, then the fine types after it, by one more step of one token. ``"release"``: the tokens that the
        published release would decode (greedy, three tokens; no probabilities).
    threshold
        Cells with a lower probability are ``"uncertain"``.
    min_genes
        Fewest genes of the model's vocabulary that the input must have.
    precision
        ``"fp32"``, ``"bf16"`` or ``"int8"``; ``"auto"`` picks the fastest that reproduces the fp32 labels on a sample
        of the cells (:mod:`scmulan.infer.precision`).
    key_added
        Prefix of the columns, and key of ``uns``: results of several models then stand side by side. Default:
        ``scmulan_cell_type``, and ``uns['scmulan']``.
    copy
        Return a copy with the results and leave ``adata`` as it is.
    progress
        Shows how far it is.

    Returns
    -------
    anndata.AnnData or None
        The copy with ``copy=True``, else None. Added to ``obs`` are

        ``scmulan_cell_type``, ``scmulan_cell_type_coarse``
            categories;
        ``scmulan_cell_type_probability``
            float32, of the type or a finer one, not calibrated beyond training;
        ``scmulan_cell_type_ontology_id``
            Cell Ontology id, empty where the label has none;
        ``scmulan_cell_type_status``
            ``confident``; ``uncertain``; ``conflict`` (coarse and fine type exclude each other); ``empty`` (no gene
            of the vocabulary: the type is ``unknown``).

        Added to ``uns['scmulan']``: model, parameters, matrix and genes used.

    Raises
    ------
    MatrixError, GeneError, ModelError
        If the input or the model cannot be used; nothing is changed then.

    Notes
    -----
    Under ``torchrun`` each process annotates a part of the cells, and each gets all results.
    """
    reading = ReadOptions(layer=layer, matrix_kind=matrix_kind, min_genes=min_genes, precision=precision)
    result = annotate_cells(adata, as_model(model), rule=rule, threshold=threshold, reading=reading, progress=progress)
    adata = in_place_or_copy(adata, copy)
    result.add_to(adata, key_added)
    return adata if copy else None


def annotate_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    rule: AnnotationRule = "default",
    threshold: float = 0.5,
    reading: ReadOptions | None = None,
    keep_hidden: bool = False,
    store: BlockStore | None = None,
    progress: Progress = SILENT,
) -> Annotation:
    """Annotate cells and leave the input as it is; parameters as in :func:`annotate`.

    Parameters
    ----------
    reading
        How cells are read.
    keep_hidden
        Return the embedding too: it comes from the same pass.
    store
        Where results of finished blocks are kept, and taken from.
    """
    if not model.vocabulary.names(Family.FINE):
        raise ModelError(f"model {model.folder.name} has no cell types in its vocabulary: it cannot annotate")
    labels = _Labels(model, threshold)

    def work(
        used: LoadedModel, prompts: Sentences, tokens: GeneTokens, budget: TokenBudget, advance: Advance
    ) -> dict[str, np.ndarray]:
        if rule == "release":
            decoded = release_rule.annotate(used.network, prompts, end=used.vocabulary.end)
            arrays = labels.from_tokens(decoded.entity, tokens.lengths)
            hidden = decoded.embedding
            advance(len(tokens))
        else:
            scores = score_labels(used, prompts, budget=budget, coarse_first=rule == "stepwise", advance=advance)
            arrays = labels.from_probabilities(scores.fine, scores.coarse, tokens.lengths)
            hidden = scores.hidden
        return {**arrays, **({"hidden": zero_if_empty(hidden, tokens)} if keep_hidden else {})}

    results = run_blocks(adata, model, work, reading or ReadOptions(), rule=rule, store=store, progress=progress)
    return Annotation(
        obs=labels.table(results.columns("fine", "coarse", "probability", "status"), adata.obs_names),
        uns=results.provenance("annotate", {"rule": rule, "threshold": threshold}),
        hidden=results.hidden(model.config.width) if keep_hidden else None,
    )


class _Labels:
    """Labels, statuses and ontology ids of cells, by index among the model's fine and coarse types.

    The last index of both is of cells without a type.
    """

    def __init__(self, model: LoadedModel, threshold: float) -> None:
        ontology = Ontology.load()
        self.vocabulary = model.vocabulary
        self.threshold = threshold
        self.fine = np.array([*model.vocabulary.names(Family.FINE), UNKNOWN], dtype=object)
        self.coarse = np.array([*model.vocabulary.names(Family.COARSE), UNKNOWN], dtype=object)
        self.ids = np.array([ontology.find(n) or "" for n in self.fine[:-1]] + [""], dtype=object)
        self.supports = ontology.label_matrix(list(self.fine[:-1])).astype(np.float32)
        """Whether a type's probability counts for a label: its own and that of finer types."""
        self.excludes = np.zeros((len(self.fine), len(self.coarse)), dtype=bool)
        """Whether a fine and a coarse type exclude each other."""
        coarse_ids = [ontology.find(n) for n in self.coarse[:-1]]
        for i, f in enumerate(self.ids[:-1]):
            for j, c in enumerate(coarse_ids):
                if f and c:
                    self.excludes[i, j] = not (ontology.is_a(f, c) or ontology.is_a(c, f))

    def from_probabilities(self, fine: np.ndarray, coarse: np.ndarray, n_tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Label cells by probabilities ``[cells, types]``."""
        best = fine.argmax(1)
        probability = np.take_along_axis(fine @ self.supports.T, best[:, None], 1)[:, 0].clip(0, 1)
        best_coarse = coarse.argmax(1) if coarse.shape[1] else np.full(len(best), len(self.coarse) - 1)
        status = np.where(probability >= self.threshold, CONFIDENT, UNCERTAIN)
        status[self.excludes[best, best_coarse]] = CONFLICT
        empty = n_tokens == 0
        best = np.where(empty, len(self.fine) - 1, best)
        best_coarse = np.where(empty, len(self.coarse) - 1, best_coarse)
        return _columns(best, best_coarse, np.where(empty, 0, probability), np.where(empty, EMPTY, status))

    def from_tokens(self, decoded: np.ndarray, n_tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Label cells by the tokens that the release decodes: the coarse type first, then the fine one."""
        coarse, fine = (self._types_at(decoded, i, family) for i, family in enumerate((Family.COARSE, Family.FINE)))
        known = (fine >= 0) & (n_tokens > 0)
        status = np.where(known, CONFIDENT, UNCERTAIN)
        status[known & self.excludes[fine, coarse]] = CONFLICT
        status[n_tokens == 0] = EMPTY
        fine = np.where(known, fine, len(self.fine) - 1)
        coarse = np.where((n_tokens > 0) & (coarse >= 0), coarse, len(self.coarse) - 1)
        return _columns(fine, coarse, np.full(len(fine), np.nan), status)

    def _types_at(self, decoded: np.ndarray, position: int, family: Family) -> np.ndarray:
        """Return the index in a family of the tokens decoded at a position, −1 for any other token."""
        if decoded.shape[1] <= position:
            return np.full(len(decoded), -1)
        ids = self.vocabulary.ids(family)
        index = np.full(len(self.vocabulary) + 1, -1)
        index[ids] = np.arange(len(ids))
        return index[decoded[:, position]]

    def table(self, found: dict[str, np.ndarray], cells: pd.Index) -> pd.DataFrame:
        """Return columns for ``obs``; categories are those that occur, in the order of the vocabulary."""
        return pd.DataFrame(
            {
                CELL_TYPE: _categories(found["fine"], self.fine),
                COARSE: _categories(found["coarse"], self.coarse),
                PROBABILITY: found["probability"].astype(np.float32),
                STATUS: pd.Categorical.from_codes(found["status"], categories=list(STATUSES)),
                ONTOLOGY_ID: self.ids[found["fine"]],
            },
            index=cells.copy(),
        )


def _columns(fine: Any, coarse: Any, probability: Any, status: Any) -> dict[str, np.ndarray]:
    return {
        "fine": np.asarray(fine, dtype=np.int32),
        "coarse": np.asarray(coarse, dtype=np.int32),
        "probability": np.asarray(probability, dtype=np.float32),
        "status": np.asarray(status, dtype=np.int8),
    }


def _categories(index: np.ndarray, names: np.ndarray) -> pd.Categorical:
    used = np.unique(index)
    return pd.Categorical.from_codes(np.searchsorted(used, index), categories=list(names[used]))

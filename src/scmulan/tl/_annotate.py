"""What is each cell?"""

from dataclasses import dataclass
from typing import Any, Literal

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
from scmulan._progress import Advance as Progress
from scmulan.errors import ModelError
from scmulan.infer import release_rule
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision
from scmulan.infer.scoring import score_labels
from scmulan.model.loading import LoadedModel
from scmulan.tl._blockwise import BlockStore, CellReader, Rule, merge_uns, provenance, run_blocks, without_empty
from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family


@dataclass(frozen=True)
class Annotation:
    """Cell types of all cells of an input.

    Parameters
    ----------
    obs
        One row per cell: ``scmulan_cell_type``, ``…_coarse``, ``…_probability``, ``…_status``, ``…_ontology_id``.
    uns
        Contents of ``uns['scmulan']``.
    matrix_kind
        The embedding that :func:`scmulan.tl.embed` would give, if it was asked for: float32 ``[cells, width]``, read
        from the parts block by block.
    """

    obs: pd.DataFrame
    uns: dict[str, Any]
    hidden: BlockArray | None = None


def annotate(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    rule: Rule = "default",
    threshold: float = 0.5,
    min_genes: int = 20,
    precision: Precision = "auto",
) -> None:
    """Name the type of each cell, in place.

    Parameters
    ----------
    adata
        Cells × genes with human gene symbols or Ensembl ids; counts or log1p values in ``X``, ``raw`` or a layer.
    model
        From :func:`scmulan.load`.
    layer, matrix_kind
        Which matrix, and what it holds; found by looking unless given.
    rule
        ``"default"``: every type's probability from one pass over the cell. ``"stepwise"``: the most probable coarse
        type, then the fine types after it, by one more step of one word. ``"release"``: the words that the
        published release would decode (greedy, three words).
    threshold
        Cells whose probability is lower are ``"uncertain"``.
    min_genes
        Fewest genes of the model's vocabulary that the input must have.
    precision
        ``"fp32"``, ``"bf16"``, ``"int8"``; ``"auto"`` takes the fastest that gives the labels of fp32 on a sample
        of the cells (see :mod:`scmulan.infer.precision`).

    Notes
    -----
    Adds to ``obs``: ``scmulan_cell_type`` and ``scmulan_cell_type_coarse`` (categories),
    ``scmulan_cell_type_probability`` (float32; of the type or a finer one, not calibrated beyond training),
    ``scmulan_cell_type_ontology_id`` (Cell Ontology id, empty where the label has none) and
    ``scmulan_cell_type_status``: ``confident``; ``uncertain``; ``conflict`` (coarse and fine type exclude each
    other); ``empty`` (no gene word: type is ``"unknown"``). Adds ``uns['scmulan']``.

    Under ``torchrun`` each process does its share of the cells, and each gets all results.

    Raises
    ------
    MatrixError, GeneError, ModelError
        If the input or the model cannot be used; nothing is changed then.
    """
    result = annotate_cells(
        adata, model, layer=layer, matrix_kind=matrix_kind, rule=rule, threshold=threshold, min_genes=min_genes,
        precision=precision,
    )  # fmt: skip
    for column in result.obs:
        adata.obs[column] = result.obs[column]
    merge_uns(adata, result.uns)


def annotate_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    *,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    rule: Rule = "default",
    threshold: float = 0.5,
    min_genes: int = 20,
    precision: Precision = "auto",
    batch_tokens: int | None = None,
    keep_hidden: bool = False,
    parts: BlockStore | None = None,
    progress: Progress = lambda n: None,
) -> Annotation:
    """Name the type of each cell and leave the input alone; parameters as in :func:`annotate`.

    Parameters
    ----------
    batch_tokens
        Padded words per forward pass (default: what suits the device and its memory).
    keep_hidden
        Return the embedding too: it comes from the same pass.
    parts
        Where results of finished blocks are kept, and taken from.
    progress
        Called with the number of cells just done.
    """
    if not model.vocabulary.names(Family.FINE):
        raise ModelError(f"model {model.folder.name} has no cell types in its vocabulary: it cannot annotate")
    reader = CellReader(adata, model, layer=layer, matrix_kind=matrix_kind, min_genes=min_genes)
    namer = _Namer(model, threshold)

    def work(used: LoadedModel, prompts: Sentences, words: GeneTokens, budget: TokenBudget) -> dict[str, np.ndarray]:
        if rule == "release":
            said = release_rule.annotate(used.network, prompts, end=used.vocabulary.end)
            arrays = namer.release(*_release_types(used, said.entity), words.lengths)
            states = said.embedding
            progress(len(words))
        else:
            scores = score_labels(used, prompts, budget=budget, coarse_first=rule == "stepwise", advance=progress)
            arrays = namer.name(scores.fine, scores.coarse, words.lengths)
            states = scores.hidden
        return {**arrays, **({"hidden": without_empty(states, words)} if keep_hidden else {})}

    done = run_blocks(
        reader, model, work, rule=rule, precision=precision, batch_tokens=batch_tokens, parts=parts, progress=progress
    )
    found = done.columns("fine", "coarse", "probability", "status", "words", "covered")
    parameters = {
        "rule": rule, "threshold": threshold, "layer": layer, "state": matrix_kind, "min_genes": min_genes,
        "precision": done.precision,
    }  # fmt: skip
    uns = provenance(model, "annotate", parameters, reader.account(int(found["words"].sum()), found["covered"]))
    return Annotation(
        obs=namer.table(found, adata.obs_names),
        uns=uns,
        hidden=done.hidden(model.config.width) if keep_hidden else None,
    )


class _Namer:
    """Turns probabilities into labels, status and ontology ids."""

    def __init__(self, model: LoadedModel, threshold: float) -> None:
        ontology = Ontology.load()
        self.fine = np.array([*model.vocabulary.names(Family.FINE), UNKNOWN], dtype=object)
        self.coarse = np.array([*model.vocabulary.names(Family.COARSE), UNKNOWN], dtype=object)
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

    def name(self, fine: np.ndarray, coarse: np.ndarray, words: np.ndarray) -> dict[str, np.ndarray]:
        """Places of labels and statuses of cells, from probabilities ``[cells, types]``."""
        best = fine.argmax(1)
        probability = np.take_along_axis(fine @ self.supports.T, best[:, None], 1)[:, 0].clip(0, 1)
        rough = coarse.argmax(1) if coarse.shape[1] else np.full(len(best), len(self.coarse) - 1)
        status = np.where(probability >= self.threshold, CONFIDENT, UNCERTAIN)
        status[self.excludes[best, rough]] = CONFLICT
        empty = words == 0
        best, rough = np.where(empty, len(self.fine) - 1, best), np.where(empty, len(self.coarse) - 1, rough)
        return _small(best, rough, np.where(empty, 0, probability), np.where(empty, EMPTY, status))

    def release(self, fine: np.ndarray, coarse: np.ndarray, words: np.ndarray) -> dict[str, np.ndarray]:
        """The same from places among the fine and coarse types (−1: the word said is no such type)."""
        known = (fine >= 0) & (words > 0)
        status = np.where(known, CONFIDENT, UNCERTAIN)
        status[known & self.excludes[fine, coarse]] = CONFLICT
        status[words == 0] = EMPTY
        fine = np.where(known, fine, len(self.fine) - 1)
        coarse = np.where((words > 0) & (coarse >= 0), coarse, len(self.coarse) - 1)
        return _small(fine, coarse, np.full(len(fine), np.nan), status)

    def table(self, found: dict[str, np.ndarray], cells: pd.Index) -> pd.DataFrame:
        """Columns for ``obs`` from places; categories are those that occur, in the order of the vocabulary."""
        fine, coarse = _categories(found["fine"], self.fine), _categories(found["coarse"], self.coarse)
        return pd.DataFrame(
            {
                CELL_TYPE: fine,
                COARSE: coarse,
                PROBABILITY: found["probability"].astype(np.float32),
                STATUS: pd.Categorical.from_codes(found["status"], categories=list(STATUSES)),
                ONTOLOGY_ID: self.ids[found["fine"]],
            },
            index=cells.copy(),
        )


def _small(fine: Any, coarse: Any, probability: Any, status: Any) -> dict[str, np.ndarray]:
    return {
        "fine": np.asarray(fine, dtype=np.int32),
        "coarse": np.asarray(coarse, dtype=np.int32),
        "probability": np.asarray(probability, dtype=np.float32),
        "status": np.asarray(status, dtype=np.int8),
    }


def _categories(places: np.ndarray, names: np.ndarray) -> pd.Categorical:
    used = np.unique(places)
    return pd.Categorical.from_codes(np.searchsorted(used, places), categories=list(names[used]))


def _release_types(model: LoadedModel, said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fine and coarse type among the words that the release says, as places in their families, −1 for any other."""
    out = []
    for family, column in ((Family.FINE, 1), (Family.COARSE, 0)):
        place = np.full(len(model.vocabulary) + 1, -1)
        place[model.vocabulary.ids(family)] = np.arange(len(model.vocabulary.ids(family)))
        out.append(place[said[:, column]] if said.shape[1] > column else np.full(len(said), -1))
    return out[0], out[1]

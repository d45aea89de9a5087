"""``scmulan.tl.perturb``: read cells again with some genes at another level."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._keys import PERTURBED, PERTURBED_CELL_TYPE, PERTURBED_PROBABILITY, PROBABILITY_BEFORE, SHIFT, UNKNOWN
from scmulan._progress import SILENT, Advance, Progress
from scmulan.errors import InputError, ModelError
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision
from scmulan.infer.scoring import LabelScores, score_labels
from scmulan.model.loading import LoadedModel
from scmulan.tl._block_store import BlockStore
from scmulan.tl._blockwise import ReadOptions, run_blocks
from scmulan.tl._record import ModelLike, add_columns, add_record, as_model, in_place_or_copy
from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.gene_table import GeneTable
from scmulan.vocab.matrix import MatrixKind
from scmulan.vocab.sentences import Sentences, gene_prompts
from scmulan.vocab.tasks import ANNOTATE
from scmulan.vocab.vocabulary import Family


@dataclass(frozen=True)
class Perturbation:
    """Change of all cells of an input, as the model reads them, once some genes have another level.

    Parameters
    ----------
    obs
        One row per cell, columns as in :func:`perturb`.
    other_type
        Bool ``[cells]``: whether the most probable type is another than before.
    uns
        The record for ``uns['scmulan']``.
    """

    obs: pd.DataFrame
    other_type: np.ndarray
    uns: dict[str, Any]

    def add_to(self, adata: ad.AnnData, key_added: str | None = None) -> None:
        """Put the results into an AnnData of the same cells, under keys as in :func:`perturb`."""
        add_columns(adata, self.obs, PERTURBED, key_added)
        add_record(adata, self.uns, key_added)


def perturb(
    adata: ad.AnnData,
    model: ModelLike,
    genes: Mapping[str, int],
    *,
    layer: str | None = None,
    matrix_kind: MatrixKind | None = None,
    min_genes: int = 20,
    precision: Precision = "auto",
    key_added: str | None = None,
    copy: bool = False,
    progress: Progress = SILENT,
) -> ad.AnnData | None:
    """Perturb cells: read each again with some genes at another level, and compare.

    Parameters
    ----------
    adata, model, layer, matrix_kind, min_genes, precision, copy, progress
        As in :func:`scmulan.tl.annotate`.
    genes
        Level of each gene: 0 (silent) to the number of the model's bins (10: as high as the cell's highest gene).
    key_added
        Prefix of the columns, and key of ``uns``: several perturbations then stand side by side. Default:
        ``scmulan_perturbed``, and ``uns['scmulan']``.

    Returns
    -------
    anndata.AnnData or None
        The copy with ``copy=True``, else None. Added to ``obs`` are

        ``scmulan_perturbed``
            bool, whether a token of the cell changed; where not, nothing else changes;
        ``scmulan_perturbed_cell_type``
            category;
        ``scmulan_perturbed_probability``, ``scmulan_perturbed_probability_before``
            float32, of the type that the cell had before, after and before the change;
        ``scmulan_perturbed_shift``
            float32, one minus the cosine between both embeddings.

        Added to ``uns['scmulan']``: as by :func:`scmulan.tl.annotate`.

    Raises
    ------
    InputError
        If a gene or level is unknown to the model.
    MatrixError, GeneError, ModelError
        If the input or the model cannot be used; nothing is changed then.

    Notes
    -----
    This is how the model reads the changed cell, which tells what a gene says about a cell's type. It does not tell
    what a living cell would become: no downstream gene is changed.
    """
    reading = ReadOptions(layer=layer, matrix_kind=matrix_kind, min_genes=min_genes, precision=precision)
    result = perturb_cells(adata, as_model(model), genes, reading=reading, progress=progress)
    adata = in_place_or_copy(adata, copy)
    result.add_to(adata, key_added)
    return adata if copy else None


def perturb_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    genes: Mapping[str, int],
    *,
    reading: ReadOptions | None = None,
    store: BlockStore | None = None,
    progress: Progress = SILENT,
) -> Perturbation:
    """Perturb cells and leave the input as it is; parameters as in :func:`perturb`.

    Parameters
    ----------
    reading
        How cells are read.
    store
        Where results of finished blocks are kept, and taken from.
    """
    fine = model.vocabulary.names(Family.FINE)
    if not fine:
        raise ModelError(
            f"model {model.folder.name} has no cell types in its vocabulary: it cannot tell a change of type"
        )
    levels = {find_gene(model, name): check_level(model, name, level) for name, level in genes.items()}

    def work(
        used: LoadedModel, prompts: Sentences, tokens: GeneTokens, budget: TokenBudget, advance: Advance
    ) -> dict[str, np.ndarray]:
        perturbed = set_levels(tokens, levels)
        changed = _changed_cells(tokens, perturbed, len(used.vocabulary.genes))
        before = score_labels(used, prompts, budget=budget, advance=advance)
        again = gene_prompts(perturbed, used.vocabulary, ANNOTATE).take(np.flatnonzero(changed))
        return {"changed": changed, **_compare(before, score_labels(used, again, budget=budget), changed)}

    results = run_blocks(adata, model, work, reading or ReadOptions(), store=store, progress=progress)
    found = results.columns("changed", "before", "after", "fine_before", "fine", "shift", "tokens")
    empty = found["tokens"] == 0
    types = np.where(empty & ~found["changed"], UNKNOWN, np.array(fine, dtype=object)[found["fine"]])
    present = [name for name in (*fine, UNKNOWN) if name in set(types)]
    obs = pd.DataFrame(
        {
            PERTURBED: found["changed"],
            PERTURBED_CELL_TYPE: pd.Categorical(types, categories=present),
            PERTURBED_PROBABILITY: np.where(empty, 0, found["after"]).astype(np.float32),
            PROBABILITY_BEFORE: np.where(empty, 0, found["before"]).astype(np.float32),
            SHIFT: found["shift"].clip(0, 2).astype(np.float32),
        },
        index=adata.obs_names,
    )
    return Perturbation(
        obs=obs,
        other_type=found["fine"] != found["fine_before"],
        uns=results.provenance("perturb", {"genes": {model.vocabulary.genes[g]: level for g, level in levels.items()}}),
    )


def find_gene(model: LoadedModel, name: str) -> int:
    """Return the index of a gene among the model's, from a symbol, alias or Ensembl id.

    Raises
    ------
    InputError
        If the model has no such gene; names the nearest ones.
    """
    genes = model.vocabulary.genes
    symbol = name if name in genes else GeneTable.load().resolve([name])[0]
    if symbol in genes:
        return genes.index(symbol)
    near = difflib.get_close_matches(name.upper(), genes, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"gene {name!r} is none of the {len(genes):,} genes of model {model.folder.name}{hint}")


def check_level(model: LoadedModel, name: str, level: int) -> int:
    """Return a level, checked.

    Raises
    ------
    InputError
        If it is no bin of the model.
    """
    if not 0 <= level <= model.config.levels:
        raise InputError(f"level {level} of gene {name!r}: expected 0 (silent) to {model.config.levels}")
    return level


def set_levels(tokens: GeneTokens, levels: Mapping[int, int]) -> GeneTokens:
    """Return the gene tokens of the same cells with some genes (indices) at given levels; without those at level 0."""
    n = len(tokens)
    row = np.repeat(np.arange(n), tokens.lengths)
    keep = ~np.isin(tokens.gene, list(levels))
    added = {g: level for g, level in levels.items() if level > 0}
    row = np.concatenate([row[keep], *(np.arange(n) for _ in added)])
    gene = np.concatenate([tokens.gene[keep], *(np.full(n, g, tokens.gene.dtype) for g in added)])
    level = np.concatenate([tokens.level[keep], *(np.full(n, v, tokens.level.dtype) for v in added.values())])
    order = np.lexsort((gene, row))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=n))))
    return GeneTokens(indptr, gene[order], level[order], tokens.maximum, tokens.covered)


def _changed_cells(a: GeneTokens, b: GeneTokens, n_genes: int) -> np.ndarray:
    """Return which cells have other tokens in one than in the other, bool ``[cells]``."""
    tables = [sp.csr_matrix((t.level.astype(np.int16), t.gene, t.indptr), shape=(len(t), n_genes)) for t in (a, b)]
    return np.diff((tables[0] != tables[1]).tocsr().indptr) > 0


def _compare(before: LabelScores, after: LabelScores, changed: np.ndarray) -> dict[str, np.ndarray]:
    """Compare the scores of all cells before with those of changed cells after."""
    rows = np.flatnonzero(changed)
    type_before = before.fine.argmax(1)
    probability = np.take_along_axis(before.fine, type_before[:, None], 1)[:, 0]
    out = {
        "before": probability,
        "after": probability.copy(),
        "fine_before": type_before.astype(np.int32),
        "fine": type_before.astype(np.int32),
        "shift": np.zeros(len(changed), dtype=np.float32),
    }
    out["after"][rows] = np.take_along_axis(after.fine, type_before[rows, None], 1)[:, 0]
    out["fine"][rows] = after.fine.argmax(1)
    norms = np.linalg.norm(before.hidden[rows], axis=1) * np.linalg.norm(after.hidden, axis=1)
    out["shift"][rows] = 1 - (before.hidden[rows] * after.hidden).sum(1) / np.maximum(norms, 1e-12)
    return out

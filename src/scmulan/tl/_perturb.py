"""What if this gene were silent? Cells are read again with some genes at another level."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._keys import PERTURBED, PERTURBED_CELL_TYPE, PERTURBED_PROBABILITY, PROBABILITY_BEFORE, SHIFT, UNKNOWN
from scmulan._progress import Advance as Progress
from scmulan.errors import InputError, ModelError
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision
from scmulan.infer.scoring import score_labels
from scmulan.model.loading import LoadedModel
from scmulan.tl._blockwise import BlockStore, CellReader, merge_uns, provenance, run_blocks
from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.gene_table import GeneTable
from scmulan.vocab.sentences import Sentences, gene_prompts
from scmulan.vocab.tasks import ANNOTATE
from scmulan.vocab.vocabulary import Family


@dataclass(frozen=True)
class Perturbation:
    """What the model says of all cells of an input once some genes have another level.

    Parameters
    ----------
    obs
        One row per cell, columns as in :func:`perturb`.
    other_type
        Bool ``[cells]``: whether the type is another than before.
    uns
        Contents of ``uns['scmulan']``.
    """

    obs: pd.DataFrame
    other_type: np.ndarray
    uns: dict[str, Any]


def perturb(
    adata: ad.AnnData,
    model: LoadedModel,
    genes: Mapping[str, int],
    *,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    min_genes: int = 20,
    precision: Precision = "auto",
) -> None:
    """Read each cell with some genes at another level and say what changes, in place.

    Parameters
    ----------
    adata, model, layer, matrix_kind, min_genes, precision
        As in :func:`scmulan.tl.annotate`.
    genes
        Level of each gene: 0 (silent) to the number of the model's bins (10: as high as the cell's highest gene).

    Notes
    -----
    Adds to ``obs``: ``scmulan_perturbed`` (bool: whether a word of the cell changed; nothing else changes where not),
    ``scmulan_perturbed_cell_type`` (category), ``scmulan_perturbed_probability`` and
    ``scmulan_perturbed_probability_before`` (float32: of the type that the cell had before, after and before the
    change) and ``scmulan_perturbed_shift`` (float32: one minus the cosine between both embeddings). Adds
    ``uns['scmulan']``.

    This is how the model reads the changed cell, which tells what a gene says about a cell's type. It does not tell
    what a living cell would become: no downstream gene is changed.

    Raises
    ------
    InputError
        If a gene or level is unknown to the model.
    MatrixError, GeneError, ModelError
        If the input or the model cannot be used; nothing is changed then.
    """
    result = perturb_cells(
        adata, model, genes, layer=layer, matrix_kind=matrix_kind, min_genes=min_genes, precision=precision
    )  # fmt: skip
    for column in result.obs:
        adata.obs[column] = result.obs[column]
    merge_uns(adata, result.uns)


def perturb_cells(
    adata: ad.AnnData,
    model: LoadedModel,
    genes: Mapping[str, int],
    *,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    min_genes: int = 20,
    precision: Precision = "auto",
    batch_tokens: int | None = None,
    parts: BlockStore | None = None,
    progress: Progress = lambda n: None,
) -> Perturbation:
    """Read each cell twice and leave the input alone; parameters as in :func:`perturb`.

    Parameters
    ----------
    batch_tokens, parts, progress
        As in :func:`scmulan.tl._annotate.annotate_cells`.
    """
    fine = model.vocabulary.names(Family.FINE)
    if not fine:
        raise ModelError(
            f"model {model.folder.name} has no cell types in its vocabulary: it cannot tell a change of type"
        )
    levels = {gene_place(model, name): level_of(model, name, level) for name, level in genes.items()}
    reader = CellReader(adata, model, layer=layer, matrix_kind=matrix_kind, min_genes=min_genes)

    def work(used: LoadedModel, prompts: Sentences, words: GeneTokens, budget: TokenBudget) -> dict[str, np.ndarray]:
        other = with_levels(words, levels)
        changed = _differs(words, other, len(used.vocabulary.genes))
        before = score_labels(used, prompts, budget=budget, advance=progress)
        rows = np.flatnonzero(changed)
        asked = gene_prompts(other, used.vocabulary, ANNOTATE).take(rows)
        after = score_labels(used, asked, budget=budget)
        had = before.fine.argmax(1)
        probability = np.take_along_axis(before.fine, had[:, None], 1)[:, 0]
        out = {
            "changed": changed,
            "before": probability,
            "after": probability.copy(),
            "had": had.astype(np.int32),
            "fine": had.astype(np.int32),
            "shift": np.zeros(len(words), dtype=np.float32),
        }
        out["after"][rows] = np.take_along_axis(after.fine, had[rows, None], 1)[:, 0]
        out["fine"][rows] = after.fine.argmax(1)
        lengths = np.linalg.norm(before.hidden[rows], axis=1) * np.linalg.norm(after.hidden, axis=1)
        out["shift"][rows] = 1 - (before.hidden[rows] * after.hidden).sum(1) / np.maximum(lengths, 1e-12)
        return out

    done = run_blocks(
        reader, model, work, precision=precision, batch_tokens=batch_tokens, parts=parts, progress=progress
    )
    found = done.columns("changed", "before", "after", "had", "fine", "shift", "words", "covered")
    empty = found["words"] == 0
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
    parameters = {
        "genes": {model.vocabulary.genes[g]: level for g, level in levels.items()},
        "layer": layer, "state": matrix_kind, "min_genes": min_genes, "precision": done.precision,
    }  # fmt: skip
    account = reader.account(int(found["words"].sum()), found["covered"])
    return Perturbation(obs, found["fine"] != found["had"], provenance(model, "perturb", parameters, account))


def gene_place(model: LoadedModel, name: str) -> int:
    """Place of a gene among the model's, from a symbol, alias or Ensembl id.

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


def level_of(model: LoadedModel, name: str, level: int) -> int:
    """Check a level.

    Raises
    ------
    InputError
        If it is no bin of the model.
    """
    if not 0 <= level <= model.config.levels:
        raise InputError(f"level {level} of gene {name!r}: expected 0 (silent) to {model.config.levels}")
    return level


def with_levels(words: GeneTokens, levels: Mapping[int, int]) -> GeneTokens:
    """Gene words of the same cells with some genes (places) at given levels; at level 0 they are not said."""
    row = np.repeat(np.arange(len(words)), words.lengths)
    keep = ~np.isin(words.gene, list(levels))
    said = {g: level for g, level in levels.items() if level > 0}
    cells = np.arange(len(words))
    row = np.concatenate([row[keep], *(cells for _ in said)])
    gene = np.concatenate([words.gene[keep], *(np.full(len(words), g, words.gene.dtype) for g in said)])
    level = np.concatenate([words.level[keep], *(np.full(len(words), v, words.level.dtype) for v in said.values())])
    order = np.lexsort((gene, row))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(words)))))
    return GeneTokens(indptr, gene[order], level[order], words.maximum, words.covered)


def _differs(a: GeneTokens, b: GeneTokens, genes: int) -> np.ndarray:
    """Which cells have other words in one than in the other: bool ``[cells]``."""
    tables = [sp.csr_matrix((w.level.astype(np.int16), w.gene, w.indptr), shape=(len(w), genes)) for w in (a, b)]
    return np.diff((tables[0] != tables[1]).tocsr().indptr) > 0

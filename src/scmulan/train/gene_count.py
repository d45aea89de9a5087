"""Gene-count model: how many genes a generated cell has, given its prompt.

The next-token objective fixes the odds of genes against each other well and their common level loosely. So the level is
measured after training: for each group of training cells (a cell type of a study) the ratio of its mean number of genes
to the number that the model expects among the genes which that study measured, and from these ratios a factor for each
metadata token.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmulan.data.store import CellSource
from scmulan.model.network import Mulan
from scmulan.train.init import cell_groups
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

RIDGE = 0.5
# A token is in a group's prompt if more than this fraction of its cells have it.
MIN_FRACTION = 0.5


@dataclass
class CellGroups:
    """Statistics of each group of cells: a few numbers each, so that a run can keep them without the cells.

    Parameters
    ----------
    has
        Bool ``[groups, V]``: metadata tokens that most cells of a group have: its prompt.
    cells, genes, spread
        ``[groups]``: cells, their mean number of genes, and the variance of its logarithm.
    measured
        Bool ``[groups, genes]``: genes that the group's study measured.
    """

    has: np.ndarray
    cells: np.ndarray
    genes: np.ndarray
    spread: np.ndarray
    measured: np.ndarray

    @classmethod
    def of(cls, store: CellSource, vocabulary_size: int) -> "CellGroups | None":
        """Summarise a store's cells; None where no group has enough of them."""
        groups = cell_groups(store)
        if not groups:
            return None
        has = np.zeros((len(groups), vocabulary_size), dtype=bool)
        genes, spread = np.zeros(len(groups)), np.zeros(len(groups))
        for i, cells in enumerate(groups):
            metadata = store.metadata[cells]
            tokens = np.unique(metadata[metadata >= 0])
            has[i, [t for t in tokens if (metadata == t).any(1).mean() > MIN_FRACTION]] = True
            lengths = store.lengths[cells].clip(min=1)
            genes[i], spread[i] = lengths.mean(), np.log(lengths).var()
        number = np.array([len(cells) for cells in groups])
        measured = store.measured[[store.study[cells[0]] for cells in groups]]
        return cls(has=has, cells=number, genes=genes, spread=spread, measured=measured)

    def save(self, path: Path) -> None:
        """Write to an npz file."""
        np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "CellGroups":
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{name: file[name] for name in file.files})


@torch.inference_mode()
def fit_gene_counts(model: Mulan, groups: CellGroups | None, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Fit log-factors for the number of genes of generated cells, for the key ``depth`` of a model's card.

    Parameters
    ----------
    model
        Trained network.
    groups
        Statistics of its training cells.
    vocabulary
        Its vocabulary.

    Returns
    -------
    dict or None
        ``base``; ``words``: by family, by token; ``spread``: standard deviation of the logarithm of the number of genes
        among cells of one group. A prompt's factor is exp(base + the sum over its tokens). None without groups, or for
        a model without bounded genes, whose probabilities expect no number.

    Notes
    -----
    ``base`` is the mean log-ratio of the groups, weighted by the square root of their cells; factors of tokens are a
    ridge regression of what it leaves, with the same weights.
    """
    if not model.config.bounded_genes or groups is None:
        return None
    genes = vocabulary.ids(Family.GENE)
    has = groups.has.astype(float)
    ratio = np.zeros(len(has))
    for i, common in enumerate(groups.has):
        known = [*np.flatnonzero(common).tolist(), vocabulary.prompts["generate"]]
        prompt = torch.tensor([known], device=model.word.weight.device)
        logits = model.entity_logits(model(prompt, torch.zeros_like(prompt))[0, -1])[genes]
        ratio[i] = np.log(groups.genes[i] / logits.sigmoid().cpu().numpy()[groups.measured[i]].sum())
    weight = np.sqrt(groups.cells)
    base = float((weight * ratio).sum() / weight.sum())
    tokens = np.flatnonzero(has.any(0))
    x = has[:, tokens] * np.sqrt(weight)[:, None]
    factor = np.linalg.solve(x.T @ x + RIDGE * np.eye(len(tokens)), x.T @ ((ratio - base) * np.sqrt(weight)))
    by_token = dict(zip(tokens.tolist(), factor.tolist(), strict=True))
    return {
        "base": round(base, 4),
        "words": {
            str(family): {
                vocabulary.tokens[t]: round(by_token[t], 4) for t in vocabulary.ids(family).tolist() if t in by_token
            }
            for family in METADATA
        },
        "spread": round(float(np.sqrt(groups.spread.mean())), 4),
    }

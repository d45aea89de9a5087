"""How many genes cells have, beyond what their prompt makes a trained model expect.

The next-word objective fixes the odds of genes against each other well and their common level loosely. So the level is
measured afterwards: for each kind of training cell (a type of a study) its mean number of gene words over the number
that the model expects in the genes which that study measured, and from these ratios a factor for each metadata word.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmulan.data.store import CellSource
from scmulan.model.network import Mulan
from scmulan.train.init import kinds
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

RIDGE = 0.5
# Half of the cells of a kind must have a word for it to be in the kind's prompt.
COMMON = 0.5


@dataclass
class Kinds:
    """Statistics of each kind of cell for :func:`gene_counts_of`: a few numbers each, so that a run can keep them.

    Parameters
    ----------
    has
        Bool ``[kinds, V]``: metadata words that most cells of a kind have: its prompt.
    cells, genes, spread
        ``[kinds]``: cells, their mean number of gene words, and the variance of its logarithm.
    measured
        Bool ``[kinds, genes]``: what the kind's study could have seen.
    """

    has: np.ndarray
    cells: np.ndarray
    genes: np.ndarray
    spread: np.ndarray
    measured: np.ndarray

    @classmethod
    def of(cls, store: CellSource, words: int) -> "Kinds | None":
        """Kinds of a store's cells, with the number of words of the vocabulary; None where there are none."""
        groups = kinds(store)
        if not groups:
            return None
        has = np.zeros((len(groups), words), dtype=bool)
        genes, spread = np.zeros(len(groups)), np.zeros(len(groups))
        for i, cells in enumerate(groups):
            metadata = store.metadata[cells]
            common = [w for w in np.unique(metadata[metadata >= 0]) if (metadata == w).any(1).mean() > COMMON]
            has[i, common] = True
            seen = store.lengths[cells].clip(min=1)
            genes[i], spread[i] = seen.mean(), np.log(seen).var()
        number = np.array([len(cells) for cells in groups])
        measured = store.measured[[store.study[cells[0]] for cells in groups]]
        return cls(has=has, cells=number, genes=genes, spread=spread, measured=measured)

    def save(self, path: Path) -> None:
        """Write to an npz file."""
        np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Kinds":
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{name: file[name] for name in file.files})


def fit_gene_counts(model: Mulan, store: CellSource, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Log-factors for the number of genes of generated cells, for a model's card; None without bounded genes."""
    return gene_counts_of(model, Kinds.of(store, len(vocabulary)), vocabulary)


@torch.inference_mode()
def gene_counts_of(model: Mulan, groups: Kinds | None, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Log-factors for the number of genes of generated cells, for a model's card; None without bounded genes.

    Returns
    -------
    dict
        ``base``; ``words``: by family, by word; ``spread``: standard deviation of the logarithm of the number of genes
        among cells of one kind. A prompt's factor is exp(base + the sum over its words).
    """
    if not model.config.bounded_genes or groups is None:
        return None
    genes = vocabulary.ids(Family.GENE)
    has = groups.has.astype(float)
    ratio = np.zeros(len(has))
    for i, common in enumerate(groups.has):
        known = [*np.flatnonzero(common).tolist(), vocabulary.prompts["generate"]]
        prompt = torch.tensor([known], device=model.word.weight.device)
        chance = model.entity_logits(model(prompt, torch.zeros_like(prompt))[0, -1])[genes].sigmoid().cpu().numpy()
        ratio[i] = np.log(groups.genes[i] / chance[groups.measured[i]].sum())
    weight = np.sqrt(groups.cells)
    words = np.flatnonzero(has.any(0))
    base = float((weight * ratio).sum() / weight.sum())
    told = has[:, words] * np.sqrt(weight)[:, None]
    factor = np.linalg.solve(told.T @ told + RIDGE * np.eye(len(words)), told.T @ ((ratio - base) * np.sqrt(weight)))
    by_word = dict(zip(words.tolist(), factor.tolist(), strict=True))
    return {
        "base": round(base, 4),
        "words": {
            str(family): {
                vocabulary.tokens[w]: round(by_word[w], 4) for w in vocabulary.ids(family).tolist() if w in by_word
            }
            for family in METADATA
        },
        "spread": round(float(np.sqrt(groups.spread.mean())), 4),
    }

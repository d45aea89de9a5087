"""How many genes cells have, beyond what their prompt makes a trained model expect.

The next-word objective fixes the odds of genes against each other well and their common level loosely. So the level is
measured afterwards: for each kind of training cell (a type of a study) its mean number of gene words over the number
that the model expects in the genes which that study measured, and from these ratios a factor for each metadata word.
"""

from typing import Any

import numpy as np
import torch

from scmulan.corpus.memory import CellStore
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.model.transformer import Mulan
from scmulan.training.start import kinds

RIDGE = 0.5
# Half of the cells of a kind must have a word for it to be in the kind's prompt.
COMMON = 0.5


@torch.inference_mode()
def measure_depth(model: Mulan, store: CellStore, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Log-factors for the number of genes of generated cells, for a model's card; None without bounded genes.

    Returns
    -------
    dict
        ``base``; ``words``: by family, by word; ``spread``: standard deviation of the logarithm of the number of genes
        among cells of one kind. A prompt's factor is exp(base + the sum over its words).
    """
    groups = kinds(store)
    if not model.config.bounded_genes or not groups:
        return None
    number = store.lengths
    genes = vocabulary.ids(Family.GENE)
    has = np.zeros((len(groups), len(vocabulary)))
    ratio, spread = np.zeros(len(groups)), []
    for i, cells in enumerate(groups):
        metadata = store.metadata[cells]
        common = [w for w in np.unique(metadata[metadata >= 0]) if (metadata == w).any(1).mean() > COMMON]
        has[i, common] = 1
        prompt = torch.tensor([[*common, vocabulary.prompts["generate"]]], device=model.word.weight.device)
        chance = model.entity_logits(model(prompt, torch.zeros_like(prompt))[0, -1])[genes].sigmoid().cpu().numpy()
        seen = number[cells].clip(min=1)
        ratio[i] = np.log(seen.mean() / chance[store.measured[store.study[cells[0]]]].sum())
        spread.append(np.log(seen).var())
    weight = np.sqrt([len(cells) for cells in groups])
    words = np.flatnonzero(has.any(0))
    base = float((weight * ratio).sum() / weight.sum())
    told = has[:, words] * np.sqrt(weight)[:, None]
    factor = np.linalg.solve(told.T @ told + RIDGE * np.eye(len(words)), told.T @ ((ratio - base) * np.sqrt(weight)))
    by_word = dict(zip(words.tolist(), factor.tolist(), strict=True))
    return {
        "base": round(base, 4),
        "words": {
            str(family): {
                vocabulary.words[w]: round(by_word[w], 4) for w in vocabulary.ids(family).tolist() if w in by_word
            }
            for family in METADATA
        },
        "spread": round(float(np.sqrt(np.mean(spread))), 4),
    }

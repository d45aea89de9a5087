"""Prompts of random cells."""

import numpy as np
import pytest

from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family


@pytest.fixture(scope="session")
def random_prompts():
    """Annotation prompts of ``n`` cells of ``min_genes`` to 59 genes."""

    def make(model, n, seed=0, min_genes=1):
        rng = np.random.default_rng(seed)
        genes, prompt_token = model.vocabulary.ids(Family.GENE), model.vocabulary.prompts["annotate"]
        parts = []
        for k in rng.integers(min_genes, 60, n).tolist():
            entity = np.append(rng.permutation(genes)[:k], prompt_token)
            parts.append((entity, np.append(rng.integers(1, 11, k), 0), k + 1))
        return Sentences.join(parts)

    return make

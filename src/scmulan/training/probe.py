"""Rows of cell types fitted to what a network already sees, before any other weight moves.

Fine-tuning from a fitted head disturbs what was learned before less than from a new one, whose first gradients are
noise, and gets there in a fraction of the steps.
"""

import numpy as np
import torch
import torch.nn.functional as F

from scmulan.corpus.adata import take
from scmulan.corpus.memory import CellStore
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.model.transformer import Mulan
from scmulan.training.objective import Objective
from scmulan.training.validate import last_states

MOST = 4000
PULL = 1e-3
ITERATIONS = 60


def fit_type_rows(network: Mulan, store: CellStore, vocabulary: Vocabulary, objective: Objective, seed: int) -> None:
    """Fit the entity head's rows of all cell types to labelled cells, in place; all else stays.

    Types that no cell has are fitted too: where words are judged one by one, as in the publication, they would
    otherwise keep whatever weight they had.

    Parameters
    ----------
    network
        Its head is changed.
    store
        Training cells; at most 4,000 labelled ones are read, rare labels with more than their share.
    vocabulary
        Words of the network.
    objective
        What the head's logits mean: next-word or "still to be said" probabilities.
    seed
        Of the choice of cells.
    """
    types = store.metadata[:, [METADATA.index(f) for f in (Family.COARSE, Family.FINE)]]
    cells = np.flatnonzero((types[:, 1] >= 0) & (store.lengths > 0))
    cells = np.sort(np.random.default_rng([seed, 2]).permutation(cells)[:MOST])
    ids = torch.from_numpy(np.union1d(vocabulary.ids(Family.COARSE), vocabulary.ids(Family.FINE)))
    own = torch.from_numpy(types[cells].astype(np.int64))
    target = (own[:, :, None] == ids).any(1).float()
    _, group, number = np.unique(types[cells, 1], return_inverse=True, return_counts=True)
    weight = torch.from_numpy(number[group] ** -0.5).float()
    weight /= weight.sum()

    hidden = torch.empty(len(cells), network.config.width)
    end = torch.empty(len(cells))  # the only other word that an answer can hold
    network.eval()
    with torch.no_grad():
        for rows, states in last_states(network, take(store, cells), vocabulary):
            hidden[rows] = states
            end[rows] = network.entity_logits(states)[:, vocabulary.end]
    network.train()
    start = network.entity_head.weight.detach()[ids]
    before = torch.zeros(len(ids)) if network.entity_bias is None else network.entity_bias.detach()[ids]
    fitted, bias = start.clone().requires_grad_(), before.clone().requires_grad_(network.entity_bias is not None)
    optimizer = torch.optim.LBFGS(
        [fitted, *([bias] if bias.requires_grad else [])],
        max_iter=ITERATIONS,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = hidden @ fitted.T + bias
        if objective == "published":
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
        else:
            each = torch.logaddexp(end, logits.logsumexp(1)) - (logits * target).sum(1) / target.sum(1)
        moved = (fitted - start).square().sum() + (bias - before).square().sum()
        total = (each * weight).sum() + PULL * moved
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        network.entity_head.weight[ids] = fitted.detach()
        if network.entity_bias is not None:
            network.entity_bias[ids] = bias.detach()

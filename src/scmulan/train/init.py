"""Where the weights start: from counting, as far as counting goes.

How often each gene is seen in each kind of cell (a cell type of a study) is known before the first step. Log-odds of
detection minus those of all cells, kinds × genes, have a singular value decomposition; its axes become the first
vectors of genes in the entity head and in the set state, and the kinds' coordinates those of the metadata words and of
the type words in the head. A cell type in the prompt then speaks for its genes, and a cell's genes for its type, at
step 0; training starts from there instead of finding it out from noisy batches.

New words for a network that exists: every table with one row per word gets more rows.

Rows of cell types fitted to what a network already sees, before any other weight moves.

Fine-tuning from a fitted head disturbs what was learned before less than from a new one, whose first gradients are
noise, and gets there in a fraction of the steps.
"""

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from scmulan.data.memory import CellStore, take
from scmulan.data.store import CellSource
from scmulan.model.network import Mulan
from scmulan.train.losses import Objective
from scmulan.train.validate import last_hidden_states
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

LEAST_CELLS = 5
CLIP = 4.0
RIDGE = 1.0
CHUNK = 16_384


def init_from_counts(model: Mulan, store: CellSource, vocabulary: Vocabulary, seed: int) -> None:
    """Set the word bias, and the vectors of words in head and set state, from the training cells.

    Parameters
    ----------
    model
        With ``word_bias`` and ``set_state``; a model without them is left as it is.
    store, vocabulary
        The cells to count and their words.
    seed
        Of the rotation that spreads the axes over the width.
    """
    if model.entity_bias is None or model.set_state is None:
        return
    genes = vocabulary.ids(Family.GENE)
    groups = kinds(store)
    if not groups:
        return
    seen, seen_in = count_detections(store, groups)
    bias = _log_odds(seen, np.bincount(store.study, minlength=len(store.studies)) @ store.measured)
    odds = np.stack([_log_odds(number, len(cells)) for number, cells in zip(seen_in, groups, strict=True)]) - bias
    odds[~store.measured[[store.study[cells[0]] for cells in groups]]] = 0.0
    weight = np.array([len(cells) for cells in groups], dtype=float) ** 0.25
    odds = np.clip(odds, -CLIP, CLIP)
    u, size, axes = np.linalg.svd(odds * weight[:, None], full_matrices=False)
    rank, width = min(len(size), model.config.width), model.config.width
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0][:rank]
    place = (u[:, :rank] * size[:rank] / weight[:, None]) @ turn  # kinds × width
    vectors = axes[:rank].T @ turn  # genes × width
    typical = np.linalg.norm(place, axis=1).mean()
    if typical < 1e-6:  # one kind of cell: nothing tells it from others
        with torch.no_grad():
            model.entity_bias[genes] = torch.from_numpy(bias).float()
        return
    # The average cell's genes should say nothing: what is left of a bag of genes is how the cell differs from it.
    share = 1 / (1 + np.exp(-bias))
    apart = vectors - (share @ vectors) / share.sum()
    # Words are added up in a prompt, so together, not each alone, they should stand where their kind does.
    has = np.stack([_share_of_words(store, cells, len(vocabulary)) for cells in groups])
    words = np.flatnonzero(has.any(0))
    told = has[:, words] * weight[:, None]
    together = np.linalg.solve(told.T @ told + RIDGE * np.eye(len(words)), told.T @ (place * weight[:, None]))
    types = np.concatenate([vocabulary.ids(Family.COARSE), vocabulary.ids(Family.FINE)])
    with torch.no_grad():
        model.entity_bias[genes] = torch.from_numpy(bias).float()
        # After the last norm a hidden state has length √width, so the head carries the coordinates' length.
        model.entity_head.weight[genes] = torch.from_numpy(vectors * typical / width**0.5).float()
        model.set_state.word.weight[genes] = torch.from_numpy(apart * (len(genes) / width) ** 0.5).float()
        model.set_state.word.weight[words] = torch.from_numpy(together / typical * width**0.5).float()
        for word in types:
            if has[:, word].any():
                mean = has[:, word] @ place / has[:, word].sum() - place.mean(0)
                model.entity_head.weight[word] = torch.from_numpy(0.5 * mean / np.linalg.norm(mean)).float()
        eye = torch.eye(width)
        model.set_state.out.weight[:, :width] = eye
        model.set_state.out.weight[:, width : 2 * width] = eye
        # The number of genes has to be heard beside coordinates of size one.
        model.set_state.out.weight[:, 2 * width :] *= 3


def count_detections(store: CellSource, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """In how many cells each gene is seen, and in how many of each group: ``[genes]``, ``[groups, genes]``."""
    group = np.full(len(store), len(groups))
    for number, cells in enumerate(groups):
        group[cells] = number
    seen = np.zeros((len(groups) + 1, store.measured.shape[1]))
    for start in range(0, len(store), CHUNK):
        cells = np.arange(start, min(start + CHUNK, len(store)))
        rows = store.rows(cells)
        member = sp.csr_matrix((np.ones(len(cells)), (group[cells], np.arange(len(cells)))), (len(seen), len(cells)))
        rows.data = (rows.data > 0).astype(np.float64)
        seen += (member @ rows).toarray()
    return seen.sum(0), seen[:-1]


def _share_of_words(store: CellSource, cells: np.ndarray, words: int) -> np.ndarray:
    """Share of the cells that have each metadata word."""
    metadata = store.metadata[cells]
    return np.bincount(metadata[metadata >= 0], minlength=words) / len(cells)


def kinds(store: CellSource) -> list[np.ndarray]:
    """Cells of each fine type of each study; the rest of a study is one more kind."""
    label = store.tokens(Family.FINE)
    out = []
    for study in range(len(store.studies)):
        for word in np.unique(label[store.study == study]):
            cells = np.flatnonzero((store.study == study) & (label == word))
            if len(cells) >= LEAST_CELLS:
                out.append(cells)
    return out


def _log_odds(seen: np.ndarray, cells: np.ndarray | int) -> np.ndarray:
    share = (seen + 0.5) / (np.asarray(cells) + 1.0)
    return np.log(share / (1 - share))


NOISE = 0.1


def resize_vocabulary(network: Mulan, old: Vocabulary, new: Vocabulary, seed: int) -> Mulan:
    """Copy a network (float32, on the CPU) and give it rows for the words that were added to its vocabulary.

    Parameters
    ----------
    network
        Network of ``old``; it is not changed.
    old, new
        Vocabulary before and after :meth:`Vocabulary.extend`; the ids of old words stay.
    seed
        Of the noise that tells new words of the same origin apart.

    Returns
    -------
    Mulan
        Old words keep their rows. A new word starts as the mean of its :func:`relatives`, plus noise of a tenth of
        the table's spread.
    """
    models = [relatives(old, *_family_and_name(new, word)) for word in range(len(old), len(new))]
    grown = Mulan(replace(network.config, vocabulary=len(new)))
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    with torch.no_grad():
        for name, weight in grown.state_dict().items():
            before = state[name].to(device="cpu", dtype=torch.float32)
            if before.shape == weight.shape:
                weight.copy_(before)
                continue
            weight[: len(old)] = before
            for row, like in enumerate(models, start=len(old)):
                rows = before[torch.from_numpy(like)]
                noise = torch.randn(weight.shape[1:], generator=generator)
                weight[row] = rows.mean(0) + NOISE * before.std(0) * noise
    return grown


def _family_and_name(vocabulary: Vocabulary, word: int) -> tuple[Family, str]:
    return next(f for f in METADATA if word in vocabulary.families.get(f, ())), vocabulary.tokens[word]


def relatives(vocabulary: Vocabulary, family: Family, name: str) -> np.ndarray:
    """Words that a new word of a family is most like.

    Of cell types those that mean the same type of the Cell Ontology, otherwise the closest that the type is a kind
    of, otherwise those that are kinds of it; else the whole family; of a family without words all metadata words.

    Returns
    -------
    numpy.ndarray
        int64 word ids, at least one.
    """
    ids = vocabulary.ids(family)
    if family in (Family.COARSE, Family.FINE):
        ontology = Ontology.load()
        wanted = ontology.find(name)
        types = {int(i): ontology.find(vocabulary.tokens[i]) for i in ids} if wanted else {}
        known = {i: t for i, t in types.items() if t}
        for group in (
            {i: 0 for i, t in known.items() if t == wanted},
            {i: ontology.distance(wanted, t) for i, t in known.items() if wanted and ontology.is_a(wanted, t)},
            {i: 0 for i, t in known.items() if wanted and ontology.is_a(t, wanted)},
        ):
            if group:
                least = min(d for d in group.values() if d is not None)
                return np.array([i for i, d in group.items() if d == least], dtype=np.int64)
    if not len(ids):
        ids = np.unique(np.concatenate([vocabulary.ids(f) for f in METADATA]))
    return ids if len(ids) else np.arange(len(vocabulary), dtype=np.int64)


MOST = 4000
PULL = 1e-3
ITERATIONS = 60


def fit_head(network: Mulan, store: CellStore, vocabulary: Vocabulary, objective: Objective, seed: int) -> None:
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
        for rows, states in last_hidden_states(network, take(store, cells), vocabulary):
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

"""Initial weights: from counts of the training cells, for new tokens, and a head fitted to labels.

``init_from_counts`` starts a new network, ``resize_vocabulary`` gives an existing one rows for new tokens, and
``fit_head`` fits the rows of cell types to what the network sees, before any other weight moves.
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

# -- from counts -----------------------------------------------------------------------------------------------------

MIN_GROUP_CELLS = 5
"""Smallest number of cells of a type of a study from which detection is estimated."""
MAX_LOG_ODDS = 4.0
"""Largest difference of log-odds from the mean of all cells, either way."""
RIDGE = 1.0
"""Ridge penalty of the metadata tokens' vectors."""
TYPE_NORM = 0.5
"""Norm of a cell type's row in the entity head."""
CELLS_PER_READ = 16_384


def init_from_counts(model: Mulan, store: CellSource, vocabulary: Vocabulary, seed: int) -> None:
    """Set the token bias, and the vectors of tokens in head and set state, from the training cells, in place.

    Parameters
    ----------
    model
        With ``word_bias`` and ``set_state``; a model without them is left as it is.
    store, vocabulary
        The cells to count and their tokens.
    seed
        Of the rotation that spreads the axes over the width.

    Notes
    -----
    How often each gene is detected in each group of cells (a cell type of a study) is known before the first step. The
    log-odds of detection minus those of all cells, groups × genes, have a singular value decomposition. Its axes become
    the vectors of genes, in the entity head and in the set state; the groups' coordinates become those of metadata
    tokens. A cell type in the prompt then predicts its genes, and a cell's genes its type, at step 0, which training
    would otherwise find out from noisy batches.
    """
    if model.entity_bias is None or model.set_state is None:
        return
    groups = cell_groups(store)
    if not groups:
        return
    genes = vocabulary.ids(Family.GENE)
    bias, odds = _detection(store, groups)
    with torch.no_grad():
        model.entity_bias[genes] = torch.from_numpy(bias).float()
    width = model.config.width
    weight = np.array([len(cells) for cells in groups], dtype=float) ** 0.25
    coordinates, axes = _factorise(odds, weight, width, seed)
    norm = np.linalg.norm(coordinates, axis=1).mean()
    if norm < 1e-6:  # one group: nothing tells it from others
        return
    # The average cell's genes should say nothing: what is left of a bag of genes is how the cell differs from it.
    detected = 1 / (1 + np.exp(-bias))
    centred = axes - (detected @ axes) / detected.sum()
    fractions = np.stack([_token_fractions(store, cells, len(vocabulary)) for cells in groups])
    tokens = np.flatnonzero(fractions.any(0))
    together = _solve_tokens(fractions[:, tokens], coordinates, weight)
    with torch.no_grad():
        # After the last norm a hidden state has length √width, so the head carries the coordinates' length.
        model.entity_head.weight[genes] = torch.from_numpy(axes * norm / width**0.5).float()
        model.set_state.word.weight[genes] = torch.from_numpy(centred * (len(genes) / width) ** 0.5).float()
        model.set_state.word.weight[tokens] = torch.from_numpy(together / norm * width**0.5).float()
        for token in np.concatenate([vocabulary.ids(Family.COARSE), vocabulary.ids(Family.FINE)]):
            of_type = fractions[:, token]
            if of_type.any():
                mean = of_type @ coordinates / of_type.sum() - coordinates.mean(0)
                model.entity_head.weight[token] = torch.from_numpy(TYPE_NORM * mean / np.linalg.norm(mean)).float()
        eye = torch.eye(width)
        model.set_state.out.weight[:, :width] = eye
        model.set_state.out.weight[:, width : 2 * width] = eye
        # The number of genes has to be heard beside coordinates of size one.
        model.set_state.out.weight[:, 2 * width :] *= 3


def cell_groups(store: CellSource) -> list[np.ndarray]:
    """Group cells by study and fine type; the unlabelled cells of a study are one more group.

    Returns
    -------
    list of numpy.ndarray
        Indices of the cells of each group that is large enough.
    """
    label = store.tokens(Family.FINE)
    groups = []
    for study in range(len(store.studies)):
        for token in np.unique(label[store.study == study]):
            cells = np.flatnonzero((store.study == study) & (label == token))
            if len(cells) >= MIN_GROUP_CELLS:
                groups.append(cells)
    return groups


def _detection(store: CellSource, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Compute log-odds of detection ``[genes]`` in all cells, and of each group minus them ``[groups, genes]``."""
    detected, detected_in = count_detections(store, groups)
    bias = _log_odds(detected, np.bincount(store.study, minlength=len(store.studies)) @ store.measured)
    odds = np.stack([_log_odds(number, len(cells)) for number, cells in zip(detected_in, groups, strict=True)]) - bias
    odds[~store.measured[[store.study[cells[0]] for cells in groups]]] = 0.0
    return bias, np.clip(odds, -MAX_LOG_ODDS, MAX_LOG_ODDS)


def count_detections(store: CellSource, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Count the cells in which each gene is above zero: ``[genes]`` in all, ``[groups, genes]`` in each group."""
    group = np.full(len(store), len(groups))
    for number, cells in enumerate(groups):
        group[cells] = number
    detected = np.zeros((len(groups) + 1, store.measured.shape[1]))
    for start in range(0, len(store), CELLS_PER_READ):
        cells = np.arange(start, min(start + CELLS_PER_READ, len(store)))
        rows = store.rows(cells)
        shape = len(detected), len(cells)
        member = sp.csr_matrix((np.ones(len(cells)), (group[cells], np.arange(len(cells)))), shape)
        rows.data = (rows.data > 0).astype(np.float64)
        detected += (member @ rows).toarray()
    return detected.sum(0), detected[:-1]


def _log_odds(detected: np.ndarray, cells: np.ndarray | int) -> np.ndarray:
    fraction = (detected + 0.5) / (np.asarray(cells) + 1.0)
    return np.log(fraction / (1 - fraction))


def _factorise(odds: np.ndarray, weight: np.ndarray, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Decompose log-odds into coordinates of groups ``[groups, width]`` and axes of genes ``[genes, width]``."""
    u, size, axes = np.linalg.svd(odds * weight[:, None], full_matrices=False)
    rank = min(len(size), width)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0][:rank]
    return (u[:, :rank] * size[:rank] / weight[:, None]) @ rotation, axes[:rank].T @ rotation


def _token_fractions(store: CellSource, cells: np.ndarray, vocabulary: int) -> np.ndarray:
    """Compute the fraction of the cells that have each metadata token, ``[vocabulary]``."""
    metadata = store.metadata[cells]
    return np.bincount(metadata[metadata >= 0], minlength=vocabulary) / len(cells)


def _solve_tokens(fractions: np.ndarray, coordinates: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Find vectors of tokens whose sum, not each alone, is where their group is: ``[tokens, width]``."""
    known = fractions * weight[:, None]
    penalty = RIDGE * np.eye(known.shape[1])
    return np.linalg.solve(known.T @ known + penalty, known.T @ (coordinates * weight[:, None]))


# -- new tokens ------------------------------------------------------------------------------------------------------

NOISE = 0.1
"""Noise that tells new tokens of the same origin apart, relative to the table's spread."""


def resize_vocabulary(network: Mulan, old: Vocabulary, new: Vocabulary, seed: int) -> Mulan:
    """Copy a network (float32, on the CPU) and give it rows for the tokens that were added to its vocabulary.

    Parameters
    ----------
    network
        Network of ``old``; it is not changed.
    old, new
        Vocabulary before and after :meth:`Vocabulary.extend`; the ids of old tokens stay.
    seed
        Of the noise.

    Returns
    -------
    Mulan
        Old tokens keep their rows. A new one starts as the mean of its :func:`relatives`, plus a little noise.
    """
    origins = [relatives(old, *_family_and_name(new, token)) for token in range(len(old), len(new))]
    resized = Mulan(replace(network.config, vocabulary=len(new)))
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    with torch.no_grad():
        for name, weight in resized.state_dict().items():
            before = state[name].to(device="cpu", dtype=torch.float32)
            if before.shape == weight.shape:
                weight.copy_(before)
                continue
            weight[: len(old)] = before
            for row, origin in enumerate(origins, start=len(old)):
                noise = torch.randn(weight.shape[1:], generator=generator)
                weight[row] = before[torch.from_numpy(origin)].mean(0) + NOISE * before.std(0) * noise
    return resized


def _family_and_name(vocabulary: Vocabulary, token: int) -> tuple[Family, str]:
    return next(f for f in METADATA if token in vocabulary.families.get(f, ())), vocabulary.tokens[token]


def relatives(vocabulary: Vocabulary, family: Family, name: str) -> np.ndarray:
    """Find the tokens that a new token of a family is most like.

    Of cell types those that mean the same type of the Cell Ontology, otherwise its closest ancestors, otherwise its
    descendants; else the whole family; of a family without tokens all metadata tokens.

    Returns
    -------
    numpy.ndarray
        int64 ids, at least one.
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
                closest = min(d for d in group.values() if d is not None)
                return np.array([i for i, d in group.items() if d == closest], dtype=np.int64)
    if not len(ids):
        ids = np.unique(np.concatenate([vocabulary.ids(f) for f in METADATA]))
    return ids if len(ids) else np.arange(len(vocabulary), dtype=np.int64)


# -- the head --------------------------------------------------------------------------------------------------------

MAX_FIT_CELLS = 4000
STAY = 1e-3
"""Penalty of the squared distance from the rows before."""
FIT_ITERATIONS = 60


def fit_head(network: Mulan, store: CellStore, vocabulary: Vocabulary, objective: Objective, seed: int) -> None:
    """Fit the entity head's rows of all cell types to labelled cells, in place; all else stays.

    Parameters
    ----------
    network
        Its head is changed.
    store
        Training cells; at most ``MAX_FIT_CELLS`` labelled ones are read, rare ones with more weight.
    vocabulary
        Tokens of the network.
    objective
        What the head's logits mean: the next token, or each token that is still to come.
    seed
        Of the choice of cells.

    Notes
    -----
    Fine-tuning from a fitted head disturbs what was learned before less than from a new one, whose first gradients are
    noise, and gets there in a fraction of the steps. Types that no cell has are fitted too: where tokens are judged one
    by one, as in the publication, they would otherwise keep whatever weight they had.
    """
    types = store.metadata[:, [METADATA.index(f) for f in (Family.COARSE, Family.FINE)]]
    cells = np.flatnonzero((types[:, 1] >= 0) & (store.lengths > 0))
    cells = np.sort(np.random.default_rng([seed, 2]).permutation(cells)[:MAX_FIT_CELLS])
    ids = torch.from_numpy(np.union1d(vocabulary.ids(Family.COARSE), vocabulary.ids(Family.FINE)))
    own = torch.from_numpy(types[cells].astype(np.int64))
    target = (own[:, :, None] == ids).any(1).float()
    _, group, number = np.unique(types[cells, 1], return_inverse=True, return_counts=True)
    weight = torch.from_numpy(number[group] ** -0.5).float()
    weight /= weight.sum()

    hidden = torch.empty(len(cells), network.config.width)
    end = torch.empty(len(cells))  # the only other token that an answer can hold
    network.eval()
    with torch.no_grad():
        for rows, last in last_hidden_states(network, take(store, cells), vocabulary):
            hidden[rows] = last
            end[rows] = network.entity_logits(last)[:, vocabulary.end]
    network.train()
    start = network.entity_head.weight.detach()[ids]
    before = torch.zeros(len(ids)) if network.entity_bias is None else network.entity_bias.detach()[ids]
    fitted, bias = start.clone().requires_grad_(), before.clone().requires_grad_(network.entity_bias is not None)
    optimizer = torch.optim.LBFGS(
        [fitted, *([bias] if bias.requires_grad else [])],
        max_iter=FIT_ITERATIONS,
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
        total = (each * weight).sum() + STAY * moved
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        network.entity_head.weight[ids] = fitted.detach()
        if network.entity_bias is not None:
            network.entity_bias[ids] = bias.detach()

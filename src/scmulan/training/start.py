"""Where the weights start: from counting, as far as counting goes.

How often each gene is seen in each kind of cell (a cell type of a study) is known before the first step. Log-odds of
detection minus those of all cells, kinds × genes, have a singular value decomposition; its axes become the first
vectors of genes in the entity head and in the set state, and the kinds' coordinates those of the metadata words and of
the type words in the head. A cell type in the prompt then speaks for its genes, and a cell's genes for its type, at
step 0; training starts from there instead of finding it out from noisy batches.
"""

import numpy as np
import scipy.sparse as sp
import torch

from scmulan.corpus.cells import Cells
from scmulan.language.vocabulary import Family, Vocabulary
from scmulan.model.transformer import Mulan

LEAST_CELLS = 5
CLIP = 4.0
RIDGE = 1.0
CHUNK = 16_384


def start_from_cells(model: Mulan, store: Cells, vocabulary: Vocabulary, seed: int) -> None:
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


def count_detections(store: Cells, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
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


def _share_of_words(store: Cells, cells: np.ndarray, words: int) -> np.ndarray:
    """Share of the cells that have each metadata word."""
    metadata = store.metadata[cells]
    return np.bincount(metadata[metadata >= 0], minlength=words) / len(cells)


def kinds(store: Cells) -> list[np.ndarray]:
    """Cells of each fine type of each study; the rest of a study is one more kind."""
    label = store.words(Family.FINE)
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

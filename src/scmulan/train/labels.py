"""What somebody's own cells are called: columns of ``obs`` as words, and which cells are held out."""

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd

from scmulan._io.adata import read_column
from scmulan.data.memory import CellStore
from scmulan.errors import InputError, VocabularyError
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.vocabulary import Family, Vocabulary, family_of_field

FEW = 5
MOST_HELD_OUT = 500
TYPES = (Family.COARSE, Family.FINE)


def read_words(
    obs: pd.DataFrame,
    labels: str,
    vocabulary: Vocabulary,
    source: str,
    *,
    coarse: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[Family, np.ndarray]:
    """Words of each family per cell.

    Parameters
    ----------
    obs
        One row per cell.
    labels
        Column of cell types.
    vocabulary
        Of the model to start from.
    source
        What to call the cells in errors.
    coarse
        Column of coarse types; by default what the ontology puts above the labels, see :func:`coarse_of`.
    metadata
        Column of each further field; by default columns with names of fields, as far as the vocabulary has their words.

    Raises
    ------
    InputError
        If a column is missing, or there are fewer than two labels.
    VocabularyError
        If a field is unknown.

    Warns
    -----
    UserWarning
        If labels have fewer than five cells.
    """
    words: dict[Family, np.ndarray] = {}
    for field, column in (metadata or {}).items():
        family = family_of_field(field)
        if family in TYPES:
            raise InputError(f"metadata names {field!r}: give that column as `labels` or `coarse`")
        words[family] = read_column(obs, column, source)
    if metadata is None:
        words |= _known_fields(obs, {labels, coarse}, vocabulary, source)
    words[Family.FINE] = read_column(obs, labels, source)
    _check_labels(words[Family.FINE], labels, source)
    if coarse is None:
        words[Family.COARSE] = coarse_of(words[Family.FINE], vocabulary)
    else:
        words[Family.COARSE] = read_column(obs, coarse, source)
    return words


def _known_fields(
    obs: pd.DataFrame, taken: set[str | None], vocabulary: Vocabulary, source: str
) -> dict[Family, np.ndarray]:
    words: dict[Family, np.ndarray] = {}
    for name in map(str, obs):
        try:
            family = family_of_field(name)
        except VocabularyError:
            continue
        if family in TYPES or family in words or name in taken:
            continue
        spelled = {w.casefold(): w for w in vocabulary.names(family)}
        words[family] = np.array([spelled.get(w.casefold(), "") for w in read_column(obs, name, source)], dtype=object)
    return words


def _check_labels(words: np.ndarray, column: str, source: str) -> None:
    found, number = np.unique(words[words != ""].astype(str), return_counts=True)
    if len(found) < 2:
        has = f"only {str(found[0])!r}" if len(found) else "no label at all"
        raise InputError(f"{source}: obs[{column!r}] has {has}; expected at least two different cell types")
    few = [f"{name} ({n})" for name, n in zip(found, number, strict=True) if n < FEW]
    if few:
        warnings.warn(
            f"{source}: labels with fewer than {FEW} cells will hardly be learned: {', '.join(few)}",
            UserWarning,
            stacklevel=4,
        )


def coarse_of(labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Coarse type of each label: the closest one of the vocabulary that the ontology puts above it; else empty."""
    ontology = Ontology.load()
    types = {name: ontology.find(name) for name in vocabulary.names(Family.COARSE)}
    above: dict[str, str] = {}
    for label in set(labels) - {""}:
        identifier = ontology.find(label)
        steps = {
            name: ontology.distance(identifier, t) or 0
            for name, t in types.items()
            if identifier and t and ontology.is_a(identifier, t)
        }
        above[label] = min(steps, key=lambda name: (steps[name], name)) if steps else ""
    return np.array([above.get(label, "") for label in labels], dtype=object)


def label_relations_among(store: CellStore, vocabulary: Vocabulary) -> np.ndarray:
    """Which word satisfies which among the cell types that these cells have: bool ``[V, V]``.

    Words that only the model's earlier cells had satisfy nothing here: somebody who calls cells "B cells" wants to
    read that, not the "B cell" that the model said before.
    """
    out = np.eye(len(vocabulary), dtype=bool)
    ontology = Ontology.load()
    for family in TYPES:
        ids = np.unique(store.tokens(family)[store.tokens(family) >= 0])
        if len(ids):
            out[np.ix_(ids, ids)] = ontology.label_matrix([vocabulary.tokens[i] for i in ids])
    return out


def hold_out(store: CellStore, donors: np.ndarray | None, share: float, seed: int) -> np.ndarray:
    """Labelled cells to choose the best weights with.

    Without donors a share of each label that has at least five cells, and at least one cell of it. With donors whole
    ones, as long as every label keeps cells to learn from.

    Parameters
    ----------
    store
        All cells.
    donors
        Donor of each cell (empty: unknown, never held out), or None.
    share
        Share of the labelled cells; at most about 500 cells are held out, whatever it is.
    seed
        Of the choice.

    Returns
    -------
    numpy.ndarray
        int64 rows, ascending.

    Raises
    ------
    InputError
        If nothing can be held out.
    """
    rng = np.random.default_rng([seed, 1])
    label = store.tokens(Family.FINE)
    usable = np.flatnonzero((label >= 0) & (store.lengths > 0))
    share = min(share, MOST_HELD_OUT / max(1, len(usable)))
    if donors is not None:
        return _hold_out_donors(label, usable, donors, share, rng)
    parts = []
    for word in np.unique(label[usable]):
        cells = usable[label[usable] == word]
        if len(cells) >= FEW:
            parts.append(rng.permutation(cells)[: max(1, round(share * len(cells)))])
    if not parts:
        raise InputError(
            f"no label has {FEW} cells that say a gene of the model, so none can be held out; "
            "give more cells, or merge labels"
        )
    return np.sort(np.concatenate(parts))


def _hold_out_donors(
    label: np.ndarray, usable: np.ndarray, donors: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    names = sorted(set(donors[usable]) - {""})
    held = np.zeros(len(label), dtype=bool)
    for name in rng.permutation(np.array(names, dtype=object)):
        more = held.copy()
        more[usable[donors[usable] == name]] = True
        left = usable[~more[usable]]
        keeps_labels = set(label[left]) == set(label[usable])
        if keeps_labels and (not held.any() or more.sum() <= share * len(usable)):
            held = more
    if not held.any():
        raise InputError(
            f"none of the {len(names)} donors can be held out, as each has all cells of some label; "
            "leave the donor column out, or merge labels"
        )
    return np.flatnonzero(held)

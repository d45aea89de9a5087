"""Labels of somebody's own cells: columns of ``obs`` as metadata, and which cells are held out."""

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd

from scmulan._io.adata import read_column
from scmulan.data.memory import CellStore
from scmulan.errors import InputError, VocabularyError
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.vocabulary import Family, Vocabulary, family_of_field

MIN_CELLS_PER_LABEL = 5  # fewer are hardly learned, and none of them is held out
MAX_HELD_OUT = 500  # cells
TYPES = (Family.COARSE, Family.FINE)


def read_metadata(
    obs: pd.DataFrame,
    labels: str,
    vocabulary: Vocabulary,
    source: str,
    *,
    coarse: str | None = None,
    metadata: Mapping[str, str] | None = None,
    stacklevel: int = 2,
) -> dict[Family, np.ndarray]:
    """Read metadata of cells from columns of ``obs``.

    Parameters
    ----------
    obs
        One row per cell.
    labels
        Column of cell types.
    vocabulary
        Vocabulary of the model to start from.
    source
        What to call the cells in errors.
    coarse
        Column of coarse types; by default what the ontology puts above the labels, see :func:`coarse_of`.
    metadata
        Column of each further field; by default columns with names of fields, as far as the vocabulary has their
        tokens.
    stacklevel
        Frame that warnings point to, as in :func:`warnings.warn`; 2 is the caller.

    Returns
    -------
    dict
        For each family one string per cell, ``""`` where unknown.

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
    found: dict[Family, np.ndarray] = {}
    for field, column in (metadata or {}).items():
        family = family_of_field(field)
        if family in TYPES:
            raise InputError(f"metadata names {field!r}: give that column as `labels` or `coarse`")
        found[family] = read_column(obs, column, source)
    if metadata is None:
        found |= _known_fields(obs, {labels, coarse}, vocabulary, source)
    found[Family.FINE] = read_column(obs, labels, source)
    _check_labels(found[Family.FINE], labels, source, stacklevel + 1)
    if coarse is None:
        found[Family.COARSE] = coarse_of(found[Family.FINE], vocabulary)
    else:
        found[Family.COARSE] = read_column(obs, coarse, source)
    return found


def _known_fields(
    obs: pd.DataFrame, taken: set[str | None], vocabulary: Vocabulary, source: str
) -> dict[Family, np.ndarray]:
    """Read the columns named like fields, as far as the vocabulary has their tokens; case does not matter."""
    found: dict[Family, np.ndarray] = {}
    for name in map(str, obs):
        try:
            family = family_of_field(name)
        except VocabularyError:
            continue
        if family in TYPES or family in found or name in taken:
            continue
        spelled = {w.casefold(): w for w in vocabulary.names(family)}
        found[family] = np.array([spelled.get(w.casefold(), "") for w in read_column(obs, name, source)], dtype=object)
    return found


def _check_labels(labels: np.ndarray, column: str, source: str, stacklevel: int) -> None:
    found, number = np.unique(labels[labels != ""].astype(str), return_counts=True)
    if len(found) < 2:
        has = f"only {str(found[0])!r}" if len(found) else "no label at all"
        raise InputError(f"{source}: obs[{column!r}] has {has}; expected at least two different cell types")
    few = [f"{name} ({n})" for name, n in zip(found, number, strict=True) if n < MIN_CELLS_PER_LABEL]
    if few:
        warnings.warn(
            f"{source}: labels with fewer than {MIN_CELLS_PER_LABEL} cells will hardly be learned: {', '.join(few)}",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def coarse_of(labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Find the coarse type of each label: the closest one of the vocabulary above it in the ontology, else ``""``."""
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


def label_relations(vocabulary: Vocabulary, store: CellStore | None = None) -> np.ndarray:
    """Find which cell types satisfy which by the Cell Ontology.

    Parameters
    ----------
    vocabulary
        Tokens.
    store
        Cells whose types alone are related to each other, by default all of the vocabulary: somebody who fine-tunes on
        "B cells" wants to read that, not the "B cell" of the model.

    Returns
    -------
    numpy.ndarray
        Bool ``[V, V]``: ``[v, u]`` where cell type u is v or a finer kind of it. Fine and coarse types are related
        among themselves; any other token satisfies only itself.
    """
    out = np.eye(len(vocabulary), dtype=bool)
    ontology = Ontology.load()
    for family in TYPES:
        tokens = vocabulary.ids(family)
        if store is not None:
            tokens = np.unique(store.tokens(family)[store.tokens(family) >= 0])
        if len(tokens):
            out[np.ix_(tokens, tokens)] = ontology.label_matrix([vocabulary.tokens[t] for t in tokens])
    return out


def hold_out(store: CellStore, donors: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """Choose labelled cells that are held out, to find the best weights with.

    Without donors, a fraction of each label that has at least five cells, and at least one cell of it. With donors,
    whole donors, as long as every label keeps cells to learn from.

    Parameters
    ----------
    store
        All cells.
    donors
        Donor of each cell (empty: unknown, never held out), or None.
    fraction
        Fraction of the labelled cells; at most about 500 cells are held out, whatever it is.
    seed
        Seed of the choice.

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
    fraction = min(fraction, MAX_HELD_OUT / max(1, len(usable)))
    if donors is not None:
        return _hold_out_donors(label, usable, donors, fraction, rng)
    parts = []
    for token in np.unique(label[usable]):
        cells = usable[label[usable] == token]
        if len(cells) >= MIN_CELLS_PER_LABEL:
            parts.append(rng.permutation(cells)[: max(1, round(fraction * len(cells)))])
    if not parts:
        raise InputError(
            f"no label has {MIN_CELLS_PER_LABEL} cells that say a gene of the model, so none can be held out; "
            "give more cells, or merge labels"
        )
    return np.sort(np.concatenate(parts))


def _hold_out_donors(
    label: np.ndarray, usable: np.ndarray, donors: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    names = sorted(set(donors[usable]) - {""})
    held = np.zeros(len(label), dtype=bool)
    for name in rng.permutation(np.array(names, dtype=object)):
        more = held.copy()
        more[usable[donors[usable] == name]] = True
        left = usable[~more[usable]]
        keeps_labels = set(label[left]) == set(label[usable])
        if keeps_labels and (not held.any() or more.sum() <= fraction * len(usable)):
            held = more
    if not held.any():
        raise InputError(
            f"none of the {len(names)} donors can be held out, as each has all cells of some label; "
            "leave the donor column out, or merge labels"
        )
    return np.flatnonzero(held)

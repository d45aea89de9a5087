"""Scores of predicted against true labels, exact and by the ontology, and whether probabilities can be believed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from scmulan.vocab.ontology import Ontology

__all__ = ["Calibration", "Scores", "TypeScore", "agreement", "answerable", "calibrate", "outcomes", "resolve", "score"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeScore:
    """Scores of one true type."""

    name: str
    """Type."""
    n: int
    """Cells that are of this type."""
    predicted: int
    """Cells that were given this type."""
    precision: float
    """Share of the cells given this type that are; 0 where there are none."""
    recall: float
    """Share of the cells of this type that were given it."""
    f1: float
    """Harmonic mean of precision and recall."""
    known: bool
    """Whether the predictor has a right answer for it in its vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of labelled cells."""

    n: int
    """Cells."""
    accuracy: float | None
    """Share of cells that are right; None without cells."""
    macro_f1: float | None
    """Mean F1 over the true types (types that were only predicted have none)."""
    n_known: int
    """Cells of types for which the predictor has a right answer in its vocabulary."""
    accuracy_known: float | None
    """Accuracy over these cells."""
    macro_f1_known: float | None
    """Mean F1 over these types, among all cells."""
    types: list[TypeScore]
    """Per true type, the most frequent first."""
    confusion: "Confusion"
    """Which type was given to which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Numbers of cells by true and predicted type."""

    truth: list[str]
    """Rows: true types, the most frequent first."""
    predicted: list[str]
    """Columns: the same types, then those that were only predicted, the most frequent first."""
    counts: list[list[int]]
    """Cells."""


def score(truth: np.ndarray, predicted: np.ndarray, known: Collection[str]) -> Scores:
    """Score labels that are compared as they are spelled.

    Parameters
    ----------
    truth, predicted
        One label per cell, ``[cells]`` each.
    known
        True labels for which the predictor has a right answer.

    Returns
    -------
    Scores
    """
    names, n = _by_frequency(truth)
    given, n_given = _by_frequency(predicted)
    counted = dict(zip(given, n_given, strict=True))
    columns = [*names, *(name for name in given if name not in set(names))]
    row = {name: i for i, name in enumerate(names)}
    column = {name: i for i, name in enumerate(columns)}
    counts = np.zeros((len(names), len(columns)), dtype=np.int64)
    np.add.at(counts, ([row[t] for t in truth], [column[p] for p in predicted]), 1)
    types = []
    for i, (name, cells) in enumerate(zip(names, n, strict=True)):
        right, offered = int(counts[i, i]), int(counted.get(name, 0))
        precision, recall = right / offered if offered else 0.0, right / cells
        f1 = 2 * right / (offered + cells)
        types.append(
            TypeScore(
                name=name, n=cells, predicted=offered, precision=precision, recall=recall, f1=f1, known=name in known
            )
        )
    is_right = truth == predicted
    inside = np.isin(truth, list(known))
    return Scores(
        n=len(truth),
        accuracy=_mean(is_right),
        macro_f1=_mean([t.f1 for t in types]),
        n_known=int(inside.sum()),
        accuracy_known=_mean(is_right[inside]),
        macro_f1_known=_mean([t.f1 for t in types if t.known]),
        types=types,
        confusion=Confusion(truth=names, predicted=columns, counts=counts.tolist()),
    )


def _by_frequency(labels: np.ndarray) -> tuple[list[str], list[int]]:
    names, n = np.unique(labels.astype(str), return_counts=True)
    order = np.lexsort((names, -n))
    return names[order].tolist(), n[order].tolist()


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def agreement(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Say which predictions are right: the true type itself or a finer one (bool ``[cells]``)."""
    ontology = Ontology.load()
    pairs, of_cell = _pairs(truth, predicted)
    return np.array([ontology.agrees(p, t) for t, p in pairs], dtype=bool)[of_cell]


def resolve(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Bring predictions to the granularity of the true labels, so that ordinary scores can be taken.

    A prediction that is the true type or a finer one becomes the true type. Any other becomes the nearest of all true
    types that it is a kind of, and stays as it is where there is none.

    Parameters
    ----------
    truth, predicted
        One label per cell, ``[cells]`` each.

    Returns
    -------
    numpy.ndarray
        Labels ``[cells]``.
    """
    ontology = Ontology.load()
    ids = {name: ontology.find(name) for name in np.unique(truth.astype(str))}
    nearest: dict[str, str] = {}
    for name in np.unique(predicted.astype(str)):
        found = ontology.find(name)
        above = [(ontology.distance(found, i), t) for t, i in ids.items() if found and i and ontology.is_a(found, i)]
        nearest[name] = name if name in ids or not above else min(above)[1]
    pairs, of_cell = _pairs(truth, predicted)
    return np.array([t if ontology.agrees(p, t) else nearest[p] for t, p in pairs], dtype=object)[of_cell]


def outcomes(truth: np.ndarray, predicted: np.ndarray) -> dict[str, int]:
    """Count how predictions relate to the truth.

    Returns
    -------
    dict
        Cells whose prediction is the true type (``exact``), a kind of it (``finer``), a type that it is a kind of
        (``coarser``: no mistake in itself, but less than was asked; it does not count as right), or ``other``.
    """
    ontology = Ontology.load()
    pairs, of_cell = _pairs(truth, predicted)
    kinds = []
    for t, p in pairs:
        if t == p or (ontology.find(t) or t) == (ontology.find(p) or p):
            kinds.append("exact")
        elif ontology.agrees(p, t):
            kinds.append("finer")
        else:
            kinds.append("coarser" if ontology.agrees(t, p) else "other")
    n = np.bincount(of_cell, minlength=len(pairs))
    return {
        kind: int(sum(n[i] for i, k in enumerate(kinds) if k == kind))
        for kind in ("exact", "finer", "coarser", "other")
    }


def _pairs(truth: np.ndarray, predicted: np.ndarray) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return different pairs of labels, and which of them each cell has."""
    place: dict[tuple[str, str], int] = {}
    of_cell = [place.setdefault(pair, len(place)) for pair in zip(truth, predicted, strict=True)]
    return list(place), np.array(of_cell, dtype=np.int64)


def answerable(truth: np.ndarray, vocabulary: Sequence[str]) -> set[str]:
    """Return the true labels that a word of a vocabulary is, or is a kind of."""
    names = np.unique(truth.astype(str)).tolist()
    satisfied = Ontology.load().label_matrix([*names, *vocabulary])[: len(names), len(names) :].any(1)
    return {names[i] for i in np.flatnonzero(satisfied)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Whether probabilities say how often they are right."""

    mean_right: float | None
    """Mean probability of the cells that are right."""
    mean_wrong: float | None
    """Mean probability of the cells that are wrong."""
    error: float
    """Expected calibration error: |accuracy − mean probability| of ten bins of equal width, weighted by their cells."""
    bins: list[dict[str, float]]
    """Of each bin with cells: ``low``, ``high``, ``n``, ``accuracy``, ``probability``."""


def calibrate(right: np.ndarray, probability: np.ndarray, bins: int = 10) -> Calibration | None:
    """Compare probabilities with what came true.

    Parameters
    ----------
    right
        Bool ``[cells]``.
    probability
        ``[cells]`` in [0, 1].
    bins
        Number of bins, each open below and closed above (the first holds 0 too).

    Returns
    -------
    Calibration or None
        None where a probability is missing (a decoding rule without any) or there are no cells.
    """
    if not len(right) or np.isnan(probability).any():
        return None
    place = np.clip(np.ceil(probability.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    table, error = [], 0.0
    for i in np.unique(place):
        inside = place == i
        accuracy, mean = float(right[inside].mean()), float(probability[inside].mean(dtype=np.float64))
        error += float(inside.mean()) * abs(accuracy - mean)
        table.append(
            {"low": i / bins, "high": (i + 1) / bins, "n": int(inside.sum()), "accuracy": accuracy, "probability": mean}
        )
    return Calibration(
        mean_right=_mean(probability[right].astype(np.float64)),
        mean_wrong=_mean(probability[~right].astype(np.float64)),
        error=error,
        bins=table,
    )

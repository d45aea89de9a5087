"""Score predicted against true labels, as spelled and by the Cell Ontology, and the calibration of probabilities."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from scmulan.vocab.ontology import Ontology

__all__ = [
    "Calibration",
    "Confusion",
    "Scores",
    "TypeScore",
    "calibrate",
    "count_outcomes",
    "is_correct",
    "known_labels",
    "score",
    "to_label_granularity",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeScore:
    """Scores of one true type."""

    name: str
    """Type."""
    n: int
    """Cells of this true type."""
    predicted: int
    """Cells predicted as this type."""
    precision: float
    """Fraction of the cells predicted as this type that are of it; 0 where none was."""
    recall: float
    """Fraction of the cells of this type that were predicted as it."""
    f1: float
    """Harmonic mean of precision and recall."""
    known: bool
    """Whether the predictor's vocabulary holds a correct answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Numbers of cells by true and predicted type."""

    truth: list[str]
    """Rows: true types, the most frequent first."""
    predicted: list[str]
    """Columns: the same types, then those that were only predicted, the most frequent first."""
    counts: list[list[int]]
    """Cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of labelled cells."""

    n: int
    """Cells."""
    accuracy: float | None
    """Fraction of cells predicted correctly; None without cells."""
    macro_f1: float | None
    """Mean F1 over the true types (types that were only predicted have none)."""
    n_known: int
    """Cells of types for which the predictor's vocabulary holds a correct answer."""
    accuracy_known: float | None
    """Accuracy over these cells."""
    macro_f1_known: float | None
    """Mean F1 over these types, among all cells."""
    types: list[TypeScore]
    """Per true type, the most frequent first."""
    confusion: Confusion
    """Cells by true and predicted type."""


def score(truth: np.ndarray, predicted: np.ndarray, known: Collection[str]) -> Scores:
    """Score labels, compared as they are spelled.

    Parameters
    ----------
    truth, predicted
        One label per cell, ``[cells]`` each.
    known
        True labels for which the predictor's vocabulary holds a correct answer.

    Returns
    -------
    Scores
    """
    true_types, n_true = _by_frequency(truth)
    predicted_types, n_predicted = _by_frequency(predicted)
    predicted_count = dict(zip(predicted_types, n_predicted, strict=True))
    columns = [*true_types, *(name for name in predicted_types if name not in set(true_types))]
    row_of = {name: i for i, name in enumerate(true_types)}
    column_of = {name: i for i, name in enumerate(columns)}
    counts = np.zeros((len(true_types), len(columns)), dtype=np.int64)
    np.add.at(counts, ([row_of[t] for t in truth], [column_of[p] for p in predicted]), 1)
    types = []
    for i, (name, n) in enumerate(zip(true_types, n_true, strict=True)):
        n_correct, n_as_this = int(counts[i, i]), int(predicted_count.get(name, 0))
        types.append(
            TypeScore(
                name=name,
                n=n,
                predicted=n_as_this,
                precision=n_correct / n_as_this if n_as_this else 0.0,
                recall=n_correct / n,
                f1=2 * n_correct / (n_as_this + n),
                known=name in known,
            )
        )
    correct = truth == predicted
    of_known_type = np.isin(truth, list(known))
    return Scores(
        n=len(truth),
        accuracy=_mean(correct),
        macro_f1=_mean([t.f1 for t in types]),
        n_known=int(of_known_type.sum()),
        accuracy_known=_mean(correct[of_known_type]),
        macro_f1_known=_mean([t.f1 for t in types if t.known]),
        types=types,
        confusion=Confusion(truth=true_types, predicted=columns, counts=counts.tolist()),
    )


def _by_frequency(labels: np.ndarray) -> tuple[list[str], list[int]]:
    names, n = np.unique(labels.astype(str), return_counts=True)
    order = np.lexsort((names, -n))
    return names[order].tolist(), n[order].tolist()


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def is_correct(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return whether each prediction is the true type or a finer one of the Cell Ontology (bool ``[cells]``)."""
    ontology = Ontology.load()
    pairs, pair_of_cell = _distinct_pairs(truth, predicted)
    return np.array([ontology.agrees(p, t) for t, p in pairs], dtype=bool)[pair_of_cell]


def to_label_granularity(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Coarsen predictions to the granularity of the true labels, so that ordinary scores can be computed.

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
    pairs, pair_of_cell = _distinct_pairs(truth, predicted)
    return np.array([t if ontology.agrees(p, t) else nearest[p] for t, p in pairs], dtype=object)[pair_of_cell]


def count_outcomes(truth: np.ndarray, predicted: np.ndarray) -> dict[str, int]:
    """Count how predictions relate to the true types.

    Returns
    -------
    dict
        Cells whose prediction is the true type (``exact``), a kind of it (``finer``), a type that it is a kind of
        (``coarser``: not wrong in itself, but less than was asked, so it does not count as correct), or ``other``.
    """
    ontology = Ontology.load()
    pairs, pair_of_cell = _distinct_pairs(truth, predicted)
    outcomes = []
    for t, p in pairs:
        if t == p or (ontology.find(t) or t) == (ontology.find(p) or p):
            outcomes.append("exact")
        elif ontology.agrees(p, t):
            outcomes.append("finer")
        else:
            outcomes.append("coarser" if ontology.agrees(t, p) else "other")
    n = np.bincount(pair_of_cell, minlength=len(pairs))
    return {
        kind: int(sum(n[i] for i, outcome in enumerate(outcomes) if outcome == kind))
        for kind in ("exact", "finer", "coarser", "other")
    }


def _distinct_pairs(truth: np.ndarray, predicted: np.ndarray) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return the distinct pairs of true and predicted label, and the index of each cell's pair."""
    index: dict[tuple[str, str], int] = {}
    pair_of_cell = [index.setdefault(pair, len(index)) for pair in zip(truth, predicted, strict=True)]
    return list(index), np.array(pair_of_cell, dtype=np.int64)


def known_labels(truth: np.ndarray, vocabulary: Sequence[str]) -> set[str]:
    """Return the true labels for which a vocabulary holds a correct answer: the type itself or a kind of it."""
    names = np.unique(truth.astype(str)).tolist()
    known = Ontology.load().label_matrix([*names, *vocabulary])[: len(names), len(names) :].any(1)
    return {names[i] for i in np.flatnonzero(known)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Agreement of probabilities with the accuracy of the predictions."""

    mean_right: float | None
    """Mean probability of correct predictions."""
    mean_wrong: float | None
    """Mean probability of wrong predictions."""
    error: float
    """Expected calibration error: |accuracy − mean probability| of ten bins of equal width, weighted by their cells."""
    bins: list[dict[str, float]]
    """Of each bin with cells: ``low``, ``high``, ``n``, ``accuracy``, ``probability``."""


def calibrate(correct: np.ndarray, probability: np.ndarray, n_bins: int = 10) -> Calibration | None:
    """Compare probabilities with the accuracy of the predictions.

    Parameters
    ----------
    correct
        Bool ``[cells]``.
    probability
        ``[cells]`` in [0, 1].
    n_bins
        Number of bins, each open below and closed above (the first holds 0 too).

    Returns
    -------
    Calibration or None
        None where a probability is missing (a decoding rule without any) or there are no cells.
    """
    if not len(correct) or np.isnan(probability).any():
        return None
    bin_of_cell = np.clip(np.ceil(probability.astype(np.float64) * n_bins).astype(int) - 1, 0, n_bins - 1)
    bins, error = [], 0.0
    for i in np.unique(bin_of_cell):
        inside = bin_of_cell == i
        accuracy, mean = float(correct[inside].mean()), float(probability[inside].mean(dtype=np.float64))
        error += float(inside.mean()) * abs(accuracy - mean)
        bins.append(
            {
                "low": i / n_bins,
                "high": (i + 1) / n_bins,
                "n": int(inside.sum()),
                "accuracy": accuracy,
                "probability": mean,
            }
        )
    return Calibration(
        mean_right=_mean(probability[correct].astype(np.float64)),
        mean_wrong=_mean(probability[~correct].astype(np.float64)),
        error=error,
        bins=bins,
    )

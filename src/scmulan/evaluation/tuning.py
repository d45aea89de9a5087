"""The settings of logistic regression, chosen on its training files alone.

Each file in turn (files of one study together) is left out, and the setting that names the cells of the files left out
best is used.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from scmulan.errors import InputError
from scmulan.evaluation.baselines import LogisticBaseline, LogisticConfig, TrainingFile
from scmulan.evaluation.cells import GeneCells
from scmulan.evaluation.scores import agreement, answerable, resolve, score

__all__ = ["Tuning", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What was tried and what won."""

    config: LogisticConfig
    """Settings that won."""
    score: float | None
    """Its mean score over the studies left out; None where there was nothing to leave out."""
    left_out: list[str]
    """Studies that were left out in turn."""
    tried: list[dict[str, Any]]
    """All settings tried, with their scores."""
    seconds: float
    """Time it took."""


def tune(
    files: Sequence[TrainingFile],
    *,
    seed: int = 0,
    studies: int = 5,
    cells: int = 25,
    progress: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """Choose the settings by leaving studies out, one after the other.

    Parameters
    ----------
    files
        Training cells.
    seed
        Of the choice of studies and cells.
    studies
        Most studies that are left out (those with most types that others have).
    cells
        Most cells per type and file, while choosing.
    progress
        Called with each setting tried, in words.

    Returns
    -------
    Tuning
        Of a single study, or of studies without a common type, the default settings.
    """
    started = time.monotonic()
    rng = np.random.default_rng(seed)
    small = [_thin(file, cells, rng) for file in files]
    folds = _folds(small, studies)
    tried: dict[tuple, float] = {}

    def value(config: LogisticConfig) -> float:
        key = tuple(asdict(config).values())
        if key not in tried:
            tried[key] = float(np.mean([_fold_score(rest, out, config) for rest, out in folds]))
            progress(f"{config}: {tried[key]:.3f}")
        return tried[key]

    best = LogisticConfig()
    if folds:
        for step in _steps():
            best = max([best, *step(best)], key=value)
    names = [f.name for f in fields(LogisticConfig)]
    table = [{**dict(zip(names, key, strict=True)), "score": found} for key, found in tried.items()]
    return Tuning(
        config=best,
        score=value(best) if folds else None,
        left_out=[out[0].study for _, out in folds],
        tried=table,
        seconds=time.monotonic() - started,
    )


def _steps() -> Iterator[Callable[[LogisticConfig], list[LogisticConfig]]]:
    """One kind of setting after the other, each from the best so far."""
    yield lambda best: [replace(best, coarse=c) for c in ("keep", "drop")]
    yield lambda best: [replace(best, C=c, scaling=s) for s in ("none", "sd", "max") for c in (0.01, 0.1, 1.0, 10.0)]
    yield lambda best: [replace(best, total="shared")]
    yield lambda best: [replace(best, presence=p) for p in (0.25, 0.5)]
    yield lambda best: [replace(best, balanced=True)]
    yield lambda best: [replace(best, C=best.C * f) for f in (1 / 30, 1 / 3, 3)]


def _folds(files: Sequence[TrainingFile], most: int) -> list[tuple[list[TrainingFile], list[TrainingFile]]]:
    """Training files and files left out, for the studies that have most types in common with others."""
    folds = []
    for study in dict.fromkeys(file.study for file in files):
        out = [file for file in files if file.study == study]
        rest = [file for file in files if file.study != study]
        if not rest:
            continue
        labels = np.concatenate([file.labels for file in out])
        known = answerable(labels, sorted({label for file in rest for label in file.labels}))
        # A single type in common says nothing about telling types apart.
        if len(known) > 1:
            folds.append((len(known), (rest, out)))
    return [fold for _, fold in sorted(folds, key=lambda entry: -entry[0])[:most]]


def _fold_score(rest: Sequence[TrainingFile], out: Sequence[TrainingFile], config: LogisticConfig) -> float:
    """Mean of accuracy and macro-F1, over the types that the remaining studies have."""
    results = []
    for file in out:
        known = answerable(file.labels, sorted({label for f in rest for label in f.labels}))
        inside = np.flatnonzero(np.isin(file.labels, list(known)))
        if not len(inside):
            continue
        try:
            baseline = LogisticBaseline(rest, file.cells.genes, config)
        except InputError:
            return 0.0
        cells = GeneCells(amounts=file.cells.amounts[inside], genes=file.cells.genes, total=file.cells.total[inside])
        truth, predicted = file.labels[inside], baseline.predict(cells)[0]
        macro = score(truth, resolve(truth, predicted), known).macro_f1 or 0.0
        results.append((float(agreement(truth, predicted).mean()) + macro) / 2)
    return float(np.mean(results))


def _thin(file: TrainingFile, most: int, rng: np.random.Generator) -> TrainingFile:
    keep = np.sort(
        np.concatenate(
            [rng.permutation(np.flatnonzero(file.labels == name))[:most] for name in sorted(set(file.labels))]
        )
    )
    cells = GeneCells(amounts=file.cells.amounts[keep], genes=file.cells.genes, total=file.cells.total[keep])
    return replace(file, cells=cells, labels=file.labels[keep])

"""Logistic regression trained on labelled files: the baseline that a model of cells has to beat.

It is fitted for each file anew, on the genes that the cells to be named share with the training cells.

The settings of logistic regression, chosen on its training files alone.

Each file in turn (files of one study together) is left out, and the setting that names the cells of the files left out
best is used.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from scmulan._io.adata import read_column
from scmulan.data.gene_selection import GeneScores
from scmulan.errors import InputError
from scmulan.evaluate.cells import GeneCells, Total, file_names, ignoring, named, need, open_labelled, read_genes
from scmulan.evaluate.labels import LabelMap
from scmulan.evaluate.scores import agreement, answerable, resolve, score
from scmulan.vocab.ontology import Ontology

__all__ = ["LogisticBaseline", "LogisticConfig", "TrainingFile", "Tuning", "read_training_file", "tune"]


@dataclass(kw_only=True, slots=True)
class LogisticConfig:
    """Settings of the baseline."""

    C: float = 1.0
    """Inverse strength of the L2 penalty."""
    scaling: Literal["none", "sd", "max"] = "max"
    """What a gene's log1p values are divided by: nothing, their standard deviation or their maximum in training."""
    total: Total = "file"
    """What is scaled to 10,000 per cell: all genes of a file or the shared ones."""
    presence: float = 0.0
    """Smallest share of the training files that must have measured a gene."""
    coarse: Literal["keep", "descend", "drop"] = "descend"
    """Labels of which training has finer ones: given as they are; replaced by the likeliest of the finer ones, which a
    second regression on the cells with fine labels tells apart (right wherever the coarse label was); or their cells
    left out of training."""
    balanced: bool = False
    """Whether all types weigh the same, however many cells they have."""
    genes: int = 3000
    """Most genes used, the most variable of the shared ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFile:
    """Labelled cells to train on."""

    name: str
    """Short name of the file."""
    study: str
    """Files of one study are left out together."""
    cells: GeneCells
    """Expression of the labelled cells."""
    labels: np.ndarray
    """Type of each, in the ontology's spelling."""
    variable: dict[str, float]
    """How variable each gene is, 0 to 1."""


def read_training_file(path: str | Path, labels: str, mapping: LabelMap | None = None, name: str = "") -> TrainingFile:
    """Read the labelled cells of a file.

    Parameters
    ----------
    path
        h5ad file.
    labels
        Column of ``obs``; cells without label are left out.
    mapping
        What the labels mean.
    name
        Short name (default: the file's).

    Raises
    ------
    InputError
        If the file cannot be used or has no labelled cell.
    """
    adata = open_labelled(path)
    mapping = mapping or LabelMap()
    terms = np.array([mapping.term(label) for label in read_column(adata.obs, labels, str(path))], dtype=object)
    inside = np.flatnonzero(terms != "")
    if not len(inside):
        raise InputError(f"{path}: no labelled cell in column {labels!r}; leave the file out of the training files")
    name = name or file_names([path])[0]
    studies = sorted(set(read_column(adata.obs, "study", str(path))) - {""}) if "study" in adata.obs else []
    with named(path):
        cells = read_genes(adata, str(path))
    cells = GeneCells(amounts=cells.amounts[inside], genes=cells.genes, total=cells.total[inside])
    scores = GeneScores()
    scores.add(cells.genes, cells.amounts, cells.total, "counts")
    return TrainingFile(
        name=name,
        study=studies[0] if len(studies) == 1 else name,
        cells=cells,
        labels=terms[inside],
        variable=scores.scores,
    )


class LogisticBaseline:
    """Multinomial logistic regression on the log1p values of shared genes.

    Parameters
    ----------
    files
        Training cells.
    measured
        Genes of the cells that are to be named.
    config
        Settings.
    """

    def __init__(self, files: Sequence[TrainingFile], measured: Sequence[str], config: LogisticConfig) -> None:
        self.config = config
        self.genes = shared_genes(files, measured, config)
        labels = np.concatenate([file.labels for file in files])
        x = np.concatenate([file.cells.log1p(self.genes, config.total).toarray() for file in files])
        fine = ~np.isin(labels, list(coarse_labels(labels)))
        if config.coarse == "drop":
            x, labels, fine = x[fine], labels[fine], fine[fine]
        if len(set(labels)) < 2:
            raise InputError(
                f"logistic regression: the training cells are of one type ({', '.join(set(labels))}), two are needed"
            )
        self.cells = len(labels)
        self.scale = _scale(x, config.scaling)
        x /= self.scale
        self.regression = _fit(x, labels, config)
        # Of cells with coarse labels it learns that they are no others: who is to tell finer types apart must not.
        among = set(labels[fine])
        descends = config.coarse == "descend" and not fine.all() and len(among) > 1
        self.finer = _fit(x[fine], labels[fine], config) if descends else None

    @property
    def types(self) -> list[str]:
        """Types that it can name."""
        return [str(c) for c in (self.regression if self.finer is None else self.finer).classes_]

    def predict(self, cells: GeneCells) -> tuple[np.ndarray, np.ndarray]:
        """Name cells.

        Returns
        -------
        tuple of numpy.ndarray
            Type of each cell, and its probability together with that of the kinds of it. A type that was descended to
            has that of the coarse one, times its share among the finer ones.
        """
        x = cells.log1p(self.genes, self.config.total).toarray() / self.scale
        classes = np.array(self.regression.classes_, dtype=object)
        probability = self.regression.predict_proba(x)
        supports = Ontology.load().label_matrix(list(classes))
        best = probability.argmax(1)
        named = classes[best]
        together = np.take_along_axis(probability @ supports.T, best[:, None], 1)[:, 0]
        if self.finer is not None:
            finer = np.array(self.finer.classes_, dtype=object)
            share = self.finer.predict_proba(x)
            for i in np.flatnonzero(supports.sum(1) > 1):
                rows, kinds = np.flatnonzero(best == i), np.flatnonzero(np.isin(finer, classes[supports[i]]))
                among = share[np.ix_(rows, kinds)]
                named[rows] = finer[kinds[among.argmax(1)]]
                together[rows] *= among.max(1) / np.maximum(among.sum(1), 1e-12)
        return named, together.clip(0, 1)


def _fit(x: np.ndarray, labels: np.ndarray, config: LogisticConfig) -> Any:
    with need("logistic regression"):
        from sklearn.linear_model import LogisticRegression
    regression = LogisticRegression(
        C=config.C, class_weight="balanced" if config.balanced else None, max_iter=200, tol=1e-3
    )
    # A fit that stops at max_iter names cells as well as one that goes on.
    with ignoring("lbfgs failed to converge"):
        return regression.fit(x, labels)


def shared_genes(files: Sequence[TrainingFile], measured: Sequence[str], config: LogisticConfig) -> list[str]:
    """Return the most variable genes that the cells to be named share with the training files, alphabetically."""
    number = pd.Series(0, index=pd.Index(list(measured)))
    variable: dict[str, float] = {}
    for file in files:
        number[number.index.isin(file.cells.genes)] += 1
        for gene, value in file.variable.items():
            variable[gene] = variable.get(gene, 0.0) + value
    enough = max(1, int(np.ceil(config.presence * len(files))))
    shared = [gene for gene in number.index[number >= enough] if gene in variable]
    if not shared:
        raise InputError(
            f"logistic regression: no gene is shared with at least {enough} of the {len(files)} training files"
        )
    return sorted(sorted(shared, key=lambda gene: (-variable[gene], gene))[: config.genes])


def coarse_labels(labels: np.ndarray) -> set[str]:
    """Return the labels of which others are kinds."""
    names = sorted(set(labels))
    matrix = Ontology.load().label_matrix(names)
    return {name for name, row in zip(names, matrix, strict=True) if row.sum() > 1}


def _scale(x: np.ndarray, scaling: str) -> np.ndarray:
    if scaling == "none":
        return np.ones(x.shape[1], dtype=np.float32)
    spread = x.std(0) if scaling == "sd" else x.max(0)
    return np.where(spread > 1e-3, spread, 1.0).astype(np.float32)


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

"""Logistic regression trained on labelled files: the baseline that a language model of cells has to beat.

It is fitted anew for each file to be annotated, on the genes that the file shares with the training cells. Its settings
are chosen on the training files alone: each study in turn is left out, and the setting that predicts the types of the
studies left out best is used.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from scmulan._io.adata import read_column
from scmulan._progress import SILENT, Progress
from scmulan.data.gene_selection import GeneScores
from scmulan.errors import InputError
from scmulan.evaluate.inputs import (
    Expression,
    Total,
    file_names,
    ignore_warnings,
    open_labelled,
    optional_packages,
    read_expression,
    with_source,
)
from scmulan.evaluate.labels import LabelMap
from scmulan.evaluate.scores import is_correct, known_labels, score, to_label_granularity
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
    """Smallest fraction of the training files that must have measured a gene."""
    coarse: Literal["keep", "descend", "drop"] = "descend"
    """Labels of which training has finer ones: predicted as they are; replaced by the likeliest of the finer ones,
    which a second regression on the cells with fine labels tells apart (correct wherever the coarse label was); or
    their cells left out of training."""
    balanced: bool = False
    """Whether all types weigh the same, however many cells they have."""
    genes: int = 3000
    """Maximum number of genes, the most variable of the shared ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFile:
    """Labelled cells to train on."""

    name: str
    """Short name of the file."""
    study: str
    """Files of one study are left out together."""
    expression: Expression
    """Expression of the labelled cells."""
    labels: np.ndarray
    """Type of each, in the ontology's spelling."""
    variability: dict[str, float]
    """How variable each gene is, 0 to 1."""

    def rows(self, rows: np.ndarray) -> "TrainingFile":
        """Return the file with some of its cells only; the variability stays that of all."""
        return replace(self, expression=self.expression.rows(rows), labels=self.labels[rows])


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
    labelled = np.flatnonzero(terms != "")
    if not len(labelled):
        raise InputError(f"{path}: no labelled cell in column {labels!r}; leave the file out of the training files")
    name = name or file_names([path])[0]
    studies = sorted(set(read_column(adata.obs, "study", str(path))) - {""}) if "study" in adata.obs else []
    with with_source(path):
        expression = read_expression(adata, str(path)).rows(labelled)
    variability = GeneScores()
    variability.add(expression.genes, expression.amounts, expression.total, "counts")
    return TrainingFile(
        name=name,
        study=studies[0] if len(studies) == 1 else name,
        expression=expression,
        labels=terms[labelled],
        variability=variability.scores,
    )


class LogisticBaseline:
    """Multinomial logistic regression on the log1p values of shared genes.

    Parameters
    ----------
    files
        Training cells.
    measured
        Genes of the cells that are to be annotated.
    config
        Settings.

    Raises
    ------
    InputError
        If no gene is shared, or the training cells are of fewer than two types.
    """

    def __init__(self, files: Sequence[TrainingFile], measured: Sequence[str], config: LogisticConfig) -> None:
        self.config = config
        self.genes = shared_genes(files, measured, config)
        labels = np.concatenate([file.labels for file in files])
        x = np.concatenate([file.expression.log1p(self.genes, config.total).toarray() for file in files])
        fine = ~np.isin(labels, list(coarse_labels(labels)))
        if config.coarse == "drop":
            x, labels, fine = x[fine], labels[fine], fine[fine]
        if len(set(labels)) < 2:
            raise InputError(
                f"logistic regression: the training cells are of one type ({', '.join(set(labels))}), two are needed"
            )
        self.n_cells = len(labels)
        self.scale = _gene_scale(x, config.scaling)
        x /= self.scale
        self.regression = _fit(x, labels, config)
        # A cell with a coarse label is a negative example of all finer types: the regression that tells these apart
        # must not see it.
        descends = config.coarse == "descend" and not fine.all() and len(set(labels[fine])) > 1
        self.fine_regression = _fit(x[fine], labels[fine], config) if descends else None

    @property
    def types(self) -> list[str]:
        """Types that it can predict."""
        regression = self.regression if self.fine_regression is None else self.fine_regression
        return [str(c) for c in regression.classes_]

    def predict(self, cells: Expression) -> tuple[np.ndarray, np.ndarray]:
        """Predict cell types.

        Returns
        -------
        types : numpy.ndarray
            ``[cells]``.
        probability : numpy.ndarray
            ``[cells]``: of the type together with the kinds of it. A type that was descended to has the probability of
            the coarse one, times its fraction among the finer ones.
        """
        x = cells.log1p(self.genes, self.config.total).toarray() / self.scale
        classes = np.array(self.regression.classes_, dtype=object)
        probability = self.regression.predict_proba(x)
        is_kind_of = Ontology.load().label_matrix(list(classes))
        best = probability.argmax(1)
        types = classes[best]
        total = np.take_along_axis(probability @ is_kind_of.T, best[:, None], 1)[:, 0]
        if self.fine_regression is not None:
            fine_classes = np.array(self.fine_regression.classes_, dtype=object)
            fine_probability = self.fine_regression.predict_proba(x)
            for i in np.flatnonzero(is_kind_of.sum(1) > 1):
                rows = np.flatnonzero(best == i)
                kinds = np.flatnonzero(np.isin(fine_classes, classes[is_kind_of[i]]))
                among = fine_probability[np.ix_(rows, kinds)]
                types[rows] = fine_classes[kinds[among.argmax(1)]]
                total[rows] *= among.max(1) / np.maximum(among.sum(1), 1e-12)
        return types, total.clip(0, 1)


def shared_genes(files: Sequence[TrainingFile], measured: Sequence[str], config: LogisticConfig) -> list[str]:
    """Return the most variable genes that the cells to be annotated share with the training files, alphabetically."""
    n_files = pd.Series(0, index=pd.Index(list(measured)))
    variability: dict[str, float] = {}
    for file in files:
        n_files[n_files.index.isin(file.expression.genes)] += 1
        for gene, value in file.variability.items():
            variability[gene] = variability.get(gene, 0.0) + value
    min_files = max(1, int(np.ceil(config.presence * len(files))))
    shared = [gene for gene in n_files.index[n_files >= min_files] if gene in variability]
    if not shared:
        raise InputError(
            f"logistic regression: no gene is shared with at least {min_files} of the {len(files)} training files"
        )
    return sorted(sorted(shared, key=lambda gene: (-variability[gene], gene))[: config.genes])


def coarse_labels(labels: np.ndarray) -> set[str]:
    """Return the labels of which others are kinds."""
    names = sorted(set(labels))
    matrix = Ontology.load().label_matrix(names)
    return {name for name, row in zip(names, matrix, strict=True) if row.sum() > 1}


def _gene_scale(x: np.ndarray, scaling: str) -> np.ndarray:
    if scaling == "none":
        return np.ones(x.shape[1], dtype=np.float32)
    spread = x.std(0) if scaling == "sd" else x.max(0)
    return np.where(spread > 1e-3, spread, 1.0).astype(np.float32)


def _fit(x: np.ndarray, labels: np.ndarray, config: LogisticConfig) -> Any:
    with optional_packages("logistic regression"):
        from sklearn.linear_model import LogisticRegression
    regression = LogisticRegression(
        C=config.C, class_weight="balanced" if config.balanced else None, max_iter=200, tol=1e-3
    )
    # A fit that stops at max_iter predicts as well as one that goes on.
    with ignore_warnings("lbfgs failed to converge"):
        return regression.fit(x, labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Settings that were tried, and the best of them."""

    config: LogisticConfig
    """The best settings."""
    score: float | None
    """Their mean score over the studies left out; None where there was nothing to leave out."""
    left_out: list[str]
    """Studies that were left out in turn."""
    tried: list[dict[str, Any]]
    """All settings tried, with their scores."""
    seconds: float
    """Duration."""


def tune(
    files: Sequence[TrainingFile],
    *,
    seed: int = 0,
    max_studies: int = 5,
    max_cells: int = 25,
    progress: Progress = SILENT,
) -> Tuning:
    """Choose the settings by leaving studies out, one after the other.

    Parameters
    ----------
    files
        Training cells.
    seed
        Seed of the choice of cells.
    max_studies
        Maximum number of studies that are left out (those with most types that others have).
    max_cells
        Maximum number of cells per type and file, while choosing.
    progress
        Shows the score of each setting tried.

    Returns
    -------
    Tuning
        Of a single study, or of studies without a common type, the default settings.
    """
    started = time.monotonic()
    rng = np.random.default_rng(seed)
    folds = _folds([_subsample(file, max_cells, rng) for file in files], max_studies)
    tried: dict[tuple, float] = {}

    def value(config: LogisticConfig) -> float:
        key = tuple(asdict(config).values())
        if key not in tried:
            tried[key] = float(np.mean([_fold_score(rest, left_out, config) for rest, left_out in folds]))
            progress.log(f"{config}: {tried[key]:.3f}")
        return tried[key]

    best = LogisticConfig()
    if folds:
        for alternatives in _search_steps():
            best = max([best, *alternatives(best)], key=value)
    names = [f.name for f in fields(LogisticConfig)]
    table = [{**dict(zip(names, key, strict=True)), "score": found} for key, found in tried.items()]
    return Tuning(
        config=best,
        score=value(best) if folds else None,
        left_out=[left_out[0].study for _, left_out in folds],
        tried=table,
        seconds=time.monotonic() - started,
    )


def _search_steps() -> Iterator[Callable[[LogisticConfig], list[LogisticConfig]]]:
    """Yield the alternatives of one kind of setting after the other, each from the best so far."""
    yield lambda best: [replace(best, coarse=c) for c in ("keep", "drop")]
    yield lambda best: [replace(best, C=c, scaling=s) for s in ("none", "sd", "max") for c in (0.01, 0.1, 1.0, 10.0)]
    yield lambda best: [replace(best, total="shared")]
    yield lambda best: [replace(best, presence=p) for p in (0.25, 0.5)]
    yield lambda best: [replace(best, balanced=True)]
    yield lambda best: [replace(best, C=best.C * f) for f in (1 / 30, 1 / 3, 3)]


def _subsample(file: TrainingFile, max_cells: int, rng: np.random.Generator) -> TrainingFile:
    """Draw at most so many cells of each type."""
    per_type = [rng.permutation(np.flatnonzero(file.labels == name))[:max_cells] for name in sorted(set(file.labels))]
    return file.rows(np.sort(np.concatenate(per_type)))


def _folds(files: Sequence[TrainingFile], max_studies: int) -> list[tuple[list[TrainingFile], list[TrainingFile]]]:
    """Return training files and files left out, for the studies that have most types in common with others."""
    folds = []
    for study in dict.fromkeys(file.study for file in files):
        left_out = [file for file in files if file.study == study]
        rest = [file for file in files if file.study != study]
        if not rest:
            continue
        labels = np.concatenate([file.labels for file in left_out])
        known = known_labels(labels, _types_of(rest))
        # A single type in common says nothing about telling types apart.
        if len(known) > 1:
            folds.append((len(known), (rest, left_out)))
    return [fold for _, fold in sorted(folds, key=lambda entry: -entry[0])[:max_studies]]


def _fold_score(rest: Sequence[TrainingFile], left_out: Sequence[TrainingFile], config: LogisticConfig) -> float:
    """Return the mean of accuracy and macro-F1, over the types that the remaining studies have."""
    results = []
    for file in left_out:
        known = known_labels(file.labels, _types_of(rest))
        rows = np.flatnonzero(np.isin(file.labels, list(known)))
        if not len(rows):
            continue
        try:
            baseline = LogisticBaseline(rest, file.expression.genes, config)
        except InputError:
            return 0.0
        truth, (predicted, _) = file.labels[rows], baseline.predict(file.expression.rows(rows))
        macro = score(truth, to_label_granularity(truth, predicted), known).macro_f1 or 0.0
        results.append((float(is_correct(truth, predicted).mean()) + macro) / 2)
    return float(np.mean(results))


def _types_of(files: Sequence[TrainingFile]) -> list[str]:
    return sorted({label for file in files for label in file.labels})

"""Evaluate annotation: scores of predicted cell types, beside logistic regression."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from scmulan import _keys
from scmulan._io.adata import read_column
from scmulan._progress import SILENT, Progress
from scmulan._text import format_table, shorten
from scmulan.errors import InputError
from scmulan.evaluate.baselines import LogisticBaseline, LogisticConfig, TrainingFile, Tuning, read_training_file, tune
from scmulan.evaluate.inputs import (
    as_model,
    file_names,
    model_name,
    open_labelled,
    read_expression,
    require_files,
    trained_on,
    with_source,
)
from scmulan.evaluate.labels import LINEAGES, OTHER, LabelMap, as_label_map, canonical
from scmulan.evaluate.scores import (
    Calibration,
    Scores,
    calibrate,
    count_outcomes,
    is_correct,
    known_labels,
    score,
    to_label_granularity,
)
from scmulan.model.loading import LoadedModel
from scmulan.tl._annotate import annotate_cells
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._smooth import smooth_types
from scmulan.vocab.vocabulary import Family

__all__ = ["AnnotationEvaluation", "FileSummary", "PredictorScores", "evaluate_annotation"]

MODEL, SMOOTHED, BASELINE, POOLED = "scmulan", "scmulan, smoothed", "logistic regression", "all files"
MAX_MISTAKES = 10  # rows of the table of mistakes


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSummary:
    """Cells, matrix and genes that were read from one file."""

    name: str
    """Short name of the file."""
    cells: int
    """All cells."""
    labelled: int
    """Cells with a label; only these are scored."""
    unlabelled: int
    """Cells without one (empty, missing, or mapped to nothing)."""
    matrix: str
    """Matrix used by the model, and whether it holds counts or log1p values."""
    genes: str
    """Summary of the model's genes found."""
    trained_on: bool
    """Whether the model's card names this file as training data; its scores then mean nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorScores:
    """Scores of one predictor on the labelled cells of one file, or of all."""

    ontology: Scores
    """The true label or a finer type counts as correct."""
    exact: Scores
    """Only the true label itself counts as correct."""
    groups: Scores | None
    """Scores of groups (lineages) instead of types; None where no groups were requested."""
    outcomes: dict[str, int]
    """Cells whose prediction is ``exact``, ``finer``, ``coarser`` or ``other``."""
    calibration: Calibration | None
    """Calibration of the probability (of being correct by the ontology); None where there is none."""
    unknown_types: dict[str, int]
    """True types, with their cells, for which the predictor's vocabulary holds no correct answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationEvaluation:
    """Scores of a model, and of the baseline, on labelled files."""

    model: str
    """Name of the model."""
    weights_hash: str
    """sha256 of its weights."""
    rule: str
    """Rule of the annotation."""
    labels: str
    """Column of the true labels."""
    files: list[FileSummary]
    """Files that were read."""
    results: dict[str, dict[str, PredictorScores]]
    """Predictor (``scmulan``, ``scmulan, smoothed``, ``logistic regression``) → file, or ``all files`` where there are
    several → scores."""
    baseline: dict[str, Any] | None
    """Training files of the baseline, its settings and how they were chosen."""

    def to_json(self) -> dict[str, Any]:
        """Return the contents as plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Return the scores as text: a line per predictor and file, then per type, then the most frequent mistakes."""
        return "\n\n".join(_sections(self))


def _sections(result: AnnotationEvaluation) -> list[str]:
    read = [
        f"{f.name}: {f.labelled:,} of {f.cells:,} cells labelled ({f.unlabelled:,} left out); {f.matrix}\n  {f.genes}"
        + ("\n  This file is among the model's training data: these scores say nothing." if f.trained_on else "")
        for f in result.files
    ]
    head = f"Cell types of column {result.labels!r} by model {result.model} (rule {result.rule})"
    sections = ["\n".join([head, *read]), _headline(result)]
    last = list(result.results[MODEL])[-1]
    sections.append(_per_type(result, last))
    for predictor in result.results:
        scores = result.results[predictor][last]
        sections.append(f"Mistakes of {predictor}, {last}\n{_mistakes(scores.ontology)}")
        if scores.unknown_types:
            listed = ", ".join(f"{t} ({n:,})" for t, n in scores.unknown_types.items())
            sections.append(f"{predictor} cannot name: {listed}")
    if result.results[MODEL][last].groups is not None:
        sections.append(_lineages(result, last))
    if result.baseline is not None:
        b = result.baseline
        settings = ", ".join(f"{name} {value}" for name, value in b["config"].items())
        chosen = f"chosen by leaving out {len(b['left_out'])} studies in turn" if b["left_out"] else "not tuned"
        n = sum(b["files"].values())
        sections.append(
            f"Logistic regression on {n:,} cells of {len(b['files'])} files, settings {chosen}:\n  {settings}"
        )
    return sections


def _headline(result: AnnotationEvaluation) -> str:
    rows = []
    for predictor, by_file in result.results.items():
        for name, scores in by_file.items():
            o, groups, c = scores.ontology, scores.groups, scores.calibration
            row = [predictor, shorten(name), o.n, o.accuracy, o.macro_f1, o.accuracy_known, scores.exact.accuracy]
            row += [] if groups is None else [groups.accuracy]
            row += [None] * 3 if c is None else [c.mean_right, c.mean_wrong, c.error]
            rows.append(row)
    grouped = result.results[MODEL][next(iter(result.results[MODEL]))].groups is not None
    header = ["predictor", "file", "cells", "accuracy", "macro F1", "known types", "exact"]
    header += ["lineage"] if grouped else []
    note = "accuracy, macro F1: a finer type than the label is right; known types: accuracy where a right answer exists"
    return f"{format_table([*header, 'p right', 'p wrong', 'ECE'], rows, text_columns=2)}\n{note}"


def _per_type(result: AnnotationEvaluation, name: str) -> str:
    others = [predictor for predictor in result.results if predictor != MODEL]
    f1 = {p: {t.name: t.f1 for t in result.results[p][name].ontology.types} for p in others}
    rows = [
        [shorten(t.name), t.n, t.precision, t.recall, t.f1, *(f1[p][t.name] for p in others)]
        for t in result.results[MODEL][name].ontology.types
    ]
    header = ["type", "cells", "precision", "recall", "F1", *(f"F1 {p}" for p in others)]
    return f"Per type, {name}\n{format_table(header, rows)}"


def _mistakes(scores: Scores) -> str:
    c = scores.confusion
    pairs = [
        (n, truth, predicted, sum(row))
        for truth, row in zip(c.truth, c.counts, strict=True)
        for predicted, n in zip(c.predicted, row, strict=True)
        if n and truth != predicted
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [[shorten(t), shorten(p), n, n / total] for n, t, p, total in pairs[:MAX_MISTAKES]]
    rest = sum(pair[0] for pair in pairs[MAX_MISTAKES:])
    text = format_table(["true", "given", "cells", "of the type"], rows, text_columns=2) if rows else "none"
    return f"{text}\nand {rest:,} cells with rarer mistakes" if rest else text


def _lineages(result: AnnotationEvaluation, name: str) -> str:
    parts = []
    for predictor, by_file in result.results.items():
        groups = by_file[name].groups
        assert groups is not None
        order = [*LINEAGES, OTHER]
        seen = sorted(groups.confusion.predicted, key=lambda g: (order.index(g) if g in order else -1, g))
        column = [groups.confusion.predicted.index(g) for g in seen]
        rows = [
            [t.name, t.n, t.recall, t.f1, *(groups.confusion.counts[i][j] for j in column)]
            for i, t in enumerate(groups.types)
        ]
        header = ["lineage", "cells", "recall", "F1", *(f"→ {g}" for g in seen)]
        parts.append(f"Lineages by {predictor}, {name}: {groups.accuracy:.3f} right\n{format_table(header, rows)}")
    return "\n\n".join(parts)


def evaluate_annotation(
    model: LoadedModel | str | Path,
    data: Sequence[str | Path],
    *,
    labels: str,
    mapping: str | Path | LabelMap | None = None,
    lineages: bool = False,
    train: Sequence[str | Path] = (),
    train_labels: str | None = None,
    train_mapping: str | Path | LabelMap | None = None,
    rule: Literal["default", "release"] = "default",
    smooth: bool = False,
    min_genes: int = 20,
    seed: int = 0,
    progress: Progress = SILENT,
) -> AnnotationEvaluation:
    """Score the cell types that a model predicts for the cells of labelled files.

    Parameters
    ----------
    model
        From :func:`scmulan.load`, or its path or name.
    data
        Labelled h5ad files.
    labels
        Column of ``obs`` with the true labels: Cell Ontology ids or names, or the usual short names; cells without
        label are left out and counted.
    mapping
        What the labels mean, where their names do not say it: a table, see
        :func:`scmulan.evaluate.labels.read_label_map`. Its groups, if it has any, are scored too.
    lineages
        Score lineages (:func:`scmulan.evaluate.labels.lineage_of`) beside types, also without a table of groups.
    train
        Labelled files to train logistic regression on (default: no baseline).
    train_labels, train_mapping
        Their column and table (default: the column of ``data``, and no table).
    rule
        Rule of :func:`scmulan.tl.annotate`.
    smooth
        Score the types of :func:`scmulan.tl.smooth` too: neighbours are sought among all cells of a file, with and
        without a label.
    min_genes
        Minimum number of the model's genes that a file must have.
    seed
        Seed of the choice of the baseline's settings.
    progress
        Shows what is being done.

    Returns
    -------
    AnnotationEvaluation

    Raises
    ------
    InputError
        If a file cannot be used, no cell of it is labelled, or one is both tested and trained on.
    """
    require_files(data)
    both = {Path(p).resolve() for p in data} & {Path(p).resolve() for p in train}
    if both:
        raise InputError(f"{min(both)}: is to be tested and trained on; leave it out of one of the two")
    loaded = as_model(model)
    label_map = as_label_map(mapping)
    names = file_names(data)
    training = _read_training(train, train_labels or labels, as_label_map(train_mapping))
    tuning = tune(training, seed=seed, progress=progress) if training else None
    files = []
    for path, name in zip(data, names, strict=True):
        file = _LabelledFile(path, name, labels, label_map)
        progress.log(f"{name}: naming cells")
        file.annotate(loaded, rule, smooth=smooth, min_genes=min_genes)
        if tuning is not None:
            progress.log(f"{name}: training logistic regression")
            file.annotate_with_baseline(training, tuning.config)
        files.append(file)
    vocabularies = {MODEL: loaded.vocabulary.names(Family.FINE)}
    if smooth:
        vocabularies[SMOOTHED] = vocabularies[MODEL]
    if tuning is not None:
        vocabularies[BASELINE] = sorted({t for file in files for t in file.baseline_types})
    groups = label_map if lineages or label_map.groups else None
    return AnnotationEvaluation(
        model=model_name(loaded),
        weights_hash=loaded.weights_hash,
        rule=rule,
        labels=labels,
        files=[file.summary for file in files],
        results={
            predictor: _score_files([file.predictions[predictor] for file in files], names, vocabulary, groups)
            for predictor, vocabulary in vocabularies.items()
        },
        baseline=None if tuning is None else _describe_baseline(training, tuning, files),
    )


def _read_training(paths: Sequence[str | Path], labels: str, mapping: LabelMap) -> list[TrainingFile]:
    return [read_training_file(p, labels, mapping, name) for p, name in zip(paths, file_names(paths), strict=True)]


class _Predictions(NamedTuple):
    """Labels of the labelled cells of one file by one predictor, ``[cells]`` each."""

    raw: np.ndarray  # true labels as in the file
    truth: np.ndarray  # their cell types
    predicted: np.ndarray
    probability: np.ndarray


class _LabelledFile:
    """Labelled cells of one file, and what each predictor predicts for them."""

    def __init__(self, path: str | Path, name: str, labels: str, label_map: LabelMap) -> None:
        self.path, self.name = path, name
        self.adata = open_labelled(path)
        self.raw = read_column(self.adata.obs, labels, str(path))
        label_map.check(self.raw, str(path))
        self.truth = np.array([label_map.term(label) for label in self.raw], dtype=object)
        self.rows = np.flatnonzero(self.truth != "")
        if not len(self.rows):
            raise InputError(f"{path}: no labelled cell in column {labels!r}; expected cell types or CL ids")
        self.predictions: dict[str, _Predictions] = {}
        self.baseline_types: list[str] = []
        self.n_baseline_genes = 0

    def annotate(
        self, model: LoadedModel, rule: Literal["default", "release"], *, smooth: bool, min_genes: int
    ) -> None:
        """Predict types by the model and, if requested, by the vote of neighbours."""
        with with_source(self.path):
            reading = ReadOptions(min_genes=min_genes, precision="fp32")
            found = annotate_cells(self.adata, model, rule=rule, reading=reading, keep_hidden=smooth)
        self.summary = FileSummary(
            name=self.name,
            cells=len(self.raw),
            labelled=len(self.rows),
            unlabelled=len(self.raw) - len(self.rows),
            matrix=f"{found.uns['matrix']['where']}, {found.uns['matrix']['state']}",
            genes=str(found.uns["summary"]).splitlines()[0],
            trained_on=trained_on(model, self.path),
        )
        self._add(MODEL, _canonical_types(found.obs[_keys.CELL_TYPE]), found.obs[_keys.PROBABILITY].to_numpy())
        if found.hidden is not None:
            smoothed = smooth_types(found.obs[_keys.CELL_TYPE], found.hidden.load())
            self._add(
                SMOOTHED, _canonical_types(smoothed[_keys.SMOOTHED]), smoothed[_keys.SMOOTHED_FRACTION].to_numpy()
            )

    def annotate_with_baseline(self, training: Sequence[TrainingFile], config: LogisticConfig) -> None:
        """Predict types by logistic regression on the genes shared with the training files."""
        cells = read_expression(open_labelled(self.path), str(self.path))
        baseline = LogisticBaseline(training, cells.genes, config)
        self._add(BASELINE, *baseline.predict(cells))
        self.baseline_types, self.n_baseline_genes = baseline.types, len(baseline.genes)

    def _add(self, predictor: str, types: np.ndarray, probability: np.ndarray) -> None:
        rows = self.rows
        self.predictions[predictor] = _Predictions(self.raw[rows], self.truth[rows], types[rows], probability[rows])


def _canonical_types(labels: pd.Series) -> np.ndarray:
    return np.array([canonical(label) for label in labels.astype(str)], dtype=object)


def _score_files(
    files: Sequence[_Predictions], names: Sequence[str], vocabulary: Sequence[str], groups: LabelMap | None
) -> dict[str, PredictorScores]:
    """Score the predictions for each file and, where there are several, for all cells together."""
    scores = {name: _score(file, vocabulary, groups) for name, file in zip(names, files, strict=True)}
    if len(files) > 1:
        pooled = _Predictions(*(np.concatenate(arrays) for arrays in zip(*files, strict=True)))
        scores[POOLED] = _score(pooled, vocabulary, groups)
    return scores


def _score(cells: _Predictions, vocabulary: Sequence[str], groups: LabelMap | None) -> PredictorScores:
    truth, predicted = cells.truth, cells.predicted
    known = known_labels(truth, vocabulary)
    names, n = np.unique(truth.astype(str), return_counts=True)
    return PredictorScores(
        ontology=score(truth, to_label_granularity(truth, predicted), known),
        exact=score(truth, predicted, {canonical(name) for name in vocabulary}),
        groups=None if groups is None else _score_groups(cells, vocabulary, groups),
        outcomes=count_outcomes(truth, predicted),
        calibration=calibrate(is_correct(truth, predicted), cells.probability),
        unknown_types={t: int(c) for t, c in zip(names, n, strict=True) if t not in known},
    )


def _score_groups(cells: _Predictions, vocabulary: Sequence[str], label_map: LabelMap) -> Scores:
    group_of_label = {label: label_map.true_group(label) for label in set(cells.raw)}
    group_of_type = {term: label_map.group_of(term) for term in {*cells.predicted, *vocabulary}}
    truth = np.array([group_of_label[label] for label in cells.raw], dtype=object)
    predicted = np.array([group_of_type[term] for term in cells.predicted], dtype=object)
    return score(truth, predicted, {group_of_type[name] for name in vocabulary})


def _describe_baseline(
    training: Sequence[TrainingFile], tuning: Tuning, files: Sequence[_LabelledFile]
) -> dict[str, Any]:
    return {
        "files": {file.name: len(file.labels) for file in training},
        "types": len({label for file in training for label in file.labels}),
        "genes": [file.n_baseline_genes for file in files],
        **asdict(tuning),
    }

"""Whether a model names cells rightly, and better than logistic regression does.

What the evaluation of an annotation found: numbers for machines, tables for people.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from scmulan import _keys
from scmulan._io.adata import read_column
from scmulan._text import grid, shorten
from scmulan.errors import InputError
from scmulan.evaluate.baselines import LogisticBaseline, LogisticConfig, TrainingFile, Tuning, read_training_file, tune
from scmulan.evaluate.cells import (
    as_model,
    file_names,
    model_name,
    named,
    need_files,
    open_labelled,
    read_genes,
    trained_on,
)
from scmulan.evaluate.labels import LINEAGES, OTHER, LabelMap, canonical, read_label_map
from scmulan.evaluate.scores import Calibration, Scores, agreement, answerable, calibrate, outcomes, resolve, score
from scmulan.model.loading import LoadedModel
from scmulan.tl._annotate import annotate_cells
from scmulan.tl._smooth import smooth_types
from scmulan.vocab.vocabulary import Family

MODEL, SMOOTHED, BASELINE, POOLED = "scmulan", "scmulan, smoothed", "logistic regression", "all files"
MISTAKES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class FileAccount:
    """What was read of one file."""

    name: str
    """Short name of the file."""
    cells: int
    """All cells."""
    labelled: int
    """Cells with a label: only these are scored."""
    unlabelled: int
    """Cells without one (empty, missing, or mapped to nothing)."""
    matrix: str
    """Matrix used by the model, and its state."""
    genes: str
    """Genes of the model found."""
    trained_on: bool
    """Whether the model's card names this file as training data: its scores are then worth nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """Scores of one predictor on the labelled cells of one file, or of all."""

    ontology: Scores
    """A finer prediction than the true label is right."""
    exact: Scores
    """Only the true label itself is right."""
    groups: Scores | None
    """True and predicted group (lineage) are the same; None where no groups were asked for."""
    outcomes: dict[str, int]
    """Cells whose prediction is ``exact``, ``finer``, ``coarser`` or ``other``."""
    calibration: Calibration | None
    """Whether the probability is that of being right (by the ontology); None where there is none."""
    unknown_types: dict[str, int]
    """True types, with their cells, for which the predictor has no right answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationEvaluation:
    """Scores of a model, and of the baseline, on labelled files."""

    model: str
    """Name of the model."""
    weights_hash: str
    """sha256 of its weights."""
    rule: str
    """Rule by which it named cells."""
    labels: str
    """Column of the true labels."""
    files: list[FileAccount]
    """What was read."""
    results: dict[str, dict[str, Named]]
    """Predictor (``scmulan``, ``scmulan, smoothed``, ``logistic regression``) → file, or ``all files`` where there are
    several → scores."""
    baseline: dict[str, Any] | None
    """Training files, settings and their choice of the baseline."""

    def to_json(self) -> dict[str, Any]:
        """Contents as plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Scores as text: a line per predictor and file, then per type, then the most frequent mistakes."""
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
        named_by = result.results[predictor][last]
        sections.append(f"Mistakes of {predictor}, {last}\n{_mistakes(named_by.ontology)}")
        if named_by.unknown_types:
            listed = ", ".join(f"{t} ({n:,})" for t, n in named_by.unknown_types.items())
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
        for name, n in by_file.items():
            o, group, cal = n.ontology, n.groups, n.calibration
            row = [predictor, shorten(name), o.n, o.accuracy, o.macro_f1, o.accuracy_known, n.exact.accuracy]
            row += [] if group is None else [group.accuracy]
            row += [None] * 3 if cal is None else [cal.mean_right, cal.mean_wrong, cal.error]
            rows.append(row)
    grouped = result.results[MODEL][next(iter(result.results[MODEL]))].groups is not None
    header = ["predictor", "file", "cells", "accuracy", "macro F1", "known types", "exact"]
    header += ["lineage"] if grouped else []
    note = "accuracy, macro F1: a finer type than the label is right; known types: accuracy where a right answer exists"
    return f"{grid([*header, 'p right', 'p wrong', 'ECE'], rows, text=2)}\n{note}"


def _per_type(result: AnnotationEvaluation, name: str) -> str:
    others = [predictor for predictor in result.results if predictor != MODEL]
    f1 = {p: {t.name: t.f1 for t in result.results[p][name].ontology.types} for p in others}
    rows = [
        [shorten(t.name), t.n, t.precision, t.recall, t.f1, *(f1[p][t.name] for p in others)]
        for t in result.results[MODEL][name].ontology.types
    ]
    header = ["type", "cells", "precision", "recall", "F1", *(f"F1 {p}" for p in others)]
    return f"Per type, {name}\n{grid(header, rows)}"


def _mistakes(scores: Scores) -> str:
    c = scores.confusion
    pairs = [
        (n, truth, predicted, sum(row))
        for truth, row in zip(c.truth, c.counts, strict=True)
        for predicted, n in zip(c.predicted, row, strict=True)
        if n and truth != predicted
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [[shorten(t), shorten(p), n, n / total] for n, t, p, total in pairs[:MISTAKES]]
    rest = sum(pair[0] for pair in pairs[MISTAKES:])
    text = grid(["true", "given", "cells", "of the type"], rows, text=2) if rows else "none"
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
        parts.append(f"Lineages by {predictor}, {name}: {groups.accuracy:.3f} right\n{grid(header, rows)}")
    return "\n\n".join(parts)


__all__ = ["AnnotationEvaluation", "FileAccount", "Named", "evaluate_annotation"]

Progress = Callable[[str], None]


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
    progress: Progress = lambda text: None,
) -> AnnotationEvaluation:
    """Score the cell types that a model gives to the cells of labelled files.

    Parameters
    ----------
    model
        From :func:`scmulan.load`, or its path or name.
    data
        Labelled h5ad files.
    labels
        Column of ``obs`` with the true labels: Cell Ontology ids or names, or names of the field; cells without are
        left out and counted.
    mapping
        What the labels mean, where their names do not say it: a table, see
        :func:`scmulan.evaluate.labels.read_label_map`. Its groups, if it has any, are scored too.
    lineages
        Score lineages (:func:`scmulan.evaluate.labels.lineage_of`) beside types, also without a table of groups.
    train
        Labelled files to train logistic regression on (default: no baseline).
    train_labels, train_mapping
        Their column and table (default: as for ``data``, and none).
    rule
        Rule of :func:`scmulan.tl.annotate`.
    smooth
        Score the types that :func:`scmulan.tl.smooth` makes of them, too: neighbours are sought within each file, with
        and without a label.
    min_genes
        Fewest genes of the model that a file must have.
    seed
        Of the choice of the baseline's settings.
    progress
        Called with a line of text now and then.

    Returns
    -------
    AnnotationEvaluation

    Raises
    ------
    InputError
        If a file cannot be used, no cell of it is labelled, or one is both tested and trained on.
    """
    need_files(data)
    both = {Path(p).resolve() for p in data} & {Path(p).resolve() for p in train}
    if both:
        raise InputError(f"{min(both)}: is to be tested and trained on; leave it out of one of the two")
    loaded = as_model(model)
    table = _read_map(mapping) or LabelMap()
    grouped = lineages or bool(table.groups)
    names = file_names(data)
    training = _read_training(train, train_labels or labels, _read_map(train_mapping))
    tuning = tune(training, seed=seed, progress=progress) if training else None
    accounts, cells = [], []
    for path, name in zip(data, names, strict=True):
        progress(f"{name}: naming cells")
        account, found = _name_cells(loaded, path, name, labels, table, rule, smooth, min_genes)
        accounts.append(account)
        if tuning is not None:
            progress(f"{name}: training logistic regression")
            _name_with_baseline(found, path, training, tuning.config)
        cells.append(found)
    vocabularies = {MODEL: loaded.vocabulary.names(Family.FINE)}
    if smooth:
        vocabularies[SMOOTHED] = vocabularies[MODEL]
    if tuning is not None:
        vocabularies[BASELINE] = sorted({t for found in cells for t in found.baseline_types})
    results: dict[str, dict[str, Named]] = {}
    for predictor, vocabulary in vocabularies.items():
        parts = [found.part(predictor) for found in cells]
        results[predictor] = {
            name: _score(part, vocabulary, table if grouped else None) for name, part in zip(names, parts, strict=True)
        }
        if len(parts) > 1:
            pooled = _Part(*(np.concatenate([getattr(p, f) for p in parts]) for f in _Part.__slots__))
            results[predictor][POOLED] = _score(pooled, vocabulary, table if grouped else None)
    return AnnotationEvaluation(
        model=model_name(loaded),
        weights_hash=loaded.weights_hash,
        rule=rule,
        labels=labels,
        files=accounts,
        results=results,
        baseline=None if tuning is None else _describe(training, tuning, cells),
    )


def _read_map(mapping: str | Path | LabelMap | None) -> LabelMap | None:
    return mapping if mapping is None or isinstance(mapping, LabelMap) else read_label_map(mapping)


def _read_training(paths: Sequence[str | Path], labels: str, mapping: LabelMap | None) -> list[TrainingFile]:
    return [read_training_file(p, labels, mapping, name) for p, name in zip(paths, file_names(paths), strict=True)]


@dataclass(slots=True)
class _Part:
    """Labels of cells by one predictor."""

    raw: np.ndarray  # true labels as in the file
    truth: np.ndarray  # their cell types
    predicted: np.ndarray
    probability: np.ndarray


@dataclass(slots=True)
class _FileCells:
    """Labelled cells of one file with what each predictor says."""

    rows: np.ndarray
    raw: np.ndarray
    truth: np.ndarray
    said: dict[str, tuple[np.ndarray, np.ndarray]]  # predictor → types and their probabilities
    baseline_types: Sequence[str] = ()
    baseline_genes: int = 0

    def part(self, predictor: str) -> _Part:
        return _Part(self.raw, self.truth, *self.said[predictor])


def _name_cells(
    model: LoadedModel,
    path: str | Path,
    name: str,
    labels: str,
    table: LabelMap,
    rule: Literal["default", "release"],
    smooth: bool,
    min_genes: int,
) -> tuple[FileAccount, _FileCells]:
    adata = open_labelled(path)
    raw = read_column(adata.obs, labels, str(path))
    table.check(raw, str(path))
    truth = np.array([table.term(label) for label in raw], dtype=object)
    rows = np.flatnonzero(truth != "")
    if not len(rows):
        raise InputError(f"{path}: no labelled cell in column {labels!r}; expected cell types or CL ids")
    with named(path):
        found = annotate_cells(adata, model, rule=rule, min_genes=min_genes, precision="fp32", keep_hidden=smooth)
    account = FileAccount(
        name=name,
        cells=len(raw),
        labelled=len(rows),
        unlabelled=len(raw) - len(rows),
        matrix=f"{found.uns['matrix']['where']}, {found.uns['matrix']['state']}",
        genes=str(found.uns["summary"]).splitlines()[0],
        trained_on=trained_on(model, path),
    )
    said = {MODEL: (_types(found.obs[_keys.CELL_TYPE])[rows], found.obs[_keys.PROBABILITY].to_numpy()[rows])}
    if found.hidden is not None:
        voted = smooth_types(found.obs[_keys.CELL_TYPE], found.hidden.load())
        said[SMOOTHED] = _types(voted[_keys.SMOOTHED])[rows], voted[_keys.SMOOTHED_FRACTION].to_numpy()[rows]
    return account, _FileCells(rows, raw[rows], truth[rows], said)


def _types(labels: pd.Series) -> np.ndarray:
    return np.array([canonical(label) for label in labels.astype(str)], dtype=object)


def _name_with_baseline(
    found: _FileCells, path: str | Path, training: Sequence[TrainingFile], config: LogisticConfig
) -> None:
    cells = read_genes(open_labelled(path), str(path))
    baseline = LogisticBaseline(training, cells.genes, config)
    predicted, probability = baseline.predict(cells)
    found.said[BASELINE] = predicted[found.rows], probability[found.rows]
    found.baseline_types, found.baseline_genes = baseline.types, len(baseline.genes)


def _score(part: _Part, vocabulary: Sequence[str], groups: LabelMap | None) -> Named:
    truth, predicted = part.truth, part.predicted
    spelled = {canonical(word) for word in vocabulary}
    known = answerable(truth, vocabulary)
    right = agreement(truth, predicted)
    names, n = np.unique(truth.astype(str), return_counts=True)
    return Named(
        ontology=score(truth, resolve(truth, predicted), known),
        exact=score(truth, predicted, spelled),
        groups=None if groups is None else _score_groups(part, vocabulary, groups),
        outcomes=outcomes(truth, predicted),
        calibration=calibrate(right, part.probability),
        unknown_types={t: int(c) for t, c in zip(names, n, strict=True) if t not in known},
    )


def _score_groups(part: _Part, vocabulary: Sequence[str], table: LabelMap) -> Scores:
    of_label = {label: table.true_group(label) for label in set(part.raw)}
    of_type = {term: table.group_of(term) for term in {*part.predicted, *vocabulary}}
    truth = np.array([of_label[label] for label in part.raw], dtype=object)
    predicted = np.array([of_type[term] for term in part.predicted], dtype=object)
    return score(truth, predicted, {of_type[word] for word in vocabulary})


def _describe(training: Sequence[TrainingFile], tuning: Tuning, cells: Sequence[_FileCells]) -> dict[str, Any]:
    return {
        "files": {file.name: len(file.labels) for file in training},
        "types": len({label for file in training for label in file.labels}),
        "genes": [found.baseline_genes for found in cells],
        **asdict(tuning),
    }

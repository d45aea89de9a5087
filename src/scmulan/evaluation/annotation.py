"""Whether a model names cells rightly, and better than logistic regression does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from scmulan.errors import InputError
from scmulan.evaluation.annotation_result import (
    BASELINE,
    MODEL,
    POOLED,
    SMOOTHED,
    AnnotationEvaluation,
    FileAccount,
    Named,
)
from scmulan.evaluation.baselines import LogisticBaseline, LogisticConfig, TrainingFile, read_training_file
from scmulan.evaluation.cells import (
    as_model,
    file_names,
    model_name,
    named,
    need_files,
    open_labelled,
    read_genes,
    trained_on,
)
from scmulan.evaluation.labels import LabelMap, canonical, read_column, read_label_map
from scmulan.evaluation.scores import Scores, agreement, answerable, calibrate, outcomes, resolve, score
from scmulan.evaluation.tuning import Tuning, tune
from scmulan.language.vocabulary import Family
from scmulan.model.checkpoint import LoadedModel
from scmulan.tl.annotate import KEY, annotate_cells
from scmulan.tl.smooth import AGREEMENT, smooth_types
from scmulan.tl.smooth import KEY as SMOOTHED_KEY

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
        :func:`scmulan.evaluation.labels.read_label_map`. Its groups, if it has any, are scored too.
    lineages
        Score lineages (:func:`scmulan.evaluation.labels.lineage_of`) beside types, also without a table of groups.
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
        found = annotate_cells(adata, model, rule=rule, min_genes=min_genes, precision="fp32", keep_state=smooth)
    account = FileAccount(
        name=name,
        cells=len(raw),
        labelled=len(rows),
        unlabelled=len(raw) - len(rows),
        matrix=f"{found.uns['matrix']['where']}, {found.uns['matrix']['state']}",
        genes=str(found.uns["summary"]).splitlines()[0],
        trained_on=trained_on(model, path),
    )
    said = {MODEL: (_types(found.obs[KEY])[rows], found.obs[f"{KEY}_probability"].to_numpy()[rows])}
    if found.state is not None:
        voted = smooth_types(found.obs[KEY], found.state.load())
        said[SMOOTHED] = _types(voted[SMOOTHED_KEY])[rows], voted[AGREEMENT].to_numpy()[rows]
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

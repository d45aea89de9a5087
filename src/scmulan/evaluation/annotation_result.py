"""What the evaluation of an annotation found: numbers for machines, tables for people."""

from dataclasses import asdict, dataclass
from typing import Any

from scmulan.evaluation.labels import LINEAGES, OTHER
from scmulan.evaluation.scores import Calibration, Scores
from scmulan.evaluation.text import grid, shorten

__all__ = ["BASELINE", "MODEL", "POOLED", "SMOOTHED", "AnnotationEvaluation", "FileAccount", "Named"]

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

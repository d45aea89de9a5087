"""From annotated cells to one HTML file."""

import datetime
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from anndata import AnnData

import scmulan
from scmulan.errors import ScmulanError
from scmulan.files import atomic_path
from scmulan.language.matrix import ExpressionMatrix, choose_matrix
from scmulan.report import methods, words
from scmulan.report.palette import OTHER, REAL, WRITTEN
from scmulan.report.results import KEY, Results, find_card, read_info, read_results

MOST_DRAWN = 20_000
MOST_NAMED = 50
# Settings of the generation in the order and the words in which the page gives them.
_SETTINGS = {
    "n": "Cells",
    "seed": "Seed",
    "temperature": "Temperature",
    "rule": "Rule",
    "values": "Values",
    "max_words": "Most words",
    "panel": "Genes allowed",
}
_EXTRAS = {"jinja2": "jinja2", "matplotlib": "matplotlib", "umap": "umap-learn"}


def write_report(
    annotated: AnnData,
    path: str | os.PathLike[str],
    *,
    generated: AnnData | None = None,
    command: str = "",
    title: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a report on annotated cells: one HTML file that needs nothing else, for a person to read.

    Parameters
    ----------
    annotated
        Cells with the results of :func:`scmulan.tl.annotate` and, for the map, of :func:`scmulan.tl.embed`; backed
        files are read in blocks. It is not changed.
    path
        File to write; one that exists is replaced.
    generated
        Cells of :func:`scmulan.tl.generate`, to be shown beside the real cells of their type.
    command
        Command that made the report, shown in it.
    title
        Heading of the page.
    card
        Training card of the model (``card`` of a loaded model), which says what it knows. That of a packaged model
        is found by the hash of its weights.

    Raises
    ------
    ScmulanError
        If a package that reports need is missing.
    InputError
        If the cells were not annotated, or ``generated`` has none.
    MatrixError, GeneError
        If the expression values cannot be used.
    OutputError
        If the file cannot be written; nothing is left behind then.
    """
    missing = [package for module, package in _EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise ScmulanError(f"a report needs {' and '.join(missing)}: pip install 'scmulan[report]'")
    html = render(annotated, generated=generated, command=command, title=title, card=card)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render(
    annotated: AnnData,
    *,
    generated: AnnData | None = None,
    command: str = "",
    title: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> str:
    """Return the page of :func:`write_report` as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    card = card or find_card(str(read_info(annotated).get("weights_hash")))
    results = read_results(annotated, card)
    used = results.info.get("matrix", {})
    matrix = choose_matrix(annotated, layer=used.get("where"), state=used.get("state"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=PackageLoader("scmulan.report"),
    )  # fmt: skip
    environment.filters.update(percent=words.percent, n="{:,}".format, listed=words.listed)
    content = {
        "title": title or "Cell types by scMulan",
        "lead": words.lead(results, generated.n_obs if generated is not None else 0),
        "results": results,
        "info": results.info,
        "n_genes": matrix.n_genes,
        "matrix": matrix,
        "notes": words.notes(results),
        "card": card,
        "trained": bool(card and card.get("cell_types")),
        "model_texts": methods.model_texts(card) if card else [],
        "key": KEY,
        "row_of": {row.name: row for row in results.types},
        "real": REAL,
        "written": WRITTEN,
        "other": OTHER,
        "doubtful": _doubtful(annotated, results),
        **_prediction(results, matrix),
        **_generation(annotated, results, generated, matrix),
        "command": command,
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
    }
    plane, markers = content["plane"], content["markers"]
    content["map_text"] = words.map_text(results, content["drawn"], plane.method) if plane else None
    content["methods"] = methods.methods_text(
        results, card, _matrix_words(matrix), plane.method if plane else None, markers is not None
    )
    return environment.get_template("report.html").render(content)


def _prediction(results: Results, matrix: ExpressionMatrix) -> dict[str, Any]:
    """Draw maps and marker genes."""
    from markupsafe import Markup

    from scmulan.report import figures
    from scmulan.report.layout import lay_out, sample
    from scmulan.report.markers import find_markers

    content: dict[str, Any] = {"plane": None, "drawn": 0, "type_map": None, "probability_map": None}
    if results.embedding is not None:
        cells = np.flatnonzero(results.status != "empty")
        cells = cells[sample(len(cells), MOST_DRAWN)]
        content["drawn"] = len(cells)
        if len(cells):
            plane = content["plane"] = lay_out(results.embedding[cells])
            content["type_map"] = Markup(figures.map_by_type(plane, results.label[cells], results.types))
            if np.isfinite(results.probability[cells]).all():
                svg = figures.map_by_probability(plane, results.probability[cells], results.threshold)
                content["probability_map"] = Markup(svg)
    shown = [row.name for row in results.types if row.shown]
    label = np.where(results.status == "empty", "", results.label)
    markers = content["markers"] = find_markers(matrix, label, shown)
    content["dot_plot"] = Markup(figures.dot_plot(markers, results.types)) if markers and markers.genes else None
    return content


def _generation(
    annotated: AnnData, results: Results, generated: AnnData | None, matrix: ExpressionMatrix
) -> dict[str, Any]:
    """Compare generated cells with real ones."""
    if generated is None:
        return {"generated": None}
    from markupsafe import Markup

    from scmulan.report import compare, figures

    comparisons = compare.compare(annotated, results, generated, matrix)
    settings = read_info(generated)
    used = settings.get("parameters", {}).get("generate", {})
    pictures = []
    for i, comparison in enumerate(comparisons):
        drawn = {
            "words": figures.words_per_cell(comparison, f"words-{i}"),
            "map": figures.joint_map(comparison, f"joint-{i}"),
        }
        if comparison.real is not None:
            drawn["mean"] = figures.gene_scatter(comparison, "mean", f"mean-{i}")
            drawn["detected"] = figures.gene_scatter(comparison, "detected", f"detected-{i}")
        pictures.append(
            {name: Markup(svg) for name, svg in drawn.items()} | {"text": words.comparison_text(comparison)}
        )
    return {
        "generated": {
            "cells": generated.n_obs,
            "prompts": compare.count_prompts(generated),
            "comparisons": list(zip(comparisons, pictures, strict=True)),
            "settings": settings,
            "parameters": {text: used[name] for name, text in _SETTINGS.items() if name in used},
            "notes": words.generation_notes(results, settings, comparisons, generated.n_vars),
        }
    }


def _doubtful(annotated: AnnData, results: Results) -> dict[str, Any]:
    """Which cells should be looked at again: the least probable ones by name, and which types exclude each other."""
    cells = np.flatnonzero(results.status != "confident")
    order = cells[np.argsort(results.probability[cells], kind="stable")][:MOST_NAMED]
    names = annotated.obs_names
    clash = results.status == "conflict"
    pairs: dict[tuple[str, str], int] = {}
    for pair in zip(results.label[clash], results.coarse[clash], strict=True):
        pairs[pair] = pairs.get(pair, 0) + 1
    return {
        "cells": len(cells),
        "where": words.where_doubtful(results),
        "named": [
            (str(names[i]), results.label[i], results.coarse[i], float(results.probability[i]), results.status[i])
            for i in order
        ],
        "pairs": sorted(pairs.items(), key=lambda item: -item[1])[:10],
    }


def _matrix_words(matrix: ExpressionMatrix) -> str:
    if matrix.state == "counts":
        return f"the counts in {matrix.where} (normalised to 10,000 per cell and log-transformed)"
    return f"the log1p values in {matrix.where}"


def _versions() -> dict[str, str]:
    found = {
        "scmulan": scmulan.__version__,
        "python": platform.python_version(),
    }
    return found | {name: version(name) for name in ("anndata", "numpy", "scipy", "umap-learn", "matplotlib")}

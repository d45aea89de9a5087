"""From annotated cells to one HTML file.

A report from file to file.
"""

import datetime
import os
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

import scmulan
from scmulan._io.adata import atomic_path, check_output, open_input
from scmulan._keys import CELL_TYPE
from scmulan.errors import OutputError, ScmulanError
from scmulan.model.folder import read_card, resolve_model
from scmulan.report import text
from scmulan.report.results import OTHER, REAL, WRITTEN, Results, find_card, read_info, read_results
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix

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
    matrix = choose_matrix(annotated, layer=used.get("where"), matrix_kind=used.get("state"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=PackageLoader("scmulan.report"),
    )  # fmt: skip
    environment.filters.update(percent=text.percent, n="{:,}".format, listed=text.listed)
    content = {
        "title": title or "Cell types by scMulan",
        "lead": text.lead(results, generated.n_obs if generated is not None else 0),
        "results": results,
        "info": results.info,
        "n_genes": matrix.n_genes,
        "matrix": matrix,
        "notes": text.notes(results),
        "card": card,
        "trained": bool(card and card.get("cell_types")),
        "model_texts": text.model_texts(card) if card else [],
        "key": CELL_TYPE,
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
    content["map_text"] = text.map_text(results, content["drawn"], plane.method) if plane else None
    content["methods"] = text.methods_text(
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
        pictures.append({name: Markup(svg) for name, svg in drawn.items()} | {"text": text.comparison_text(comparison)})
    return {
        "generated": {
            "cells": generated.n_obs,
            "prompts": compare.count_prompts(generated),
            "comparisons": list(zip(comparisons, pictures, strict=True)),
            "settings": settings,
            "parameters": {text: used[name] for name, text in _SETTINGS.items() if name in used},
            "notes": text.generation_notes(results, settings, comparisons, generated.n_vars),
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
        "where": text.where_doubtful(results),
        "named": [
            (str(names[i]), results.label[i], results.coarse[i], float(results.probability[i]), results.status[i])
            for i in order
        ],
        "pairs": sorted(pairs.items(), key=lambda item: -item[1])[:10],
    }


def _matrix_words(matrix: ExpressionMatrix) -> str:
    if matrix.matrix_kind == "counts":
        return f"the counts in {matrix.where} (normalised to 10,000 per cell and log-transformed)"
    return f"the log1p values in {matrix.where}"


def _versions() -> dict[str, str]:
    found = {
        "scmulan": scmulan.__version__,
        "python": platform.python_version(),
    }
    return found | {name: version(name) for name in ("anndata", "numpy", "scipy", "umap-learn", "matplotlib")}


def report_file(
    annotated: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    generated: str | os.PathLike[str] | None = None,
    model: str | Path | None = None,
    title: str | None = None,
    command: str = "",
    force: bool = False,
) -> None:
    """Write a report on a file of annotated cells.

    Parameters
    ----------
    annotated
        What ``scmulan annotate`` wrote; its matrices are never loaded whole.
    out
        HTML file.
    generated
        What ``scmulan generate`` wrote.
    model
        Model that was used, whose card says what it knows; a packaged one is found without being named.
    title, command
        As in :func:`scmulan.report.write_report`.
    force
        Replace a page that exists.

    Raises
    ------
    ScmulanError
        If anything cannot be used as given; then nothing is written.
    """
    inputs = [Path(path) for path in (annotated, generated) if path is not None]
    if any(os.path.realpath(path) == os.path.realpath(out) for path in inputs):
        raise OutputError(f"{out}: is an input too; give another path for the page")
    check_output(out, force, suffixes=(".html", ".htm"))
    card = None if model is None else read_card(resolve_model(model))
    with ExitStack() as stack:
        open_study = [open_input(path, backed=True) for path in inputs]
        for adata in open_study:
            if adata.isbacked:
                stack.callback(adata.file.close)
        cells, written = (*open_study, None)[:2]
        write_report(cells, out, generated=written, command=command, title=title, card=card)

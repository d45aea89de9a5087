"""Report on annotated cells as one HTML file: from files, from AnnData, and the content of its sections."""

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
from scmulan._io.adata import open_input
from scmulan._io.outputs import atomic_path, check_output
from scmulan._keys import CELL_TYPE
from scmulan.errors import OutputError, ScmulanError
from scmulan.model.folder import read_card, resolve_model
from scmulan.report import text
from scmulan.report.compare import Comparison, compare, count_prompts
from scmulan.report.layout import lay_out, sample_rows
from scmulan.report.markers import find_markers
from scmulan.report.results import (
    GENERATED_COLOUR,
    OTHER_COLOUR,
    REAL_COLOUR,
    Results,
    find_card,
    read_info,
    read_results,
)
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix

MAX_CELLS_DRAWN = 20_000
MAX_CELLS_LISTED = 50
# Parameters of the generation in the order of the page, and their names there.
GENERATION_PARAMETERS = {
    "n": "Cells",
    "seed": "Seed",
    "temperature": "Temperature",
    "rule": "Rule",
    "values": "Values",
    "max_words": "Most words",
    "panel": "Genes allowed",
}
# Packages that only reports need: module → name on PyPI.
PACKAGES = {"jinja2": "jinja2", "matplotlib": "matplotlib", "umap": "umap-learn"}


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
    """Write a report on a file of annotated cells: one HTML file that needs nothing else.

    Parameters
    ----------
    annotated
        Output of ``scmulan annotate``; its matrices are never loaded whole.
    out
        HTML file.
    generated
        Output of ``scmulan generate``.
    model
        Model that was used, for its card; a packaged one is found by the hash of its weights.
    title, command
        As in :func:`scmulan.report.write_report`.
    force
        Replace an existing page.

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
        opened = [open_input(path, backed=True) for path in inputs]
        for adata in opened:
            if adata.isbacked:
                stack.callback(adata.file.close)
        cells, generated_cells = (*opened, None)[:2]
        write_report(cells, out, generated=generated_cells, command=command, title=title, card=card)


def write_report(
    annotated: AnnData,
    path: str | os.PathLike[str],
    *,
    generated: AnnData | None = None,
    command: str = "",
    title: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a report on annotated cells: one HTML file that needs nothing else.

    Parameters
    ----------
    annotated
        Cells with the results of :func:`scmulan.tl.annotate` and, for the map, of :func:`scmulan.tl.embed`; backed
        files are read in blocks. It is not changed.
    path
        File to write; one that exists is replaced.
    generated
        Cells of :func:`scmulan.tl.generate`, shown beside the real cells of their type.
    command
        Command that made the report, shown in it.
    title
        Heading of the page.
    card
        Training card of the model (``card`` of a loaded model): what it was trained on. The card of a packaged model
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
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
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
    environment.filters.update(percent=text.percent, n="{:,}".format)
    maps = _draw_maps(results)
    markers = _draw_markers(results, matrix)
    method = maps["map_method"]
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
        "real_colour": REAL_COLOUR,
        "generated_colour": GENERATED_COLOUR,
        "other_colour": OTHER_COLOUR,
        "doubtful": _list_doubtful(annotated, results),
        **maps,
        **markers,
        "generated": None if generated is None else _compare_generated(annotated, results, generated, matrix),
        "methods": text.methods_text(
            results, card, _describe_matrix(matrix), method, markers=markers["markers"] is not None
        ),
        "command": command,
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
    }
    return environment.get_template("report.html").render(content)


def _draw_maps(results: Results) -> dict[str, Any]:
    """Draw maps of the cells by type and by probability, from their embedding."""
    from markupsafe import Markup

    from scmulan.report import figures

    content: dict[str, Any] = dict.fromkeys(("map_method", "map_text", "type_map", "probability_map"))
    cells = np.flatnonzero(results.status != "empty")
    if results.embedding is None or not len(cells):
        return content
    cells = cells[sample_rows(len(cells), MAX_CELLS_DRAWN)]
    layout = lay_out(results.embedding[cells])
    content["map_method"] = layout.method
    content["map_text"] = text.map_text(results, len(cells), layout.method)
    content["type_map"] = Markup(figures.map_by_type(layout, results.label[cells], results.types))
    if np.isfinite(results.probability[cells]).all():
        svg = figures.map_by_probability(layout, results.probability[cells], results.threshold)
        content["probability_map"] = Markup(svg)
    return content


def _draw_markers(results: Results, matrix: ExpressionMatrix) -> dict[str, Any]:
    """Find the marker genes of the types and draw them."""
    from markupsafe import Markup

    from scmulan.report import figures

    label = np.where(results.status == "empty", "", results.label)
    markers = find_markers(matrix, label, [row.name for row in results.types if row.shown])
    dot_plot = Markup(figures.dot_plot(markers, results.types)) if markers and markers.genes else None
    return {"markers": markers, "dot_plot": dot_plot}


def _compare_generated(
    annotated: AnnData, results: Results, generated: AnnData, matrix: ExpressionMatrix
) -> dict[str, Any]:
    """Compare generated cells with real ones, and draw the comparisons."""
    comparisons = compare(annotated, results, generated, matrix)
    settings = read_info(generated)
    parameters = settings.get("parameters", {}).get("generate", {})
    return {
        "cells": generated.n_obs,
        "prompts": count_prompts(generated),
        "comparisons": [(c, _draw_comparison(c, i)) for i, c in enumerate(comparisons)],
        "settings": settings,
        "parameters": {label: parameters[name] for name, label in GENERATION_PARAMETERS.items() if name in parameters},
        "notes": text.generation_notes(results, settings, comparisons, generated.n_vars),
    }


def _draw_comparison(comparison: Comparison, number: int) -> dict[str, str]:
    from markupsafe import Markup

    from scmulan.report import figures

    drawn = {
        "n_genes": figures.genes_per_cell(comparison, f"words-{number}"),
        "map": figures.joint_map(comparison, f"joint-{number}"),
    }
    if comparison.real is not None:
        drawn["mean"] = figures.gene_scatter(comparison, "mean", f"mean-{number}")
        drawn["detected"] = figures.gene_scatter(comparison, "detected", f"detected-{number}")
    return {name: Markup(svg) for name, svg in drawn.items()} | {"text": text.comparison_text(comparison)}


def _list_doubtful(annotated: AnnData, results: Results) -> dict[str, Any]:
    """List the cells to look at again: the least probable ones by name, and which types exclude each other."""
    cells = np.flatnonzero(results.status != "confident")
    order = cells[np.argsort(results.probability[cells], kind="stable")][:MAX_CELLS_LISTED]
    names = annotated.obs_names
    conflict = results.status == "conflict"
    pairs: dict[tuple[str, str], int] = {}
    for pair in zip(results.label[conflict], results.coarse[conflict], strict=True):
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


def _describe_matrix(matrix: ExpressionMatrix) -> str:
    if matrix.matrix_kind == "counts":
        return f"the counts in {matrix.where} (normalised to 10,000 per cell and log-transformed)"
    return f"the log1p values in {matrix.where}"


def _versions() -> dict[str, str]:
    own = {"scmulan": scmulan.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in ("anndata", "numpy", "scipy", "umap-learn", "matplotlib")}

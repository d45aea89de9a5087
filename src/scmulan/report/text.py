"""Sentences of the page: summary, warnings, captions and a paragraph for a methods section."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from scmulan._keys import UNKNOWN
from scmulan.report.compare import Comparison
from scmulan.report.layout import MIN_DIST, N_NEIGHBOURS, SEED
from scmulan.report.markers import MAX_CELLS_PER_TYPE
from scmulan.report.results import Results

MIN_COVERAGE = 0.5
MIN_GENES_PER_CELL = 100
MAX_DOUBTFUL_FRACTION = 0.3


@dataclass(frozen=True, slots=True)
class Note:
    """Warning or remark beside the numbers."""

    kind: str
    """``warning`` or ``note``."""
    text: str
    """One or two sentences."""


def percent(fraction: float) -> str:
    """Format a fraction for readers: ``35%``, ``3.2%``, ``<0.1%``; a dash for NaN."""
    if not math.isfinite(fraction):
        return "–"
    value = 100 * fraction
    if value == 0 or value >= 100:
        return f"{value:.0f}%"
    if value < 0.1:
        return "<0.1%"
    if value > 99.9:
        return ">99.9%"
    return f"{value:.1f}%" if value < 9.95 or value >= 99.5 else f"{value:.0f}%"


def count(n: int, one: str, many: str | None = None) -> str:
    """Format a number with its noun: ``1 cell``, ``1,234 cells``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def enumerate_words(items: Sequence[str], last: str = "and") -> str:
    """Join items as in a sentence: ``a, b and c``."""
    return f" {last} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _is(n: int) -> str:
    return "is" if n == 1 else "are"


def _was(n: int) -> str:
    return "was" if n == 1 else "were"


def lead(results: Results, generated: int) -> str:
    """Summarise what was done and found, in three sentences."""
    model = results.info.get("model")
    named = [row for row in results.types if row.name != UNKNOWN]
    by = f" with the model “{model}”" if model else ""
    text = f"scMulan{by} read {count(results.cells, 'cell')} and named their types."
    if named:
        top = enumerate_words([f"{row.name} ({percent(row.fraction)})" for row in named[:3]])
        text += f" {'The most common are' if len(named) > 1 else 'There is one:'} {top}."
    doubtful = results.cells - results.status_counts["confident"]
    if doubtful:
        text += f" {count(doubtful, 'cell')} ({percent(doubtful / results.cells)}) should be looked at again."
    if generated:
        text += f" It also wrote {count(generated, 'new cell')}, shown beside the real ones."
    return text


def notes(results: Results) -> list[Note]:
    """Warn of problems of the input and its annotation."""
    info, counts = results.info, results.status_counts
    found: list[Note] = []
    if not info:
        found.append(
            Note(
                "warning",
                "The file does not say how it was annotated: uns['scmulan'] is missing, as after joining files. "
                "Model, matrix and gene coverage cannot be shown.",
            )
        )
    genes = info.get("genes", {})
    coverage = genes.get("fraction_of_vocabulary", 1.0)
    if coverage < MIN_COVERAGE:
        found.append(
            Note(
                "warning",
                f"Only {genes['found']['count']:,} of the {genes['vocabulary_genes']:,} genes that the model reads are "
                f"in this file ({percent(coverage)}). A gene that was not measured looks like one that is off, so "
                "types are less certain. If the file was cut to variable genes, give all measured genes.",
            )
        )
    covered = genes.get("umi_share")
    if covered is not None and covered < MIN_COVERAGE:
        found.append(
            Note(
                "note",
                f"The model reads genes that hold {percent(covered)} of the expression in this file; it does not see "
                "the rest.",
            )
        )
    n_genes = info.get("words_per_cell")
    if n_genes is not None and n_genes < MIN_GENES_PER_CELL:
        found.append(
            Note("warning", f"A cell has {n_genes:.0f} genes that the model reads, on average: little to judge from.")
        )
    if n := genes.get("ambiguous", {}).get("count"):
        found.append(Note("note", f"{count(n, 'gene name')} could mean several genes and {_was(n)} left out."))
    if n := genes.get("duplicates", {}).get("count"):
        found.append(Note("note", f"{count(n, 'gene')} stood in several columns, whose values were added up."))
    if counts["empty"]:
        found.append(
            Note(
                "warning",
                f"{count(counts['empty'], 'cell')} had no gene that the model reads and {_was(counts['empty'])} given "
                "no type (“unknown”).",
            )
        )
    doubtful = (counts["uncertain"] + counts["conflict"]) / results.cells
    if doubtful > MAX_DOUBTFUL_FRACTION:
        found.append(
            Note(
                "warning",
                f"{percent(doubtful)} of the cells are uncertain. That happens where cells are of types that the model "
                "never saw, where few genes were measured, or where types are close to each other.",
            )
        )
    return found


def generation_notes(
    results: Results, settings: Mapping[str, Any], comparisons: Sequence[Comparison], n_genes: int
) -> list[Note]:
    """Warn of problems of generated cells and their comparison."""
    found = []
    theirs, ours = settings.get("weights_hash"), results.info.get("weights_hash")
    if theirs and ours and theirs != ours:
        found.append(
            Note(
                "warning",
                f"The generated cells were written by another model ({settings.get('model')}) than the one above.",
            )
        )
    if cut := sum(c.incomplete for c in comparisons):
        found.append(
            Note(
                "warning",
                f"{count(cut, 'generated cell')} reached the most words allowed and {_was(cut)} cut off there.",
            )
        )
    coverage = comparisons[0].genes / n_genes
    if coverage < MIN_COVERAGE and settings.get("parameters", {}).get("generate", {}).get("panel") == "all genes":
        found.append(
            Note(
                "note",
                f"The cells were written in all {n_genes:,} genes of the model, of which this file has "
                f"{comparisons[0].genes:,}. Cells written in the file’s own genes (scmulan generate --genes-from) "
                "compare more fairly.",
            )
        )
    return found


def map_text(results: Results, drawn: int, method: str) -> str:
    """Explain the maps."""
    parts = ["Each point is a cell; cells that the model reads alike lie together."]
    if method == "PCA":
        parts.append("With so few cells, these are the first two principal components of the model’s embedding.")
    else:
        parts.append("This is a UMAP of the model’s embedding: distances between separate groups mean little.")
    empty = results.status_counts["empty"]
    if drawn < results.cells - empty:
        parts.append(f"{drawn:,} of {results.cells - empty:,} cells, drawn at random, are shown.")
    if empty:
        parts.append(f"{count(empty, 'empty cell')} {_is(empty)} left out.")
    return " ".join(parts)


def where_doubtful(results: Results) -> str:
    """Name the predicted types with most cells to look at again."""
    worst = sorted((row for row in results.types if row.doubtful), key=lambda row: -row.doubtful)[:4]
    if not worst:
        return ""
    text = enumerate_words([f"{row.name} ({row.doubtful:,} of {row.cells:,})" for row in worst])
    return f"Types with most uncertain or conflicting cells: {text}."


def comparison_text(comparison: Comparison) -> str:
    """Say what generated cells are compared with, and what the comparison can show."""
    generated, real = comparison.compared
    if comparison.real is None:
        parts = [
            f"No cell of this file was named {comparison.requested_type}, so there is nothing to compare these "
            f"{count(comparison.generated_cells, 'cell')} with."
        ]
    elif comparison.requested_type:
        names = enumerate_words(comparison.real_types, "or")
        of = f" (of {comparison.real_cells:,})" if real < comparison.real_cells else ""
        parts = [
            f"{count(generated, 'generated cell')} beside the {count(real, 'cell')}{of} of this file that the same "
            f"model named {names}. These names are predictions, not known types, and the cells need "
            "not match the other words of the prompt."
        ]
    else:
        parts = [
            f"The prompt names no cell type: {count(generated, 'generated cell')} beside {count(real, 'cell')} of this "
            "file, of all types."
        ]
    parts.append(f"Bins are computed for both in the same way, from the {comparison.genes:,} genes that both have.")
    mean = comparison.mean_generated_genes
    if mean > 1.02 * comparison.generated.n_genes.mean():
        parts.append(f"Over all genes of the model, a generated cell has {mean:.0f} words.")
    return " ".join(parts)


def model_texts(card: Mapping[str, Any]) -> list[str]:
    """Describe a model by its training card; each text is a paragraph."""
    texts = [str(card[name]) for name in ("description", "summary") if name in card]
    parts = []
    if "cells" in card:
        types, files = card.get("cell_types"), card.get("data")
        of = f" of {count(len(files), 'file')}" if files else ""
        knows = f" and knows {count(len(types), 'cell type')}" if types else ""
        parts.append(f"It has learnt from {count(card['cells'], 'cell')}{of}{knows}.")
    parts.append(
        "A cell of a type that it has not learnt is given one of its names all the same, often with a low probability, "
        "but not always: check rare and unexpected types by their marker genes."
    )
    texts.append(" ".join(parts))
    checks = {
        name.removesuffix(".accuracy"): float(accuracy)
        for name, accuracy in (card.get("validation") or {}).items()
        if name.endswith(".accuracy")
    }
    if checks:
        accuracies = enumerate_words([f"{study} {percent(accuracy)}" for study, accuracy in checks.items()])
        texts.append(f"Share of right names in labelled studies that it has not learnt from: {accuracies}.")
    if card.get("unknown"):
        texts.append(f"Not known about it: {'; '.join(card['unknown'])}.")
    return texts


def methods_text(
    results: Results, card: Mapping[str, Any] | None, matrix: str, layout: str | None, markers: bool
) -> str:
    """Write a paragraph for a methods section.

    Parameters
    ----------
    results
        The annotation.
    card
        Training card of the model, where known.
    matrix
        Description of the matrix used.
    layout
        ``UMAP`` or ``PCA`` where a map was drawn.
    markers
        Whether marker genes were searched for.
    """
    info, genes = results.info, results.info.get("genes", {})
    parts = []
    size = f", {card['parameters']:,} parameters" if card and "parameters" in card else ""
    if info:
        parts.append(
            f"Cell types of {results.cells:,} cells were predicted with scMulan (version {info.get('version')}; model "
            f"{info.get('model')}{size}; sha256 of the weights {str(info.get('weights_hash'))[:12]}…) from {matrix}."
        )
    else:
        parts.append(f"Cell types of {results.cells:,} cells were predicted with scMulan from {matrix}.")
    if genes:
        parts.append(
            f"{genes['found']['count']:,} of the model's {genes['vocabulary_genes']:,} genes were present "
            f"(matched by approved, previous and alias symbols or Ensembl ids), holding "
            f"{percent(genes.get('umi_share') or 0)} of the expression."
        )
    if results.parameters("annotate").get("rule") == "release":
        parts.append("Types were decoded greedily, by the rule of the published release.")
    else:
        doubtful = results.status_counts["uncertain"] + results.status_counts["conflict"]
        parts.append(
            f"Each cell received its most probable type; cells whose type had a probability below "
            f"{results.threshold:g}, or whose coarse and fine types exclude each other in the Cell Ontology, were "
            f"flagged ({doubtful:,} cells)."
        )
    if layout == "UMAP" and results.embedding is not None:
        parts.append(
            f"The map is a UMAP (umap-learn {version('umap-learn')}; {N_NEIGHBOURS} neighbours, minimum distance "
            f"{MIN_DIST}, cosine distance, seed {SEED}) of the model's {results.embedding.shape[1]}-dimensional "
            "embedding of each cell."
        )
    elif layout == "PCA":
        parts.append("The map shows the first two principal components of the model's embedding of each cell.")
    if markers:
        parts.append(
            "Marker genes are those with the largest area under the ROC curve for a type against all other cells, "
            "among the genes whose mean log expression in the type exceeds the other types' most; at most "
            f"{MAX_CELLS_PER_TYPE} cells per type were used, and mitochondrial and ribosomal-protein genes were left "
            "out."
        )
    return " ".join(parts)

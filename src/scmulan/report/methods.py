"""What a reader needs to tell others how the results came about."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from scmulan.report.layout import MIN_DIST, NEIGHBOURS, SEED
from scmulan.report.markers import CELLS_PER_TYPE
from scmulan.report.results import Results
from scmulan.report.words import count, listed, percent


def model_texts(card: Mapping[str, Any]) -> list[str]:
    """Say what a model knows, from its training card; each text is a paragraph."""
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
        name.removesuffix(".accuracy"): float(share)
        for name, share in (card.get("validation") or {}).items()
        if name.endswith(".accuracy")
    }
    if checks:
        shares = listed([f"{study} {percent(share)}" for study, share in checks.items()])
        texts.append(f"Share of right names in labelled studies that it has not learnt from: {shares}.")
    if card.get("unknown"):
        texts.append(f"Not known about it: {'; '.join(card['unknown'])}.")
    return texts


def methods_text(
    results: Results, card: Mapping[str, Any] | None, matrix: str, drawn: str | None, markers: bool
) -> str:
    """Return a paragraph for a methods section.

    Parameters
    ----------
    results
        The annotation.
    card
        Training card of the model, where known.
    matrix
        The matrix used, in words.
    drawn
        ``UMAP`` or ``PCA`` where a map was drawn.
    markers
        Whether marker genes were looked for.
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
        doubtful = results.counts["uncertain"] + results.counts["conflict"]
        parts.append(
            f"Each cell received its most probable type; cells whose type had a probability below "
            f"{results.threshold:g}, or whose coarse and fine types exclude each other in the Cell Ontology, were "
            f"flagged ({doubtful:,} cells)."
        )
    if drawn == "UMAP" and results.embedding is not None:
        parts.append(
            f"The map is a UMAP (umap-learn {version('umap-learn')}; {NEIGHBOURS} neighbours, minimum distance "
            f"{MIN_DIST}, cosine distance, seed {SEED}) of the model's {results.embedding.shape[1]}-dimensional "
            "embedding of each cell."
        )
    elif drawn == "PCA":
        parts.append("The map shows the first two principal components of the model's embedding of each cell.")
    if markers:
        parts.append(
            "Marker genes are those with the largest area under the ROC curve for a type against all other cells, "
            "among the genes whose mean log expression in the type exceeds the other types' most; at most "
            f"{CELLS_PER_TYPE} cells per type were used, and mitochondrial and ribosomal-protein genes were left out."
        )
    return " ".join(parts)

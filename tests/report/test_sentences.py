"""Sentences of the page agree with the numbers."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scmulan._keys import CELL_TYPE, COARSE, ONTOLOGY_ID, PROBABILITY, STATUS
from scmulan.report.results import Results, read_results
from scmulan.report.text import (
    enumerate_words,
    lead,
    map_text,
    methods_text,
    model_texts,
    notes,
    percent,
    where_doubtful,
)

INFO = {
    "version": "0.1.0",
    "model": "tiny",
    "weights_hash": "ab" * 32,
    "words_per_cell": 250.0,
    "matrix": {"where": "X", "state": "counts", "reason": "X: counts"},
    "genes": {
        "found": {"count": 90, "examples": []},
        "vocabulary_genes": 100,
        "fraction_of_vocabulary": 0.9,
        "umi_share": 0.8,
        "ambiguous": {"count": 0},
        "duplicates": {"count": 0},
    },
    "parameters": {"annotate": {"threshold": 0.5, "rule": "default"}},
}


def results(status: list[str], labels: list[str] | None = None, **info) -> Results:
    obs = pd.DataFrame(index=[str(i) for i in range(len(status))])
    obs[CELL_TYPE] = labels or ["unknown" if s == "empty" else "B cell" for s in status]
    obs[COARSE] = "lymphocyte"
    obs[PROBABILITY] = 0.7
    obs[STATUS] = status
    obs[ONTOLOGY_ID] = ""
    adata = ad.AnnData(np.zeros((len(status), 1), dtype=np.float32), obs=obs)
    adata.uns["scmulan"] = {**INFO, **info}
    return read_results(adata)


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0%"), (0.0004, "<0.1%"), (0.0123, "1.2%"), (0.0999, "10%"), (0.354, "35%"), (0.9961, "99.6%"),
     (0.99999, ">99.9%"), (1, "100%"), (float("nan"), "–")],
)  # fmt: skip
def test_percent(fraction, text):
    assert percent(fraction) == text


def test_enumerate_words():
    assert [enumerate_words(list(x)) for x in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_lead_tells_what_was_found():
    text = lead(results(["confident"] * 6 + ["uncertain"] * 2, ["B cell"] * 5 + ["T cell"] * 3), 0)
    assert "“tiny” read 8 cells" in text
    assert "The most common are B cell (62%) and T cell (38%)." in text
    assert "2 cells (25%) should be looked at again" in text
    assert "wrote" not in text
    assert "wrote 30 new cells" in lead(results(["confident"]), 30)


def test_good_input_has_no_warning():
    assert notes(results(["confident"] * 9 + ["uncertain"])) == []


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"genes": {**INFO["genes"], "fraction_of_vocabulary": 0.4, "found": {"count": 40}}}, "warning",
         "Only 40 of the 100"),
        ({"genes": {**INFO["genes"], "umi_share": 0.3}}, "note", "hold 30% of the expression"),
        ({"genes": {**INFO["genes"], "ambiguous": {"count": 2}}}, "note", "2 gene names could mean several"),
        ({"genes": {**INFO["genes"], "duplicates": {"count": 1}}}, "note", "1 gene stood in several columns"),
        ({"words_per_cell": 40.0}, "warning", "has 40 genes"),
    ],
)  # fmt: skip
def test_poor_input_is_warned_of(change, kind, text):
    (note,) = notes(results(["confident"], **change))
    assert note.kind == kind and text in note.text


def test_doubtful_and_empty_cells_are_reported():
    first, second = notes(results(["confident"] * 5 + ["uncertain"] * 2 + ["conflict"] * 2 + ["empty"]))
    assert first.text.startswith("1 cell had no gene")
    assert second.text.startswith("40% of the cells are uncertain")


def test_where_doubtful_cells_are():
    found = results(["uncertain", "confident", "conflict", "uncertain"], ["B cell", "B cell", "T cell", "T cell"])
    assert where_doubtful(found) == (
        "Types with most uncertain or conflicting cells: T cell (2 of 2) and B cell (1 of 2)."
    )
    assert where_doubtful(results(["confident", "empty"])) == ""


def test_map_text_tells_what_is_left_out():
    text = map_text(results(["confident"] * 9 + ["empty"]), 5, "UMAP")
    assert "5 of 9 cells, drawn at random" in text and "1 empty cell is left out" in text
    assert "random" not in map_text(results(["confident"] * 9), 9, "PCA")


def test_methods_name_everything_needed_to_repeat_it():
    text = methods_text(results(["confident", "uncertain"]), {"parameters": 1_234_567}, "the counts in X", None, True)
    for part in ("version 0.1.0", "model tiny, 1,234,567 parameters", "abababababab", "the counts in X",
                 "90 of the model's 100", "below 0.5", "(1 cells)", "Marker genes"):  # fmt: skip
        assert part in text
    assert "UMAP" not in text


def test_model_is_described_by_its_card():
    published = {"summary": "Published weights.", "unknown": ["its cells", "its seeds"]}
    first, second, third = model_texts(published)
    assert first == "Published weights."
    assert second.startswith("A cell of a type that it has not learnt")
    assert third == "Not known about it: its cells; its seeds."

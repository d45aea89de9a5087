"""Results as aligned text."""

from scmulan._text import format_fields, format_table, shorten


def test_columns_are_aligned():
    text = format_table(["type", "cells", "F1"], [["B cell", 1200, 0.98765], ["T", 3, None]])
    assert text.split("\n") == [
        "type    cells     F1",
        "──────  ─────  ─────",
        "B cell  1,200  0.988",
        "T           3      –",
    ]


def test_long_names_are_cut():
    assert shorten("x" * 40) == "x" * 40
    assert shorten("x" * 41) == "x" * 39 + "…"


def test_fields_are_aligned_and_empty_ones_left_out():
    text = format_fields({"genes": "90 of 100\nunknown 3", "gpu": None, "matrix": "X", "note": ""})
    assert text.split("\n") == ["genes   90 of 100", "        unknown 3", "matrix  X"]

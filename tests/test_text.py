"""Tables for people."""

from scmulan._text import grid, shorten


def test_columns_are_aligned():
    text = grid(["type", "cells", "F1"], [["B cell", 1200, 0.98765], ["T", 3, None]])
    assert text.split("\n") == [
        "type    cells     F1",
        "──────  ─────  ─────",
        "B cell  1,200  0.988",
        "T           3      –",
    ]


def test_long_names_are_cut():
    assert shorten("x" * 40) == "x" * 40
    assert shorten("x" * 41) == "x" * 39 + "…"

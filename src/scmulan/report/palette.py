"""Colours of cell types, the same in every figure of a page."""

from collections.abc import Sequence

# Twelve colours whose closest pair stays apart (OKLab distance ≥ 0.08) in normal sight and with each of the three
# colour deficiencies, and that show on white paper and on a dark screen. Types carry a number too: colour is never
# the only thing that tells them apart.
COLOURS = (
    "#1a60b5", "#d68519", "#53b280", "#8a3889", "#dcc460", "#952a0d",
    "#6cd4dc", "#866fd6", "#aa625e", "#20594e", "#a4a5eb", "#248a9b",
)  # fmt: skip
OTHER = "#8b9098"
"""Types beyond the twelfth, and cells without a type."""
REAL, WRITTEN = "#1a60b5", "#d68519"
"""Measured cells and generated ones."""


def colours(types: Sequence[str], unknown: str) -> dict[str, str]:
    """Colour of each cell type.

    Parameters
    ----------
    types
        Names, the most frequent first.
    unknown
        Name of cells without a type, which is grey like the types that no colour is left for.
    """
    named = [name for name in types if name != unknown]
    chosen = dict(zip(named, COLOURS, strict=False))
    return {name: chosen.get(name, OTHER) for name in types}

"""Write matplotlib figures as SVG for a page: with the page's fonts, its colours in light and dark, and unique ids."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Placeholders that matplotlib draws with; the page replaces them by its own colours, in light and dark.
INK, MUTED, SURFACE, RULE = "#010101", "#020202", "#030303", "#040404"
# Colour scale from zero to the maximum: light to dark on paper, the other way round on a dark screen.
SCALE = tuple(f"#0101{step:02x}" for step in range(0x10, 0x1A))
_PAGE_COLOURS = {
    INK: "currentColor", MUTED: "var(--muted)", SURFACE: "var(--surface)", RULE: "var(--rule)",
    **{colour: f"var(--scale-{step})" for step, colour in enumerate(SCALE)},
}  # fmt: skip
_SIZE = re.compile(r"[\d.]+px")
_REFERENCE = re.compile(r"url\(#")
POINTS_PER_INCH = 72
_RASTER_DPI = 144
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scmulan",
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a size in CSS pixels, without background."""
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), dpi=POINTS_PER_INCH)
    figure.patch.set_visible(False)
    return figure


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib up for figures of the page; they are drawn and written within this context."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def to_svg(figure: Figure, key: str, label: str) -> str:
    """Write a figure as an ``<svg>`` element for HTML.

    Parameters
    ----------
    figure
        Drawn with the colours of this module.
    key
        Prefix of every id of the element; unique among the figures of a page.
    label
        Description of the figure, for those who cannot see it.

    Returns
    -------
    str
        Markup in which all text of the figure is escaped.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The browser draws with the page's fonts, not with the font that matplotlib measures with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(file, format="svg", dpi=_RASTER_DPI, transparent=True, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    width, height = (float(root.attrib.pop(name).removesuffix("pt")) for name in ("width", "height"))
    for parent in list(root.iter()):
        for child in list(parent):
            # A style sheet inside would apply to the whole page; the metadata say nothing about the cells.
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attribute(*item, key) for item in element.attrib.items())
    root.attrib = {
        "role": "img",
        "aria-label": label,
        "viewBox": f"0 0 {width:g} {height:g}",
        "style": f"max-width: {width:g}px",
    }
    return ET.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, key: str) -> tuple[str, str]:
    name = name.rpartition("}")[2]
    if name == "id":
        return name, f"{key}-{value}"
    if name == "href" and value.startswith("#"):
        return name, f"#{key}-{value[1:]}"
    value = _REFERENCE.sub(f"url(#{key}-", value)
    if name == "style":
        value = "; ".join(_declarations(value))
        for placeholder, colour in _PAGE_COLOURS.items():
            value = value.replace(placeholder, colour)
    return name, value


def _declarations(style: str) -> list[str]:
    """Return the declarations of a style without its font family: the page has its own."""
    kept = []
    for declaration in style.split("; "):
        name, _, value = declaration.partition(": ")
        if name == "font":  # as matplotlib before 3.10 writes it: [style] [weight] size family
            before, size, _ = value.partition(_SIZE.search(value)[0])  # type: ignore[index]
            kept += [f"font-weight: {w}" if w.isdigit() else f"font-style: {w}" for w in before.split()]
            kept.append(f"font-size: {size}")
        elif name != "font-family":
            kept.append(declaration)
    return kept


def printable(text: str) -> str:
    """Return text without characters that XML forbids, on one line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shorten(text: str, max_length: int) -> str:
    """Cut text to at most so many characters."""
    text = printable(text)
    return text if len(text) <= max_length else f"{text[: max_length - 1].rstrip()}…"

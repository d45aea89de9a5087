"""Figures of the page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Transform

from scmulan.report.compare import Comparison
from scmulan.report.layout import Layout, label_positions, push_apart
from scmulan.report.markers import Markers
from scmulan.report.results import GENERATED_COLOUR, OTHER_COLOUR, REAL_COLOUR, CellType
from scmulan.report.svg import INK, MUTED, RULE, SCALE, SURFACE, new_figure, shorten, style, to_svg

# More points are drawn as one image: a page with a hundred thousand circles is slow and large.
MAX_VECTOR_POINTS = 1500
PROBABILITY_COLOURS = LinearSegmentedColormap.from_list(
    "doubt", ["#b3400b", "#e08a3c", "#c9bfae", "#6d9cc9", "#1a60b5"]
)
PANEL_WIDTH = 460  # CSS pixels


def map_by_type(layout: Layout, label: np.ndarray, types: Sequence[CellType]) -> str:
    """Draw cells coloured by predicted type, with the type's number where its cells are densest."""
    with style():
        figure, axes = _layout_axes(layout)
        colour = {row.name: row.colour for row in types}
        _points(axes, layout.xy, [colour[name] for name in label])
        present = [row for row in types if row.shown and (label == row.name).any()]
        _numbers(axes, layout.xy, label, present)
        names = ", ".join(f"{row.number} {row.name}" for row in present)
        return to_svg(
            figure, "map-type", f"{layout.method} of {len(label):,} cells coloured by predicted type: {names}"
        )


def map_by_probability(layout: Layout, probability: np.ndarray, threshold: float) -> str:
    """Draw cells coloured by the probability of their type; the histogram below is the legend of the colours."""
    with style():
        figure, axes = _layout_axes(layout, height=PANEL_WIDTH + 90, bottom=110)
        norm = _centred_at(threshold)
        # The doubtful ones are drawn last, over the others: the figure is about them.
        order = np.argsort(-probability, kind="stable")
        _points(axes, layout.xy[order], PROBABILITY_COLOURS(norm(probability[order])))
        legend = figure.add_axes((0.1, 38 / (PANEL_WIDTH + 90), 0.8, 52 / (PANEL_WIDTH + 90)))
        counts, edges = np.histogram(probability, bins=40, range=(0, 1))
        middle = (edges[:-1] + edges[1:]) / 2
        legend.bar(middle, np.sqrt(counts), width=0.023, color=PROBABILITY_COLOURS(norm(middle)))
        legend.axvline(threshold, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        legend.set(xlim=(0, 1), yticks=[], xlabel="probability of the type (bar heights: square root of cells)")
        legend.spines["left"].set_visible(False)
        legend.tick_params(length=3)
        below = int((probability < threshold).sum())
        text = (
            f"{layout.method} of {len(probability):,} cells coloured by probability; {below:,} are below {threshold:g}"
        )
        return to_svg(figure, "map-probability", text)


def dot_plot(markers: Markers, types: Sequence[CellType]) -> str:
    """Draw marker genes (rows) by type (columns): area is the fraction of cells, colour the mean over its maximum."""
    with style():
        row, column, left, top, right, bottom = 19, 31, 104, 132, 70, 64
        rows, columns = markers.mean.shape
        width = max(left + column * columns + right, 340)
        height = top + row * rows + bottom
        figure = new_figure(width, height)
        axes = figure.add_axes((left / width, bottom / height, column * columns / width, row * rows / height))
        relative = markers.mean / np.maximum(markers.mean.max(1, keepdims=True), 1e-9)
        steps = np.minimum((relative * len(SCALE)).astype(int), len(SCALE) - 1)
        y, x = np.mgrid[:rows, :columns]
        largest = 150
        axes.scatter(
            x.ravel(),
            y.ravel(),
            s=largest * markers.detected.ravel(),
            c=[SCALE[step] for step in steps.ravel()],
            linewidths=0,
        )
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        by_name = {kind.name: kind for kind in types}
        numbers = axes.get_xaxis_transform()
        for at, name in enumerate(markers.types):
            kind = by_name[name]
            _badge(axes, at, 1 + 14 / (row * rows), kind, transform=numbers)
            axes.text(
                at - 0.1, 1 + 30 / (row * rows), shorten(name, 22), transform=numbers, rotation=55, ha="left",
                va="bottom", rotation_mode="anchor", fontsize=10,
            )  # fmt: skip
        names = axes.get_yaxis_transform()
        for at, (gene, name) in enumerate(zip(markers.genes, markers.marked_type, strict=True)):
            shift = -0.5 * 31 / (column * columns)
            axes.text(
                shift, at, shorten(gene, 14), transform=names, ha="right", va="center", style="italic",
            )  # fmt: skip
            axes.plot(
                [shift / 2] * 2, [at - 0.5, at + 0.5], color=by_name[name].colour, linewidth=4, transform=names,
                clip_on=False, solid_capstyle="butt",
            )  # fmt: skip
            if at and markers.marked_type[at - 1] != name:
                axes.axhline(at - 0.5, color=RULE, linewidth=0.8)
        _dot_legend(figure, left, width, height, largest)
        pairs = "; ".join(f"{name}: {', '.join(g for g, _ in genes)}" for name, genes in markers.by_type if genes)
        return to_svg(figure, "markers", f"Dot plot of marker genes. {pairs}")


def _dot_legend(figure: Figure, left: int, width: int, height: int, largest: float) -> None:
    box = figure.add_axes((left / width - 0.2, 4 / height, min(1.0, 300 / width), 44 / height))
    box.set(xlim=(0, 300), ylim=(0, 44))
    box.axis("off")
    for x, fraction in zip((16, 52, 92, 132), (0.1, 0.25, 0.5, 1.0), strict=True):
        box.scatter([x], [30], s=largest * fraction, color=MUTED, linewidths=0)
        box.text(x, 8, f"{fraction:.0%}", ha="center", va="center", color=MUTED, fontsize=10)
    for at, shade in enumerate(SCALE):
        box.bar(190 + at * 10 + 5, 8, bottom=26, width=10, color=shade)
    for x, text in ((190, "0"), (290, "max")):
        box.text(x, 8, text, ha="center", va="center", color=MUTED, fontsize=10)


def genes_per_cell(comparison: Comparison, key: str) -> str:
    """Draw a histogram of the number of genes per cell, generated and real."""
    with style():
        figure = new_figure(PANEL_WIDTH, PANEL_WIDTH - 40)
        axes = figure.add_axes((0.04, 0.13, 0.92, 0.8))
        groups = [("generated", comparison.generated.n_genes, GENERATED_COLOUR)]
        if comparison.real is not None:
            groups.append(("real", comparison.real.n_genes, REAL_COLOUR))
        largest = max(int(n_genes.max()) for _, n_genes, _ in groups)
        edges = np.linspace(0, max(largest, 1) * 1.02, 31).tolist()
        text = []
        for name, n_genes, colour in reversed(groups):
            weights = np.full(len(n_genes), 1 / len(n_genes))
            axes.hist(n_genes, bins=edges, weights=weights, histtype="stepfilled", color=to_rgba(colour, 0.3))
            axes.hist(n_genes, bins=edges, weights=weights, histtype="step", color=colour, linewidth=1.6)
            axes.axvline(float(n_genes.mean()), color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
            text.append(f"{name} mean {n_genes.mean():.0f}")
        axes.set(yticks=[], xlim=(0, edges[-1]), xlabel=f"words per cell (of {comparison.genes:,} genes)")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return to_svg(figure, key, f"Histogram of words per cell: {', '.join(text)}")


def gene_scatter(comparison: Comparison, what: str, key: str) -> str:
    """Draw a point per gene, generated over real: ``mean`` level, or fraction of cells that have it (``detected``)."""
    assert comparison.real is not None and comparison.correlation is not None
    with style():
        figure = new_figure(400, 400)
        axes = figure.add_axes((0.15, 0.14, 0.81, 0.81))
        x, y = getattr(comparison.real, what), getattr(comparison.generated, what)
        end = max(float(x.max()), float(y.max()), 1e-9) * 1.05
        axes.plot([0, end], [0, end], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
        axes.scatter(x, y, s=9, color=REAL_COLOUR, alpha=0.45, linewidths=0, rasterized=len(x) > MAX_VECTOR_POINTS)
        axes.set(xlim=(-0.02 * end, end), ylim=(-0.02 * end, end), xlabel="real cells", ylabel="generated cells")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if what == "detected":
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        r = getattr(comparison.correlation, what)
        axes.text(0.03, 0.97, f"r = {r:.2f}", transform=axes.transAxes, ha="left", va="top", fontsize=12)
        name = {"mean": "mean bin", "detected": "share of cells with the gene"}[what]
        return to_svg(figure, key, f"Scatter of {len(x):,} genes, {name}, generated over real cells: r = {r:.2f}")


def joint_map(comparison: Comparison, key: str) -> str:
    """Draw generated cells, real cells of the type and other real cells in one layout."""
    with style():
        figure, axes = _layout_axes(comparison.layout, height=PANEL_WIDTH - 40)
        xy, group = comparison.layout.xy, comparison.group
        many = len(xy) > MAX_VECTOR_POINTS
        for name, colour, size, alpha in (
            ("other", OTHER_COLOUR, 8, 0.35),
            ("real", REAL_COLOUR, 14, 0.75),
            ("generated", GENERATED_COLOUR, 14, 0.85),
        ):
            points = xy[group == name]
            axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=alpha, linewidths=0, rasterized=many)
        counts = ", ".join(f"{int((group == name).sum()):,} {name}" for name in ("generated", "real", "other"))
        return to_svg(figure, key, f"{comparison.layout.method} of the bins of {counts} cells")


def _layout_axes(layout: Layout, height: int = PANEL_WIDTH, bottom: int = 20) -> tuple[Figure, Axes]:
    figure = new_figure(PANEL_WIDTH, height)
    edge = 6
    axes = figure.add_axes(
        (edge / PANEL_WIDTH, bottom / height, 1 - 2 * edge / PANEL_WIDTH, (height - bottom - edge) / height)
    )
    low, high = layout.xy.min(0), layout.xy.max(0)
    pad = 0.05 * max(float((high - low).max()), 1e-6)
    axes.set(xlim=(low[0] - pad, high[0] + pad), ylim=(low[1] - pad, high[1] + pad), xticks=[], yticks=[])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    figure.text(edge / PANEL_WIDTH, (bottom - 14) / height, f"{layout.method} 1 →", fontsize=9, color=MUTED)
    figure.text(0, (bottom + 2) / height, f"{layout.method} 2 →", fontsize=9, color=MUTED, rotation=90, va="bottom")
    return figure, axes


def _points(axes: Axes, xy: np.ndarray, colour: Any) -> None:
    size = float(np.clip(9000 / max(len(xy), 1), 2.5, 26))
    axes.scatter(
        xy[:, 0], xy[:, 1], s=size, c=colour, alpha=0.85, linewidths=0, rasterized=len(xy) > MAX_VECTOR_POINTS
    )  # fmt: skip


def _numbers(axes: Axes, xy: np.ndarray, label: np.ndarray, types: Sequence[CellType]) -> None:
    if not types:
        return
    positions = label_positions(xy, label, [row.name for row in types])
    to_screen = axes.transData
    screen = push_apart(to_screen.transform(positions), 19)
    for at, row in zip(to_screen.inverted().transform(screen), types, strict=True):
        _badge(axes, at[0], at[1], row)


def _badge(axes: Axes, x: float, y: float, row: CellType, transform: Transform | None = None) -> None:
    """Draw the number of a type in a circle of its colour."""
    transform = transform or axes.transData
    axes.scatter(
        [x],
        [y],
        s=210,
        color=SURFACE,
        edgecolors=row.colour,
        linewidths=2,
        transform=transform,
        clip_on=False,
        zorder=5,
    )
    axes.text(
        x, y, str(row.number), transform=transform, ha="center", va="center_baseline", fontsize=10, fontweight="bold",
        color=INK, zorder=6,
    )  # fmt: skip


def _centred_at(threshold: float) -> TwoSlopeNorm:
    """Scale from 0 to 1 whose middle colour is at the threshold."""
    return TwoSlopeNorm(vcenter=float(np.clip(threshold, 0.01, 0.99)), vmin=0, vmax=1)

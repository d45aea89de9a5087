"""Figures: layout, colours, and SVG that can be part of a page."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from scmulan.report import figures
from scmulan.report.layout import Layout, label_positions, lay_out, principal_components, push_apart, sample_rows
from scmulan.report.results import OTHER_COLOUR, TYPE_COLOURS, CellType, type_colours
from scmulan.report.svg import INK, new_figure, shorten, style, to_svg

# Colours as seen with each deficiency (linear RGB), Machado et al. 2009.
SIGHT = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    cones = np.cbrt(
        rgb
        @ np.array(
            [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
             [0.0514459929, 0.1073969566, 0.6299787005]]
        )
    )  # fmt: skip
    return cones @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.793617785, -2.428592205, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.808675766]]
    )  # fmt: skip


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart(sight):
    lab = oklab(np.clip(np.array([linear(c) for c in TYPE_COLOURS]) @ np.array(SIGHT[sight]).T, 0, 1))
    distance = np.linalg.norm(lab[:, None] - lab, axis=2) + np.eye(len(lab))
    assert distance.min() > 0.08


def test_colours_show_on_paper_and_screen():
    for colour in TYPE_COLOURS:
        luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 1.6 and (luminance + 0.05) / 0.06 > 1.9, colour


def test_frequent_types_have_colours_and_unknown_is_grey():
    names = [f"type {i}" for i in range(14)]
    chosen = type_colours([*names[:3], "unknown", *names[3:]], "unknown")
    assert [chosen[name] for name in names[:12]] == list(TYPE_COLOURS)
    assert chosen["unknown"] == chosen["type 12"] == chosen["type 13"] == OTHER_COLOUR


def test_few_cells_are_laid_out_by_their_principal_components():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 8)) * [9, 5, 1, 1, 1, 1, 1, 1]
    layout = lay_out(values)
    centred = values - values.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    assert layout.method == "PCA"
    np.testing.assert_allclose(np.abs(layout.xy), np.abs(left[:, :2] * size[:2]), rtol=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_principal_components_of_tall_and_wide_tables(shape):
    values = np.random.default_rng(1).normal(size=shape)
    scores, mean, directions = principal_components(values, 5)
    left, size, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs((left * size)[:, :5]), atol=1e-8)
    np.testing.assert_allclose((values - mean) @ directions, scores)


def test_one_cell_and_equal_cells_have_a_layout():
    assert lay_out(np.ones((1, 3))).xy.shape == (1, 2)
    assert np.isfinite(lay_out(np.ones((20, 3))).xy).all()


def test_umap_is_the_same_each_time_and_keeps_groups_apart():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=(60, 10)) * 0.2 + shift for shift in np.eye(10)[:2] * 5])
    first, second = lay_out(values), lay_out(values)
    assert first.method == "UMAP"
    np.testing.assert_array_equal(first.xy, second.xy)
    one, two = first.xy[:60], first.xy[60:]
    apart = np.linalg.norm(one.mean(0) - two.mean(0))
    assert apart > 2 * max(one.std(), two.std())


def test_cells_are_sampled_the_same_way_each_time():
    assert np.array_equal(sample_rows(5, 10), np.arange(5))
    chosen = sample_rows(1000, 100)
    assert len(set(chosen)) == 100 and np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, sample_rows(1000, 100))


def test_labels_are_where_their_type_is_densest():
    rng = np.random.default_rng(0)
    dense, stray = rng.normal(size=(80, 2)) * 0.1 + 5, rng.normal(size=(20, 2)) * 3 - 5
    positions = label_positions(np.concatenate([dense, stray]), np.array(["a"] * 100), ["a"])
    assert np.linalg.norm(positions[0] - 5) < 0.5


def test_labels_do_not_cover_each_other():
    positions = push_apart(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [50.0, 50.0]]), 10)
    distance = np.linalg.norm(positions[:, None] - positions, axis=2) + 99 * np.eye(4)
    assert distance.min() > 9.9
    assert positions[3].tolist() == [50, 50]


def types(n: int) -> list[CellType]:
    return [
        CellType(
            number=i + 1, name=f"type {i}", cells=10, fraction=1 / n, probability=0.5, doubtful=0, ontology_id="",
            trained_on=None, colour=TYPE_COLOURS[i], shown=True,
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(("cells", "images"), [(300, 0), (20_000, 1)])
def test_many_cells_become_one_image(cells, images):
    rng = np.random.default_rng(0)
    layout = Layout(xy=rng.normal(size=(cells, 2)), method="UMAP")
    label = np.array([f"type {i}" for i in rng.integers(5, size=cells)], dtype=object)
    svg = ET.fromstring(figures.map_by_type(layout, label, types(5)))
    assert len(list(svg.iter("image"))) == images
    assert len(list(svg.iter("use"))) >= (0 if images else 300)
    assert len(ET.tostring(svg)) < 800_000
    assert [t.text for t in svg.iter("text")][:5] == ["1", "2", "3", "4", "5"]


def test_probability_map_tells_how_many_are_doubtful():
    layout = Layout(xy=np.random.default_rng(0).normal(size=(100, 2)), method="UMAP")
    svg = ET.fromstring(figures.map_by_probability(layout, np.linspace(0, 1, 100), 0.25))
    assert "25 are below 0.25" in svg.attrib["aria-label"]
    points = [use.attrib["style"] for use in svg.iter("use")][:100]
    # The least probable ones are drawn last, over the others.
    assert "#1a60b5" in points[0] and "#b3400b" in points[-1]


def drawn(text: str, key: str = "k") -> str:
    with style():
        figure = new_figure(120, 80)
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        axes.scatter([0, 1], [0, 1], c=["#ff0000", "#00ff00"])
        axes.text(0.5, 0.5, text, color=INK, fontweight="bold", style="italic")
        return to_svg(figure, key, text)


def test_svg_belongs_to_its_page():
    svg = drawn("gene")
    root = ET.fromstring(svg)
    assert root.tag == "svg" and root.attrib["viewBox"] == "0 0 120 80" and "width" not in root.attrib
    assert not {"style", "metadata"} & {element.tag for element in root.iter()}
    assert all(e.attrib["id"].startswith("k-") for e in root.iter() if "id" in e.attrib)
    for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg):
        assert any(e.attrib.get("id") in reference for e in root.iter()), reference
    (text,) = [e for e in root.iter("text") if e.text == "gene"]
    assert "currentColor" in text.attrib["style"] and INK not in svg
    assert "font-family" not in svg and "DejaVu" not in svg
    assert "italic" in text.attrib["style"] and "700" in text.attrib["style"] and "font-size" in text.attrib["style"]


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "$\\alpha$", 'id="x" & url(#y)', "μ 细胞 \U0001f9ec", "-->"]
)
def test_any_text_stays_text(text):
    svg = drawn(text)
    root = ET.fromstring(svg)
    assert [e.text for e in root.iter("text") if e.text not in (None, "") and e.text.strip() == text]
    assert root.attrib["aria-label"] == text
    assert "<script" not in svg


def test_long_and_unprintable_names_are_shortened():
    assert shorten("B cell", 10) == "B cell"
    assert shorten("CD4-positive T cell", 10) == "CD4-posit…"
    assert shorten("a\x00b\nc", 9) == "a b c"


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn("x")
    assert dict(matplotlib.rcParams) == before

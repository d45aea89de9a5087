"""Real blood cells, annotated and embedded by a small model, cells that it generated, and the page about both."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import pytest
import torch

import scmulan
from scmulan.model.loading import LoadedModel, save_model
from scmulan.model.network import Mulan, MulanConfig
from scmulan.report import write_report
from scmulan.tl._annotate import annotate
from scmulan.tl._embed import embed
from scmulan.tl._generate import generate
from scmulan.vocab.genes import CoverageWarning
from scmulan.vocab.vocabulary import Family, Vocabulary

FINE = ["B cell", "CD4-positive, alpha-beta T cell", "natural killer cell", "monocyte", "dendritic cell", "plasma cell"]
COARSE = ["lymphocyte", "myeloid leukocyte"]
CARD = {
    "name": "tiny",
    "description": "A model with random weights.",
    "objective": "next_word",
    "cells": 1234,
    "cell_types": {name: 10 * rank for rank, name in enumerate(FINE, start=1)},
    "data": [{"study": "one"}, {"study": "two"}],
    "metadata": {"organ": ["Blood"], "sex": []},
    "covered": 0.5,
    "validation": {"other_study.accuracy": 0.625, "accuracy": 0.625},
}


class Page(HTMLParser):
    """Content of a page: text, tables by caption, and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._caption = ""
        self.feed(html)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closed out of order at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if self._open[-1:] == ["caption"]:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            row = self.tables[self._caption][-1]
            row[-1] = f"{row[-1]} {data.strip()}".strip()


@pytest.fixture(scope="session")
def card() -> dict:
    """Training card of the small model."""
    return CARD


@pytest.fixture
def write_page(tmp_path) -> Callable[..., Page]:
    """Write a page and read it."""

    def make(cells: ad.AnnData, **options) -> Page:
        path = tmp_path / "page.html"
        write_report(cells, path, **options)
        return Page(path.read_text(encoding="utf-8"))

    return make


@pytest.fixture(scope="session")
def demo_input(tmp_path_factory, root) -> Path:
    """Input of the demo, as its tool writes it."""
    path = tmp_path_factory.mktemp("input") / "cells.h5ad"
    subprocess.run([sys.executable, root / "tools" / "demo_input.py", path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory, demo_input) -> LoadedModel:
    """Small model with random weights, which knows most genes of the input and some others."""
    genes = list(ad.read_h5ad(demo_input).raw.var_names[:600])
    genes += [gene for gene in Vocabulary.published().genes if gene not in genes][:100]
    vocabulary = Vocabulary.build(genes, {Family.ORGAN: ["Blood"], Family.COARSE: COARSE, Family.FINE: FINE})
    config = MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=16, value_spread=True)
    network = Mulan(config).initialise(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter *= 25  # cells get different types, some of them surely
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny", network.eval(), vocabulary, CARD)
    return scmulan.load(folder, device="cpu")


@pytest.fixture(scope="session")
def annotated_file(tmp_path_factory, demo_input, model) -> Path:
    """Annotated and embedded cells; one cell is empty."""
    cells = ad.read_h5ad(demo_input)
    raw = cells.raw.to_adata()
    raw.X.data[raw.X.indptr[3] : raw.X.indptr[4]] = 0
    raw.X.eliminate_zeros()
    cells.raw = raw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        annotate(cells, model, threshold=0.6)
        embed(cells, model)
    path = tmp_path_factory.mktemp("annotated") / "annotated.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def annotated(annotated_file) -> ad.AnnData:
    """Annotated cells, to be changed at will."""
    return ad.read_h5ad(annotated_file)


@pytest.fixture(scope="session")
def wanted_type(annotated_file) -> str:
    """Most frequent predicted type."""
    return str(ad.read_h5ad(annotated_file).obs["scmulan_cell_type"].value_counts().index[0])


@pytest.fixture(scope="session")
def generated_file(tmp_path_factory, model, wanted_type) -> Path:
    """Generated cells of the most frequent type."""
    cells = generate(model, {"organ": "Blood", "cell_type": wanted_type}, n=30, seed=1, max_words=120)
    path = tmp_path_factory.mktemp("generated") / "generated.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def generated(generated_file) -> ad.AnnData:
    """Generated cells, to be changed at will."""
    return ad.read_h5ad(generated_file)


@pytest.fixture(scope="session")
def page_file(tmp_path_factory, annotated_file, generated_file) -> Path:
    """The whole page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    cells, generated = ad.read_h5ad(annotated_file, backed="r"), ad.read_h5ad(generated_file, backed="r")
    write_report(cells, path, generated=generated, command="scmulan report a.h5ad -o report.html", card=CARD)
    cells.file.close()
    generated.file.close()
    return path


@pytest.fixture(scope="session")
def page(page_file) -> Page:
    """The whole page, read."""
    return Page(page_file.read_text(encoding="utf-8"))

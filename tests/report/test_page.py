"""The page agrees with the files, and text in them cannot become markup."""

import subprocess
import sys
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scmulan._keys import CELL_TYPE, COARSE, EMBEDDING, ONTOLOGY_ID, PROBABILITY, STATUS, STATUSES, UNKNOWN
from scmulan.errors import InputError, OutputError, ScmulanError
from scmulan.report import page as page_module
from scmulan.report import write_report

MARKUP = "<script>alert(1)</script>"


def few_cells(cells: ad.AnnData, n: int = 40) -> ad.AnnData:
    """Return so few cells that no UMAP is computed."""
    return cells[:n].copy()


def test_types_are_counted(page, annotated, card):
    head, *rows = page.tables["Predicted cell types"]
    assert head == ["Type", "Cells", "Share", "Mean probability", "To check", "Trained on", "Cell Ontology"]
    obs = annotated.obs
    counts = obs[CELL_TYPE].value_counts()
    assert len(rows) == (counts > 0).sum() > 3
    assert [int(row[1]) for row in rows[:-1]] == sorted(counts[counts.index != UNKNOWN], reverse=True)
    for row in rows:
        name = row[0].split(" ", 1)[1]
        own = obs[obs[CELL_TYPE] == name]
        assert row[1] == str(len(own))
        assert row[4] == str(own[STATUS].isin(["uncertain", "conflict"]).sum())
        if name != UNKNOWN:
            assert row[2].endswith("%") and abs(float(row[2][:-1]) - 100 * len(own) / 700) <= 0.5
            assert row[3] == f"{own[PROBABILITY].mean():.2f}"
            assert row[5] == str(card["cell_types"][name])
            assert row[6] == own[ONTOLOGY_ID].iloc[0] != ""
    assert rows[-1][0].endswith(UNKNOWN) and rows[-1][1] == "1"


def test_numbers_of_types_are_their_ranks(page):
    numbers = [row[0].split(" ")[0] for row in page.tables["Predicted cell types"][1:]]
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]


def test_many_types_are_folded(annotated, write_page):
    cells = few_cells(annotated)
    cells.obs[CELL_TYPE] = pd.Categorical([f"type {min(i, 34)}" for i in range(40)])
    page = write_page(cells)
    first, more = page.tables["Predicted cell types"][1:], page.tables["More predicted cell types"][1:]
    assert (len(first), len(more)) == (30, 5)
    assert first[0][:2] == ["1 type 34", "6"] and more[-1][0].startswith("35 ")
    assert "5 more types, with 5 cells" in page.text


def test_input_is_described(page, annotated):
    facts = {row[0]: row[1] for row in page.tables["The input"]}
    info = annotated.uns["scmulan"]
    genes = info["genes"]
    assert facts["Cells"] == "700"
    assert facts["Genes"].startswith("765 ")
    assert facts["Matrix"].startswith("raw.X") and info["matrix"]["reason"] in facts["Matrix"]
    assert "X not used: scaled" in facts["Matrix"]
    assert facts["Genes of the model found"].startswith(f"{genes['found']['count']} of 700")
    assert facts["Missing in the file"].split()[0] == str(genes["missing"]["count"])
    assert facts["Missing in the file"].split()[1].rstrip(",") == genes["missing"]["examples"][0]
    assert facts["Expression in these genes"].endswith(f"{genes['umi_share']:.0%}")
    assert facts["Words per cell"].startswith(f"{info['words_per_cell']:.0f} ")


def test_status_is_counted(page, annotated):
    counts = annotated.obs[STATUS].value_counts()
    rows = {row[0]: row for row in page.tables["Cells by status"]}
    assert {status: int(rows[status][1]) for status in STATUSES} == counts.to_dict()
    assert "is 0.6 or more" in rows["confident"][3]
    named = page.tables["Cells to look at again"][1:]
    doubtful = annotated.obs[annotated.obs[STATUS] != "confident"]
    assert len(named) == min(50, len(doubtful))
    lowest = doubtful[PROBABILITY].sort_values(kind="stable")
    assert [row[0] for row in named] == list(lowest.index[: len(named)])


def test_record_is_complete(page, annotated, model):
    record = {row[0]: row[1] for row in page.tables["Versions and parameters"]}
    assert record["Model"] == "tiny"
    assert record["Weights (sha256)"] == model.weights_hash
    assert "threshold=0.6" in record["Parameters of annotate"]
    assert record["Command"] == "scmulan report a.h5ad -o report.html"
    assert "umap-learn" in record["Report made with"]
    assert "learnt from 1,234 cells of 2 files and knows 6 cell types" in page.text
    assert "other_study 62%" in page.text
    assert model.weights_hash[:12] in page.text


def test_generated_cells_are_compared(page, annotated, wanted_type):
    _, ours, real, others = page.tables["Agreement of generated and real cells"]
    assert ours[0] == "Generated cells"
    assert all(-1 <= float(row[2]) <= 1 and -1 <= float(row[3]) <= 1 for row in (ours, real, others))
    n = int((annotated.obs[CELL_TYPE] == wanted_type).sum())
    assert f"30 generated cells beside the {n} cells of this file that the same model named {wanted_type}" in page.text
    settings = {row[0]: row[1] for row in page.tables["Settings of the generation"]}
    assert (settings["Cells"], settings["Seed"], settings["Most words"]) == ("30", "1", "120")


def test_every_id_is_there_once(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    used = [a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")]
    assert set(used) <= set(ids)


def test_page_can_be_read_with_any_device(page):
    tags = dict(reversed(page.tags))
    assert tags["html"]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 7
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in pictures)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)


def test_page_needs_nothing_else(page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        if tag != "a":
            assert "http" not in (attributes.get("href") or "")
    assert "@import" not in page.html and "url(http" not in page.html
    assert len(page.html) < 3_000_000


def test_text_from_files_stays_text(annotated, generated, write_page):
    cells = few_cells(annotated)
    half = np.arange(40) % 2 == 0
    cells.obs[CELL_TYPE] = pd.Categorical(np.where(half, MARKUP, "$\\frac{a}$\x01 & B"))
    cells.obs[COARSE] = pd.Categorical([MARKUP] * 40)
    cells.obs[STATUS] = pd.Categorical(["conflict"] * 40)
    cells.obs[ONTOLOGY_ID] = '"><script>alert(1)</script>'
    cells.obs_names = [f"{MARKUP}{i}" for i in range(40)]
    raw = cells.raw.to_adata()
    markup_genes = [f"<img src=x onerror=alert({i})>" for i in range(3)]
    raw.var_names = [*raw.var_names[:-3], *markup_genes]
    x = raw.X.tolil()
    x[np.flatnonzero(half)[:, None], [762, 763, 764]] = 5.0
    x[np.flatnonzero(~half)[:, None], [762, 763, 764]] = 0.0
    raw.X = x.tocsr()
    cells.raw = raw
    cells.uns["scmulan"]["model"] = MARKUP
    cells.uns["scmulan"]["genes"]["renamed"] = {"count": 1, "examples": [f"{MARKUP} → {MARKUP}"]}
    other = generated.copy()
    other.obs["prompt_fine_type"] = pd.Categorical([MARKUP] * 30)
    page = write_page(
        cells, generated=other, title=MARKUP, command=MARKUP, card={"description": MARKUP, "cell_types": {MARKUP: 3}}
    )
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert MARKUP not in page.html
    assert page.text.count(MARKUP) > 20
    # In the dot plot too, where labels pass through matplotlib.
    assert markup_genes[0] in page.words or f"{markup_genes[0][:13]}…" in page.words
    assert sum("$\\frac{a}$" in words for words in page.words) > 3


def test_few_cells_without_embedding_or_probability(annotated, write_page):
    cells = few_cells(annotated)
    del cells.obsm[EMBEDDING]
    cells.obs[PROBABILITY] = np.float32("nan")
    cells.uns["scmulan"]["parameters"]["annotate"]["rule"] = "release"
    page = write_page(cells)
    assert "There is no map" in page.text
    assert "decoded greedily" in page.text
    assert {row[3] for row in page.tables["Predicted cell types"][1:]} == {"–"}
    assert "nan" not in page.text.lower().replace("nanog", "")
    assert "Generated cells" not in page.text


def test_release_rule_has_a_map_but_no_probabilities(annotated, write_page):
    cells = few_cells(annotated)
    cells.obs[PROBABILITY] = np.float32("nan")
    page = write_page(cells)
    assert sum(a.get("aria-label", "").startswith("PCA of") for tag, a in page.tags if tag == "svg") == 1
    assert "gives no probabilities" in page.text


def test_results_survive_a_lost_record(annotated, write_page):
    cells = few_cells(annotated)
    del cells.uns["scmulan"]
    page = write_page(cells)
    assert "does not say how it was annotated" in page.text
    assert dict(page.tables["The input"])["Matrix"].startswith("raw.X")


def test_prompted_type_that_no_cell_has(annotated, generated, write_page):
    cells = few_cells(annotated)
    other = generated.copy()
    other.obs["prompt_fine_type"] = pd.Categorical(["hepatocyte"] * 30)
    page = write_page(cells, generated=other)
    assert "No cell of this file was named hepatocyte" in page.text
    assert "Agreement of generated and real cells" not in page.tables


def test_only_empty_cells(annotated, write_page):
    cells = annotated[[3]].copy()
    page = write_page(cells)
    assert [row[0] for row in page.tables["Predicted cell types"][1:]] == ["1 unknown"]
    assert "no gene that the model reads" in page.text


def test_cells_that_were_not_annotated(annotated, tmp_path):
    cells = few_cells(annotated)
    del cells.obs[CELL_TYPE]
    with pytest.raises(InputError, match=r"no column 'scmulan_cell_type' in obs.*scmulan annotate") as error:
        write_report(cells, tmp_path / "page.html")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_one_line(annotated, tmp_path, monkeypatch):
    there = page_module.find_spec
    monkeypatch.setattr(page_module, "find_spec", lambda name: None if name in ("umap", "jinja2") else there(name))
    with pytest.raises(ScmulanError, match=r"needs jinja2 and umap-learn: pip install 'scmulan\[report\]'$"):
        write_report(annotated, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_old_page_stays_where_a_new_one_fails(annotated, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    cells = few_cells(annotated)
    cells.uns["scmulan"]["matrix"]["where"] = "layers['gone']"
    with pytest.raises(ScmulanError, match="gone"):
        write_report(cells, path)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"] and path.read_text() == "old"
    with pytest.raises(OutputError, match="nowhere"):
        write_report(few_cells(annotated), tmp_path / "nowhere" / "page.html")


def test_input_is_not_changed(annotated, generated, write_page):
    cells = few_cells(annotated)
    before = cells.copy()
    write_page(cells, generated=generated)
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert list(cells.uns) == list(before.uns) and list(cells.obsm) == list(before.obsm)
    assert (cells.raw.X != before.raw.X).nnz == 0


def test_extras_are_imported_late():
    # AnnData itself brings jinja2 along where dask is installed.
    code = "import sys, anndata; before = set(sys.modules); import scmulan.report\n"
    code += "print({'torch', 'matplotlib', 'umap', 'jinja2'} & (set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()"

"""Labels from clusters and markers, as used by the recipe of the small model."""

import importlib.util
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parents[1]
TYPES = ("B cell", "dendritic cell", "platelet")


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("name_by_markers", ROOT / "tools" / "name_by_markers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(tmp_path):
    """Three kinds of cells, each with 20 genes of its own among 200; the study names the first kind vaguely or not."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(3), 60)
    rate = np.full((180, 200), 0.5)
    for k in range(3):
        rate[np.ix_(kind == k, np.arange(20 * k, 20 * k + 20))] = 6
    obs = pd.DataFrame({"label": "", "coarse": ""}, index=[f"c{i}" for i in range(180)])
    obs.iloc[:10] = "plasma cell"
    obs.iloc[10:20] = ["vague", "vaguer"]
    path = tmp_path / "study.h5ad"
    cells = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs)
    cells.var_names = [f"G{i}" for i in range(200)]
    cells.write_h5ad(path)
    return path, kind


def test_clusters_get_the_labels_of_their_markers(tool, study, tmp_path, monkeypatch, capsys):
    path, kind = study
    genes = [f"G{20 * k} G{20 * k + 1} G{20 * k + 2} -G{(20 * k + 20) % 60} ABSENT" for k in range(3)]
    markers = pd.DataFrame({"label": TYPES, "coarse": [f"coarse {t}" for t in TYPES], "given": "yes", "markers": genes})
    markers.to_csv(tmp_path / "markers.tsv", sep="\t", index=False)
    given = [str(path), "--markers", str(tmp_path / "markers.tsv"), "-o", str(tmp_path / "tables")]
    monkeypatch.setattr(sys, "argv", ["name_by_markers.py", *given, "--vague", "vague", "--resolution", "0.5"])
    tool.main()
    table = pd.read_csv(tmp_path / "tables" / "study.csv", index_col="row", keep_default_na=False)
    assert list(table.index) == list(range(10, 180))  # the study's own name is not listed
    named = table["label"] != ""
    truth = np.array(TYPES)[kind[10:]]
    assert named.mean() > 0.9 and (table["label"][named] == truth[named]).all()
    assert (table["coarse"][named] == "coarse " + table["label"][named]).all()
    assert f"{int(named.sum())} of 170 cells named" in capsys.readouterr().out
    markers.loc[1, "given"] = "no"
    markers.to_csv(tmp_path / "markers.tsv", sep="\t", index=False)
    tool.main()
    fewer = pd.read_csv(tmp_path / "tables" / "study.csv", index_col="row", keep_default_na=False)["label"]
    assert (fewer == table["label"].where(table["label"] != TYPES[1], "")).all()
    markers.loc[1, "given"] = "coarse"
    markers.to_csv(tmp_path / "markers.tsv", sep="\t", index=False)
    tool.main()
    coarse = pd.read_csv(tmp_path / "tables" / "study.csv", index_col="row", keep_default_na=False)
    assert (coarse["label"] == fewer).all() and (coarse["coarse"] == table["coarse"]).all()
    printed = capsys.readouterr().out
    copy = tmp_path / "copies" / "study.h5ad"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--copies", str(copy.parent)])
    tool.main()
    before, after = ad.read_h5ad(path), ad.read_h5ad(copy)
    names = coarse["label"].where(coarse["label"] != "", coarse["coarse"])
    assert list(after.obs["label"]) == ["plasma cell"] * 10 + list(names)
    assert (after.X != before.X).nnz == 0
    assert f"{int(named.sum())} of 170 cells named" in printed and f"coarse {TYPES[1]}" in printed


def test_a_cell_among_others_gets_no_label(tool, study):
    """Its cluster's name, unless its neighbours show other markers: here nothing tells the types apart."""
    path, _ = study
    markers = pd.DataFrame({"coarse": "x", "given": "yes", "markers": ["G100 G101", "G102 G103"]}, index=["one", "two"])
    found = tool.label_cells(ad.read_h5ad(path), markers, 0.5)
    assert (found == "").mean() > 0.5


def test_mixed_labels_of_a_study_are_told_apart(tool, shared, tmp_path, monkeypatch):
    """Real cells: monocytes and dendritic cells under one name, natural killer and T cells under another."""
    study, recipes = shared / "data" / "train" / "10x_pbmc4k.h5ad", ROOT / "recipes" / "mini"
    vague = ["--vague", "mononuclear phagocyte", "--vague", "natural killer cell"]
    given = [str(study), "--markers", str(recipes / "markers.tsv"), *vague, "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["name_by_markers.py", *given])
    tool.main()
    table = pd.read_csv(tmp_path / "10x_pbmc4k.csv", index_col="row", keep_default_na=False)
    number = table["label"].value_counts()
    assert number["CD14-positive monocyte"] > 350 and number["CD14-low, CD16-positive monocyte"] > 40
    assert 35 < number["dendritic cell"] < 90 and number["plasmacytoid dendritic cell"] > 10
    assert not any("T cell" in label for label in number.index)
    # About half of the cells that the study calls natural killer cells show the T cell receptor.
    cells = ad.read_h5ad(study)[table.index.to_numpy()]
    assert set(cells.obs["label"].astype(str)) == {"", "mononuclear phagocyte", "natural killer cell"}
    seen = (cells[:, ["CD3D", "TYROBP", "FCER1G"]].to_df() > 0).groupby(table["coarse"].to_numpy()).mean()
    assert number["natural killer cell"] > 60 and (table["coarse"] == "T cell").sum() > 60
    assert seen.loc["T cell", "CD3D"] > 0.8 and seen.loc["natural killer cell", "CD3D"] < 0.3
    assert seen.loc["natural killer cell", "TYROBP"] > 0.9 and seen.loc["T cell", "FCER1G"] < 0.3
    # What the recipe reads was written so; clusters may come out a little different on another machine.
    kept = pd.read_csv(recipes / "names" / "10x_pbmc4k.csv", index_col="row", keep_default_na=False)
    assert list(kept.index) == list(table.index) and (kept["coarse"] == table["coarse"]).mean() > 0.9


def test_the_recipe_s_names_are_those_of_the_marker_table():
    folder = ROOT / "recipes" / "mini"
    markers = pd.read_csv(folder / "markers.tsv", sep="\t", index_col="label")
    given = markers["coarse"][markers["given"] == "yes"]
    tables = sorted((folder / "names").glob("*.csv"))
    assert len(tables) == 3
    for path in tables:
        table = pd.read_csv(path, keep_default_na=False)
        assert list(table) == ["row", "label", "coarse"] and table["row"].is_unique  # no cell is named, only counted
        fine = table[table["label"] != ""]
        assert (fine["label"].map(given) == fine["coarse"]).all()
        assert set(table["coarse"][table["label"] == ""]) <= {"", *markers["coarse"][markers["given"] == "coarse"]}

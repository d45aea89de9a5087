"""Labels, mapping tables and lineages."""

import importlib.util
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from scmulan._io.adata import read_column
from scmulan.errors import InputError
from scmulan.evaluate.labels import LINEAGES, OTHER, canonical, lineage_of, read_label_map
from scmulan.vocab.ontology import Ontology


@pytest.mark.parametrize(
    ("label", "lineage"),
    [
        ("T cell", "T"),
        ("CD8-positive, alpha-beta T cell", "T"),
        ("mucosal-associated invariant T cell", "T"),
        ("exhausted CD8 T cell", "T"),
        ("mature NK T cell", "T"),
        ("B cell", "B"),
        ("plasma cell", "B"),
        ("plasmablast", "B"),
        ("CL:0000236", "B"),
        ("NK", "NK"),
        ("monocyte", "monocyte"),
        ("CD14-low, CD16-positive monocyte", "monocyte"),
        ("macrophage", "monocyte"),
        ("mononuclear phagocyte", "monocyte"),
        ("microglial cell", "monocyte"),
        ("Gr1-high classical monocyte", "monocyte"),
        ("dendritic cell", "dendritic"),
        ("CL:0001056", "dendritic"),
        ("plasmacytoid dendritic cell", "dendritic"),
        ("Langerhans cell", "dendritic"),
        ("hematopoietic precursor cell", "progenitor"),
        ("HSC", "progenitor"),
        ("CD34+", "progenitor"),
        ("myeloid cell", OTHER),
        ("platelet", OTHER),
        ("fibroblast", OTHER),
        ("unknown", OTHER),
        ("", OTHER),
    ],
)
def test_lineages(label, lineage):
    assert lineage_of(label) == lineage


def test_every_root_is_a_type_of_the_ontology():
    for lineage, roots in LINEAGES.items():
        for root in roots:
            assert root in Ontology.load() and lineage_of(root) == lineage


def test_spellings_of_a_type_are_one():
    assert canonical("CD4 T") == canonical("CL:0000624") == "CD4-positive, alpha-beta T cell"
    assert canonical("my cluster 7") == "my cluster 7"


def test_missing_labels_are_empty():
    obs = pd.DataFrame({"label": pd.Categorical(["B cell", None, " T cell ", ""]), "number": [1.0, np.nan, 2.0, 3.0]})
    assert read_column(obs, "label", "x").tolist() == ["B cell", "", "T cell", ""]
    assert read_column(obs, "number", "x").tolist() == ["1.0", "", "2.0", "3.0"]


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"file.h5ad: no column 'lable' in obs; did you mean 'label'\?"):
        read_column(pd.DataFrame({"label": ["a"], "x": ["b"]}), "lable", "file.h5ad")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_map_gives_terms_and_groups(tmp_path):
    table = read_label_map(
        write(tmp_path / "m.tsv", "label\tlineage\tCL id\nc1\tT\tCL:0000624\nc2\tT\tCL:0000625\nc3\t\t\n")
    )
    assert table.term("c1") == "CD4-positive, alpha-beta T cell"
    assert table.true_group("c1") == table.true_group("c2") == "T"
    assert table.term("c3") == ""  # its cells are left out
    assert table.term("B cells") == "B cell" and table.true_group("B cells") == "B"  # not in the table
    assert table.group_of("regulatory T cell") == "T"


def test_groups_other_than_lineages(tmp_path):
    text = "label\tgroup\tterm\nx1\tlymphoid\tlymphocyte\nx2\tmyeloid\tmyeloid cell\nx3\tlymphoid\tNK cell\n"
    table = read_label_map(write(tmp_path / "m.tsv", text))
    assert table.true_group("x3") == "lymphoid"
    assert table.group_of("B cell") == "lymphoid"
    assert table.group_of("platelet") == "myeloid"
    assert table.group_of("fibroblast") == OTHER


def test_the_map_s_group_of_a_label_counts(tmp_path):
    text = "label\tlineage\tcl_id\nmonocyte-derived\tdendritic\tmonocyte\nB\tB\tB cell\n"
    table = read_label_map(write(tmp_path / "m.tsv", text))
    assert table.true_group("monocyte-derived") == "dendritic" and table.group_of("monocyte") == "monocyte"


def test_two_columns_are_a_map_too(tmp_path):
    table = read_label_map(write(tmp_path / "m.tsv", "bulk_labels\tterm\nA\tT cell\n"))
    assert table.term("A") == "T cell" and not table.groups


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "its header is missing"),
        ("label\tcolour\nA\tred\n", "its header is label, colour"),
        ("label\tterm\nA\tB cell\nA\tT cell\n", "label 'A' is there twice \\(row 3\\)"),
        ("label\tterm\n\tB cell\n", "row 2 has no label"),
    ],
)
def test_a_bad_map_is_refused(tmp_path, text, problem):
    with pytest.raises(InputError, match=problem):
        read_label_map(write(tmp_path / "m.tsv", text))


def test_a_map_of_other_labels_is_refused(tmp_path):
    table = read_label_map(write(tmp_path / "m.tsv", "label\tterm\nA\tB cell\n"))
    table.check(["A", "C", ""], "f.h5ad")
    with pytest.raises(InputError, match=r"none of its labels \('A'\) is among those of f.h5ad \('C'\)"):
        table.check(["C", ""], "f.h5ad")


def test_a_missing_map_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such mapping table"):
        read_label_map(tmp_path / "none.tsv")


def test_the_packaged_lineages_agree_with_the_ontology():
    table = read_label_map("pbmc68k_lineages")
    assert set(table.groups.values()) == set(LINEAGES)
    for label, identifier in table.terms.items():
        assert identifier in Ontology.load(), label
        assert lineage_of(identifier) == table.groups[label], label


def test_the_packaged_lineages_cover_the_demo_s_labels():
    # Names of the labels only; which cell has which is looked at once per release.
    folder = Path(importlib.util.find_spec("scanpy").submodule_search_locations[0]) / "datasets"
    with h5py.File(folder / "10x_pbmc68k_reduced.h5ad") as file:  # in the layout of 2019, categories stand in uns
        labels = {label.decode() for label in file["uns/bulk_labels_categories"][:]}
    table = read_label_map("pbmc68k_lineages")
    assert set(table.terms) == set(table.groups) == labels


def test_labels_of_an_anndata(tmp_path):
    adata = ad.AnnData(np.ones((2, 1), dtype=np.float32), obs=pd.DataFrame({"l": ["a", "b"]}, index=["x", "y"]))
    assert read_column(adata.obs, "l", "x").tolist() == ["a", "b"]

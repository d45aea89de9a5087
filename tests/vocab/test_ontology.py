"""Labels to Cell Ontology ids, and what is a kind of what."""

import json

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.resources import read_text
from scmulan.vocab.ontology import Ontology

ONTOLOGY = Ontology.load()
IDS = [line.split("\t")[0] for line in read_text("ontology.tsv.gz").splitlines()[1:]]
CURRENT = [identifier for identifier in IDS if identifier in ONTOLOGY]
T, B, NK, CD4, CD8 = "CL:0000084", "CL:0000236", "CL:0000623", "CL:0000624", "CL:0000625"
MONOCYTE, CD14, LYMPHOCYTE = "CL:0000576", "CL:0001054", "CL:0000542"


@pytest.mark.parametrize(
    ("label", "identifier"),
    [
        ("T cell", T),
        ("t-cells", T),
        ("T lymphocytes", T),
        ("CL:0000084", T),
        ("CL_0000084", T),
        (" cl:0000084 ", T),
        ("T", T),
        ("CD4+ T cells", CD4),
        ("CD4 T", CD4),
        ("T_CD4", CD4),
        ("CD4-positive, alpha-beta T cell", CD4),
        ("CD8 T cells", CD8),
        ("B cells", B),
        ("B_cell", B),
        ("CD19+ B", B),
        ("NK cell", NK),
        ("NK", NK),
        ("CD56+ NK", NK),
        ("monocytes", MONOCYTE),
        ("CD14+ Monocyte", CD14),
        ("CD14+ Monocytes", CD14),
        ("Mono CD14", CD14),
        ("FCGR3A+ Monocytes", "CL:0002396"),
        ("DCs", "CL:0000451"),
        ("Dendritic", "CL:0000451"),
        ("cDC", "CL:0000990"),
        ("pDC", "CL:0000784"),
        ("Tregs", "CL:0000815"),
        ("CD4+/CD25 T Reg", "CL:0000792"),
        ("MAIT cell", "CL:0000940"),
        ("Haematopoietic stem cell", "CL:0000037"),
        ("Common lymphoid progenitor (CLP)", "CL:0000051"),
        ("fibres", None),
        ("CD8- T cell", None),
        ("B cell (malignant)", None),
        ("Mono", None),
        ("D1", None),
        ("N2", None),
        ("R1", None),
        ("B1", None),
        ("C", None),
        ("unknown", None),
        ("", None),
        ("CL:9999999", None),
    ],
)
def test_labels_of_the_field_are_found(label, identifier):
    assert ONTOLOGY.find(label) == identifier


def test_a_deprecated_id_gives_its_replacement_or_nothing():
    assert ONTOLOGY.find("CL:0000003") == "CL:0000000"
    assert ONTOLOGY.find("CL:1000897") == "CL:1000452"  # a merged term that lost its name
    assert ONTOLOGY.find("CL:0000002") is None  # replaced by a term of another ontology
    assert "CL:0000002" not in ONTOLOGY
    with pytest.raises(KeyError):
        ONTOLOGY.name("CL:0000002")


def test_a_synonym_of_several_types_is_no_name_of_any():
    text = (
        "id\tname\tsynonyms\tparents\tdeprecated\treplaced_by\n"
        "CL:0000001\tred cell\tshared|own\t\t\t\n"
        "CL:0000002\tblue cell\tshared|red cell\tCL:0000001\t\t\n"
    )
    ontology = Ontology(text)
    assert [ontology.find(label) for label in ("shared", "own", "red cells")] == [None, "CL:0000001", "CL:0000001"]
    short = Ontology(text, "short_name\tid\tname\nshared\tCL:0000002\tblue cell\nred cell\tCL:0000002\tblue cell\n")
    # A short name settles an ambiguous synonym, but never takes a name.
    assert (short.find("shared"), short.find("red cell")) == ("CL:0000002", "CL:0000001")


def test_relations():
    assert ONTOLOGY.name(CD4) == "CD4-positive, alpha-beta T cell"
    assert ONTOLOGY.parents(CD4) == ("CL:0000791",)
    assert T in ONTOLOGY.ancestors(CD4) and CD4 not in ONTOLOGY.ancestors(CD4)
    assert ONTOLOGY.ancestors(CD4, include_self=True) == ONTOLOGY.ancestors(CD4) | {CD4}
    assert {CD4, CD8, "CL:0000815"} <= ONTOLOGY.descendants(T)
    assert ONTOLOGY.is_a(CD4, LYMPHOCYTE) and not ONTOLOGY.is_a(LYMPHOCYTE, CD4)
    assert ONTOLOGY.closest_common_ancestor([CD4, CD8]) == "CL:0000791"
    assert ONTOLOGY.closest_common_ancestor([CD4, T]) == T
    assert ONTOLOGY.closest_common_ancestor([CD4, B]) == LYMPHOCYTE
    assert ONTOLOGY.closest_common_ancestor([]) is None
    assert ONTOLOGY.distance(CD4, LYMPHOCYTE) == ONTOLOGY.distance(LYMPHOCYTE, CD4) == 4
    assert ONTOLOGY.distance(CD4, CD8) == 2 and ONTOLOGY.distance(T, T) == 0


def test_a_finer_prediction_agrees_with_a_coarse_truth_and_not_the_other_way():
    assert ONTOLOGY.agrees("CD4+ T cells", "T cell")
    assert not ONTOLOGY.agrees("T cell", "CD4+ T cells")
    assert not ONTOLOGY.agrees("CD4 T", "CD8 T")
    assert ONTOLOGY.agrees("plasmacytoid dendritic cell", "mononuclear phagocyte")
    assert ONTOLOGY.agrees("my own type", "my own type") and not ONTOLOGY.agrees("my own type", "cell")


def test_label_matrix():
    labels = ["T cell", "CD4+ T cells", "CD4 T", "cluster 7", "B cell", "cluster 8", "cluster 7"]
    expected = np.eye(7, dtype=bool)
    expected[0, [1, 2]] = expected[1, 2] = expected[2, 1] = expected[3, 6] = expected[6, 3] = True
    matrix = ONTOLOGY.label_matrix(labels)
    assert matrix.dtype == bool
    np.testing.assert_array_equal(matrix, expected)
    assert ONTOLOGY.label_matrix([]).shape == (0, 0)


def test_every_name_and_id_finds_its_type():
    names = [ONTOLOGY.name(identifier) for identifier in CURRENT]
    wrong = [
        name for name, identifier in zip(names, CURRENT, strict=True) if ONTOLOGY.find(name) not in (identifier, None)
    ]
    unfound = [name for name in names if ONTOLOGY.find(name) is None]
    assert wrong == [] and len(unfound) < 10, unfound  # a few names differ in punctuation alone
    assert [ONTOLOGY.find(identifier.replace(":", "_")) for identifier in CURRENT] == CURRENT


def test_short_names_are_reviewed():
    rows = [line.split("\t") for line in read_text("ontology_shortnames.tsv").splitlines()[1:]]
    assert [row for row in rows if ONTOLOGY.name(row[1]) != row[2]] == []
    assert [row for row in rows if ONTOLOGY.find(row[0]) != row[1]] == []
    assert len({row[0].casefold() for row in rows}) == len(rows) > 200


def test_the_published_words_for_cell_types_are_found():
    lists = json.loads(read_text("vocabulary_release.json"))
    unknown = {name for name in lists["coarse_cell_types"] + lists["fine_cell_types"] if ONTOLOGY.find(name) is None}
    assert unknown == {
        "Basement membrane fibroblast",
        "Epithelial progenitor cell",
        "FOXN4+ cell",
        "Intermediate macrophage",
        "Proliferating cell",
        "Unclassified",
        "Vascular cell",
    }


def test_the_table_is_acyclic_and_whole():
    for identifier in CURRENT:
        assert set(ONTOLOGY.parents(identifier)) <= set(CURRENT)
        assert identifier not in ONTOLOGY.ancestors(identifier)


identifiers = st.sampled_from(CURRENT)


@settings(deadline=None)
@given(identifiers, identifiers)
def test_is_a_ancestors_and_descendants_are_one_relation(one, other):
    related = ONTOLOGY.is_a(one, other)
    assert related == (other in ONTOLOGY.ancestors(one, include_self=True))
    assert related == (one in ONTOLOGY.descendants(other, include_self=True))
    distance = ONTOLOGY.distance(one, other)
    assert distance == ONTOLOGY.distance(other, one)
    assert (distance == 0) == (one == other)
    common = ONTOLOGY.closest_common_ancestor([one, other])
    assert (common is None) == (distance is None)
    if common is not None:
        assert ONTOLOGY.is_a(one, common) and ONTOLOGY.is_a(other, common)
        below = ONTOLOGY.descendants(common)
        assert not any(ONTOLOGY.is_a(one, node) and ONTOLOGY.is_a(other, node) for node in below)
        assert not related or common == other


@settings(deadline=None)
@given(st.lists(st.one_of(identifiers, identifiers.map(ONTOLOGY.name), st.text(max_size=8)), max_size=12))
def test_label_matrix_is_a_preorder_and_what_agrees_says(labels):
    matrix = ONTOLOGY.label_matrix(labels)
    assert matrix.diagonal().all()
    steps = matrix.astype(int)
    assert not ((steps @ steps > 0) & ~matrix).any()
    for i, truth in enumerate(labels):
        for j, predicted in enumerate(labels):
            assert ONTOLOGY.agrees(predicted, truth) == matrix[i, j]


@settings(deadline=None)
@given(identifiers, st.sampled_from(["upper", "title", "lower"]), st.sampled_from([" ", "_", "-"]))
def test_spelling_does_not_matter(identifier, case, blank):
    name = ONTOLOGY.name(identifier)
    if ONTOLOGY.find(name) is None:
        return
    assert ONTOLOGY.find(getattr(name, case)()) == identifier
    assert ONTOLOGY.find(name.replace(" ", blank)) == identifier
    if name.endswith(" cell"):
        assert ONTOLOGY.find(name + "s") == identifier


@pytest.mark.shared
def test_all_harmonised_labels_of_the_training_studies_are_found(shared):
    seen = set()
    for path in sorted((shared / "data" / "train").glob("*.h5ad")):
        obs = ad.read_h5ad(path, backed="r").obs
        seen |= set(zip(obs["label"].astype(str), obs["label_id"].astype(str), strict=True))
    labelled = {(label, identifier) for label, identifier in seen if label}
    assert len(labelled) > 50
    assert {(label, ONTOLOGY.find(label)) for label, _ in labelled} == labelled

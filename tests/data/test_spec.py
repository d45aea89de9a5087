"""The text that says what the columns of training files mean."""

import pandas as pd
import pytest

from scmulan.data.spec import read_corpus_spec, read_spec
from scmulan.errors import RecipeError
from scmulan.vocab.vocabulary import Family, Vocabulary


@pytest.fixture
def folder(tmp_path):
    for name in ("a.h5ad", "b.h5ad"):
        (tmp_path / name).touch()
    return tmp_path


def test_studies_may_differ_from_what_holds_for_all(folder):
    raw = {
        "columns": {"organ": "organ", "cell_type": "label"},
        "rename": {"technology": {"10X": "10x"}},
        "study": [
            {"file": "a.h5ad"},
            {
                "file": "b.h5ad",
                "name": "Bee 2020",
                "columns": {"fine_type": "celltype", "tech": "assay"},
                "rename": {"tech": {"SS2": "Smart-seq2", "10X": ""}},
                "fixed": {"organ": "Brain"},
            },
        ],
    }
    one, two = read_spec(raw, folder)
    assert one.name == "a" and one.columns == {Family.ORGAN: "organ", Family.FINE: "label"}
    assert two.name == "Bee 2020"
    assert two.columns == {Family.ORGAN: "organ", Family.FINE: "celltype", Family.TECHNOLOGY: "assay"}
    assert one.rename == {Family.TECHNOLOGY: {"10X": "10x"}}
    assert two.rename == {Family.TECHNOLOGY: {"SS2": "Smart-seq2", "10X": ""}}
    obs = pd.DataFrame(
        {
            "organ": ["Blood", None, "Liver"],
            "celltype": pd.Categorical([" T cell", None, "B cell"]),
            "assay": ["10X", "SS2", "CEL-seq"],
        }
    )
    names = two.metadata(obs)
    assert {f: n.tolist() for f, n in names.items()} == {
        Family.ORGAN: ["Brain"] * 3,
        Family.FINE: ["T cell", "", "B cell"],
        Family.TECHNOLOGY: ["", "Smart-seq2", "CEL-seq"],
    }
    assert one.metadata(obs)[Family.ORGAN].tolist() == ["Blood", "", "Liver"]
    assert Family.FINE not in one.metadata(obs)  # the column is not there: nothing is known


def test_a_folder_is_relative_to_the_file_that_says_so(folder):
    (folder / "sub").mkdir()
    assert read_spec({"folder": "..", "study": [{"file": "a.h5ad"}]}, folder / "sub")[0].file == folder / "a.h5ad"


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({"study": []}, RecipeError, r"names no \[\[study\]\]"),
        ({"study": [{"name": "x"}]}, RecipeError, "without `file`"),
        ({"study": [{"file": "c.h5ad"}]}, RecipeError, r"training cells not found: .*c\.h5ad"),
        ({"studies": []}, RecipeError, r"unknown setting 'data\.studies': expected .*; did you mean 'study'"),
        ({"study": [{"file": "a.h5ad", "path": "x"}]}, RecipeError, r"unknown setting 'data\.study\[1\]\.path'"),
        ({"study": [{"file": "a.h5ad", "name": 3}]}, RecipeError, r"data\.study\[1\]\.name = 3: expected a text"),
        ({"study": {"file": "a.h5ad"}}, RecipeError, r"data\.study = .*: expected a list"),
        ({"columns": "organ", "study": [{"file": "a.h5ad"}]}, RecipeError, r"data\.columns = 'organ': expected a tab"),
        ({"columns": {"flavour": "x"}, "study": [{"file": "a.h5ad"}]}, RecipeError, "unknown metadata field"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(folder, raw, error, message):
    with pytest.raises(error, match=message) as found:
        read_spec(raw, folder)
    assert "\n" not in str(found.value)


def test_donors_and_groups(folder):
    raw = {
        "columns": {"donor": "person"},
        "study": [
            {"file": "a.h5ad", "group": "G"},
            {"file": "b.h5ad", "columns": {"donor": "patient"}, "fixed": {"donor": "P9", "organ": "Lung"}},
        ],
    }
    one, two = read_spec(raw, folder)
    assert (one.group, two.group) == ("G", "b") and two.fixed == {Family.ORGAN: "Lung"}
    obs = pd.DataFrame({"person": pd.Categorical([" d1", None, "d2"]), "patient": [1, 2, 3]})
    assert one.donors(obs).tolist() == ["d1", "", "d2"]
    assert two.donors(obs).tolist() == ["P9"] * 3
    assert read_spec({"study": [{"file": "a.h5ad"}]}, folder)[0].donors(obs).tolist() == [""] * 3


def test_numbers_are_names_too(folder):
    one = read_spec({"columns": {"age": "age"}, "study": [{"file": "a.h5ad"}]}, folder)[0]
    names = one.metadata(pd.DataFrame({"age": [30.0, None, 45.5]}))[Family.AGE]
    assert names.tolist() == ["30.0", "", "45.5"]


def test_a_corpus_has_settings_and_a_recipe_is_one_too(folder):
    Vocabulary.build(["CD4"], {}).save(folder / "words.json")
    (folder / "a.toml").write_text(
        'genes = 7\nunknown = "add"\nduplicates = "drop"\nshard_cells = 9\nvocabulary = "words.json"\n'
        '[[study]]\nfile = "a.h5ad"\nlayer = "counts"\nmatrix_kind = "counts"\n'
    )
    spec = read_corpus_spec(folder / "a.toml")
    assert (spec.genes, spec.unknown, spec.duplicates, spec.shard_cells) == (7, "add", "drop", 9)
    assert spec.vocabulary == str(folder / "words.json")
    assert (spec.studies[0].layer, spec.studies[0].matrix_kind) == ("counts", "counts")
    (folder / "b.toml").write_text('name = "x"\n[vocabulary]\ngenes = 5\n[data]\n[[data.study]]\nfile = "a.h5ad"\n')
    recipe = read_corpus_spec(folder / "b.toml")
    assert (recipe.genes, recipe.vocabulary, [s.name for s in recipe.studies]) == (5, "", ["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[study]]\nfile = "a.h5ad"\n[[study]]\nfile = "a.h5ad"', "two studies have the name 'a'"),
        ('[[study]]\nfile = "a.h5ad"\nmatrix_kind = "scaled"', "matrix_kind = 'scaled': expected 'counts' or 'log1p'"),
        ('[[study]]\nfile = "a.h5ad"\nstate = "counts"', r"study\[1\]\.state is called matrix_kind now"),
        ('unknown = "refse"\n[[study]]\nfile = "a.h5ad"', "unknown = 'refse': .*; did you mean 'refuse'"),
        ('shard_cell = 9\n[[study]]\nfile = "a.h5ad"', "unknown setting 'shard_cell': .*; did you mean 'shard_cells'"),
        ('shard_cells = 9.5\n[[study]]\nfile = "a.h5ad"', "shard_cells = 9.5: expected a whole number of at least 1"),
        ('[[study]]\nfile = "a.h5ad"\nobs = "none.csv"', r"training cells not found: .*none\.csv"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_corpus_is_said_in_one_line(folder, text, message):
    (folder / "a.toml").write_text(text)
    with pytest.raises(RecipeError, match=message) as found:
        read_corpus_spec(folder / "a.toml")
    assert "\n" not in str(found.value)

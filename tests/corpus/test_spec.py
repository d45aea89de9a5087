"""The text that says what the columns of training files mean."""

import pandas as pd
import pytest

from scmulan.corpus.spec import read_spec
from scmulan.errors import RecipeError, VocabularyError
from scmulan.language.vocabulary import Family


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
    words = two.metadata(obs)
    assert {f: w.tolist() for f, w in words.items()} == {
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
        ({"studies": []}, RecipeError, r"unknown setting 'studies' in \[data\]: expected columns, folder"),
        ({"study": [{"file": "a.h5ad", "path": "x"}]}, RecipeError, r"unknown setting 'path' in \[\[study\]\]"),
        ({"columns": {"flavour": "x"}, "study": [{"file": "a.h5ad"}]}, VocabularyError, "unknown metadata field"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(folder, raw, error, message):
    with pytest.raises(error, match=message) as found:
        read_spec(raw, folder)
    assert "\n" not in str(found.value)

import json

import pytest

from scmulan.errors import VocabularyError
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary, family_of_field


def small() -> Vocabulary:
    types = {Family.COARSE: ["B cell", "T cell"], Family.FINE: ["B cell", "naive B cell"]}
    return Vocabulary.build(["CD3E", "MS4A1"], {Family.ORGAN: ["Blood", "Brain"], **types})


def test_published_vocabulary_has_the_words_and_families_of_the_release():
    v = Vocabulary.published()
    assert len(v) == 2222
    assert len(v.genes) == 2000 and v.tokens[1] == "A2M" and v.genes[0] == "A2M"
    assert v.end == 0 and v.tokens[v.prompts["annotate"]] == "<PCT>"
    assert v.tokens[v.prompts["generate"]] == "<SPToken1>"
    assert [len(v.ids(f)) for f in METADATA] == [7, 39, 34, 3, 7, 10, 29, 109]
    shared = set(v.ids(Family.COARSE)) & set(v.ids(Family.FINE))
    assert len(shared) == 24  # one token in two families, as published


def test_published_vocabulary_is_the_list_beside_the_checkout(shared):
    raw = json.loads((shared / "reference" / "vocabulary.json").read_text())
    assert list(Vocabulary.published().tokens) == raw["tokens"]
    assert Vocabulary.load(shared / "reference" / "vocabulary.json") == Vocabulary.published()


def test_same_name_in_two_families_is_two_words():
    v = small()
    assert v.id(Family.COARSE, "B cell") != v.id(Family.FINE, "B cell")
    assert v.tokens[v.id(Family.FINE, "B cell")] == "B cell"


def test_json_round_trip(tmp_path):
    for v in (small(), Vocabulary.published()):
        v.save(tmp_path / "v.json")
        assert Vocabulary.load(tmp_path / "v.json") == v


def test_extend_keeps_ids_and_appends_only_what_is_new():
    v = small()
    w = v.extend(Family.FINE, ["naive B cell", "my type", "my type"])
    assert w.tokens[: len(v)] == v.tokens and len(w) == len(v) + 1
    assert w.id(Family.FINE, "my type") == len(v)
    assert len(v.ids(Family.FINE)) == 2  # the old one is untouched


def test_unknown_word_suggests_near_ones():
    with pytest.raises(VocabularyError, match="did you mean 'naive B cell'"):
        small().id(Family.FINE, "naiv b cel")
    with pytest.raises(VocabularyError, match="no words for region"):
        small().id(Family.REGION, "cortex")
    assert small().id(Family.ORGAN, "blood") == small().id(Family.ORGAN, "Blood")


def test_metadata_fields_have_the_names_people_use():
    assert family_of_field("cell_type") is Family.FINE
    assert family_of_field("tech") is Family.TECHNOLOGY
    assert small().metadata_ids({"organ": "Blood", "cell_type": "B cell"}) == [3, 7]
    with pytest.raises(VocabularyError, match="organ is given twice"):
        small().metadata_ids({"organ": "Blood", "tissue": "Brain"})
    with pytest.raises(VocabularyError, match="unknown metadata field 'colour'"):
        family_of_field("colour")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": {"end": [0], "gene": [1, 99]}}, "names id 99"),
        ({"families": {"end": [0], "gene": [1]}}, "belongs to no family"),
        ({"prompts": {"annotate": 1}}, "is no prompt word"),
        ({"format": "other"}, "not a vocabulary"),
    ],
)
def test_broken_files_are_refused(change, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.from_json({**small().to_json(), **change})


def test_file_that_is_no_json(tmp_path):
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(VocabularyError, match="not JSON"):
        Vocabulary.load(tmp_path / "v.json")

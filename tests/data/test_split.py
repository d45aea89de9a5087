"""Holding out studies and donors."""

import json

import numpy as np
import pytest

from scmulan.data.split import select_part, split_corpus
from scmulan.data.store import Corpus
from scmulan.errors import InputError, RecipeError


@pytest.fixture
def split(corpus_folder, tmp_path):
    """Split the corpus of three studies as a text says; return the cells of each part."""

    def make(text):
        (tmp_path / "split.toml").write_text(f'corpus = "{corpus_folder}"\n{text}')
        found = split_corpus(tmp_path / "split.toml", tmp_path / "split.json")
        corpus = Corpus(corpus_folder)
        parts = {p: select_part(corpus, p, tmp_path / "split.json").index for p in ("train", "validation", "test")}
        assert found["cells"] == {part: len(cells) for part, cells in parts.items()}
        assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(corpus)))
        return corpus, parts, found

    return make


def test_studies_and_donors_are_held_out_by_name(split):
    corpus, parts, found = split('[studies]\ntest = ["log*"]\n[donors]\nvalidation = ["counts/d1"]\n')
    assert parts["test"].tolist() == list(range(100, 150))
    assert set(corpus.donor[parts["validation"]]) == {corpus.donors.index(("counts", "d1"))}
    assert ("counts", "d1") not in {corpus.donors[d] for d in corpus.donor[parts["train"]] if d >= 0}
    assert found["shared_donors"] == []


def test_a_donor_name_without_group_means_all_of_that_name(split):
    corpus, parts, _ = split('[donors]\ntest = ["d2"]\n')
    assert {corpus.donors[d] for d in np.unique(corpus.donor[parts["test"]])} == {("counts", "d2"), ("amounts", "d2")}


def test_fractions_follow_from_the_seed_and_take_whole_donors(split):
    seen = set()
    for seed in (0, 0, 1, 2, 3):
        corpus, parts, _ = split(f"seed = {seed}\n[fractions]\nvalidation = 0.3\ntest = 0.1\n")
        units = {part: {(int(corpus.study[c]), int(corpus.donor[c])) for c in cells} for part, cells in parts.items()}
        assert not units["train"] & units["validation"] and not units["train"] & units["test"]
        assert (len(units["validation"]), len(units["test"])) == (2, 1)  # of seven: five donors and two unknown
        seen.add((frozenset(units["validation"]), frozenset(units["test"])))
    assert 1 < len(seen) < 5


def test_fractions_of_studies(split):
    text = '[studies]\ntest = ["counts"]\n[fractions]\nby = "study"\nvalidation = 0.5\n'
    for seed in range(4):
        corpus, parts, _ = split(f"seed = {seed}\n{text}")
        studies = {part: set(corpus.study[cells].tolist()) for part, cells in parts.items()}
        assert studies in (
            {"train": {1}, "validation": {2}, "test": {0}},
            {"train": {2}, "validation": {1}, "test": {0}},
        )


def test_a_split_belongs_to_its_corpus(split, corpus_folder, tmp_path):
    corpus, _, _ = split("")
    content = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**content, "corpus": "0" * 64}))
    for name, message in (("other.json", "a split of another corpus"), ("none.json", "no such file; make a split")):
        with pytest.raises(InputError, match=message):
            select_part(corpus, "train", tmp_path / name)
    with pytest.raises(InputError, match="no part 'training' in a split; expected train, validation, test"):
        select_part(corpus, "training", tmp_path / "split.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[studies]\ntest = ["cuonts"]', "no study 'cuonts' in the corpus; did you mean 'counts'"),
        ('[donors]\ntest = ["x1"]', "no donor 'x1' in the corpus"),
        ('[studies]\ntest = ["counts"]\nvalidation = ["counts"]', "'counts' is in validation and in test"),
        ("[fractions]\ntest = 1.0", r"\[fractions\] are from 0 to 1"),
        ("[fractions]\ntest = 1.5", "fractions.test = 1.5: expected a number from 0 to 1"),
        ("[fractions]\nby = 'studdy'", "fractions.by = 'studdy': expected 'donor' or 'study'; did you mean 'study'"),
        ("[parts]\ntest = 1", "unknown setting 'parts'"),
        (
            "[studies]\nvalid = []",
            "unknown setting 'studies.valid': expected one of validation, test; did you mean 'validation'",
        ),
        ("[studies]\ntest = 'counts'", "studies.test = 'counts': expected a list of which each is a text"),
        ("seed = 'zero'", "seed = 'zero': expected a whole number"),
        ("seed = ", "not TOML"),
    ],
)
def test_what_is_wrong_is_said(split, text, message):
    with pytest.raises(RecipeError, match=message):
        split(text)

"""A corpus on disk as training reads it."""

import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import load_file

from scmulan.data.build import build
from scmulan.data.memory import build_store, read_studies, take
from scmulan.data.shards import code_values
from scmulan.data.spec import read_corpus_spec
from scmulan.data.store import CellSource, Corpus, Selection
from scmulan.errors import InputError
from scmulan.vocab.vocabulary import Family


def test_any_rows_in_any_order(corpus_folder):
    corpus = Corpus(corpus_folder)
    assert isinstance(corpus, CellSource)
    shards = [load_file(corpus_folder / shard["file"]) for shard in corpus.manifest["shards"]]
    decode = [code_values(shard["encoding"]) for shard in corpus.manifest["shards"]]
    whole = sp.vstack(
        [
            sp.csr_matrix((d[s["words"][:, 1]], s["words"][:, 0], s["indptr"]), shape=(len(s["total"]), 80))
            for s, d in zip(shards, decode, strict=True)
        ],
        format="csr",
    )
    assert np.array_equal(corpus.rows(np.arange(210)).toarray(), whole.toarray())
    rng = np.random.default_rng(0)
    for cells in (rng.integers(0, 210, 64), np.array([209]), np.array([5, 5, 205, 0, 5]), np.array([], dtype=int)):
        found = corpus.rows(cells)
        found.check_format()
        assert found.shape == (len(cells), 80) and found.dtype == np.float32
        assert np.array_equal(found.toarray(), whole[cells].toarray() if len(cells) else np.zeros((0, 80)))
        assert np.array_equal(np.diff(found.indptr), corpus.lengths[cells])


def test_another_process_gets_the_path_only(corpus_folder):
    corpus = Corpus(corpus_folder)
    sent = pickle.dumps(corpus)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).rows(np.array([7])).toarray(), corpus.rows(np.array([7])).toarray())


def test_what_is_mapped_cannot_be_changed(corpus_folder):
    corpus = Corpus(corpus_folder)
    for name in ("lengths", "total", "logged", "study", "donor", "metadata", "measured"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(corpus, name)[0] = 1


def test_some_cells_in_memory_or_as_a_view(corpus_folder):
    corpus = Corpus(corpus_folder)
    cells = np.array([200, 3, 120, 3])
    store, view = take(corpus, cells), Selection(corpus, cells)
    assert isinstance(view, CellSource) and len(store) == len(view) == 4
    for part in (store, view):
        assert np.array_equal(part.rows(np.arange(4)).toarray(), corpus.rows(cells).toarray())
        assert np.array_equal(part.rows(np.array([2])).toarray(), corpus.rows(np.array([120])).toarray())
        for name in ("lengths", "total", "logged", "study", "metadata"):
            assert np.array_equal(getattr(part, name), getattr(corpus, name)[cells]), name
        assert np.array_equal(part.tokens(Family.FINE), corpus.tokens(Family.FINE)[cells])
        assert part.studies == corpus.studies and part.measured is corpus.measured
    assert np.array_equal(take(view, np.array([3, 0])).total, corpus.total[[3, 200]])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "shards" / "000001.safetensors").unlink(), r"000001\.safetensors: no such file"),
        (
            lambda f: os.truncate(f / "shards" / "000001.safetensors", 5000),
            r"000001\.safetensors: 5,000 bytes",
        ),
        (lambda f: (f / "cells.safetensors").unlink(), r"cells\.safetensors: no such file"),
        (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json in it"),
        (lambda f: (f / "manifest.sha256").unlink(), r"manifest\.sha256: missing or damaged"),
        (lambda f: (f / "manifest.json").write_text("{}"), r"manifest\.json: does not match manifest\.sha256"),
        (lambda f: shutil.rmtree(f), "no such folder"),
    ],
)
def test_an_incomplete_corpus_is_refused_when_it_is_opened(corpus_folder, tmp_path, harm, message):
    folder = tmp_path / "copy"
    shutil.copytree(corpus_folder, folder)
    Corpus(folder)
    harm(folder)
    with pytest.raises(InputError, match=message):
        Corpus(folder)


@pytest.mark.shared
def test_real_studies_are_what_they_are_in_memory(root, shared, tmp_path):
    """Files of the small model's recipe: whole and fractional counts, reads beyond 16 bits, log1p values."""
    spec = read_corpus_spec(root / "recipes" / "mini.toml")
    wanted = ("10x_pbmc3k_subset", "ding2019_pbmc1", "cepo_pancreas", "pollen2014_skin_brain_lines")
    spec.studies = [study for study in spec.studies if study.name in wanted]
    spec.genes = 1000
    manifest = build(spec, tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    store = build_store(read_studies(spec.studies), corpus.vocabulary)
    for name in ("logged", "study", "measured", "metadata", "lengths"):
        assert np.array_equal(getattr(corpus, name), getattr(store, name)), name
    found = corpus.rows(np.arange(len(corpus)))
    assert np.array_equal(found.indices, store.matrix.indices)
    np.testing.assert_allclose(corpus.total, store.total, rtol=1e-6)
    encoding = {shard["study"]: shard["encoding"] for shard in manifest["shards"]}
    assert sorted(encoding.values()) == ["amounts", "counts", "counts", "log1p"]
    of_word = np.repeat(store.study, store.lengths)
    for study, name in enumerate(store.studies):
        ours, theirs = found.data[of_word == study], store.matrix.data[of_word == study]
        if encoding[study] == "counts":
            assert np.array_equal(ours[theirs <= 60_000], theirs[theirs <= 60_000]), name
        np.testing.assert_allclose(ours, theirs, rtol={"counts": 5e-4, "log1p": 5e-4, "amounts": 4e-3}[encoding[study]])
    assert manifest["studies"][wanted.index("ding2019_pbmc1")]["cells"] == 598

"""Files of cells in memory: genes harmonised, duplicates summed, tokens of a vocabulary."""

import hashlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmulan.data.memory import StudyCells, build_store, build_vocabulary, store_from_adata, take
from scmulan.data.spec import StudySpec
from scmulan.errors import GeneError
from scmulan.vocab.genes import CoverageWarning, GeneTable
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

# MARCH1 is a previous symbol of MARCHF1, ENSG00000010610 is CD4; "cluster 3" is no gene.
NAMES = ["CD4", "MARCH1", "cluster 3", "CD8A", "MARCHF1", "ENSG00000010610", "GNLY"]
COUNTS = np.array([[1, 2, 30, 0, 5, 4, 0], [0, 3, 0, 2, 0, 0, 1], [9, 0, 1, 0, 7, 0, 2]], dtype=np.float32)
SUMMED = {"CD4": [5, 0, 9], "CD8A": [0, 2, 0], "GNLY": [0, 1, 2], "MARCHF1": [7, 3, 7]}


@pytest.fixture(scope="module")
def table():
    return GeneTable.load()


def spec(path, x, obs=None, names=NAMES, **settings):
    obs = pd.DataFrame(obs or {"label": ["T cell", "", "B cell"]}, index=[f"c{i}" for i in range(len(x))])
    with_dots = ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=pd.Index(names)))
    with_dots.write_h5ad(path)
    return StudySpec(**{"file": path, "name": path.stem, "columns": {Family.FINE: "label"}, **settings})


def test_duplicate_genes_are_summed_on_counts(tmp_path, table):
    file = tmp_path / "a.h5ad"
    study = StudyCells.read(spec(file, COUNTS), table)
    assert study.matrix_kind == "counts"
    assert study.genes == sorted(SUMMED)
    assert study.matrix.toarray().tolist() == np.array([SUMMED[g] for g in study.genes]).T.tolist()
    assert study.total.tolist() == [42, 6, 19]  # over all columns, genes or not
    assert study.metadata[Family.FINE].tolist() == ["T cell", "", "B cell"]
    assert study.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_log1p_values_are_summed_on_their_counts(tmp_path, table):
    amounts = COUNTS / COUNTS.sum(1, keepdims=True) * 1e4
    study = StudyCells.read(spec(tmp_path / "a.h5ad", np.log1p(amounts)), table)
    assert study.matrix_kind == "log1p"
    expected = np.array([SUMMED[g] for g in study.genes]).T / COUNTS.sum(1, keepdims=True) * 1e4
    np.testing.assert_allclose(study.matrix.toarray(), np.log1p(expected), rtol=1e-5)
    np.testing.assert_allclose(study.total, 1e4, rtol=1e-4)


def test_a_store_holds_what_its_vocabulary_has(tmp_path, table):
    one = spec(tmp_path / "one.h5ad", COUNTS, {"label": ["T cell", "", "dragon cell"]}, fixed={Family.ORGAN: "Blood"})
    logged = np.log1p(COUNTS[:2, [0, 3, 6]] * 100)
    two = spec(tmp_path / "two.h5ad", logged, {"label": ["B cell", "T cell"]}, names=["CD4", "CD8A", "GNLY"])
    studies = [StudyCells.read(s, table) for s in (one, two)]
    vocabulary = Vocabulary.build(
        ["GNLY", "CD4", "MARCHF1", "XIST"], {Family.FINE: ["B cell", "T cell"], Family.ORGAN: ["Blood"]}
    )
    store = build_store(studies, vocabulary)

    counts = np.array([SUMMED[g] if g in SUMMED else [0, 0, 0] for g in vocabulary.genes]).T
    assert store.matrix[:3].toarray().tolist() == counts.tolist()
    np.testing.assert_allclose(store.matrix[3:].toarray()[:, :2], logged[:, [2, 0]])
    assert store.total[:3].tolist() == [42, 6, 19]
    assert store.logged.tolist() == [False] * 3 + [True] * 2
    assert store.study.tolist() == [0, 0, 0, 1, 1] and store.studies == ["one", "two"]
    assert store.measured.tolist() == [[True, True, True, False], [True, True, False, False]]
    fine = [vocabulary.tokens[w] if w >= 0 else None for w in store.tokens(Family.FINE)]
    assert fine == ["T cell", None, None, "B cell", "T cell"]  # the vocabulary knows no dragons
    assert (store.tokens(Family.ORGAN) >= 0).tolist() == [True] * 3 + [False] * 2
    assert store.metadata.shape == (5, len(METADATA))
    fractions = [counts[i].sum() / COUNTS[i].sum() for i in range(3)]
    fractions += [np.expm1(logged[i, [0, 2]]).sum() / np.expm1(logged[i]).sum() for i in range(2)]
    assert store.covered() == pytest.approx(np.mean(fractions), rel=1e-5)


def test_a_vocabulary_has_the_names_that_occur(tmp_path, table):
    rng = np.random.default_rng(0)
    genes = Vocabulary.published().genes[:60]
    x = rng.poisson(rng.gamma(1.0, 2.0, 60), (30, 60)).astype(np.float32)
    labels = ["T cell", "B cell", ""] * 10
    study = StudyCells.read(spec(tmp_path / "a.h5ad", x, {"label": labels}, names=genes), table)
    vocabulary = build_vocabulary([study], 25)
    assert len(vocabulary.genes) == 25 and set(vocabulary.genes) <= set(study.genes)
    assert vocabulary.names(Family.FINE) == ["B cell", "T cell"]
    assert vocabulary.names(Family.ORGAN) == []


# -- one AnnData, for a model that exists ---------------------------------------------------------------------------


def some_cells():
    return ad.AnnData(sp.csr_matrix(COUNTS), var=pd.DataFrame(index=pd.Index(NAMES)))


def test_cells_are_read_into_old_names_of_genes_too():
    """A vocabulary keeps the symbols it was made with; both sides meet through the approved one."""
    vocabulary = Vocabulary.build(["GNLY", "CD4", "MARCH1"], {Family.FINE: ["T cell"]})
    names = {Family.FINE: np.array(["T cell", "", "dragon cell"], dtype=object)}
    store, matrix, match = store_from_adata(some_cells(), vocabulary, names, name="mine")
    assert store.matrix.toarray().tolist() == np.array([SUMMED[g] for g in ("GNLY", "CD4", "MARCHF1")]).T.tolist()
    assert store.total.tolist() == [42, 6, 19]
    assert store.tokens(Family.FINE).tolist() == [vocabulary.id(Family.FINE, "T cell"), -1, -1]
    assert store.measured.tolist() == [[True] * 3] and store.studies == ["mine"]
    assert (matrix.where, matrix.matrix_kind) == ("X", "counts") and len(match.found) == 3

    logged = some_cells()
    logged.X = np.log1p(COUNTS / 7)
    other = store_from_adata(logged, vocabulary, {}, name="mine", matrix_kind="log1p")[0]
    np.testing.assert_allclose(np.expm1(other.matrix.toarray()) * 7, store.matrix.toarray(), rtol=1e-5)
    np.testing.assert_allclose(other.total * 7, store.total, rtol=1e-5)
    assert other.logged.all()


def test_genes_of_another_kind_are_refused():
    vocabulary = Vocabulary.build([f"MT-ND{i}" for i in range(1, 7)], {})
    with pytest.raises(GeneError, match="mine: 0 of the model's 6 genes found"):
        store_from_adata(some_cells(), vocabulary, {}, name="mine")
    with pytest.warns(CoverageWarning, match="mine: 1 of 4 vocabulary genes"):
        store_from_adata(
            some_cells(), Vocabulary.build(["CD4", "MT-ND1", "MT-ND2", "MT-ND3"], {}), {}, name="mine", min_genes=1
        )


def test_some_cells_of_a_store_stay_what_they_are():
    vocabulary = Vocabulary.build(["GNLY", "CD4", "MARCH1"], {Family.FINE: ["T cell"]})
    names = {Family.FINE: np.array(["T cell", "", "T cell"], dtype=object)}
    store = store_from_adata(some_cells(), vocabulary, names, name="mine")[0]
    part = take(store, np.array([2, 0]))
    assert len(part) == 2 and part.studies == ["mine"]
    assert part.matrix.toarray().tolist() == store.matrix.toarray()[[2, 0]].tolist()
    for name in ("total", "logged", "study", "metadata"):
        assert getattr(part, name).tolist() == getattr(store, name)[[2, 0]].tolist()

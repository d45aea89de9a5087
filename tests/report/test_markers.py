"""Marker genes tell types apart."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

from scmulan.report.markers import find_markers, gene_symbols, read_log1p
from scmulan.vocab.matrix import choose_matrix


@pytest.fixture
def cells() -> ad.AnnData:
    """Counts of three types with a gene of their own each, and genes that must not be taken."""
    rng = np.random.default_rng(0)
    genes = ["CD3D", "CD79A", "LYZ", "MT-CO1", "RPL13A", "ENSG00000105374.9", *(f"RP11-{i}P3.1" for i in range(40))]
    label = np.repeat(["T cell", "B cell", "monocyte", "rare"], [60, 50, 40, 9])
    x = rng.poisson(1.0, (len(label), len(genes))).astype(np.float32)
    for gene, name in enumerate(["T cell", "B cell", "monocyte", "T cell", "B cell", "T cell"]):
        own = label == name
        x[:, gene] = rng.poisson(np.where(own, 9, 0.3))
    obs = pd.DataFrame({"label": label}, index=[f"c{i}" for i in range(len(label))])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=genes))


def test_genes_of_each_type(cells):
    label = cells.obs["label"].to_numpy()
    found = find_markers(choose_matrix(cells), label, ["T cell", "B cell", "monocyte", "rare"])
    assert found.types == ["T cell", "B cell", "monocyte"] and found.cells == [60, 50, 40]
    best = dict(found.by_type)
    # The Ensembl id is that of NKG7.
    assert {gene for gene, _ in best["T cell"][:2]} == {"CD3D", "NKG7"}
    assert best["B cell"][0][0] == "CD79A" and best["monocyte"][0][0] == "LYZ"
    assert not {"MT-CO1", "RPL13A"} & set(found.genes)
    assert all(auroc >= 0.6 for _, genes in found.by_type for _, auroc in genes)
    assert len(set(found.genes)) == len(found.genes)


def test_numbers_are_those_of_the_values(cells):
    label = cells.obs["label"].to_numpy()
    found = find_markers(choose_matrix(cells), label, ["T cell", "B cell", "monocyte"])
    used = label != "rare"
    counts = cells.X.toarray()[used]
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    row = found.genes.index("LYZ")
    lyz = values[:, 2]
    assert found.auroc[row] == pytest.approx(roc_auc_score(label[used] == "monocyte", lyz), abs=1e-6)
    for t, name in enumerate(found.types):
        own = lyz[label[used] == name]
        assert found.mean[row, t] == pytest.approx(own.mean(), rel=1e-5)
        assert found.detected[row, t] == pytest.approx((own > 0).mean())


def test_large_types_are_sampled(cells):
    label = cells.obs["label"].to_numpy()
    first, second = (find_markers(choose_matrix(cells), label, ["T cell", "B cell"], max_cells=20) for _ in range(2))
    assert first.cells == [20, 20]
    assert first.genes == second.genes and np.array_equal(first.mean, second.mean)


def test_one_type_has_no_markers(cells):
    assert find_markers(choose_matrix(cells), cells.obs["label"].to_numpy(), ["T cell", "rare"]) is None


def test_same_values_have_no_markers(cells):
    cells.X = sp.csr_matrix(np.ones(cells.shape, dtype=np.float32))
    assert find_markers(choose_matrix(cells), cells.obs["label"].to_numpy(), ["T cell", "B cell"]) is None


def test_values_are_read_in_blocks(cells):
    rows = np.array([0, 5, 90, 158])
    big = ad.concat([cells] * 8, index_unique="-")
    got = read_log1p(choose_matrix(big), np.concatenate([rows, rows + 7 * 159]))
    counts = cells.X.toarray()[rows]
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.toarray(), np.concatenate([expected, expected]), rtol=1e-5)


def test_symbols_stay_as_given_and_ids_are_translated():
    var = pd.DataFrame(index=["ENSG00000105374", "ENSG00000105374.9", "CD3D", "AES", "ENSG99999999999"])
    assert gene_symbols(var) == ["NKG7", "NKG7", "CD3D", "AES", "ENSG99999999999"]

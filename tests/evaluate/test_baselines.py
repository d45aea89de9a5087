"""Logistic regression: input, settings and predictions."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmulan.errors import InputError
from scmulan.evaluate.baselines import (
    LogisticBaseline,
    LogisticConfig,
    coarse_labels,
    read_training_file,
    shared_genes,
    tune,
)
from scmulan.evaluate.inputs import read_expression


@pytest.fixture(scope="module")
def files(cells):
    return [read_training_file(cells[name], "label") for name in ("one", "two")]


def anndata(counts, genes):
    return ad.AnnData(sp.csr_matrix(np.array(counts, dtype=np.float32)), var=pd.DataFrame(index=pd.Index(genes)))


def test_genes_are_read_under_their_approved_symbols_and_summed():
    # MARCH1 is MARCHF1 now, ENSG00000010610 is CD4, and two columns of a gene are one.
    counts = [[1, 2, 3, 4], [0, 0, 5, 0]] + [[1, 0, 0, 0]] * 3
    genes = ["MARCH1", "ENSG00000010610", "CD4", "no-gene-at-all"]
    extra = [f"{g}" for g in ("CD3E", "MS4A1", "LYZ", "NKG7", "GNLY", "CD8A", "CD8B", "CD14", "FCGR3A", "PPBP", "CST3")]
    more = ["IL7R", "CCR7", "S100A4", "CD79A", "CD79B", "FCER1A", "IL32", "LTB", "AIF1", "FCN1"]
    wide = np.hstack([np.array(counts), np.zeros((5, len(extra) + len(more)))])
    found = read_expression(anndata(wide, [*genes, *extra, *more]), "x")
    column_of = {gene: i for i, gene in enumerate(found.genes)}
    assert found.amounts[0, column_of["CD4"]] == 5 and found.amounts[0, column_of["MARCHF1"]] == 1
    assert "no-gene-at-all" not in column_of
    assert found.total.tolist() == [10, 5, 1, 1, 1]  # its counts belong to the library all the same
    x = found.log1p(["CD4", "MARCHF1", "TP53"])
    assert x[0].toarray()[0] == pytest.approx([np.log1p(5000), np.log1p(1000), 0])
    x = found.log1p(["CD4", "MARCHF1", "TP53"], total="shared")
    assert x[0].toarray()[0] == pytest.approx([np.log1p(1e4 * 5 / 6), np.log1p(1e4 / 6), 0])


def test_counts_and_log1p_values_are_the_same_cells(cells):
    adata = ad.read_h5ad(cells["one"])
    logged = adata.copy()
    x = logged.X.astype(np.float64)
    logged.X = sp.csr_matrix(x.multiply(1e4 / x.sum(1)).log1p().astype(np.float32))
    one, two = read_expression(adata, "counts"), read_expression(logged, "logs")
    genes = one.genes[:50]
    assert two.log1p(genes).toarray() == pytest.approx(one.log1p(genes).toarray(), abs=1e-3)


def test_training_cells_are_the_labelled_ones(cells):
    file = read_training_file(cells["tested"], "label")
    assert len(file.labels) == 157 and file.expression.amounts.shape[0] == 157
    assert set(file.labels) == {"B cell", "CD14-positive monocyte", "natural killer cell", "platelet"}
    assert file.study == "study 3"


def test_a_file_without_labels_is_refused(cells, tmp_path):
    adata = ad.read_h5ad(cells["one"])
    adata.obs["label"] = ""
    adata.write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(InputError, match="no labelled cell in column 'label'"):
        read_training_file(tmp_path / "empty.h5ad", "label")


def test_genes_are_those_that_enough_files_share(files):
    config = LogisticConfig(genes=10_000)
    both = shared_genes(files, files[0].expression.genes, LogisticConfig(presence=1.0, genes=10_000))
    any_of = shared_genes(files, files[0].expression.genes, config)
    varying = set(files[0].variability) | set(files[1].variability)
    assert set(both) == set(files[1].expression.genes) & set(files[0].expression.genes) & varying
    assert set(both) < set(any_of)
    assert len(shared_genes(files, files[0].expression.genes, LogisticConfig(genes=25))) == 25
    with pytest.raises(InputError, match="no gene is shared"):
        shared_genes(files, ["TP53"], config)


@pytest.mark.parametrize("scaling", ["none", "sd", "max"])
def test_types_of_another_study_are_predicted(files, cells, scaling):
    tested = read_training_file(cells["tested"], "label")
    baseline = LogisticBaseline(files, tested.expression.genes, LogisticConfig(scaling=scaling))
    assert set(baseline.genes) <= set(tested.expression.genes)
    predicted, probability = baseline.predict(tested.expression)
    known = tested.labels != "platelet"
    assert (predicted[known] == tested.labels[known]).mean() > 0.95
    assert ((probability >= 0) & (probability <= 1)).all()


def test_coarse_labels_are_those_with_kinds():
    labels = np.array(["T cell", "CD4-positive, alpha-beta T cell", "B cell", "lymphocyte"], dtype=object)
    assert coarse_labels(labels) == {"T cell", "lymphocyte"}


@pytest.fixture(scope="module")
def coarser(files):
    """The first file with a coarse label for half of its monocytes and all its NK cells."""
    labels = files[0].labels.copy()
    labels[::2] = np.where(labels[::2] == "CD14-positive monocyte", "monocyte", labels[::2])
    labels[labels == "natural killer cell"] = "lymphocyte"
    return replace(files[0], labels=labels)


def predictions(files, cells, coarse, C=1.0):
    baseline = LogisticBaseline(files, cells.genes, LogisticConfig(coarse=coarse, C=C))
    predicted, probability = baseline.predict(cells)
    x = cells.log1p(baseline.genes).toarray() / baseline.scale
    alone = pd.DataFrame(baseline.regression.predict_proba(x), columns=baseline.regression.classes_)
    return baseline, predicted, probability, alone


def test_coarse_labels_are_kept(coarser):
    baseline, predicted, probability, alone = predictions([coarser], coarser.expression, "keep")
    assert set(baseline.types) == {"B cell", "CD14-positive monocyte", "lymphocyte", "monocyte"}
    assert predicted.tolist() == alone.idxmax(axis=1).tolist() and "monocyte" in predicted
    for i in np.flatnonzero(predicted == "monocyte")[:5]:  # counts the kinds of it
        assert probability[i] == pytest.approx(alone.loc[i, ["monocyte", "CD14-positive monocyte"]].sum())
    for i in np.flatnonzero(predicted == "CD14-positive monocyte")[:5]:
        assert probability[i] == pytest.approx(alone.loc[i, "CD14-positive monocyte"])


def test_coarse_labels_give_way_to_their_likeliest_kind(files):
    labels = files[0].labels.copy()
    labels[::3] = "leukocyte"
    mixed = replace(files[0], labels=labels)
    baseline, predicted, probability, alone = predictions([mixed], mixed.expression, "descend", C=0.001)
    kinds = ["B cell", "CD14-positive monocyte", "natural killer cell"]
    assert baseline.types == kinds
    winner = alone.idxmax(axis=1)
    assert (winner == "leukocyte").sum() > 5
    x = mixed.expression.log1p(baseline.genes).toarray() / baseline.scale
    fine = pd.DataFrame(baseline.fine_regression.predict_proba(x), columns=baseline.fine_regression.classes_)
    assert (predicted == np.where(winner == "leukocyte", fine.idxmax(axis=1), winner)).all()
    for i in np.flatnonzero(winner == "leukocyte"):
        assert probability[i] == pytest.approx(fine.loc[i].max())


def test_only_kinds_of_the_coarse_label_are_predicted(files):
    labels = files[0].labels.copy()
    rows = np.flatnonzero(labels != "CD14-positive monocyte")[::2]
    labels[rows] = "lymphocyte"  # half of the B and NK cells
    mixed = replace(files[0], labels=labels)
    _, predicted, _, alone = predictions([mixed], mixed.expression, "descend", C=0.01)
    found = set(predicted[(alone.idxmax(axis=1) == "lymphocyte").to_numpy()])
    assert found == {"B cell", "natural killer cell"}
    assert (predicted == files[0].labels).mean() > 0.95


def test_training_cells_of_one_type_are_refused(files):
    one = replace(files[0], labels=np.full(len(files[0].labels), "B cell", dtype=object))
    with pytest.raises(InputError, match=r"the training cells are of one type \(B cell\)"):
        LogisticBaseline([one], one.expression.genes, LogisticConfig())


def test_cells_with_coarse_labels_are_dropped(coarser):
    baseline, predicted, _, _ = predictions([coarser], coarser.expression, "drop")
    assert set(baseline.types) == set(predicted) == {"B cell", "CD14-positive monocyte"}
    assert baseline.n_cells == np.isin(coarser.labels, baseline.types).sum()


def test_settings_are_chosen_on_studies_left_out(files):
    found = tune(files, seed=0, max_cells=15)
    assert sorted(found.left_out) == ["study 1", "study 2"]
    assert found.score == max(entry["score"] for entry in found.tried) > 0.9
    best = {k: v for k, v in found.tried[0].items() if k != "score"}
    assert set(best) == set(LogisticConfig.__dataclass_fields__)
    assert len(found.tried) > 12
    again = tune(files, seed=0, max_cells=15)
    assert again.config == found.config and again.tried == found.tried


def test_one_study_alone_cannot_be_left_out(files):
    found = tune(files[:1])
    assert found.config == LogisticConfig() and found.score is None and not found.left_out

"""The evaluation of annotations, end to end."""

import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from scmulan._io.adata import to_json
from scmulan.errors import InputError
from scmulan.evaluate import evaluate_annotation
from scmulan.evaluate.annotation import BASELINE, MODEL, POOLED, SMOOTHED
from scmulan.evaluate.labels import canonical, lineage_of
from scmulan.tl._annotate import annotate_cells
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._smooth import smooth_types
from scmulan.vocab.genes import CoverageWarning
from scmulan.vocab.ontology import Ontology

pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")


@pytest.fixture(scope="module")
def result(model, cells):
    return evaluate_annotation(
        model, [cells["tested"]], labels="label", lineages=True, train=[cells["one"], cells["two"]]
    )


def read_labelled(path):
    adata = ad.read_h5ad(path)
    raw = adata.obs["label"].astype(object)
    keep = (raw.notna() & (raw != "")).to_numpy()
    return adata, keep, np.array([canonical(label) for label in raw[keep]], dtype=object)


def test_scores_are_those_of_the_annotation(model, cells, result):
    adata, keep, truth = read_labelled(cells["tested"])
    table = annotate_cells(adata, model).obs
    predicted = np.array([canonical(p) for p in table["scmulan_cell_type"].astype(str)[keep]], dtype=object)
    found = result.results[MODEL]["tested"]
    assert found.exact.accuracy == pytest.approx(accuracy_score(truth, predicted))
    expected = f1_score(truth, predicted, labels=sorted(set(truth)), average="macro", zero_division=0)
    assert found.exact.macro_f1 == pytest.approx(expected)
    right = np.array([Ontology.load().agrees(p, t) for p, t in zip(predicted, truth, strict=True)])
    assert found.ontology.accuracy == pytest.approx(right.mean())
    assert found.groups.accuracy == pytest.approx(
        np.mean([lineage_of(p) == lineage_of(t) for p, t in zip(predicted, truth, strict=True)])
    )
    probability = table["scmulan_cell_type_probability"].to_numpy()[keep].astype(float)
    for mean, of_cells in ((found.calibration.mean_right, right), (found.calibration.mean_wrong, ~right)):
        assert mean == (pytest.approx(probability[of_cells].mean()) if of_cells.any() else None)


def test_cells_without_label_are_left_out_and_counted(result):
    (file,) = result.files
    assert (file.cells, file.labelled, file.unlabelled) == (160, 157, 3)
    assert file.matrix == "X, counts" and "300 of 400 vocabulary genes" in file.genes
    assert not file.trained_on


def test_types_outside_the_vocabulary_are_reported(result):
    for predictor in (MODEL, BASELINE):
        found = result.results[predictor]["tested"]
        assert found.unknown_types == {"platelet": 3}
        assert found.ontology.n == 157 and found.ontology.n_known == 154
    assert [t.known for t in result.results[MODEL]["tested"].ontology.types] == [True, True, True, False]


def test_the_baseline_beats_random_weights(result):
    found = result.results[BASELINE]["tested"]
    assert found.ontology.accuracy_known > 0.95 > 0.7 > result.results[MODEL]["tested"].ontology.accuracy_known
    assert found.ontology.accuracy == pytest.approx(found.ontology.accuracy_known * 154 / 157)
    assert result.baseline["files"] == {"one": 150, "two": 150}
    assert result.baseline["score"] > 0.9


def test_results_are_json_and_a_table(result):
    content = json.loads(to_json(result.to_json()))
    assert content["results"][MODEL]["tested"]["ontology"]["confusion"]["truth"][-1] == "platelet"
    assert content["baseline"]["config"]["C"] > 0
    table = result.table()
    for part in (
        "natural killer cell",
        "logistic regression",
        "tested",
        "cannot name: platelet (3)",
        "→ NK",
        "157 of 160",
    ):
        assert part in table
    assert max(map(len, table.split("\n"))) < 140


def test_several_files_are_pooled(model, cells):
    found = evaluate_annotation(model, [cells["tested"], cells["one"]], labels="label").results[MODEL]
    assert list(found) == ["tested", "one", POOLED]
    together = sum(found[name].ontology.accuracy * found[name].ontology.n for name in ("tested", "one"))
    assert found[POOLED].ontology.n == 307
    assert found[POOLED].ontology.accuracy == pytest.approx(together / 307)
    assert found[POOLED].groups is None


def test_a_map_says_what_labels_mean(model, cells, tmp_path):
    adata = ad.read_h5ad(cells["one"])
    adata.obs["cluster"] = adata.obs["label"].map({"B cell": "c1", "NK": "c2", "CD14+ Monocyte": "c3"})
    adata.write_h5ad(tmp_path / "f.h5ad")
    (tmp_path / "map.tsv").write_text(
        "label\tterm\tgroup\nc1\tB cell\tlymphoid\nc2\tNK\tlymphoid\nc3\tmonocyte\tmyeloid\n"
    )
    found = evaluate_annotation(model, [tmp_path / "f.h5ad"], labels="cluster", mapping=tmp_path / "map.tsv")
    scores = found.results[MODEL]["f"]
    assert {t.name for t in scores.ontology.types} == {"B cell", "natural killer cell", "monocyte"}
    assert {t.name for t in scores.groups.types} == {"lymphoid", "myeloid"}
    plain = evaluate_annotation(model, [cells["one"]], labels="label").results[MODEL]["one"]
    monocytes = {t.name: t for t in scores.ontology.types}["monocyte"]
    finer = {t.name: t for t in plain.ontology.types}["CD14-positive monocyte"]
    assert monocytes.n == finer.n and monocytes.recall >= finer.recall


def test_the_release_s_rule_has_no_probabilities(model, cells):
    found = evaluate_annotation(model, [cells["tested"]], labels="label", rule="release").results[MODEL]["tested"]
    assert found.calibration is None
    assert "–" in evaluate_annotation(model, [cells["tested"]], labels="label", rule="release").table()


def test_smoothed_types_are_scored_beside_the_predicted_ones(model, cells):
    adata, keep, truth = read_labelled(cells["tested"])
    found = annotate_cells(adata, model, reading=ReadOptions(precision="fp32"), keep_hidden=True)
    smoothed = smooth_types(found.obs["scmulan_cell_type"], found.hidden.load())[keep]
    predicted = np.array([canonical(p) for p in smoothed["scmulan_cell_type_smoothed"].astype(str)], dtype=object)
    right = np.array([Ontology.load().agrees(p, t) for p, t in zip(predicted, truth, strict=True)])
    result = evaluate_annotation(model, [cells["tested"], cells["one"]], labels="label", smooth=True, lineages=True)
    assert list(result.results) == [MODEL, SMOOTHED]
    scores = result.results[SMOOTHED]["tested"]
    assert scores.exact.accuracy == pytest.approx(accuracy_score(truth, predicted))
    fractions = smoothed["scmulan_cell_type_smoothed_share"].to_numpy(dtype=float)
    assert scores.calibration.mean_right == pytest.approx(fractions[right].mean())
    assert scores.unknown_types == {"platelet": 3} and result.results[SMOOTHED][POOLED].ontology.n == 307
    assert "Lineages by scmulan, smoothed" in result.table()


def test_a_file_is_not_tested_and_trained_on(model, cells):
    with pytest.raises(InputError, match="to be tested and trained on"):
        evaluate_annotation(model, [cells["one"]], labels="label", train=[cells["one"], cells["two"]])


def test_training_data_of_the_model_is_reported(model, cells, monkeypatch):
    import hashlib

    digest = hashlib.sha256(cells["one"].read_bytes()).hexdigest()
    monkeypatch.setitem(model.card, "data", [{"file": "one.h5ad", "sha256": digest}])
    found = evaluate_annotation(model, [cells["one"]], labels="label")
    assert found.files[0].trained_on and "training data" in found.table()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a.obs.rename(columns={"label": "lab"}), "no column 'label' in obs"),
        (lambda a: a.obs.assign(label=""), "no labelled cell in column 'label'"),
    ],
)
def test_bad_labels_are_refused(model, cells, tmp_path, change, problem):
    adata = ad.read_h5ad(cells["one"])
    adata.obs = pd.DataFrame(change(adata))
    adata.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(InputError, match=rf"bad\.h5ad: .*{problem}"):
        evaluate_annotation(model, [tmp_path / "bad.h5ad"], labels="label")


def test_errors_of_a_file_name_it(model, cells, tmp_path):
    adata = ad.read_h5ad(cells["one"])
    adata.var_names = [f"x{i}" for i in range(adata.n_vars)]
    adata.write_h5ad(tmp_path / "odd.h5ad")
    with pytest.raises(InputError, match=r"odd\.h5ad"):
        evaluate_annotation(model, [tmp_path / "odd.h5ad"], labels="label")
    with pytest.raises(InputError, match="no file given"):
        evaluate_annotation(model, [], labels="label")


def test_few_genes_are_warned_of(model, cells, tmp_path):
    with pytest.warns(CoverageWarning):
        adata = ad.read_h5ad(cells["one"])[:, :100].copy()
        adata.write_h5ad(tmp_path / "few.h5ad")
        evaluate_annotation(model, [tmp_path / "few.h5ad"], labels="label")


@pytest.mark.shared
def test_real_cells_of_a_study_that_was_not_trained_on(shared, real_model):
    data = shared / "data"
    found = evaluate_annotation(
        real_model,
        [data / "validation" / "10x_pbmc_3tech.h5ad"],
        labels="label",
        lineages=True,
        train=[data / "train" / "10x_pbmc3k_subset.h5ad"],
    )
    scores = found.results[BASELINE]["10x_pbmc_3tech"]
    assert scores.groups.accuracy > 0.85 and scores.ontology.accuracy > 0.7
    assert scores.unknown_types == {"megakaryocyte": 7, "hematopoietic precursor cell": 3}
    assert found.baseline["left_out"] == []


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, scmulan.evaluate; print([m for m in ('torch', 'sklearn', 'scanpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

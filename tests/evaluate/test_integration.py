"""The evaluation of embeddings, end to end."""

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scmulan._io.adata import to_json
from scmulan.errors import InputError
from scmulan.evaluate import evaluate_integration
from scmulan.evaluate.inputs import ignore_warnings
from scmulan.evaluate.integration import AGGREGATES, quiet_scib_metrics, score_embeddings

pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")


@pytest.fixture(scope="module")
def result(model, cells):
    return evaluate_integration(
        model, [cells["one"], cells["two"], cells["tested"]], labels="label", max_cells=250, dimensions=10, seed=2
    )


@pytest.mark.slow
def test_cells_are_drawn_and_counted(result):
    assert result.cells + sum(result.left_out.values()) == 250 and result.of == 457
    assert set(result.types) == {"B cell", "CD14-positive monocyte", "natural killer cell"}
    assert set(result.left_out) <= {"platelet"}
    assert sum(result.batches.values()) == sum(result.types.values()) == result.cells
    assert set(result.batches) == {"one", "two", "tested"} and result.batch == "file"
    assert result.genes <= 300


def test_embeddings_are_scored_beside_pca(result):
    assert result.dimensions == {"X_pca": 10, "X_scmulan (default)": 32, "X_scmulan (release)": 32}
    assert len(result.metrics) == 9 and set(result.metrics.values()) == set(AGGREGATES[:2])
    for scores in result.results.values():
        assert set(scores) == {*result.metrics, *AGGREGATES}
        for kind in AGGREGATES[:2]:
            values = [scores[m] for m, about in result.metrics.items() if about == kind]
            assert scores[kind] == pytest.approx(np.mean(values))
        assert scores["Total"] == pytest.approx(0.6 * scores["Bio conservation"] + 0.4 * scores["Batch correction"])
    assert result.results["X_pca"]["Bio conservation"] > 0.7
    assert result.results["X_pca"]["Bio conservation"] > result.results["X_scmulan (default)"]["Bio conservation"]


@pytest.mark.slow
def test_an_embedding_of_types_is_good_and_one_of_batches_is_bad():
    rng = np.random.default_rng(0)
    types, batches = np.repeat(list("ab"), 60), np.tile(list("xy"), 60)
    noise = rng.normal(size=(120, 5)).astype(np.float32)
    by_type, by_batch = noise.copy(), noise.copy()
    by_type[:, 0] += 20 * (types == "a")
    by_batch[:, 0] += 20 * (batches == "x")
    scores, _ = score_embeddings({"X_pca": by_batch, "types": by_type}, types, batches)
    assert scores["types"]["Bio conservation"] > 0.9 > 0.5 > scores["X_pca"]["Bio conservation"]
    assert scores["types"]["Batch correction"] > 0.7 > 0.5 > scores["X_pca"]["Batch correction"]


def test_scib_metrics_prints_nothing_on_standard_output(capfd):
    with ignore_warnings("Tensorflow not installed"):
        import scib_metrics

    logger = logging.getLogger(scib_metrics.__name__)
    with quiet_scib_metrics():
        logger.info("type x is too small. Skip.")
    assert capfd.readouterr().out == ""
    assert logger.level == logging.INFO  # as it was


def test_results_are_json_and_a_table(result):
    content = json.loads(to_json(result.to_json()))
    assert content["results"]["X_pca"]["Total"] > 0
    table = result.table()
    for part in ("X_scmulan (release)", "iLISI", "Total", "0.6, 0.4", "3 batches ('file')"):
        assert part in table
    assert max(map(len, table.split("\n"))) < 120


def test_one_seed_gives_one_result(model, cells, result):
    again = evaluate_integration(
        model, [cells["one"], cells["two"], cells["tested"]], labels="label", max_cells=250, dimensions=10, seed=2
    )
    assert (again.types, again.batches, again.left_out) == (result.types, result.batches, result.left_out)
    for name, scores in result.results.items():
        # matrix products round as memory happens to lie
        assert again.results[name] == pytest.approx(scores, abs=1e-3), name


@pytest.mark.parametrize(
    ("obs", "problem"),
    [
        ({"label": "B cell"}, "two or more cell types: found 'B cell'"),
        ({"tech": "10x"}, "two or more batches: found '10x'"),
    ],
)
def test_one_type_or_batch_is_refused(model, cells, tmp_path, obs, problem):
    adata = ad.read_h5ad(cells["one"])
    for column, value in obs.items():
        adata.obs[column] = pd.Categorical([value] * adata.n_obs)
    adata.write_h5ad(tmp_path / "f.h5ad")
    with pytest.raises(InputError, match=problem):
        evaluate_integration(model, [tmp_path / "f.h5ad"], labels="label", batch="tech")


@pytest.mark.shared
@pytest.mark.slow
def test_real_batches(shared, real_model):
    path = shared / "data" / "validation" / "10x_pbmc_3tech.h5ad"
    found = evaluate_integration(real_model, [path], labels="label", batch="donor", max_cells=300, rules=("default",))
    assert found.batches.keys() == {"3pv1", "3pv2", "5p"}
    pca = found.results["X_pca"]
    assert pca["Bio conservation"] > 0.55 and pca["iLISI"] < 0.4 and pca["PCR comparison"] == 0

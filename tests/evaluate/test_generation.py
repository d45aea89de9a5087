"""Evaluation of generated cells, end to end."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scmulan._io.adata import to_json
from scmulan.errors import InputError
from scmulan.evaluate import evaluate_generation
from scmulan.evaluate.generation import BASELINE, CEILING, GENERATED
from scmulan.vocab.binning import tokenize
from scmulan.vocab.genes import match_genes

pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")


@pytest.fixture(scope="module")
def result(model, cells):
    return evaluate_generation(model, [cells["tested"]], labels="label", n=12, max_words=40, seed=4)


def test_sets_are_of_the_same_size_and_genes(result):
    (file,) = result.files
    assert file.genes == 300
    assert file.types == {"B cell": 12, "CD14-positive monocyte": 12, "natural killer cell": 12}
    assert file.left_out == {"platelet": "3 cells; the model has no word for it"}
    assert file.unlabelled == 3 and not file.trained_on
    assert list(file.results) == [GENERATED, CEILING, BASELINE]


def test_prompts_are_the_file_s_own_metadata(result):
    for name, prompts in result.files[0].prompts.items():
        assert sum(prompt["n"] for prompt in prompts) == 12
        assert {prompt["technology"] for prompt in prompts} == {"10x", "Drop-seq"}
        assert {prompt["fine_type"] for prompt in prompts} == {name}
        assert {prompt["organ"] for prompt in prompts} == {"Blood"}  # `blood` in the file
        assert all("coarse_type" not in prompt and "status" not in prompt for prompt in prompts)


def test_real_cells_are_similar_and_random_ones_are_not(result):
    file = result.files[0]
    assert file.results[CEILING].type_accuracy > 0.95 and file.results[CEILING].words_ratio == pytest.approx(
        1, abs=0.15
    )
    assert file.results[BASELINE].mean_pearson > 0.8
    assert file.results[CEILING].mean_pearson > 0.8 > 0.4 > file.results[GENERATED].mean_pearson
    assert file.results[CEILING].mean_difference > 0  # other cells, not the same
    assert 30 < file.results[GENERATED].words_mean <= 40  # no gene is lost
    assert file.results[CEILING].told_apart < 0.7 and file.results[GENERATED].told_apart > 0.9


def test_levels_are_those_of_tokenize(model, cells, result):
    adata = ad.read_h5ad(cells["tested"])
    match = match_genes(adata.var, model.vocabulary.genes)
    tokens = tokenize(adata.X.tocsr(), match.columns, len(model.vocabulary.genes), matrix_kind="counts")
    # every reference cell is one of the file's cells: so is their mean number of genes within its range
    assert tokens.lengths.min() <= result.files[0].real_words_mean <= tokens.lengths.max()
    assert result.files[0].real_words_mean == pytest.approx(tokens.lengths.mean(), rel=0.1)


def test_one_seed_gives_one_result(model, cells, result):
    again = evaluate_generation(model, [cells["tested"]], labels="label", n=12, max_words=40, seed=4)
    assert to_json(again.to_json()) == to_json(result.to_json())
    other = evaluate_generation(model, [cells["tested"]], labels="label", n=12, max_words=40, seed=5)
    assert to_json(other.files[0].results[GENERATED].words_mean) != to_json(
        result.files[0].results[GENERATED].words_mean
    )


def test_results_are_json_and_a_table(result):
    content = json.loads(to_json(result.to_json()))
    assert content["files"][0]["results"]["written"]["words_mean"] <= 40
    table = result.table()
    for part in ("36 cells per set", "independent genes", "told apart", "left out: platelet", "ended by themselves"):
        assert part in table
    assert max(map(len, table.split("\n"))) < 120


def test_fields_can_be_named(model, cells, tmp_path):
    adata = ad.read_h5ad(cells["one"])
    adata.obs = adata.obs.rename(columns={"tech": "machine", "organ": "place"})
    adata.write_h5ad(tmp_path / "f.h5ad")
    plain = evaluate_generation(model, [tmp_path / "f.h5ad"], labels="label", n=10, max_words=5)
    assert plain.files[0].prompts["B cell"] == [{"fine_type": "B cell", "coarse_type": "B cell", "n": 10}] or (
        plain.files[0].prompts["B cell"] == [{"fine_type": "B cell", "n": 10}]
    )
    named = evaluate_generation(
        model, [tmp_path / "f.h5ad"], labels="label", n=10, max_words=5, fields={"machine": "technology"}
    )
    assert {p["technology"] for p in named.files[0].prompts["B cell"]} == {"10x", "Drop-seq"}


def test_a_type_that_is_only_a_coarse_type_is_prompted_by_it(model, cells, tmp_path):
    adata = ad.read_h5ad(cells["one"])
    adata.obs["label"] = adata.obs["label"].astype(str).replace({"B cell": "naive B cell"})
    adata.obs["coarse"] = adata.obs["label"].replace({"naive B cell": "B cell", "CD14+ Monocyte": "monocyte"})
    adata.write_h5ad(tmp_path / "f.h5ad")
    file = evaluate_generation(model, [tmp_path / "f.h5ad"], labels="label", n=10, max_words=5).files[0]
    assert {(p.get("fine_type"), p["coarse_type"]) for p in file.prompts["naive B cell"]} == {(None, "B cell")}
    assert {(p["fine_type"], p["coarse_type"]) for p in file.prompts["CD14-positive monocyte"]} == {
        ("CD14-positive monocyte", "monocyte")
    }


def test_nothing_to_compare_is_refused(model, cells, tmp_path):
    adata = ad.read_h5ad(cells["one"])[:20].copy()
    adata.obs["label"] = pd.Categorical(np.where(np.arange(20) < 10, "B cell", "neuron"))
    adata.write_h5ad(tmp_path / "f.h5ad")
    with pytest.raises(
        InputError, match=r"f\.h5ad: no cell type can be compared \(B cell: 10 cells, 20 needed; neuron"
    ):
        evaluate_generation(model, [tmp_path / "f.h5ad"], labels="label")


def test_the_release_s_rule_can_be_used(model, cells):
    found = evaluate_generation(model, [cells["one"]], labels="label", n=10, max_words=5, rule="release", values="mean")
    assert found.parameters["rule"] == "release" and found.files[0].results[GENERATED].words_mean <= 5


@pytest.mark.shared
def test_real_cells(shared, real_model):
    path = shared / "data" / "validation" / "10x_pbmc_3tech.h5ad"
    file = evaluate_generation(real_model, [path], labels="label", n=15, max_words=10).files[0]
    assert {"B cell", "CD14-positive monocyte", "natural killer cell"} < set(file.types)
    assert "the model has no word for it" in file.left_out["megakaryocyte"]
    assert file.results[CEILING].words_ratio == pytest.approx(1, abs=0.3)

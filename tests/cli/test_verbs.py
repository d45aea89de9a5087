"""annotate, embed and generate: what they write, print and leave as it is."""

import os

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmulan.model.loading import load
from scmulan.tl._annotate import annotate
from scmulan.tl._embed import embed


def test_annotate_writes_what_the_api_gives(scmulan, folder, cells, tiny):
    run = scmulan("annotate", cells, "-o", "out.h5ad", "--model", tiny, "--table", "types.csv")
    assert run.code == 0
    assert not run.err
    assert set(os.listdir(folder)) == {"out.h5ad", "types.csv"}
    expected = ad.read_h5ad(cells)
    annotate(expected, load(tiny))
    found = ad.read_h5ad("out.h5ad")
    pd.testing.assert_frame_equal(found.obs.astype(object), expected.obs.astype(object))
    assert (found.X != expected.X).nnz == 0
    assert found.uns["scmulan"]["weights_hash"] == expected.uns["scmulan"]["weights_hash"]
    assert found.uns["scmulan"]["parameters"] == expected.uns["scmulan"]["parameters"]
    assert "X_scmulan" not in found.obsm
    table = pd.read_csv("types.csv", index_col="cell")
    assert list(table.index) == list(found.obs_names)
    assert list(table["scmulan_cell_type"]) == list(found.obs["scmulan_cell_type"])
    for text in ("40 cells", "300 of 300 vocabulary genes", "X: counts", "uncertain", "out.h5ad, types.csv"):
        assert text in run.out


def test_annotate_as_json(scmulan, folder, cells, tiny):
    run = scmulan("annotate", cells, "-o", "out.h5ad", "--model", tiny, "--json", "--embed", "--threshold", 0.99)
    assert run.code == 0
    assert not run.err
    account = run.json
    assert account["cells"] == sum(account["cell_types"].values()) == sum(account["status"].values()) == 40
    assert set(account["cell_types"]) <= {"B cell", "T cell", "monocyte", "natural killer cell"}
    assert account["status"]["confident"] == 0
    assert account["matrix"] == {"where": "X", "state": "counts", "reason": account["matrix"]["reason"]}
    assert account["genes"]["found"]["count"] == 300
    assert account["model"] == "tiny"
    assert (account["output"], account["table"], account["obsm"]) == ("out.h5ad", None, ["X_scmulan"])
    found = ad.read_h5ad("out.h5ad")
    assert found.obsm["X_scmulan"].shape == (40, 16)
    assert set(found.uns["scmulan"]["parameters"]) == {"annotate", "embed"}


def test_embed_writes_what_the_api_gives(scmulan, folder, cells, tiny):
    run = scmulan("embed", cells, "-o", "out.h5ad", "--model", tiny, "--batch-size", 500)
    assert run.code == 0
    assert not run.err
    assert "16 numbers per cell" in run.out
    expected = ad.read_h5ad(cells)
    embed(expected, load(tiny))
    found = ad.read_h5ad("out.h5ad")
    np.testing.assert_allclose(found.obsm["X_scmulan"], expected.obsm["X_scmulan"], atol=1e-5)
    assert list(found.obs) == ["label"]
    run = scmulan("embed", cells, "-o", "release.h5ad", "--model", tiny, "--rule", "release", "--json")
    assert run.json["width"] == 16
    assert run.json["parameters"]["embed"]["rule"] == "release"
    assert not np.allclose(ad.read_h5ad("release.h5ad").obsm["X_scmulan"], found.obsm["X_scmulan"])


def test_results_of_both_verbs_stand_side_by_side(scmulan, folder, cells, tiny):
    assert scmulan("annotate", cells, "-o", "one.h5ad", "--model", tiny).code == 0
    assert scmulan("embed", "one.h5ad", "-o", "two.h5ad", "--model", tiny).code == 0
    both = ad.read_h5ad("two.h5ad")
    assert "scmulan_cell_type" in both.obs
    assert "X_scmulan" in both.obsm
    assert set(both.uns["scmulan"]["parameters"]) == {"annotate", "embed"}


def test_the_release_rule_gives_no_probability(scmulan, folder, cells, tiny):
    assert scmulan("annotate", cells, "-o", "out.h5ad", "--model", tiny, "--rule", "release").code == 0
    assert ad.read_h5ad("out.h5ad").obs["scmulan_cell_type_probability"].isna().all()


def test_layer_and_kind_of_matrix_can_be_given(scmulan, folder, tiny, make_cells):
    adata = make_cells()
    adata.layers["mine"] = adata.X.copy()
    adata.layers["mine"].data[:] = np.log1p(adata.layers["mine"].data)
    adata.write_h5ad("in.h5ad")
    run = scmulan(
        "annotate", "in.h5ad", "-o", "out.h5ad", "--model", tiny, "--layer", "mine", "--state", "log1p", "--json"
    )
    assert run.json["matrix"]["where"] == "layers['mine']"
    assert run.json["matrix"]["state"] == "log1p"
    error = scmulan("embed", "in.h5ad", "-o", "no.h5ad", "--model", tiny, "--layer", "mien").refused()
    assert "did you mean 'mine'" in error


def test_zarr_in_and_out(scmulan, folder, tiny, make_cells):
    adata = make_cells()
    adata.write_h5ad("in.h5ad")
    assert scmulan("annotate", "in.h5ad", "-o", "out.zarr", "--model", tiny).code == 0
    assert scmulan("embed", "out.zarr", "-o", "again.zarr", "--model", tiny).code == 0
    again = ad.read_zarr("again.zarr")
    assert "scmulan_cell_type" in again.obs
    assert again.obsm["X_scmulan"].shape == (40, 16)


def test_names_that_repeat_are_accepted(scmulan, folder, tiny, make_cells):
    adata = make_cells()
    adata.obs_names = ["same"] * adata.n_obs
    adata.var_names = [*adata.var_names[:-1], adata.var_names[0]]
    adata.write_h5ad("in.h5ad")
    run = scmulan("annotate", "in.h5ad", "-o", "out.h5ad", "--model", tiny, "--table", "t.csv")
    assert run.code == 0
    assert run.err.startswith("scmulan: warning: in.h5ad: 39 names of cells repeat")
    assert run.err.count("\n") == 1
    assert "several columns (summed) 1" in run.out
    assert not pd.read_csv("t.csv")["cell"].duplicated().any()


def test_an_all_zero_cell_is_kept(scmulan, folder, tiny, make_cells):
    adata = make_cells()
    adata.X = sp.diags((np.arange(40) != 7).astype(np.float32)).tocsr() @ adata.X
    adata.write_h5ad("in.h5ad")
    run = scmulan("annotate", "in.h5ad", "-o", "out.h5ad", "--model", tiny, "--embed", "--json")
    assert run.json["status"]["empty"] == 1
    found = ad.read_h5ad("out.h5ad")
    assert found.obs["scmulan_cell_type_status"].iloc[7] == "empty"
    assert found.obs["scmulan_cell_type"].iloc[7] == "unknown"
    assert (found.obsm["X_scmulan"] == 0).all(1).sum() == 1


def test_few_genes_are_a_warning_in_one_line(scmulan, folder, tiny, make_cells):
    make_cells()[:, :60].write_h5ad("in.h5ad")
    run = scmulan("annotate", "in.h5ad", "-o", "out.h5ad", "--model", tiny, "--json")
    assert run.json["genes"]["fraction_of_vocabulary"] == 0.2
    assert run.err.startswith("scmulan: warning: the input: 60 of 300 vocabulary genes found (20%)")
    assert run.err.count("\n") == 1
    error = scmulan("annotate", "in.h5ad", "-o", "no.h5ad", "--model", tiny, "--min-genes", 100).refused()
    assert "100 needed" in error


def test_generate_writes_new_cells(scmulan, folder, tiny):
    command = ("generate", "--set", "organ=Blood", "--set", "cell_type=B cell", "-n", 6, "--model", tiny)
    run = scmulan(*command, "-o", "one.h5ad")
    assert run.code == 0
    assert not run.err
    assert "requested   organ Blood, fine type B cell" in run.out
    assert scmulan(*command, "-o", "two.h5ad").code == 0
    one, two = ad.read_h5ad("one.h5ad"), ad.read_h5ad("two.h5ad")
    assert one.shape == (6, 300)
    assert (one.X != two.X).nnz == 0
    assert set(one.obs["prompt_fine_type"]) == {"B cell"}
    other = scmulan(*command, "-o", "three.h5ad", "--seed", 1, "--json").json
    assert (ad.read_h5ad("three.h5ad").X != one.X).nnz
    assert other["prompt"] == {"organ": "Blood", "fine_type": "B cell"}
    assert other["parameters"]["seed"] == 1
    assert other["words_per_cell"]["mean"] == round(ad.read_h5ad("three.h5ad").obs["words"].mean(), 2)


def test_generate_with_all_options(scmulan, folder, tiny, make_cells):
    make_cells()[:, :50].write_h5ad("panel.h5ad")
    run = scmulan(
        "generate", "-o", "out.h5ad", "-n", 4, "--model", tiny, "--temperature", 0.5, "--rule", "release",
        "--values", "mean", "--genes-from", "panel.h5ad", "--max-words", 9,
    )  # fmt: skip
    assert run.code == 0
    assert "any cell" in run.out
    found = ad.read_h5ad("out.h5ad")
    cut = int((~found.obs["complete"]).sum())
    assert cut > 1
    assert f"{cut} cells stopped at 9 genes" in run.out
    assert found.obs["words"].max() == 9
    assert not found.X[:, 50:].nnz


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "organ=Blod"], "no organ 'Blod'; did you mean 'Blood'?"),
        (["--set", "cell_type=Bcell"], "did you mean 'B cell'"),
        (["--set", "organs=Blood"], "unknown metadata field 'organs': expected one of cell_type"),
        (["--set", "organ"], "'organ': expected FIELD=WORD"),
        (["--set", "organ=Blood", "--set", "tissue=Brain"], "the same field"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--cells", "0"], "'-n' / '--cells': Input should be greater"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_what_generate_refuses(scmulan, folder, tiny, options, message):
    error = scmulan("generate", "-o", "out.h5ad", "--model", tiny, *options).refused()
    assert message in error
    assert not os.listdir(folder)

"""The vote of a cell's neighbours."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scmulan
from scmulan._keys import SMOOTHED, SMOOTHED_FRACTION
from scmulan.cli.__main__ import main
from scmulan.errors import InputError
from scmulan.tl._smooth import smooth_types

pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")


def by_hand(types, hidden, k):
    """The same vote, a cell at a time."""
    voters = np.flatnonzero(np.linalg.norm(hidden, axis=1) > 0)
    unit = hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), 1e-30)
    smoothed, fractions = [], []
    for i, own in enumerate(types):
        if i not in voters:
            smoothed.append(own)
            fractions.append(0.0)
            continue
        order = sorted(voters, key=lambda j: (j != i, -float(unit[i] @ unit[j])))[:k]
        votes = pd.Series([types[j] for j in order]).value_counts()
        best = votes.index[votes == votes.max()]
        smoothed.append(own if own in best else sorted(best)[0])
        fractions.append(votes.max() / len(order))
    return np.array(smoothed), np.array(fractions)


@pytest.fixture
def scattered():
    """Three kinds that lie apart, a fifth of whose cells have another's name; two cells lie nowhere."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 120)
    hidden = (np.eye(8)[kind] * 3 + rng.normal(0, 0.4, (120, 8))).astype(np.float32)
    hidden[[7, 50]] = 0
    names = np.array(["T cell", "B cell", "monocyte"])
    wrong = rng.random(120) < 0.2
    types = names[np.where(wrong, (kind + 1) % 3, kind)]
    types[[7, 50]] = "unknown"
    return pd.Series(types, index=[f"c{i}" for i in range(120)]), hidden, names[kind]


@pytest.mark.parametrize("k", [1, 2, 4, 15, 500])
def test_it_is_the_vote_counted_by_hand(scattered, k):
    types, hidden, _ = scattered
    smoothed, fractions = by_hand(types.to_numpy(), hidden, k)
    for max_pairs in (2**25, 1000):  # all cells together, and few at a time
        found = smooth_types(types, hidden, k, max_pairs=max_pairs)
        assert list(found.index) == list(types.index)
        assert np.array_equal(found[SMOOTHED].astype(str), smoothed)
        np.testing.assert_allclose(found[SMOOTHED_FRACTION], fractions, atol=1e-6)


def test_names_that_scatter_come_together(scattered):
    types, hidden, truth = scattered
    found = smooth_types(types, hidden)
    known = types != "unknown"
    assert (types == truth)[known].mean() < 0.85
    assert (found[SMOOTHED].astype(str) == truth)[known].mean() > 0.98
    assert set(found[SMOOTHED].cat.categories) == {"B cell", "T cell", "monocyte", "unknown"}
    assert found[SMOOTHED_FRACTION].dtype == np.float32
    assert (found[SMOOTHED][~known] == "unknown").all() and (found[SMOOTHED_FRACTION][~known] == 0).all()


def test_cells_without_any_gene_keep_their_names():
    found = smooth_types(pd.Series(["unknown"] * 3), np.zeros((3, 4), dtype=np.float32))
    assert (found[SMOOTHED] == "unknown").all() and (found[SMOOTHED_FRACTION] == 0).all()


def test_a_cell_is_its_own_nearest_neighbour_among_equals():
    """Cells that read alike to the last bit, each of another name."""
    types = pd.Series([f"type {i}" for i in range(20)])
    found = smooth_types(types, np.ones((20, 4), dtype=np.float32), 1)
    assert (found[SMOOTHED].astype(str) == types).all() and (found[SMOOTHED_FRACTION] == 1).all()


def test_a_verb_on_anndata(scattered):
    types, hidden, _ = scattered
    adata = ad.AnnData(obs=pd.DataFrame({"scmulan_cell_type": types}), obsm={"X_scmulan": hidden})
    adata.uns["scmulan"] = {"weights_hash": "x", "parameters": {"annotate": {"rule": "default"}}}
    scmulan.tl.smooth(adata, n_neighbors=9)
    expected = smooth_types(types, hidden, 9)
    assert (adata.obs[SMOOTHED].astype(str) == expected[SMOOTHED].astype(str)).all()
    assert (adata.obs["scmulan_cell_type"] == types).all()
    record = adata.uns["scmulan"]
    assert record["weights_hash"] == "x" and record["parameters"]["annotate"] == {"rule": "default"}
    assert record["parameters"]["smooth"] == {"neighbours": 9, "use_rep": "X_scmulan"}


def test_what_is_missing_is_named(scattered):
    types, hidden, _ = scattered
    adata = ad.AnnData(obs=pd.DataFrame(index=types.index))
    with pytest.raises(InputError, match=r"'scmulan_cell_type' is missing: run scmulan\.tl\.annotate"):
        scmulan.tl.smooth(adata)
    adata.obs["scmulan_cell_type"] = types
    with pytest.raises(InputError, match=r"'X_scmulan' is missing: run scmulan\.tl\.embed"):
        scmulan.tl.smooth(adata)
    adata.obsm["X_scmulan"] = hidden
    with pytest.raises(InputError, match="0 neighbours: expected at least 1"):
        scmulan.tl.smooth(adata, n_neighbors=0)
    assert SMOOTHED not in adata.obs


@pytest.mark.parametrize("embed", [[], ["--embed"]])
def test_from_file_to_file(random_model, tmp_path, capsys, embed):
    rng = np.random.default_rng(0)
    x = rng.poisson(0.6, (40, 80)).astype(np.float32)
    x[4] = 0
    cells = ad.AnnData(x, var=pd.DataFrame(index=random_model.vocabulary.genes[:80]))
    cells.write_h5ad(tmp_path / "a.h5ad")
    options = ["--model", str(random_model.folder), "--precision", "fp32", "--table", str(tmp_path / "t.csv"), "--json"]
    assert (
        main(["annotate", str(tmp_path / "a.h5ad"), "-o", str(tmp_path / "b.h5ad"), "--smooth", *embed, *options]) == 0
    )
    account = json.loads(capsys.readouterr().out)
    assert account["obs"][-2:] == [SMOOTHED, SMOOTHED_FRACTION] and account["obsm"] == (["X_scmulan"] if embed else [])
    made, table = ad.read_h5ad(tmp_path / "b.h5ad"), pd.read_csv(tmp_path / "t.csv", index_col="cell")
    assert list(made.obsm) == account["obsm"]
    assert set(made.uns["scmulan"]["parameters"]) == {"annotate", "smooth"} | ({"embed"} if embed else set())
    scmulan.tl.annotate(cells, random_model, precision="fp32")
    scmulan.tl.embed(cells, random_model, precision="fp32")
    scmulan.tl.smooth(cells)
    for found in (made.obs, table):
        assert (found[SMOOTHED].astype(str).to_numpy() == cells.obs[SMOOTHED].astype(str).to_numpy()).all()
        np.testing.assert_allclose(found[SMOOTHED_FRACTION], cells.obs[SMOOTHED_FRACTION], atol=1e-6)

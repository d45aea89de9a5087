import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import scmulan
from scmulan.errors import GeneError, ScmulanError, VocabularyError
from scmulan.vocab.binning import tokenize

COLUMNS = [f"scmulan_cell_type{part}" for part in ("", "_coarse", "_probability", "_status", "_ontology_id")]
pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")


@pytest.fixture
def cells(random_model):
    """Counts of 30 cells in 80 of the model's genes and 20 others; cell 4 is all zero."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.6, (30, 100)).astype(np.float32)
    x[4] = 0
    names = random_model.vocabulary.genes[:80] + [f"OTHER{i}" for i in range(20)]
    adata = ad.AnnData(sp.csr_matrix(x))
    adata.var_names, adata.obs_names = names, [f"cell-{i}" for i in range(30)]
    return adata


def test_annotate_labels_every_cell_and_records_how(cells, random_model):
    before = cells.X.copy()
    assert scmulan.tl.annotate(cells, random_model) is None
    assert [c for c in cells.obs if c.startswith("scmulan")] == COLUMNS
    assert set(cells.obs[COLUMNS[0]].drop("cell-4")) <= set(random_model.vocabulary.names("fine_type"))
    assert cells.obs.loc["cell-4", COLUMNS[3]] == "empty" and cells.obs.loc["cell-4", COLUMNS[0]] == "unknown"
    assert cells.obs.loc["cell-4", COLUMNS[2]] == 0 and cells.obs.loc["cell-4", COLUMNS[4]] == ""
    ids = cells.obs[COLUMNS[4]][cells.obs[COLUMNS[0]] == "B cell"]
    assert (ids == "CL:0000236").all()
    uns = cells.uns["scmulan"]
    assert uns["matrix"]["where"] == "X" and uns["matrix"]["state"] == "counts"
    assert uns["weights_hash"] == random_model.weights_hash and uns["version"] == scmulan.__version__
    assert uns["parameters"]["annotate"]["threshold"] == 0.5
    assert (cells.X != before).nnz == 0


def test_results_survive_h5ad(cells, random_model, tmp_path):
    scmulan.tl.annotate(cells, random_model)
    scmulan.tl.embed(cells, random_model)
    cells.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (back.obs[COLUMNS[0]].astype(str) == cells.obs[COLUMNS[0]].astype(str)).all()
    assert np.array_equal(back.obsm["X_scmulan"], cells.obsm["X_scmulan"])
    assert set(back.uns["scmulan"]["parameters"]) == {"annotate", "embed"}


def test_order_of_cells_and_genes_does_not_matter(cells, random_model):
    rng = np.random.default_rng(1)
    shuffled = cells[rng.permutation(30)][:, rng.permutation(100)].copy()
    for adata in (cells, shuffled):
        scmulan.tl.annotate(adata, random_model)
        scmulan.tl.embed(adata, random_model)
    again = shuffled[cells.obs_names]
    assert np.abs(again.obs[COLUMNS[2]] - cells.obs[COLUMNS[2]]).max() < 1e-5
    assert np.abs(again.obsm["X_scmulan"] - cells.obsm["X_scmulan"]).max() < 1e-4


def test_backed_file_gives_the_same(cells, random_model, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    scmulan.tl.annotate(backed, random_model)
    scmulan.tl.annotate(cells, random_model)
    assert np.array_equal(backed.obs[COLUMNS[2]], cells.obs[COLUMNS[2]])
    backed.file.close()


def test_threshold_marks_the_uncertain(cells, random_model):
    scmulan.tl.annotate(cells, random_model, threshold=1.0)
    assert "confident" not in set(cells.obs[COLUMNS[3]])
    scmulan.tl.annotate(cells, random_model, threshold=0.0)
    assert "uncertain" not in set(cells.obs[COLUMNS[3]])


def test_release_rule_of_annotate_and_embed(cells, random_model):
    scmulan.tl.annotate(cells, random_model, rule="release")
    assert cells.obs[COLUMNS[2]].isna().all() or cells.obs[COLUMNS[2]].isna().sum() >= 29
    scmulan.tl.embed(cells, random_model)
    default = cells.obsm["X_scmulan"].copy()
    scmulan.tl.embed(cells, random_model, rule="release")
    assert default.shape == (30, 32) and not np.allclose(default, cells.obsm["X_scmulan"])
    assert (cells.obsm["X_scmulan"][4] == 0).all()


def test_input_without_our_genes_is_refused_and_left_as_it_is(cells, random_model):
    cells.var_names = [f"X{i}" for i in range(100)]
    with pytest.raises(GeneError):
        scmulan.tl.annotate(cells, random_model)
    assert not cells.uns and not len(cells.obs.columns)


def verbs(model):
    """Each verb that adds results to cells, the key that it renames, and where its results are."""
    return [
        (lambda adata, **keys: scmulan.tl.annotate(adata, model, **keys), "scmulan_cell_type", "obs"),
        (lambda adata, **keys: scmulan.tl.embed(adata, model, **keys), "X_scmulan", "obsm"),
        (lambda adata, **keys: scmulan.tl.smooth(adata, **keys), "scmulan_cell_type_smoothed", "obs"),
        (lambda adata, **keys: scmulan.tl.perturb(adata, model, {model.vocabulary.genes[0]: 0}, **keys),
         "scmulan_perturbed", "obs"),
    ]  # fmt: skip


def test_a_copy_has_the_results_and_the_input_has_not(cells, random_model):
    for verb, key, where in verbs(random_model):
        before = cells.copy()
        copied = verb(cells, copy=True)
        assert list(cells.obs) == list(before.obs) and list(cells.obsm) == list(before.obsm)
        assert cells.uns == before.uns
        assert verb(cells) is None  # in place, for the verbs that need its results
        assert key in getattr(cells, where)
        assert copied.obs.equals(cells.obs) and copied.uns == cells.uns
        assert all(np.array_equal(copied.obsm[name], cells.obsm[name]) for name in cells.obsm)


def test_a_backed_file_is_copied_into_memory(cells, random_model, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    copied = scmulan.tl.annotate(backed, random_model, copy=True)
    assert not copied.isbacked and COLUMNS[0] in copied.obs and COLUMNS[0] not in backed.obs
    backed.file.close()


def test_key_added_names_all_that_is_written(cells, random_model):
    for verb, key, where in verbs(random_model):
        before = set(getattr(cells, where))
        verb(cells)
        results = getattr(cells, where)
        renamed = {name.replace(key, "mine", 1): name for name in set(results) - before}
        other = cells.copy()
        verb(other, key_added="mine")
        assert set(getattr(other, where)) == set(results) | set(renamed)
        for new, old in renamed.items():
            assert np.array_equal(np.asarray(getattr(other, where)[new]), np.asarray(results[old]))
        assert other.uns["scmulan"] == cells.uns["scmulan"] and "mine" in other.uns


def test_records_of_several_verbs_stand_side_by_side(cells, random_model):
    verb_names = ["annotate", "embed", "smooth", "perturb"]
    for verb, _, _ in verbs(random_model):
        verb(cells)
    assert list(cells.uns["scmulan"]["parameters"]) == verb_names
    scmulan.tl.annotate(cells, random_model, threshold=0.9, key_added="strict")
    scmulan.tl.smooth(cells, cell_type_key="strict", key_added="strict")
    assert {"strict", "strict_coarse", "strict_share"} <= set(cells.obs)
    assert list(cells.uns["strict"]["parameters"]) == ["annotate", "smooth"]
    assert cells.uns["strict"]["parameters"]["annotate"]["threshold"] == 0.9
    assert cells.uns["scmulan"]["parameters"]["annotate"]["threshold"] == 0.5


def test_a_model_is_given_by_name_or_folder(cells, random_model):
    loaded = scmulan.tl.annotate(cells, random_model, precision="fp32", copy=True)
    named = scmulan.tl.annotate(cells, random_model.folder, precision="fp32", copy=True)
    assert named.obs.equals(loaded.obs)
    assert scmulan.tl.generate(str(random_model.folder), n=2, max_words=5).n_obs == 2


def test_the_package_lists_verbs_and_results():
    names = {"annotate", "embed", "generate", "perturb", "smooth", "Annotation", "Embedding", "Perturbation"}
    names |= {"annotate_cells", "embed_cells", "perturb_cells", "ReadOptions"}
    assert set(dir(scmulan.tl)) >= names == set(scmulan.tl.__all__)
    assert all(callable(getattr(scmulan.tl, name)) for name in names)


def test_generate_follows_the_metadata(random_model):
    model, metadata = random_model, {"organ": "Blood", "cell_type": "B cell"}
    made = scmulan.tl.generate(model, metadata, n=5, seed=1, max_words=40)
    assert made.shape == (5, 300) and list(made.var_names) == model.vocabulary.genes
    assert set(made.obs["prompt_organ"]) == {"Blood"} and set(made.obs["prompt_fine_type"]) == {"B cell"}
    assert np.array_equal(made.obs["words"], np.diff(made.X.indptr)) and made.obs["words"].max() <= 40
    assert made.layers["level"].data.min() >= 1 and made.layers["level"].data.max() <= 10
    # The cell's own total in the vocabulary's genes is what the card says normalised cells have.
    full = made.obs["words"].to_numpy() > 0
    assert np.allclose(np.expm1(made.X.toarray()).sum(1)[full], 4000, rtol=1e-3)
    again = scmulan.tl.generate(model, metadata, n=3, seed=1, max_words=40)
    assert (again.X != made[:3].X).nnz == 0
    assert (scmulan.tl.generate(model, metadata, n=3, seed=2, max_words=40).X != again.X).nnz > 0


def test_generated_cells_are_read_as_they_were_drawn(random_model):
    made = scmulan.tl.generate(random_model, n=4, seed=0, max_words=60)
    tokens = tokenize(made.X, np.arange(300, dtype=np.int32), 300, matrix_kind="log1p")
    assert np.array_equal(tokens.gene, made.X.indices)


def test_generate_within_a_panel(random_model):
    panel = random_model.vocabulary.genes[10:50]
    made = scmulan.tl.generate(random_model, n=4, genes=panel, max_words=100)
    outside = [g for g in made.var_names if g not in panel]
    assert made[:, outside].X.nnz == 0 and made.X.nnz > 0


@pytest.mark.parametrize(
    ("metadata", "options", "error", "message"),
    [
        ({"cell_type": "B cel"}, {}, VocabularyError, "did you mean 'B cell'"),
        ({"colour": "red"}, {}, VocabularyError, "unknown metadata field"),
        ({}, {"n": 0}, ScmulanError, "n is 0"),
        ({}, {"temperature": -1.0}, ScmulanError, "temperature is -1.0"),
    ],
)
def test_prompts_that_cannot_be_followed(random_model, metadata, options, error, message):
    with pytest.raises(error, match=message):
        scmulan.tl.generate(random_model, metadata, **options)

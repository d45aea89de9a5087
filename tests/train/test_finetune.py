"""Fine-tuning: somebody's own cells and labels in, a model folder like any other out."""

import inspect
import os
import signal
from dataclasses import fields

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scmulan
from scmulan._progress import Progress
from scmulan.data.memory import store_from_adata
from scmulan.errors import GeneError, InputError, ModelError, OutputError, RecipeError, VocabularyError
from scmulan.model.folder import verify_hashes
from scmulan.model.loading import save_model
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train import finetune as module
from scmulan.train.early_stopping import EarlyStopping, StopTraining, score
from scmulan.train.finetune import finetune
from scmulan.train.init import fit_head, relatives, resize_vocabulary
from scmulan.train.labels import coarse_of, hold_out, label_relations
from scmulan.vocab.genes import CoverageWarning
from scmulan.vocab.vocabulary import Family, Vocabulary

GENES = Vocabulary.published().genes[:80]
KINDS = ["B cell", "helper T", "killer T", "blob 7"]  # known; unknown to the model; unknown; unknown to everybody
FAST = {"steps": 12, "patience": 30}


def some_cells(n=120, seed=0, genes=GENES):
    """Counts in which kind k says the genes k, k + 4, k + 8, … more often."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.arange(n) % 4)
    mean = np.where(np.arange(len(genes)) % 4 == kind[:, None], 4.0, 0.4)
    obs = pd.DataFrame(
        {
            "type": pd.Categorical([KINDS[k] for k in kind]),
            "donor": [f"d{i % 5}" for i in range(n)],
            "organ": np.where(np.arange(n) % 2, "blood", "Kidney"),
        },
        index=[f"cell-{i}" for i in range(n)],
    )
    return ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def make_parent(folder, objective="next_word", seed=0):
    vocabulary = Vocabulary.build(
        GENES,
        {
            Family.ORGAN: ["Blood", "Brain"],
            Family.COARSE: ["T cell", "lymphocyte", "myeloid cell"],
            Family.FINE: ["B cell", "T cell", "CD8-positive, alpha-beta T cell", "monocyte"],
        },
    )
    own = objective == "next_word"
    config = MulanConfig(
        vocabulary=len(vocabulary), layers=1, heads=2, width=32,
        set_state=own, value_spread=own, word_bias=own, bounded_genes=own,
    )  # fmt: skip
    card = {"name": "tiny", "objective": objective} if own else {"name": "old"}
    network = Mulan(config).initialise(seed)
    if not own:  # without a set state, what a cell says is seen only where attention is sharp
        with torch.no_grad():
            for parameter in network.parameters():
                parameter *= 8.0 if parameter.dim() > 1 else 1.0
    return save_model(folder, network, vocabulary, card)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return make_parent(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cells():
    return some_cells()


class Lines(Progress):
    """Progress that keeps what it is told."""

    def __init__(self, lines):
        self.log = lines.append


@pytest.fixture(scope="module")
def tuned(parent, tmp_path_factory):
    """Model, report and lines of one longer fine-tuning from a file, on which several tests look."""
    folder = tmp_path_factory.mktemp("tuned")
    file = folder / "mine.h5ad"
    adata = some_cells(200)
    adata.obs["type"] = adata.obs["type"].astype(object)
    adata.obs.iloc[:20, 0] = [None, ""] * 10
    adata.write_h5ad(file)
    lines = []
    torch.set_num_threads(1)
    report = finetune(parent, file, "type", folder / "model", steps=60, progress=Lines(lines))
    return folder / "model", report, lines, file


# -- what comes out -------------------------------------------------------------------------------------------------


def test_the_result_names_new_cells_with_their_labels(tuned):
    folder, report, _, _ = tuned
    model = scmulan.load(folder)
    fresh = some_cells(100, seed=1)
    truth = fresh.obs["type"].astype(str)
    scmulan.tl.annotate(fresh, model)
    assert (fresh.obs["scmulan_cell_type"].astype(str) == truth).mean() > 0.9
    assert report["validation"]["accuracy"] > 0.9 and set(report["validation"]["recall"]) == set(KINDS)
    assert report["before"].keys() == {"accuracy", "macro_recall"}
    assert report["model"] == str(folder)


def test_the_result_is_a_model_folder_like_any_other(tuned, parent):
    folder, report, _, _ = tuned
    verify_hashes(folder)
    model, old = scmulan.load(folder), scmulan.load(parent)
    assert model.vocabulary.tokens[: len(old.vocabulary)] == old.vocabulary.tokens
    assert model.vocabulary.names(Family.FINE)[-3:] == ["blob 7", "helper T", "killer T"]
    assert report["new_words"] == {"fine_type": ["blob 7", "helper T", "killer T"]}
    assert model.config.vocabulary == old.config.vocabulary + 3
    written = scmulan.tl.generate(model, {"cell_type": "blob 7", "organ": "Blood"}, n=3, seed=0)
    assert written.shape == (3, len(GENES))
    fresh = some_cells(5)
    scmulan.tl.embed(fresh, model)
    assert np.isfinite(fresh.obsm["X_scmulan"]).all()
    assert not list(folder.parent.glob(".*"))  # the run's state is gone


def test_the_card_says_what_it_was_made_from(tuned, parent):
    folder, report, lines, file = tuned
    card = scmulan.load(folder).card
    assert card["parent"] == {"name": "tiny", "weights_hash": scmulan.load(parent).weights_hash}
    assert card["name"] == "model" and card["objective"] == "next_word" and "tiny" in card["description"]
    assert card["data"][0]["file"] == "mine.h5ad" and card["data"][0]["sha256"] == module.sha256(file)
    assert card["recipe"]["labels"] == "type"
    assert card["cell_types"] == report["labels"]
    assert sum(report["labels"].values()) == 180 and report["cells"] == card["cells"] == 200
    assert card["validation"]["accuracy"] == report["validation"]["accuracy"]
    assert card["validation"]["cells"] == report["held_out"] == 18
    assert card["validation"]["held_out"] == "a fraction of each label"
    assert card["best_step"] == report["best_step"] <= card["steps"] == report["steps"] <= 60
    assert [c["step"] for c in card["checks"]] == list(range(10, report["steps"] + 1, 10))[: len(card["checks"])]
    assert 0 < card["covered"] <= 1
    assert lines[0] == (
        "4 cell types, 3 of them new to the model; 182 cells to learn from, 18 held out; at most 60 steps"
    )
    assert lines[1].startswith("before training: accuracy ") and lines[2].startswith("step 10: accuracy ")


def test_the_cells_given_stay_as_they_are(parent, cells, tmp_path):
    adata = cells.copy()
    finetune(parent, adata, "type", tmp_path / "m", **FAST)
    assert adata.obs.equals(cells.obs) and (adata.X != cells.X).nnz == 0 and adata.uns == cells.uns
    assert scmulan.load(tmp_path / "m").card["data"][0]["file"] is None


def test_a_model_of_the_published_objective_is_tuned_with_it(cells, tmp_path):
    parent = make_parent(tmp_path / "old", "published")
    report = finetune(parent, cells, "type", tmp_path / "m", steps=200)
    model = scmulan.load(tmp_path / "m")
    assert model.card["objective"] == "published" and model.card["recipe"]["objective"]["value_weight"] == 200.0
    fresh = some_cells(60, seed=1)
    scmulan.tl.annotate(fresh, model)
    assert (fresh.obs["scmulan_cell_type"].astype(str) == fresh.obs["type"].astype(str)).mean() > 0.8
    assert report["validation"]["accuracy"] > 0.8


def test_the_published_vocabulary_grows_too(tmp_path):
    """Words of two families, and other prompt words."""
    vocabulary = Vocabulary.published()
    network = Mulan(MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=16)).initialise(0)
    save_model(tmp_path / "old", network, vocabulary, {"name": "old"})
    adata = some_cells(60)
    adata.obs["type"] = adata.obs["type"].astype(str).replace({"killer T": "Smooth muscle cell"})
    with pytest.warns(CoverageWarning):
        report = finetune(tmp_path / "old", adata, "type", tmp_path / "m", **FAST)
    assert report["new_words"] == {"fine_type": ["blob 7", "helper T"]}
    assert scmulan.load(tmp_path / "m").vocabulary.tokens[:2222] == vocabulary.tokens


# -- interruptions --------------------------------------------------------------------------------------------------


def weights(folder):
    return scmulan.load(folder).network.state_dict()


def test_an_interrupted_run_is_continued_to_the_same_weights(parent, cells, tmp_path, monkeypatch):
    finetune(parent, cells, "type", tmp_path / "whole", steps=30, patience=30)
    real = EarlyStopping.check

    def stop(self, model, step):
        out = real(self, model, step)
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    monkeypatch.setattr(EarlyStopping, "check", stop)
    report = finetune(parent, cells, "type", tmp_path / "cut", steps=30, patience=30)
    monkeypatch.undo()
    assert report["model"] is None and report["steps"] == 20
    assert not (tmp_path / "cut").exists() and (tmp_path / ".cut.run").is_dir()
    with pytest.raises(RecipeError, match=r"another recipe \(seed was 0, is 1\)"):
        finetune(parent, cells, "type", tmp_path / "cut", steps=30, patience=30, seed=1)
    started = []
    monkeypatch.setattr(EarlyStopping, "start", lambda *_: started.append(1))
    report = finetune(parent, cells, "type", tmp_path / "cut", steps=30, patience=30)
    assert report["steps"] == 30 and not started
    assert all(torch.equal(w, weights(tmp_path / "cut")[n]) for n, w in weights(tmp_path / "whole").items())
    assert not (tmp_path / ".cut.run").exists()


def test_the_best_step_is_kept_and_a_run_without_progress_ends(parent, cells, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.3, 0.3, 0.99])

    def measure(model, *_):
        value = next(scores)
        seen.append({n: w.clone() for n, w in model.state_dict().items()})
        return {"accuracy": value, "macro_recall": value, "recall": {}}

    seen = []
    monkeypatch.setattr(module, "score", measure)
    report = finetune(parent, cells, "type", tmp_path / "m", steps=200, patience=3)
    assert (report["best_step"], report["steps"], len(seen)) == (20, 50, 6)
    saved = weights(tmp_path / "m")
    assert all(torch.equal(w.half().float(), saved[n]) for n, w in seen[2].items())
    assert not all(torch.equal(w.half().float(), saved[n]) for n, w in seen[3].items())


def test_best_counts_patience_from_the_best_step(network, tmp_path):
    values = iter([0.5, 0.5, 0.6, 0.6, 0.6])
    best = EarlyStopping(tmp_path, lambda _: {"accuracy": next(values), "macro_recall": 0.0, "recall": {}}, 20)
    best.start(network)
    best.check(network, 10)  # as good is not better
    assert best.report()["best_step"] == 0
    best.check(network, 20)
    assert best.report()["best_step"] == 20 and best.report()["before"]["accuracy"] == 0.5
    best.check(network, 30)
    with pytest.raises(StopTraining):
        best.check(network, 40)


# -- the pieces -----------------------------------------------------------------------------------------------------


def test_a_grown_network_keeps_its_old_words(parent):
    model = scmulan.load(parent)
    new = model.vocabulary.extend(Family.FINE, ["killer T", "blob 7"]).extend(Family.ORGAN, ["Kidney"])
    grown = resize_vocabulary(model.network, model.vocabulary, new, seed=0)
    entity = torch.randint(1, 80, (3, 12), generator=torch.Generator().manual_seed(0))
    value = torch.full_like(entity, 4)
    with torch.no_grad():
        before, after = model.network(entity, value), grown(entity, value)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        logits = grown.entity_logits(after)[..., : len(model.vocabulary)]
        torch.testing.assert_close(logits, model.network.entity_logits(before), rtol=1e-5, atol=1e-6)
    before = model.network.state_dict()
    tables = {n for n, w in grown.state_dict().items() if w.shape != before[n].shape}
    assert tables == {
        "word.weight", "set_state.word.weight", "entity_head.weight", "value_head.weight",
        "entity_bias", "log_scale", "value_bias",
    }  # fmt: skip
    again = resize_vocabulary(model.network, model.vocabulary, new, seed=0).state_dict()
    assert all(torch.equal(w, again[n]) for n, w in grown.state_dict().items())


def test_a_new_word_starts_like_its_relatives(parent):
    model = scmulan.load(parent)
    old = model.vocabulary
    named = {name: old.id(Family.FINE, name) for name in old.names(Family.FINE)}
    fine = list(named.values())
    assert relatives(old, Family.FINE, "B cells").tolist() == [named["B cell"]]
    assert relatives(old, Family.FINE, "CD8 T").tolist() == [named["CD8-positive, alpha-beta T cell"]]
    assert relatives(old, Family.FINE, "regulatory T cell").tolist() == [named["T cell"]]  # a kind of it
    assert relatives(old, Family.FINE, "blob 7").tolist() == fine
    assert set(relatives(old, Family.FINE, "mononuclear phagocyte")) == {named["monocyte"]}  # one kind of it
    assert relatives(old, Family.ORGAN, "Kidney").tolist() == old.ids(Family.ORGAN).tolist()
    assert len(relatives(old, Family.SEX, "female"))  # a family without words
    new = old.extend(Family.FINE, ["B cells", "blob 7", "blob 8"])
    table = resize_vocabulary(model.network, old, new, seed=0).entity_head.weight.detach()
    far = table[fine].std(0).norm()
    assert (table[len(old)] - table[named["B cell"]]).norm() < 0.3 * far
    assert (table[len(old) + 1] - table[fine].mean(0)).norm() < 0.3 * far
    assert not torch.equal(table[len(old) + 1], table[len(old) + 2])


@pytest.mark.parametrize("objective", ["next_word", "published"])
def test_fitted_rows_name_cells_and_nothing_else_moves(tmp_path, cells, objective):
    model = scmulan.load(make_parent(tmp_path / "m", objective))
    words = {Family.FINE: cells.obs["type"].to_numpy(dtype=object)}
    words[Family.FINE][:30] = ""
    vocabulary = model.vocabulary.extend(Family.FINE, KINDS)
    store = store_from_adata(cells, vocabulary, words, name="x")[0]
    network = resize_vocabulary(model.network, model.vocabulary, vocabulary, 0)
    before = {n: w.clone() for n, w in network.state_dict().items()}
    plain = score_of(network, store, vocabulary)
    fit_head(network, store, vocabulary, objective, seed=0)
    assert score_of(network, store, vocabulary) > max(0.6, plain + 0.2)
    rows = [*vocabulary.ids(Family.COARSE), *vocabulary.ids(Family.FINE)]
    for name, weight in network.state_dict().items():
        if name in ("entity_head.weight", "entity_bias"):
            moved = (weight != before[name]).reshape(len(vocabulary), -1).any(1).nonzero()[:, 0].tolist()
            assert moved == sorted(rows)
        else:
            assert torch.equal(weight, before[name]), name


def score_of(network, store, vocabulary):
    from scmulan.data.memory import take

    labelled = take(store, np.flatnonzero(store.tokens(Family.FINE) >= 0))
    return score(network, labelled, vocabulary, np.eye(len(vocabulary), dtype=bool))["accuracy"]


def test_coarse_types_follow_from_the_ontology(parent):
    vocabulary = scmulan.load(parent).vocabulary
    labels = np.array(["CD8 T", "B cells", "monocyte", "neuron", "blob 7", ""], dtype=object)
    # The closest one above: a CD8 T cell is a lymphocyte, and a T cell more closely.
    assert coarse_of(labels, vocabulary).tolist() == ["T cell", "lymphocyte", "myeloid cell", "", "", ""]


def test_only_labels_of_the_cells_satisfy_each_other(parent):
    """Who calls cells "B cells" wants to read that, not the "B cell" of the model."""
    vocabulary = scmulan.load(parent).vocabulary.extend(Family.FINE, ["B cells", "CD8 T", "T lymphocyte"])
    adata = some_cells(40)
    words = {Family.FINE: np.array(["B cells", "CD8 T", "T lymphocyte", ""] * 10, dtype=object)}
    relations = label_relations(vocabulary, store_from_adata(adata, vocabulary, words, name="x")[0])
    b, t8, t, old = (vocabulary.id(Family.FINE, n) for n in ("B cells", "CD8 T", "T lymphocyte", "T cell"))
    assert relations[t, t8] and not relations[t8, t] and not relations[t, old] and not relations[b, t]
    assert relations.diagonal().all() and relations.sum() == len(vocabulary) + 1


def store_of(parent, labels, donors=None):
    adata = some_cells(len(labels))
    words = {Family.FINE: np.array(labels, dtype=object)}
    vocabulary = scmulan.load(parent).vocabulary.extend(Family.FINE, set(labels) - {""})
    return store_from_adata(adata, vocabulary, words, name="x")[0]


def test_a_share_of_each_label_is_held_out(parent):
    labels = ["a"] * 50 + ["b"] * 10 + ["c"] * 5 + ["d"] * 4 + [""] * 11
    store = store_of(parent, labels)
    held = hold_out(store, None, 0.2, seed=0)
    counts = pd.Series(np.array(labels)[held]).value_counts().to_dict()
    assert counts == {"a": 10, "b": 2, "c": 1}  # too few of d, and nothing to check in the rest
    assert held.tolist() == sorted(set(held.tolist()))
    assert held.tolist() == hold_out(store, None, 0.2, seed=0).tolist() != hold_out(store, None, 0.2, seed=1).tolist()


def test_whole_donors_are_held_out_and_every_label_stays(parent):
    labels = ["a", "b"] * 30 + ["c"] * 5
    donors = np.array([f"d{i // 12}" for i in range(60)] + ["d4"] * 5, dtype=object)
    store = store_of(parent, labels)
    for seed in range(8):
        held = hold_out(store, donors, 0.4, seed)
        inside = set(donors[held])
        assert inside and "d4" not in inside  # it alone has label c
        assert len(held) == np.isin(donors, list(inside)).sum() <= 0.4 * 65
    with pytest.raises(InputError, match="none of the 2 donors can be held out, as each has all cells of some label"):
        hold_out(store, np.where(np.array(labels) == "a", "x", "y").astype(object), 0.4, 0)


def test_nothing_to_hold_out_is_an_error(parent):
    with pytest.raises(InputError, match="no label has 5 cells"):
        hold_out(store_of(parent, ["a"] * 4 + ["b"] * 3 + [""] * 20), None, 0.1, 0)


def test_fields_of_obs_are_used_as_far_as_the_model_has_their_words(parent, cells, tmp_path):
    finetune(parent, cells, "type", tmp_path / "m", donor="donor", **FAST)
    model = scmulan.load(tmp_path / "m")
    assert model.vocabulary.names(Family.ORGAN) == ["Blood", "Brain"]  # "blood" is one, "Kidney" is not asked for
    assert "locate" in model.card["recipe"]["batches"]["tasks"]
    assert model.card["validation"]["held_out"] == "whole donors, by obs['donor']"
    finetune(parent, cells, "type", tmp_path / "n", metadata={"tissue": "organ", "sex": "donor"}, coarse="type", **FAST)
    vocabulary = scmulan.load(tmp_path / "n").vocabulary
    assert vocabulary.names(Family.ORGAN) == ["Blood", "Brain", "Kidney", "blood"]
    assert vocabulary.names(Family.SEX) == ["d0", "d1", "d2", "d3", "d4"]
    assert vocabulary.names(Family.COARSE)[-4:] == sorted(KINDS)
    bare = cells.copy()
    del bare.obs["organ"]
    finetune(parent, bare, "type", tmp_path / "o", **FAST)
    assert "locate" not in scmulan.load(tmp_path / "o").card["recipe"]["batches"]["tasks"]


def test_the_default_length_follows_from_the_cells(parent, cells, tmp_path, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def stop(network, batches, folder, **settings):
        asked.append(settings["optimizer"].steps)
        raise Stop

    monkeypatch.setattr(module, "Trainer", stop)
    for number, settings in enumerate(({}, {"epochs": 100}, {"epochs": 0.5}, {"steps": 7})):
        with pytest.raises(Stop):
            finetune(parent, cells, "type", tmp_path / str(number), **settings)
    passes = 108 / 64 / 0.8  # labelled cells, cells per batch, share of the task
    assert asked == [200, int(np.ceil(100 * passes)), int(np.ceil(0.5 * passes)), 7]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"labels": "Type"}, InputError, "the cells: no column 'Type' in obs; did you mean 'type'?"),
        ({"labels": "zzz"}, InputError, "no column 'zzz' in obs; it has 'type', 'donor', 'organ'"),
        ({"donor": "doner"}, InputError, "no column 'doner' in obs; did you mean 'donor'"),
        ({"coarse": "typ"}, InputError, "no column 'typ' in obs; did you mean 'type'"),
        ({"metadata": {"flavour": "organ"}}, VocabularyError, "unknown metadata field 'flavour'"),
        ({"metadata": {"cell_type": "organ"}}, InputError, "metadata names 'cell_type': give that column as `labels`"),
        ({"method": "magic"}, RecipeError, "finetune: method = 'magic': expected 'full'"),
        ({"steps": 0}, RecipeError, "finetune: steps = 0: expected a whole number of at least 1"),
        ({"epochs": -1}, RecipeError, "epochs = -1: expected a number above 0"),
        ({"rate": float("nan")}, RecipeError, "rate = nan"),
        ({"validation_share": 0.9}, RecipeError, r"validation_share = 0\.9: expected a number above 0 and of at most"),
        ({"matrix_kind": "log1"}, RecipeError, r"expected 'counts' or 'log1p'; did you mean 'log1p'\?"),
        ({"epoch": 3}, RecipeError, r"finetune: unknown setting 'epoch': .*did you mean 'epochs'\?"),
        ({"model": "nowhere"}, ModelError, "no model 'nowhere'"),
        ({"data": "nowhere.h5ad"}, InputError, "nowhere.h5ad: no such file"),
        ({"out": "missing/m"}, OutputError, "there is no folder"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(
    parent, cells, tmp_path, monkeypatch, settings, error, message
):
    monkeypatch.chdir(tmp_path)
    given = {"model": parent, "data": cells, "labels": "type", "out": tmp_path / "m", **settings}
    with pytest.raises(error, match=message) as found:
        finetune(**given)
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["B cell"], "has only 'B cell'; expected at least two"), (["", None], "has no label at all")],
)
def test_one_label_is_not_enough(parent, cells, tmp_path, labels, message):
    adata = cells.copy()
    adata.obs["type"] = (labels * 60 + labels * 60)[:120]
    with pytest.raises(InputError, match=message):
        finetune(parent, adata, "type", tmp_path / "m")


def test_labels_with_few_cells_are_warned_of(parent, cells, tmp_path):
    adata = cells.copy()
    adata.obs["type"] = [*adata.obs["type"].astype(str)[:115], "rare one", "rare one", "rare two", "", ""]
    with pytest.warns(UserWarning, match=r"fewer than 5 cells will hardly be learned: rare one \(2\), rare two \(1\)"):
        report = finetune(parent, adata, "type", tmp_path / "m", **FAST)
    assert report["labels"]["rare one"] == 2 and "rare one" not in report["validation"]["recall"]


def test_genes_of_others_are_refused(parent, tmp_path):
    with pytest.raises(GeneError, match="mouse genes"):
        finetune(parent, some_cells(genes=[f"{g[0]}{g[1:].lower()}" for g in GENES]), "type", tmp_path / "m")
    with pytest.raises(GeneError, match=r"the cells: 0 of the model's 80 genes found"):
        finetune(parent, some_cells(genes=[f"chr1-{i}" for i in range(80)]), "type", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_replaced_only_by_force_and_only_if_a_model(parent, cells, tmp_path):
    out = tmp_path / "m"
    out.mkdir()
    finetune(parent, cells, "type", out, **FAST)  # an empty folder is no obstacle
    first = scmulan.load(out).weights_hash
    with pytest.raises(OutputError, match="exists already; give --force"):
        finetune(parent, cells, "type", out, **FAST)
    finetune(parent, cells, "type", out, force=True, seed=1, **FAST)
    assert scmulan.load(out).weights_hash != first
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds other things than a model"):
        finetune(parent, cells, "type", other, force=True, **FAST)
    assert (other / "chapter.txt").read_text() == "precious" and not (tmp_path / ".thesis.run").exists()


def test_the_signature_shows_the_settings_with_their_defaults():
    parameters = inspect.signature(scmulan.finetune).parameters
    assert list(parameters)[:6] == ["model", "data", "labels", "out", "force", "progress"]
    assert {s.name: s.default for s in fields(scmulan.FinetuneConfig)} == {
        name: parameter.default for name, parameter in list(parameters.items())[6:]
    }

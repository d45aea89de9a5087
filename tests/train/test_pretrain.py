"""From cells to a folder that can be shipped: a corpus on disk, validation, cost before the run, export."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

import scmulan
from scmulan.data.build import build
from scmulan.data.spec import read_corpus_spec
from scmulan.data.split import split_corpus
from scmulan.data.store import Corpus
from scmulan.errors import InputError, OutputError, RecipeError
from scmulan.model.cost import batch_flops, faster_precision, gemm_rates
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.config import ObjectiveConfig
from scmulan.train.estimate import activation_bytes, synthetic_batch, typical_step
from scmulan.train.export import curve, export_run
from scmulan.train.pretrain import pretrain
from scmulan.train.trainer import batch_loss, read_log
from scmulan.train.validate import expected_genes, generate_lengths, label_scores, validate
from scmulan.vocab.tasks import TASKS
from scmulan.vocab.vocabulary import Family, Vocabulary

# Jobs are forked for speed. JAX, if another test has loaded it, warns of that; no job here uses it.
pytestmark = pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")

_spec = importlib.util.spec_from_file_location("jobs", Path(__file__).with_name("jobs.py"))
jobs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(jobs)

RECIPE = """
name = "small"
description = "A test."
model = {{ layers = 1, heads = 2, width = 16 }}
batches = {{ cells = 8, generate_cells = 8, pool = 2, positions = 8, min_cells = 2 }}
optimizer = {{ steps = 6, warmup_steps = 2 }}
run = {{ log_every = 1, validate_every = 3 }}
[data]
{data}
"""
GENES = Vocabulary.published().genes[:100]


def some_cells(cells: int, seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, cells)
    obs = pd.DataFrame(
        {
            "label": np.array(["B cell", "monocyte"])[kind],
            "organ": np.array(["Blood", "Lung"])[rng.integers(0, 2, cells)],
            "donor": [f"d{i}" for i in np.arange(cells) % 5],
        },
        index=[f"c{i}" for i in range(cells)],
    )
    mean = np.where(np.arange(len(GENES)) % 2 == kind[:, None], 2.0, 0.2)
    return ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with two files of cells, a corpus of them with a split, and recipes that train on either."""
    folder = tmp_path_factory.mktemp("pretrain")
    for i, name in enumerate("ab"):
        some_cells(60, i).write_h5ad(folder / f"{name}.h5ad")
    columns = 'columns = { organ = "organ", fine_type = "label"'
    studies = 'study = [{ file = "a.h5ad" }, { file = "b.h5ad" }]'
    (folder / "spec.toml").write_text(f'genes = 80\n{columns}, donor = "donor" }}\n{studies}\n')
    build(read_corpus_spec(folder / "spec.toml"), folder / "corpus")
    (folder / "split.toml").write_text('corpus = "corpus"\n[donors]\nvalidation = ["d1"]\ntest = ["d2"]\n')
    split_corpus(folder / "split.toml")
    (folder / "corpus.toml").write_text(RECIPE.format(data='corpus = "corpus"'))
    (folder / "files.toml").write_text(
        RECIPE.format(data=f"{columns} }}\n{studies}") + '[validation]\nstudy = [{ file = "b.h5ad" }]\n'
    )
    return folder


@pytest.fixture(scope="module")
def corpus_run(place):
    return place / "run", pretrain(place / "corpus.toml", place / "run")


def test_a_corpus_trains_without_its_held_out_donors(place, corpus_run):
    run, report = corpus_run
    corpus = Corpus(place / "corpus")
    held = sum(corpus.donors[d][1] in ("d1", "d2") for d in corpus.donor)
    assert held == 48
    assert report["cells"] == len(corpus) - held
    model = scmulan.load(report["model"])
    assert model.vocabulary == corpus.vocabulary
    card = model.card
    assert card["data"][0]["corpus"] == "corpus" and len(card["data"][0]["sha256"]) == 64
    assert [s["name"] for s in card["data"][1:]] == ["a", "b"]
    assert "/" not in json.dumps(card["data"][1:])  # no path of this machine
    checks = [line["validation"] for line in read_log(run / "log.jsonl") if "validation" in line]
    assert len(checks) == 2
    expected = {"accuracy", "macro_recall", "macro_f1", "organ_accuracy", "genes_written"}
    assert checks[-1].keys() >= expected | {"annotate.entity", "generate.entity", "generate.value", "locate.entity"}
    assert card["validation"] == checks[-1]


def test_what_a_recipe_may_not_say_beside_a_corpus(place, tmp_path):
    text = RECIPE.format(data=f"corpus = '{place}/corpus'\nfolder = 'x'")
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"data\.folder beside corpus"):
        pretrain(tmp_path / "r.toml", tmp_path / "run")
    (tmp_path / "r.toml").write_text(RECIPE.format(data=f"corpus = '{place}/nowhere'"))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        pretrain(tmp_path / "r.toml", tmp_path / "run")
    text = RECIPE.format(data=f"corpus = '{place}/corpus'") + "[vocabulary]\nfile = 'published'\n"
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"corpus: its words are not those of vocabulary\.file"):
        pretrain(tmp_path / "r.toml", tmp_path / "run")


def test_a_run_folder_is_free_again_where_its_cells_cannot_be_read(place, tmp_path):
    """Also while the error is looked at, as in a notebook."""
    shutil.copytree(place / "corpus", tmp_path / "corpus")
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(data='corpus = "corpus"'))
    pretrain(recipe, tmp_path / "run")
    manifest = tmp_path / "corpus" / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    with pytest.raises(InputError) as kept:
        pretrain(recipe, tmp_path / "run")
    manifest.write_bytes(whole)
    assert pretrain(recipe, tmp_path / "run")["model"] is not None
    assert kept.value is not None


def test_any_state_of_a_run_can_be_shipped(place, corpus_run, tmp_path):
    run, report = corpus_run
    found = export_run(run, tmp_path / "model")
    same = scmulan.load(found["model"])
    assert same.weights_hash == scmulan.load(report["model"]).weights_hash
    card, lines = same.card, [line for line in read_log(run / "log.jsonl") if "validation" not in line]
    assert card["words_read"] == found["words"] == lines[-1]["words"] == report["words"]
    assert card["steps"] == card["steps_planned"] == 6
    assert 0 < card["flops"] == found["flops"]
    assert [p["step"] for p in card["curve"]["losses"]] == list(range(1, 7))
    assert card["depth"]["base"] == pytest.approx(card["depth"]["base"]) and card["covered"] > 0
    with pytest.raises(OutputError, match="exists already"):
        export_run(run, tmp_path / "model")
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "facts.json").write_text("{}")
    with pytest.raises(InputError, match="no whole checkpoint"):
        export_run(run, tmp_path / "other")
    with pytest.raises(InputError, match=r"no recipe\.json; expected a folder that `scmulan pretrain` wrote"):
        export_run(tmp_path, tmp_path / "other")


def test_what_is_shipped_is_the_average_where_one_is_kept(place):
    report = pretrain(place / "corpus.toml", place / "averaged", changes=["optimizer.ema_decay=0.5"])
    state = load_file(next((place / "averaged" / "checkpoints").glob("step-*")) / "shard-00001.safetensors")
    shipped = load_file(Path(report["model"]) / "model.safetensors")
    assert shipped.keys() == {name.removeprefix("model.") for name in state if name.startswith("model.")}
    assert all(torch.equal(shipped[name], state[f"average.{name}"].half()) for name in shipped)
    assert not all(torch.equal(shipped[name], state[f"model.{name}"].half()) for name in shipped)


def test_the_share_of_a_cell_in_the_vocabulary_s_genes(store):
    """Of counts as they are, of log1p values as what they are the logarithm of; counts of reads overflow nothing."""
    values = np.where(store.logged[:, None], store.matrix.toarray(), 1000 * store.matrix.toarray())
    total = np.where(store.logged, store.total, 1000 * store.total).astype(np.float32)
    amounts = np.where(store.logged[:, None], store.matrix.expm1().toarray(), values)
    reads = replace(store, matrix=sp.csr_matrix(values.astype(np.float32)), total=total)
    assert store.logged.any() and values.max() > 1000
    assert reads.covered() == pytest.approx((amounts.sum(1) / total).mean(), rel=1e-5)


def test_a_long_curve_is_told_in_few_points():
    log = [{"step": i, "annotate.entity": float(i), "words": i} for i in range(1, 1001)]
    points = curve(log)["losses"]
    assert len(points) == 200 and points[-1]["step"] == 1000
    assert points[0] == {"step": 5, "annotate.entity": 3.0}


def test_the_cost_is_told_before_the_run(place):
    dry = pretrain(place / "files.toml", changes=["vocabulary.genes=90"], dry_run=True)
    assert dry["model"] is None and dry["cells"] == 120 and dry["genes"] == 90
    assert dry["flops_total"] == pytest.approx(6 * dry["flops_per_step"])
    assert dry["hours"] == pytest.approx(dry["flops_total"] / dry["flops_per_second"] / 3600)
    real = pretrain(place / "files.toml", place / "wet", changes=["vocabulary.genes=90"])
    assert real["parameters"] == dry["parameters"]
    size = dry["bytes_per_rank"]
    assert size["weights"] == size["gradients"] == size["optimizer"] / 2 == 4 * real["parameters"]
    averaged = pretrain(place / "files.toml", changes=["vocabulary.genes=90", "optimizer.ema_decay=0.9"], dry_run=True)
    assert averaged["bytes_per_rank"]["optimizer"] == 12 * real["parameters"]
    from_corpus = pretrain(place / "corpus.toml", dry_run=True)
    assert from_corpus["cells"] == 120 and from_corpus["genes"] == 80


@pytest.mark.parametrize("task", ["annotate", "generate"])
def test_a_typical_step_is_the_mean_of_real_ones(vocabulary, store, task):
    """Of cells that are as long as the recipe allows."""
    config = BatchConfig(
        cells=8, generate_cells=8, tasks={task: 1.0}, max_prompt_genes=14, min_prompt_genes=4, max_target_genes=14,
        min_target_genes=4, positions=5, panel=0.0, downsample=0.0, pool=4,
    )  # fmt: skip
    batches = Batches(store, vocabulary, config, 0)
    made = [batches.batch(step) for step in range(60)]
    typical = typical_step(config, task)
    assert typical.sentences == np.mean([len(b.entity) for b in made])
    assert typical.tokens == pytest.approx(np.mean([b.tokens for b in made]), rel=0.2)
    assert typical.positions == pytest.approx(np.mean([len(b.positions) for b in made]), rel=0.2)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_take_the_bytes_that_were_told(recompute):
    from scmulan.train.parallel import recompute_blocks

    config = MulanConfig(vocabulary=300, layers=4, heads=4, width=64, set_state=True)
    model = Mulan(config).initialise(0)
    if recompute:
        recompute_blocks(model)
    batch = synthetic_batch(config, 4, 200, 400)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_loss(model, batch, ObjectiveConfig())
    told = activation_bytes(config, batch.tokens, 0, recompute=recompute)  # the loss keeps nothing where hooks see it
    if recompute:  # what a block keeps while it is computed again is not seen here
        told -= 16 * config.width * batch.tokens * 4
    assert 0.6 < sum(kept.values()) / told < 1.2


def test_operations_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = MulanConfig(vocabulary=300, layers=2, heads=2, width=64)
    model = Mulan(config).initialise(0)
    batch = synthetic_batch(config, 3, 40, 60)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        entity, value = batch_loss(model, batch, ObjectiveConfig())
        (entity + value).backward()
    masked = 3 * config.layers * 4 * config.width * 3 * 40 * 39 / 2  # the half that a causal mask hides
    told = batch_flops(config, batch.tokens, 3, len(batch.positions))
    in_place = (
        2 * len(batch.positions) * 4 * config.width * config.vocabulary
    )  # the heads' gradients: torch overlooks them
    assert counter.get_total_flops() + in_place == pytest.approx(told + masked, rel=1e-6)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 6, 200), rng.integers(0, 8, 200)
    found = label_scores(truth, predicted, np.eye(8, dtype=bool))
    labels = np.unique(truth)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    f1 = metrics.f1_score(truth, predicted, labels=labels, average="macro")
    recall = metrics.recall_score(truth, predicted, labels=labels, average="macro")
    assert found["macro_f1"] == pytest.approx(f1) and found["macro_recall"] == pytest.approx(recall)
    finer = np.eye(8, dtype=bool)
    finer[0, 7] = True
    assert label_scores(truth, predicted, finer)["accuracy"] > found["accuracy"]


def test_written_cells_stop_when_the_end_is_likely(vocabulary, network):
    prompts = [[vocabulary.ids(Family.ORGAN)[0], vocabulary.prompts["generate"]], [vocabulary.prompts["generate"]]]
    measured = np.ones((2, len(vocabulary.genes)), dtype=bool)
    measured[1, 10:] = False
    lengths = generate_lengths(network.eval(), vocabulary, prompts, measured, 100, [1, 2])
    assert lengths[0] > 10 >= lengths[1] > 0
    assert (lengths == generate_lengths(network, vocabulary, prompts, measured, 100, [1, 2])).all()
    alone = generate_lengths(network, vocabulary, prompts[1:], measured[1:], 100, [2])
    assert alone[0] == lengths[1]
    with torch.no_grad():
        network.entity_head.weight[vocabulary.end] = 0
        network.entity_head.weight[vocabulary.ids(Family.GENE)] = 0
        bias = torch.zeros(len(vocabulary))
        bias[vocabulary.end] = 20.0
        network.entity_bias = torch.nn.Parameter(bias)
    assert (generate_lengths(network, vocabulary, prompts, measured, 100, [1, 2]) == 0).all()
    assert expected_genes(network, vocabulary, prompts, measured) == pytest.approx([len(vocabulary.genes) / 2, 5])


@pytest.mark.parametrize("objective", ["next_word", "published"])
def test_validation_is_the_same_on_any_number_of_processes(vocabulary, store, network, tmp_path, objective):
    section = ObjectiveConfig(name=objective)
    same = np.eye(len(vocabulary), dtype=bool)

    def check(ranks):
        return validate(network, store, vocabulary, same, batches=BatchConfig(), objective=section, ranks=ranks)

    alone = check(None)
    assert network.training
    assert set(TASKS) <= {key.removesuffix(".entity") for key in alone if key.endswith(".entity")}
    for found in jobs.run_job(2, check, tmp_path):
        assert found == pytest.approx(alone, rel=1e-5)
    some = validate(network, store, vocabulary, same, max_cells=10)
    assert some.keys() < alone.keys()


def test_the_faster_precision_is_chosen_only_where_it_is_worth_it():
    rates = gemm_rates(MulanConfig(vocabulary=50, layers=1, heads=2, width=64), rows=64)
    assert rates.keys() == {"fp32", "bf16"} and min(rates.values()) > 1e6
    assert faster_precision({"fp32": 100.0, "bf16": 110.0}) == "fp32"
    assert faster_precision({"fp32": 100.0, "bf16": 130.0}) == "bf16"


def test_the_command_line_exports(place, capsys):
    from scmulan.cli.__main__ import main

    run = place / "for the command line"
    assert main(["pretrain", str(place / "corpus.toml"), "--out", str(run), "--set", "run.validate_every=0"]) == 0
    capsys.readouterr()
    assert main(["model", "export", str(run), str(place / "shipped"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert main(["model", "verify", str(place / "shipped")]) == 0
    assert main(["model", "export", str(place), str(place / "none")]) == 2
    assert "no recipe.json" in capsys.readouterr().err

"""Recipes: every setting checked, and the committed one trains."""

import json
import re
from fnmatch import fnmatchcase

import anndata as ad
import pytest
import torch

import scmulan
from scmulan.errors import RecipeError
from scmulan.model.network import PUBLISHED, Mulan
from scmulan.train.batches import Batches
from scmulan.train.checkpoint import RunFolder
from scmulan.train.config import Recipe, read_recipe
from scmulan.train.export import model_config
from scmulan.train.pretrain import pretrain, read_data
from scmulan.train.trainer import Trainer
from scmulan.vocab.genes import CoverageWarning
from scmulan.vocab.vocabulary import Vocabulary


def write(path, text):
    path.write_text(text)
    return path


def test_defaults_hold_where_a_recipe_says_nothing(tmp_path):
    recipe = read_recipe(write(tmp_path / "r.toml", 'name = "x"\n[optimizer]\nlearning_rate = 1\n'))
    assert recipe.name == "x"
    assert recipe.optimizer.learning_rate == 1.0 and isinstance(recipe.optimizer.learning_rate, float)
    assert recipe.optimizer.steps == Recipe().optimizer.steps
    assert json.loads(json.dumps(recipe.to_json()))["optimizer"]["learning_rate"] == 1.0


BAD = [
    # wrong word
    ('[batches]\norder = "wekly"', "batches.order = 'wekly': expected 'weighted' or 'epoch'; did you mean 'weighted'?"),
    ('[batches]\norder = "epochs"', "batches.order = 'epochs': expected 'weighted' or 'epoch'; did you mean 'epoch'?"),
    ('[objective]\nname = "publish"', "objective.name = 'publish': *did you mean 'published'?"),
    ('[objective]\nname = "mine"', "objective.name = 'mine': expected 'next_word' or 'published'"),
    ('[run]\nprecision = "fp8"', "run.precision = 'fp8': *did you mean 'fp32'?"),
    ('[run]\nparallel = "dpp"', "run.parallel = 'dpp': *did you mean 'ddp'?"),
    # unknown key, at every level
    ("[optimiser]\nsteps = 1", "unknown setting 'optimiser': *did you mean 'optimizer'?"),
    ("steps = 1", "unknown setting 'steps': expected one of name,*did you mean 'optimizer.steps'?"),
    ("[optimizer]\nstepps = 3", "unknown setting 'optimizer.stepps': *did you mean 'steps'?"),
    ("[model]\nlayer = 3", "unknown setting 'model.layer': *did you mean 'layers'?"),
    ("[batches]\ntasks = { anotate = 1.0 }", "unknown name 'batches.tasks.anotate': *did you mean 'annotate'?"),
    (
        "[objective]\ntask_weights = { lokate = 1 }",
        "unknown name 'objective.task_weights.lokate': *did you mean 'locate'?",
    ),
    ('[data]\ncorpus = "c"\nsplitt = "s"', "data.splitt beside corpus: a corpus has its studies"),
    ('[data]\nfoldr = "x"', "unknown setting 'data.foldr': *did you mean 'folder'?"),
    ('[data.columns]\norgn = "x"', "data.columns: unknown metadata field 'orgn': *did you mean 'organ'?"),
    ('[[data.study]]\nfil = "x"', "unknown setting 'data.study[1].fil': *did you mean 'file'?"),
    ('[[data.study]]\nfile = "x"\nfixed = { tisue = "x" }', "data.study[1].fixed: *did you mean 'tissue'?"),
    ("[[validation.study]]\nfile = 3", "validation.study[1].file = 3: expected a text"),
    ('[data]\nstudy = [{ file = "x", matrix_kind = "log" }]', "data.study[1].matrix_kind = 'log': *mean 'log1p'?"),
    # a former key
    ("[batches]\nwords = 100", "batches.words is called batches.tokens now"),
    ("[batches]\nthin = 0.5", "batches.thin is called batches.downsample now"),
    ("[optimizer]\nrate = 1e-3", "optimizer.rate is called optimizer.learning_rate now"),
    # wrong type
    ("model = 3", "model = 3: expected a section"),
    ("name = 3", "name = 3: expected a text"),
    ('[optimizer]\nsteps = "many"', "optimizer.steps = 'many': expected a whole number of at least 1"),
    ("[optimizer]\nsteps = 1.5", "optimizer.steps = 1.5: expected a whole number"),
    ("[optimizer]\nsteps = true", "optimizer.steps = true: expected a whole number"),
    ("[optimizer]\nlearning_rate = true", "optimizer.learning_rate = true: expected a number above 0"),
    ("[model]\nset_state = 1", "model.set_state = 1: expected true or false"),
    ("[vocabulary]\nfile = false", "vocabulary.file = false: expected a text"),
    ("[batches]\ntasks = [1]", "batches.tasks = [1]: expected a table whose values are each a number above 0"),
    ('[batches]\ntasks = { annotate = "x" }', "batches.tasks.annotate = 'x': expected a number above 0"),
    ("[data]\ncorpus = 1", "data.corpus = 1: expected a text"),
    # out of bounds
    ("[optimizer]\nlearning_rate = -1", "optimizer.learning_rate = -1: expected a number above 0"),
    ("[optimizer]\nlearning_rate = 0.0", "optimizer.learning_rate = 0.0: expected a number above 0"),
    ("[optimizer]\nsteps = 0", "optimizer.steps = 0: expected a whole number of at least 1"),
    ("[optimizer]\nema_decay = 1.0", "optimizer.ema_decay = 1.0: expected a number of at least 0 and below 1"),
    ("[optimizer]\nbeta_2 = 1", "optimizer.beta_2 = 1: expected a number of at least 0 and below 1"),
    ("[batches]\npanel = 1.5", "batches.panel = 1.5: expected a number from 0 to 1"),
    ("[batches]\ntasks = { annotate = 0 }", "batches.tasks.annotate = 0: expected a number above 0"),
    ("[batches]\ncells = -4", "batches.cells = -4: expected a whole number of at least 1"),
    ("[run]\naccumulate = 0", "run.accumulate = 0: expected a whole number of at least 1"),
    ("[model]\nwidth = 30", "model.width = 30: expected a multiple of heads, which is 4"),
    ("seed = -1", "seed = -1: expected a whole number of at least 0"),
    # no number
    ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate = nan: expected a number above 0"),
    ("[run]\ntimeout_seconds = inf", "run.timeout_seconds = inf: expected a number above 0"),
    ("[batches]\ntasks = { generate = inf }", "batches.tasks.generate = inf: expected a number above 0"),
    # empty
    ('name = ""', "name = '': expected a text, not empty"),
    ("[batches]\ntasks = {}", "batches.tasks = {}: expected a table*with at least one entry"),
    ("name = ", "not TOML (*line 1"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message.partition(":")[0] for _, message in BAD])
def test_a_recipe_that_cannot_be_followed_is_refused_in_one_line(tmp_path, text, message):
    """The line names the file, the setting, what was given and expected, and the nearest known word."""
    file = write(tmp_path / "r.toml", f"{text}\n")
    with pytest.raises(RecipeError) as error:
        read_recipe(file)
    pattern = re.sub(r"([?[])", r"[\1]", f"{file}: {message}")  # only * is special
    assert fnmatchcase(str(error.value), f"{pattern}*")
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError):
        pretrain(file, dry_run=True)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no such recipe: .*nowhere\.toml"):
        read_recipe(tmp_path / "nowhere.toml")


def test_changes_win_over_the_file(tmp_path):
    file = write(tmp_path / "r.toml", 'name = "x"\n[optimizer]\nsteps = 10\nlearning_rate = 0.1\n')
    changes = ["optimizer.steps=20", "name=fast run", "batches.tasks={generate=1.0}", "run.precision=bf16"]
    recipe = read_recipe(file, changes)
    assert (recipe.optimizer.steps, recipe.optimizer.learning_rate) == (20, 0.1)
    assert recipe.name == "fast run"
    assert recipe.batches.tasks == {"generate": 1.0}
    assert recipe.run.precision == "bf16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.steps", r"expected section\.key=value"),
        ("name.first=1", "name is no section"),
        ("optimizer.step=1", r"unknown setting 'optimizer\.step': .*did you mean 'steps'\?"),
        ("optimizer.steps=soon", r"optimizer\.steps = 'soon': expected a whole number"),
        ("optimizer.average=0.5", r"optimizer\.average is called optimizer\.ema_decay now"),
        ("optimizer.ema_decay=1.0", r"optimizer\.ema_decay = 1\.0: expected a number of at least 0 and below 1"),
    ],
)
def test_changes_are_checked_like_the_file(tmp_path, change, message):
    file = write(tmp_path / "r.toml", 'name = "x"\n')
    with pytest.raises(RecipeError, match=message):
        read_recipe(file, [change])


def test_folders_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "here" / "cells").mkdir(parents=True)
    (tmp_path / "here" / "cells" / "a.h5ad").touch()
    file = write(tmp_path / "here" / "r.toml", '[data]\nfolder = "cells"\n[[data.study]]\nfile = "a.h5ad"\n')
    recipe = read_recipe(file)
    assert recipe.studies(file.parent)[0].file == (tmp_path / "here" / "cells" / "a.h5ad").resolve()
    with pytest.raises(RecipeError, match=r"training cells not found: .*elsewhere/cells/a\.h5ad"):
        recipe.studies(tmp_path / "elsewhere")


def test_validation_studies_take_over_columns_and_renaming(tmp_path):
    for name in ("a.h5ad", "b.h5ad"):
        (tmp_path / name).touch()
    text = (
        '[data.columns]\nfine_type = "label"\n[data.rename.fine_type]\n"T" = "T cell"\n'
        '[[data.study]]\nfile = "a.h5ad"\n'
        '[[validation.study]]\nfile = "b.h5ad"\n'
    )
    recipe = read_recipe(write(tmp_path / "r.toml", text))
    watched = recipe.validation_studies(tmp_path)[0]
    assert watched.file.name == "b.h5ad"
    assert watched.columns == {"fine_type": "label"} and watched.rename == {"fine_type": {"T": "T cell"}}
    assert Recipe().validation_studies(tmp_path) == []


SMALL = [
    'validation.study=[{ file = "10x_pbmc_3tech.h5ad" }]',
    "batches.cells=4",
    "batches.generate_cells=4",
    "batches.tokens=1200",
    "batches.min_cells=2",
    "batches.pool=2",
    "run.validate_cells=30",
]


def test_the_base_recipe_trains_for_a_step(root, shared, tmp_path):
    """All of its shape, on few words of one of its files."""
    file = root / "recipes" / "base.toml"
    plan = pretrain(file, changes=["optimizer.steps=1"], dry_run=True)
    assert 30e6 < plan["parameters"] < 60e6 and plan["cells"] > 14_000
    changes = [*SMALL, 'data.study=[{ file = "mast2015_mait_blood.h5ad" }]', "optimizer.steps=1"]
    changes += ["vocabulary.genes=500"]
    changes += ["run.validate_every=0", "batches.max_target_genes=64", "batches.max_prompt_genes=64"]
    report = pretrain(file, tmp_path / "run", changes=[*changes, "batches.tasks={annotate=0.5, generate=0.5}"])
    assert report["steps"] == 1
    model = scmulan.load(report["model"])
    assert model.config.layers == 12 and model.config.width == 512
    assert model.card["flops"] > 1e10 and model.card["curve"]["losses"][0]["step"] == 1


def test_the_published_recipe_has_the_published_shape(root):
    plan = read_recipe(root / "recipes" / "scmulan-368m.toml")
    with torch.device("meta"):
        config = model_config(plan, 2222)
        assert sum(p.numel() for p in Mulan(config).parameters()) == 368_800_320
    assert config == PUBLISHED
    assert plan.vocabulary.file == "published" and plan.objective.value_weight == 200
    assert plan.batches.cells * plan.optimizer.steps == pytest.approx(100e6, rel=0.01)


@pytest.mark.slow
def test_the_published_recipe_takes_a_real_step(root, shared, tmp_path):
    """All 368 M parameters, AdamW included, on a few words of real cells."""
    text = (root / "recipes" / "scmulan-368m.toml").read_text()
    cells = "columns = { organ = 'organ' }\nstudy = [{ file = '10x_pbmc4k.h5ad' }]"
    data = f"[data]\nfolder = '{shared}/data/train'\n{cells}\n"
    file = write(tmp_path / "r.toml", text[: text.index("[data]")] + data)
    changes = ["batches.generate_cells=2", "batches.min_cells=1", "batches.window=64", "batches.max_target_genes=24"]
    changes += ["batches.min_target_genes=24", "batches.tasks={generate=1.0}", "batches.prefetch=0", "run.accumulate=1"]
    plan = read_recipe(file, changes)
    found = read_data(plan, tmp_path)
    assert found.vocabulary == Vocabulary.published()
    with torch.random.fork_rng():
        model = Mulan(model_config(plan, len(found.vocabulary)))
    batches = Batches(found.train, found.vocabulary, plan.batches, plan.seed)
    made = Trainer(
        model, batches, RunFolder(tmp_path / "run"), objective=plan.objective, optimizer=plan.optimizer, run=plan.run
    )
    before = model.blocks[23].down.weight[:2].detach().clone()
    metrics = made.step()
    # Untrained, each of 2,222 words has the loss log 2.
    assert metrics.entity == pytest.approx(2222 * 0.6931, rel=0.1)
    assert not torch.equal(before, model.blocks[23].down.weight[:2])
    assert made.tokens == metrics.tokens > 2 * 24
    assert made.flops > 6 * 361e6 * made.tokens  # six operations for each parameter of a block and each token


def test_the_committed_recipe_trains_and_its_model_annotates(root, shared, tmp_path):
    """Two steps of a narrow model on three of its files, through the same call as the real run."""
    file = root / "recipes" / "mini.toml"
    studies = read_recipe(file).studies(file.parent)
    assert len(studies) == 20
    some = "ding2019_pbmc1.h5ad", "mast2015_mait_blood.h5ad", "kang2018_pbmc_stim.h5ad"
    named = ["", "", ', obs = "mini/names/kang2018_pbmc_stim.csv"']
    changes = [
        "data.study=[" + ", ".join(f'{{ file = "{f}"{t} }}' for f, t in zip(some, named, strict=True)) + "]",
        'validation.study=[{ file = "10x_pbmc_3tech.h5ad" }]',
        "vocabulary.genes=300",
        "model.layers=1",
        "model.heads=2",
        "model.width=32",
        "batches.cells=4",
        "batches.generate_cells=4",
        "batches.pool=2",
        "optimizer.steps=2",
    ]
    plan = pretrain(file, tmp_path / "run", changes=changes, dry_run=True)
    assert plan["model"] is None and plan["genes"] == 300 and not (tmp_path / "run").exists()
    report = pretrain(file, tmp_path / "run", changes=changes)
    assert report["steps"] == 2 and report["cells"] == plan["cells"] == 598 + 96 + 1000

    model = scmulan.load(report["model"])
    assert model.card["name"] == "mini" and model.card["cells"] == report["cells"]
    assert [d["file"] for d in model.card["data"]] == list(some)
    assert model.card["recipe"]["optimizer"]["steps"] == 2
    assert 60 < model.card["cell_types"]["natural killer cell"] < 120  # the study itself names none
    assert 0 < model.card["covered"] < 1
    cells = ad.read_h5ad(shared / "data" / "train" / some[0])[:20].copy()
    with pytest.warns(CoverageWarning, match="of 300 vocabulary genes found"):
        scmulan.tl.annotate(cells, model)
    assert set(cells.obs["scmulan_cell_type"]) <= set(model.card["cell_types"])
    assert cells.obs["scmulan_cell_type_probability"].between(0, 1).all()

    again = pretrain(file, tmp_path / "run", changes=changes)  # finished: nothing is left to do
    assert again["words"] == report["words"]
    assert scmulan.load(again["model"]).weights_hash == model.weights_hash
    with pytest.raises(RecipeError, match=r"another recipe \(optimizer\.steps was 2, is 3\)"):
        pretrain(file, tmp_path / "run", changes=[*changes, "optimizer.steps=3"])

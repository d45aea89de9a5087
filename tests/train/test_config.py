"""Recipes: every setting checked, and the committed one trains."""

import json

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
    recipe = read_recipe(write(tmp_path / "r.toml", 'name = "x"\n[optimizer]\nrate = 1\n'))
    assert recipe.name == "x" and recipe.optimizer.rate == 1.0 and isinstance(recipe.optimizer.rate, float)
    assert recipe.optimizer.steps == Recipe().optimizer.steps
    assert json.loads(json.dumps(recipe.to_json()))["optimizer"]["rate"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\nrate = 1.0\n", r"unknown setting 'optimiser'; expected one of name, .*optimizer"),
        ("[optimizer]\nsteps_per_epoch = 3\n", r"\[optimizer\]: unknown setting 'steps_per_epoch'; .*warmup"),
        ('[optimizer]\nsteps = "many"\n', r'\[optimizer\]: steps is "many", expected int'),
        ("[optimizer]\nsteps = 1.5\n", r"steps is 1\.5, expected int"),
        ("[optimizer]\nsteps = true\n", "steps is true, expected int"),
        ("[optimizer]\nsteps = 0\n", r"optimizer\.steps is 0: expected at least 1"),
        ("[model]\nset_state = 1\n", "set_state is 1, expected bool"),
        ("[batches]\ntasks = [1]\n", r"tasks is \[1\], expected dict"),
        ("model = 3\n", "model is 3, expected a section"),
        ('[objective]\nname = "mine"\n', "objective 'mine' is unknown: expected 'next_word' or 'published'"),
        ('[run]\nprecision = "fp8"\n', "precision 'fp8' is unknown"),
        ("name = \n", "is not TOML"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(write(tmp_path / "r.toml", text))
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no such recipe: .*nowhere\.toml"):
        read_recipe(tmp_path / "nowhere.toml")


def test_changes_win_over_the_file(tmp_path):
    file = write(tmp_path / "r.toml", 'name = "x"\n[optimizer]\nsteps = 10\nrate = 0.1\n')
    changes = ["optimizer.steps=20", "name=fast run", "batches.tasks={generate=1.0}", "run.precision=bf16"]
    recipe = read_recipe(file, changes)
    assert (recipe.optimizer.steps, recipe.optimizer.rate) == (20, 0.1)
    assert recipe.name == "fast run"
    assert recipe.batches.tasks == {"generate": 1.0}
    assert recipe.run.precision == "bf16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.steps", r"expected section\.key=value"),
        ("name.first=1", "name is no section"),
        ("optimizer.step=1", "unknown setting 'step'"),
        ("optimizer.steps=soon", 'steps is "soon", expected int'),
        ("optimizer.average=1.0", r"optimizer\.average is 1\.0: expected a share below 1"),
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
    "batches.words=1200",
    "batches.least_cells=2",
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
    changes += ["run.validate_every=0", "batches.target_words=64", "batches.prompt_words=64"]
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
    changes = ["batches.generate_cells=2", "batches.least_cells=1", "batches.window=64", "batches.target_words=24"]
    changes += ["batches.target_words_least=24", "batches.tasks={generate=1.0}", "batches.ahead=0", "run.accumulate=1"]
    plan = read_recipe(file, changes)
    found = read_data(plan, tmp_path)
    assert found.vocabulary == Vocabulary.published()
    with torch.random.fork_rng():
        model = Mulan(model_config(plan, len(found.vocabulary)))
    batches = Batches(found.train, found.vocabulary, plan.batches, plan.seed)
    made = Trainer(
        model, batches, RunFolder(tmp_path / "run"), objective=plan.objective, optimizer=plan.optimizer, run=plan.run
    )
    recent = {}
    before = model.blocks[23].down.weight[:2].detach().clone()
    made._one_step(recent)
    # Untrained, each of 2,222 words has the loss log 2.
    assert recent["generate.entity"][0] == pytest.approx(2222 * 0.6931, rel=0.1)
    assert not torch.equal(before, model.blocks[23].down.weight[:2])
    assert made.words == recent["words"][0] > 2 * 24
    assert made.flops > 6 * 361e6 * made.words  # six operations for each parameter of a block and each word


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

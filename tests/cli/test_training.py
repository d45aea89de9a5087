"""pretrain and finetune: from cells to a model that every verb takes."""

import os

import pytest

RECIPE = """
name = "small"
[model]
layers = 1
heads = 2
width = 16
[vocabulary]
genes = 200
[batches]
cells = 8
tasks = { annotate = 0.5, generate = 0.5 }
[optimizer]
steps = 4
warmup_steps = 2
[run]
log_every = 2
validate_every = 0
[data.columns]
fine_type = "label"
[[data.study]]
file = "cells.h5ad"
"""


@pytest.fixture
def recipe(folder, make_cells):
    make_cells().write_h5ad("cells.h5ad")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def test_pretrain(scmulan, folder, recipe):
    dry = scmulan("pretrain", "recipe.toml", "--out", "run", "--set", "optimizer.steps=2", "--dry-run", "--json")
    assert dry.code == 0
    assert dry.json["cells"] == 40
    assert dry.json["steps"] == 2
    assert dry.json["model"] is None
    assert sorted(os.listdir(folder)) == ["cells.h5ad", "recipe.toml"]
    run = scmulan("pretrain", "recipe.toml", "--out", "run")
    assert run.code == 0
    assert not run.err
    assert "run/model" in run.out
    assert scmulan("model", "verify", "run/model").code == 0
    assert scmulan("annotate", "cells.h5ad", "-o", "out.h5ad", "--model", "run/model").code == 0


def test_what_pretrain_refuses(scmulan, folder, recipe):
    assert "no such recipe" in scmulan("pretrain", "none.toml").refused()
    unknown = scmulan("pretrain", recipe, "--set", "optimizer.stepps=2").refused()
    assert "unknown setting 'optimizer.stepps'" in unknown and "did you mean 'steps'?" in unknown
    assert "expected section.key=value" in scmulan("pretrain", recipe, "--set", "steps").refused()
    (folder / "cells.h5ad").unlink()
    assert "training cells not found" in scmulan("pretrain", recipe).refused()
    assert os.listdir(folder) == ["recipe.toml"]


def test_finetune(scmulan, folder, tiny, make_cells):
    adata = make_cells()
    adata.obs["mine"] = adata.obs["label"].astype(str).replace({"B cell": "my cell"})
    adata.write_h5ad("cells.h5ad")
    ask = ("finetune", tiny, "cells.h5ad", "--labels", "mine", "-o", "mine", "--steps", 10)
    run = scmulan(*ask)
    assert run.code == 0
    assert "my cell" in run.out
    assert "written: mine" in run.out
    assert "held out; at most 10 steps" in run.err
    assert sorted(os.listdir(folder)) == ["cells.h5ad", "mine"]
    assert "my cell" in scmulan("model", "info", "mine", "--json").json["words"]["fine_type"]
    assert scmulan("annotate", "cells.h5ad", "-o", "out.h5ad", "--model", "mine").code == 0
    assert "exists already; give --force" in scmulan(*ask).refused()


def test_what_finetune_refuses(scmulan, folder, tiny, cells):
    def error(*options):
        return scmulan("finetune", tiny, cells, "-o", "out", *options).refused()

    assert "did you mean 'label'" in error("--labels", "labels")
    assert "rate = -1.0: expected a number above 0" in error("--labels", "label", "--rate", -1)
    assert "expected FIELD=COLUMN" in error("--labels", "label", "--metadata", "organ")
    assert "--method" in error("--labels", "label", "--method", "magic")
    assert not os.listdir(folder)

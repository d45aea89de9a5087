"""model list, info, import and verify; doctor."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from scmulan._machine import cpu, installed, memory
from scmulan.cli.doctor import model_states
from scmulan.infer.release_rule import head_outputs
from scmulan.model.folder import packaged_models
from scmulan.model.loading import load
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family

WIDTH, WORDS = 16, 2222


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Checkpoint in the published layout, one layer of random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "transformer.wte": (WORDS, WIDTH),
        "transformer.wee": (11, WIDTH),
        "transformer.h.0.ln_1": (WIDTH,),
        "transformer.h.0.attn.c_attn": (3 * WIDTH, WIDTH),
        "transformer.h.0.attn.c_proj": (WIDTH, WIDTH),
        "transformer.h.0.ln_2": (WIDTH,),
        "transformer.h.0.mlp.c_fc": (4 * WIDTH, WIDTH),
        "transformer.h.0.mlp.c_proj": (WIDTH, 4 * WIDTH),
        "transformer.ln_f": (WIDTH,),
        "lm_head": (WORDS, WIDTH),
        "epx_head": (WORDS, WIDTH),
    }
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    settings = {"vocab_size": WORDS, "n_layer": 1, "n_head": 2, "n_embd": WIDTH, "expression_level": 10, "bias": False}
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    torch.save({"model_args": settings, "model": weights}, path)
    return path


def test_list_names_what_is_packaged(scmulan):
    listed = scmulan("model", "list", "--json").json["models"]
    assert set(listed) == set(packaged_models())
    text = scmulan("model", "list").out
    for name, about in listed.items():
        assert f"{about['parameters']:,} parameters" in text
        assert name in text


def test_info(scmulan, tiny):
    about = scmulan("model", "info", tiny, "--json").json
    loaded = load(tiny)
    assert about["name"] == "tiny"
    assert about["parameters"] == sum(p.numel() for p in loaded.network.parameters())
    assert about["weights_hash"] == loaded.weights_hash
    assert about["genes"] == 300
    assert about["words"]["fine_type"] == loaded.vocabulary.names(Family.FINE)
    assert about["config"]["width"] == 16
    text = scmulan("model", "info", tiny).out
    for words in (
        "tiny",
        f"{about['parameters']:,} parameters",
        "Blood; Brain",
        "natural killer cell",
        "Random weights.",
    ):
        assert words in text
    assert "no model 'nothing'" in scmulan("model", "info", "nothing").refused()


def test_import_and_use(scmulan, folder, checkpoint, cells):
    run = scmulan("model", "import", checkpoint, "release", "--json")
    assert run.code == 0
    assert not run.err
    assert run.json["genes"] == 2000
    assert run.json["objective"] == "published"
    assert os.listdir(folder) == ["release"]
    assert "exists" in scmulan("model", "import", checkpoint, "release").refused()
    assert scmulan("model", "import", checkpoint, "release", "--force").code == 0
    assert scmulan("model", "verify", "release").code == 0
    run = scmulan("annotate", cells, "-o", "out.h5ad", "--model", "release", "--rule", "release", "--json")
    assert run.code == 0
    assert run.json["genes"]["found"]["count"] == 300
    assert "300 of 2,000 vocabulary genes found (15%)" in run.err


@pytest.fixture
def fixture(folder, tiny) -> Path:
    """Stored outputs of the model itself."""
    model = load(tiny)
    entity = np.append(model.vocabulary.ids(Family.GENE)[:9], model.vocabulary.prompts["annotate"])
    value = np.append(np.arange(1, 10), 0)
    logits, values = head_outputs(model.network, Sentences.join([(entity, value, len(entity))]))
    np.savez(
        "fixture.npz", config=json.dumps({"layers": 1, "width": 16}), prompt_ids=entity[None],
        prompt_values=value[None], entity_logits=logits, value_outputs=values,
    )  # fmt: skip
    return folder / "fixture.npz"


def test_verify_against_stored_outputs(scmulan, tiny, fixture):
    run = scmulan("model", "verify", tiny, "--against", fixture)
    assert run.code == 0
    assert "agrees with" in run.out
    with np.load(fixture) as file:
        arrays = dict(file)
    arrays["entity_logits"][0, 3] += 0.001
    np.savez(fixture, **arrays)
    run = scmulan("model", "verify", tiny, "--against", fixture)
    assert run.code == 1
    assert not run.err
    assert "entity_logits, cell 0, word " in run.out
    result = scmulan("model", "verify", tiny, "--against", fixture, "--json").json
    assert result["passed"] is False
    assert result["first_difference"]["what"] == "entity_logits"
    assert result["checks"]["entity_logits"]["different"] == 1
    assert "no such file" in scmulan("model", "verify", tiny, "--against", "none.npz").refused()
    assert "no model" in scmulan("model", "verify", "nothing", "--against", fixture).refused()
    fixture.write_bytes(fixture.read_bytes()[:500])
    assert "not readable as .npz" in scmulan("model", "verify", tiny, "--against", fixture).refused()


def test_doctor(scmulan):
    run = scmulan("doctor", "--json")
    facts = run.json
    assert run.code == (1 if facts["problems"] else 0)
    assert facts["packages"]["torch"] == facts["accelerators"]["torch"] == torch.__version__
    assert facts["accelerators"]["threads"] == torch.get_num_threads()
    assert set(facts["models"]) == set(packaged_models())
    assert facts["extras"]["report"]["jinja2"]
    text = scmulan("doctor").out
    for words in (facts["scmulan"], facts["platform"], facts["packages"]["anndata"], "cores", "[report]", "problems"):
        assert str(words) in text


def test_missing_packages_have_no_version():
    core, extras = installed()
    assert {"torch", "anndata", "typer"} <= set(core)
    assert core["numpy"] == np.__version__
    assert "jinja2" not in core
    assert extras["report"]["matplotlib"]


def test_models_are_checked(tiny, tmp_path):
    assert model_states({"tiny": tiny})["tiny"]["problem"] is None
    assert model_states({"tiny": tiny})["tiny"]["weights_hash"] == load(tiny).weights_hash
    assert "is missing" in model_states({"none": tmp_path})["none"]["problem"]


def test_the_machine_is_described():
    assert cpu()["usable_cores"] <= cpu()["cores"]
    assert cpu()["architecture"]
    assert memory()["total_gib"] is None or memory()["total_gib"] > 0

"""Precisions: what they keep of fp32, which one is chosen, and what is remembered of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from scmulan._machine import MeasurementCache
from scmulan.errors import ModelError
from scmulan.infer import precision as module
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import (
    Int8Linear,
    apply_precision,
    cached_block_seconds,
    choose_precision,
    compare_precision,
    int8_available,
)
from scmulan.infer.scoring import score_labels

int8 = pytest.param("int8", marks=pytest.mark.skipif(not int8_available(), reason="no oneDNN in this torch"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "scmulan" / "precision.json"


@pytest.mark.parametrize("precision", ["bf16", int8])
def test_a_precision_stays_close_and_leaves_the_model_alone(random_model, random_prompts, precision):
    batch = random_prompts(random_model, 40)
    before = score_labels(random_model, batch)
    other = apply_precision(random_model, precision)
    seen = compare_precision(random_model, other, batch)
    assert 0.999 < seen.cosine < 1 and seen.cells == 40
    after = score_labels(random_model, batch)
    assert np.array_equal(before.hidden, after.hidden) and random_model.network.precision == "fp32"
    assert other.network.word is random_model.network.word and other.network.precision == precision
    assert apply_precision(other, precision) is other
    with pytest.raises(ModelError, match="load it again"):
        apply_precision(other, "fp32")


@pytest.mark.skipif(not int8_available(), reason="no oneDNN in this torch")
@pytest.mark.parametrize("bias", [False, True])
def test_int8_product_is_that_of_the_rounded_numbers(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 20, bias=bias)
    x = torch.randn(2, 7, 48) * torch.tensor([0.01, 100.0])[:, None, None]
    x[0, 0] = 0
    with torch.inference_mode():
        weight_step = layer.weight.abs().amax(1, keepdim=True) / 127
        step = x.abs().amax(2, keepdim=True).clamp(min=1e-30) / 127
        rounded = ((x / step + 0.5).floor() * step) @ ((layer.weight / weight_step).round() * weight_step).T
        expected = rounded + layer.bias if bias else rounded
        found = Int8Linear(layer)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", int8])
def test_rows_do_not_depend_on_the_batch(random_model, random_prompts, precision):
    model = apply_precision(random_model, precision)
    batch = random_prompts(random_model, 12)
    together, alone = (score_labels(model, batch, budget=TokenBudget(max_tokens=n)) for n in (4096, 1))
    # A rounding may fall to the other side after a last bit that differs; more must not happen.
    assert np.abs(together.hidden - alone.hidden).max() < 0.05
    assert np.array_equal(together.fine.argmax(1), alone.fine.argmax(1))


def test_the_decoder_reads_on_from_a_cache_in_bf16(random_model, random_prompts):
    model = apply_precision(random_model, "bf16")
    entity, value = (torch.from_numpy(a[None].astype(np.int64)) for a in random_prompts(random_model, 1)[0])
    cache = model.network.new_cache(1, entity.shape[1])
    assert cache.keys.dtype == torch.bfloat16
    with torch.inference_mode():
        whole = model.network(entity, value)
        model.network(entity[:, :3], value[:, :3], cache)
        rest = model.network(entity[:, 3:], value[:, 3:], cache)
    assert rest.dtype == torch.float32 and float((rest - whole[:, 3:]).abs().max()) < 0.05


def test_unknown_precision(random_model):
    with pytest.raises(ModelError, match="'fp8' is not known: expected 'auto', 'fp32', 'bf16', 'int8'"):
        apply_precision(random_model, "fp8")


def test_times_are_measured_once_and_a_damaged_cache_again(random_model, cache, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "block_seconds", lambda *_: calls.append(1) or {"fp32": 2.0, "bf16": 1.0})
    for _ in range(2):
        assert cached_block_seconds(random_model.config, CPU) == {"fp32": 2.0, "bf16": 1.0}
    assert len(calls) == 1
    cache.write_text("{ damaged")
    assert cached_block_seconds(random_model.config, CPU)["bf16"] == 1.0 and len(calls) == 2
    assert len(json.loads(cache.read_text())) == 1
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"fp32": "fast"}}))
    assert cached_block_seconds(random_model.config, CPU)["bf16"] == 1.0 and len(calls) == 3


def test_a_cache_that_cannot_be_written_is_done_without(random_model, cache):
    cache.parent.parent.joinpath("scmulan").write_text("a file, not a folder")
    assert cached_block_seconds(random_model.config, CPU, 32)["fp32"] > 0
    assert MeasurementCache("precision.json").get("anything") is None


def test_the_fastest_that_agrees_is_chosen_and_kept(random_model, random_prompts, monkeypatch):
    monkeypatch.setattr(module, "block_seconds", lambda *_: {"fp32": 3.0, "bf16": 2.0})
    batch = random_prompts(random_model, 40)
    assert choose_precision(random_model, batch).network.precision == "fp32"  # too few cells to compare
    assert choose_precision(random_model, batch, total=1_000).network.precision == "bf16"
    assert choose_precision(random_model, batch).network.precision == "bf16"  # compared before
    assert apply_precision(random_model, "auto").network.precision == "bf16"
    others = replace(random_model, weights_hash="other")
    assert apply_precision(others, "auto").network.precision == "fp32"


@pytest.mark.parametrize(
    ("seconds", "labels", "cosine"),
    [
        ({"fp32": 3.0, "bf16": 2.9}, 1.0, 1.0),  # hardly faster
        ({"fp32": 3.0, "bf16": 1.0}, 0.99, 1.0),  # other labels
        ({"fp32": 3.0, "bf16": 1.0}, 1.0, 0.998),  # other embeddings
    ],
)
def test_a_precision_that_is_not_worth_it_is_not_chosen(
    random_model, random_prompts, monkeypatch, seconds, labels, cosine
):
    seen = module.PrecisionAgreement(cells=200, labels=labels, cosine=cosine)
    monkeypatch.setattr(module, "block_seconds", lambda *_: seconds)
    monkeypatch.setattr(module, "compare_precision", lambda *_: seen)
    batch = random_prompts(random_model, 40)
    for _ in range(2):
        assert choose_precision(random_model, batch, total=1_000).network.precision == "fp32"


def test_timing_covers_what_this_machine_can_do(random_model):
    found = module.block_seconds(random_model.config, CPU, 64)
    assert set(found) >= {"fp32"} and all(s > 0 for s in found.values())

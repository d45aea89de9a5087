"""Verification against stored outputs: both fixtures agree, and one changed number is found and named."""

import json

import numpy as np
import pytest
import torch

from scmulan.errors import InputError, ModelError
from scmulan.infer.parity import read_fixture, verify
from scmulan.model.loading import load_model, save_model
from scmulan.model.release import import_release

COMPARED = {
    "prompt_ids",
    "prompt_values",
    "entity_logits",
    "value_outputs",
    "annotation_ids",
    "annotation_values",
    "annotation_ids_kv",
    "embedding",
    "generated_ids",
    "generated_values",
}


@pytest.fixture(scope="module")
def arrays(stored):
    """Contents of the fixture with biases, of its three shortest cells only."""
    with np.load(stored["bias"]) as file:
        return {n: a[:3] if a.ndim and len(a) == 24 else a for n, a in file.items()}


@pytest.fixture
def fixture(arrays, tmp_path):
    """Write the short fixture with changes; None takes an array out."""

    def write(**changes):
        content = {name: array for name, array in (arrays | changes).items() if array is not None}
        np.savez(tmp_path / "fixture.npz", **content)
        return tmp_path / "fixture.npz"

    return write


@pytest.mark.parametrize("name", ["nobias", "bias"])
def test_stored_outputs_agree(imported, stored, name):
    report = verify(imported[name], stored[name])
    assert report.passed, str(report)
    assert report.first_difference is None
    assert report.cells == 24
    assert set(report.checks) == COMPARED
    assert report.absent == []
    for what, check in report.checks.items():
        assert check.different == 0
        assert check.max_difference <= (0 if check.tolerance == 0 else 2e-5), what
    assert report.checks["entity_logits"].compared == 24 * 2222
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is True
    assert "agrees" in str(report)


@pytest.mark.parametrize(
    ("what", "at", "change"),
    [
        ("prompt_ids", (1, 0), 1),
        ("prompt_ids", (2, 1400), 5),  # in the padding
        ("prompt_values", (0, 0), -1),
        ("entity_logits", (1, 2000), 2e-4),
        ("value_outputs", (2, 0), -2e-4),
        ("value_outputs", (2, 7), np.nan),
        ("annotation_ids", (0, 1), 1),
        ("annotation_values", (1, 2), 1),
        ("annotation_ids_kv", (1, 2), -3),
        ("embedding", (0, 47), 2e-4),
        ("generated_ids", (2, 50), 1),
        ("generated_ids", (0, 0), 1),  # in the prompt
        ("generated_ids", (1, 123), -3000),  # the last token, taken away
        ("generated_ids", (0, 122), 3000),  # a token too many
        ("generated_values", (3, 123), 1),
    ],
)
def test_one_changed_number_is_named(imported, arrays, fixture, what, at, change):
    changed = arrays[what].copy()
    if abs(change) == 3000:  # padding in place of a token, or the other way round
        changed[at] = -1 if change < 0 else 7
    else:
        changed[at] += change
    report = verify(imported["bias"], fixture(**{what: changed}))
    assert not report.passed
    first = report.first_difference
    assert (first.what, first.cell) == (what, at[0])
    assert str(at[1]) in first.word or what in ("entity_logits", "value_outputs")
    assert first.expected != first.found
    assert [n for n, c in report.checks.items() if c.different] == [what]
    assert report.checks[what].different == 1
    assert "\n" not in str(report)
    json.dumps(report.to_json(), allow_nan=False)
    if what == "entity_logits":
        assert first.word == f"word {load_model(imported['bias']).vocabulary.tokens[2000]!r}"
        assert first.expected - first.found == pytest.approx(change, abs=2e-5)


def test_changed_expression_is_seen_in_the_prompt(imported, arrays, fixture):
    expression = arrays["expression"].copy()
    gene = int(np.argmax(expression[2]))
    expression[2, gene] = 0
    first = verify(imported["bias"], fixture(expression=expression)).first_difference
    assert (first.what, first.cell) == ("prompt_ids", 2)


def test_changed_generation_prompt(imported, arrays, fixture):
    prompts = json.loads(str(arrays["generation_prompts"]))
    prompts[1][0] = "Liver"
    first = verify(imported["bias"], fixture(generation_prompts=json.dumps(prompts))).first_difference
    assert (first.what, first.cell, first.word) == ("generated_ids", 1, "index 0")
    assert "(Lung)" in first.expected
    assert "(Liver)" in first.found


def test_one_changed_weight(imported, fixture, tmp_path):
    model = load_model(imported["bias"])
    with torch.no_grad():
        model.network.blocks[1].down.weight[5, 9] += 0.5
    other = save_model(tmp_path / "other", model.network, model.vocabulary, model.card)
    report = verify(other, fixture())
    assert report.first_difference.what == "entity_logits"
    assert report.checks["entity_logits"].max_difference > 1e-3


def test_altered_folder_is_refused(imported, fixture, tmp_path):
    model = load_model(imported["bias"])
    folder = save_model(tmp_path / "other", model.network, model.vocabulary, model.card)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: altered"):
        verify(folder, fixture())


@pytest.mark.parametrize(("setting", "value"), [("heads", 4), ("layers", 2), ("width", 64), ("bias", False)])
def test_another_shape(imported, fixture, setting, value):
    config = {"seed": 8, "layers": 3, "heads": 2, "width": 48, "bias": True, setting: value}
    changes = {"embedding": None} if setting == "width" else {}
    first = verify(imported["bias"], fixture(config=json.dumps(config), **changes)).first_difference
    assert (first.what, first.expected) == (f"config {setting}", value)


def test_another_vocabulary(imported, arrays, fixture):
    small = {name: arrays[name][:, :500] for name in ("entity_logits", "value_outputs")}
    first = verify(imported["bias"], fixture(**small)).first_difference
    assert (first.what, first.expected, first.found) == ("config vocabulary", 500, 2222)
    first = verify(imported["bias"], fixture(expression=arrays["expression"][:, :90])).first_difference
    assert (first.what, first.expected, first.found) == ("number of genes", 90, 2000)


def test_another_shape_of_release(make_checkpoint, tmp_path):
    """A fixture that is not among the stored ones: outputs of a plain reading, one sentence at a time."""
    torch.save(make_checkpoint(seed=5, layers=1, heads=3, width=24, bias=False), tmp_path / "release.pt")
    folder = import_release(tmp_path / "release.pt", tmp_path / "model")
    model = load_model(folder)
    rng = np.random.default_rng(0)
    expression = np.where(rng.random((5, 2000)) < 0.01, rng.gamma(2, 1, (5, 2000)), 0).astype(np.float32)
    logits, ids = [], np.full((5, 60), -1, dtype=np.int16)
    values = ids.copy()
    for i, x in enumerate(expression):
        genes = np.flatnonzero(x)[::-1]
        entity = np.append(model.vocabulary.ids("gene")[genes], model.vocabulary.prompts["annotate"])
        value = np.append(np.digitize(x[genes], np.linspace(0, x.max(), 11), right=True), 0)
        ids[i, : len(entity)], values[i, : len(entity)] = entity, value
        with torch.inference_mode():
            hidden = model.network(torch.from_numpy(entity)[None], torch.from_numpy(value)[None])[0, -1]
            logits.append(model.network.entity_logits(hidden).numpy())
    content = {
        "config": json.dumps({"seed": 5, "layers": 1, "heads": 3, "width": 24, "bias": False}),
        "expression": expression,
        "prompt_ids": ids,
        "prompt_values": values,
        "entity_logits": np.stack(logits),
    }
    np.savez(tmp_path / "fixture.npz", **content)
    report = verify(folder, tmp_path / "fixture.npz")
    assert report.passed, str(report)
    assert set(report.checks) == {"prompt_ids", "prompt_values", "entity_logits"}
    assert set(report.absent) == COMPARED - set(report.checks)
    assert "annotation_ids_kv" in str(report)


@pytest.mark.parametrize("gone", [["generation_prompts"], ["generated_ids", "generated_values"], ["expression"]])
def test_absent_arrays(imported, fixture, gone):
    report = verify(imported["bias"], fixture(**dict.fromkeys(gone)))
    assert report.passed, str(report)
    assert ("generated_ids" in report.absent) == ("generated_ids" in gone or "generation_prompts" in gone)
    assert "entity_logits" in report.checks


@pytest.mark.parametrize("kind", ["new words", "all words"])
def test_either_limit_of_generation(imported, arrays, fixture, kind):
    """Whether a fixture's sentences were cut at 50 new words or at 50 words, both are understood."""
    lengths = np.array([2, 4, 4, 4])
    limit = np.full(4, 50) if kind == "all words" else lengths + 50
    inside = np.arange(124) < limit[:, None]
    cut = {name: np.where(inside, arrays[name], -1) for name in ("generated_ids", "generated_values")}
    assert verify(imported["bias"], fixture(**cut)).passed


# -- malformed ------------------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(InputError) as caught:
        read_fixture(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "no config; it holds expression, prompt_ids"),
        ({"config": "{"}, "config is not JSON"),
        ({"config": "[1]"}, "config is a JSON list"),
        ({"config": '{"layers": "two"}'}, "config layers is 'two'"),
        ({"config": '{"width": 64}'}, "the width of embedding is 48, but another part says 64"),
        ({"entity_logits": np.zeros((4, 2222), np.float32)}, "entity_logits has 4 rows, expected 3"),
        ({"entity_logits": np.zeros(3, np.float32)}, "entity_logits is float32 [3], expected floating-point numbers"),
        ({"annotation_ids": np.zeros((3, 3), np.float32)}, "annotation_ids is float32 [3, 3], expected whole numbers"),
        ({"generated_ids": np.zeros((3, 9), np.int16)}, "generated_ids has 3 rows, expected 4"),
        ({"generation_prompts": '["Blood"]'}, "generation_prompts is no list of lists"),
        ({"expression": np.full((3, 2000), np.nan)}, "expression has values below zero or that are no numbers"),
        ({"expression": np.full((3, 2000), -1.0)}, "expression has values below zero or that are no numbers"),
        ({"expression": np.array([{}, {}])}, "not readable as .npz without pickles"),
        (
            {"expression": None, "prompt_ids": None, "generation_prompts": None},
            "neither expression nor prompts",
        ),
    ],
)
def test_malformed_fixture(fixture, changes, message):
    assert message in refused(fixture(**changes))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    assert "not readable as .npz" in refused(tmp_path / "a.npz")


def test_no_file_one_array_and_a_truncated_one(tmp_path, fixture):
    assert "no such file" in refused(tmp_path / "none.npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "a single array" in refused(tmp_path / "a.npy")
    path = fixture()
    path.write_bytes(path.read_bytes()[:5000])
    assert "not readable as .npz" in refused(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": 2222}, "prompt_ids of cell 1 is no prompt"),
        ({"prompt_ids": -1}, "prompt_ids of cell 1 is no prompt"),
        ({"prompt_values": 11}, "prompt_values of cell 1 is no prompt"),
    ],
)
def test_stored_prompts_without_expression_must_be_prompts(imported, arrays, fixture, changes, message):
    (name, number), changed = *changes.items(), {}
    changed[name] = arrays[name].copy()
    changed[name][1, 0] = number
    with pytest.raises(InputError, match=message):
        verify(imported["bias"], fixture(expression=None, **changed))


def test_unusable_generation(imported, arrays, fixture):
    prompts = json.loads(str(arrays["generation_prompts"]))
    prompts[2][1] = "Blod"
    with pytest.raises(InputError, match="generation prompt with 'Blod', which is no metadata word"):
        verify(imported["bias"], fixture(generation_prompts=json.dumps(prompts)))
    with pytest.raises(InputError, match="row 0 of generated_ids ends with its prompt"):
        verify(imported["bias"], fixture(generated_ids=arrays["generated_ids"][:, :2]))


# -- a model alone --------------------------------------------------------------------------------------------------


def test_a_model_alone(imported):
    report = verify(imported["bias"])
    assert report.passed
    assert report.fixture is None
    assert report.checks["entity_logits"].compared == 2222
    assert "in order" in str(report)


def test_a_model_with_a_weight_that_is_no_number(imported, tmp_path):
    model = load_model(imported["bias"])
    with torch.no_grad():
        model.network.blocks[0].up.weight[0, 0] = torch.nan
    folder = save_model(tmp_path / "nan", model.network, model.vocabulary, model.card)
    report = verify(folder)
    assert report.first_difference.what == "blocks.0.up.weight"
    assert report.first_difference.found == "1 that are not"
    json.dumps(report.to_json(), allow_nan=False)

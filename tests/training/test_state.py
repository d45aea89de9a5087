"""A run's folder: whole checkpoints, one recipe, no half-written file."""

import json

import pytest
import torch

from scmulan.errors import OutputError, RecipeError
from scmulan.training.state import RunFolder, cut_log


def state(number):
    return {"model": {"weight": torch.full((3,), float(number))}, "step": number}


def test_a_folder_follows_one_recipe(tmp_path):
    recipe = {"seed": 1, "optimizer": {"rate": 1e-3, "steps": 10}, "names": ("a", "b")}
    RunFolder(tmp_path / "run").claim(recipe)
    RunFolder(tmp_path / "run").claim(recipe)  # the same again, tuples and all
    other = {**recipe, "optimizer": {"rate": 2e-3, "steps": 10}}
    with pytest.raises(RecipeError, match=r"optimizer\.rate was 0\.001, is 0\.002"):
        RunFolder(tmp_path / "run").claim(other)
    more = {**recipe, "name": "x"}
    with pytest.raises(RecipeError, match="name was None, is 'x'"):
        RunFolder(tmp_path / "run").claim(more)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 1


def test_the_newest_checkpoint_is_loaded_and_few_are_kept(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.load() is None
    for step in (1, 2, 30):
        folder.save(step, state(step), keep=2)
    assert sorted(f.name for f in folder.checkpoints.iterdir()) == [
        "step-000000002.pt",
        "step-000000002.sha256",
        "step-000000030.pt",
        "step-000000030.sha256",
    ]
    found = folder.load()
    assert found["step"] == 30 and found["model"]["weight"].tolist() == [30.0] * 3


@pytest.mark.parametrize("damage", ["flip", "cut", "no hash"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    folder = RunFolder(tmp_path)
    folder.save(1, state(1), keep=2)
    folder.save(2, state(2), keep=2)
    file = folder.checkpoints / "step-000000002.pt"
    content = bytearray(file.read_bytes())
    if damage == "no hash":
        file.with_suffix(".sha256").unlink()
    elif damage == "cut":
        file.write_bytes(content[:100])
    else:
        content[200] ^= 255
        file.write_bytes(content)
    assert folder.load()["step"] == 1


def test_a_kill_between_hash_and_rename_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save(1, state(1), keep=2)
    monkeypatch.setattr("scmulan.training.state.os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.save(2, state(2), keep=2)
    assert RunFolder(tmp_path).load()["step"] == 1


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save(1, state(1), keep=2)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scmulan.training.state.os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device; the one before it is still good") as error:
        folder.save(2, state(2), keep=2)
    assert "\n" not in str(error.value)
    assert folder.load()["step"] == 1
    assert not list(folder.checkpoints.glob("*.partial"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the run folder"):
        RunFolder(tmp_path / "file" / "run")


def test_a_log_is_cut_at_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    log.write_text('{"step": 1}\n{"step": 3}\n{"step": 3, "validation": {}}\n{"step": 4}\n{"st')
    cut_log(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 3, "validation": {}}\n'
    cut_log(log, 0)
    assert log.read_text() == ""

"""A run's folder: whole checkpoints, one recipe, one run at a time, no half-written file."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

from scmulan.errors import OutputError, RecipeError
from scmulan.train.checkpoint import RunFolder, cut_log


def state(number, size=3):
    return {"model.weight": torch.full((size,), float(number)), "step.weight": torch.tensor(float(number))}


def save(folder, number, keep=2, **more):
    folder.save(number, state(number, **more), {"words": 10 * number}, keep)
    folder.wait()


def load(folder, size=3):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in state(0, size).items()}
    facts = folder.load(tensors)
    return facts and (facts["step"], tensors["model.weight"][0].item(), tensors["step.weight"].item())


@pytest.fixture
def folder(tmp_path):
    warnings = []
    made = RunFolder(tmp_path / "run", warn=warnings.append)
    made.warnings = warnings
    return made


def test_a_folder_follows_one_recipe(tmp_path):
    recipe = {"seed": 1, "optimizer": {"rate": 1e-3, "steps": 10}, "names": ("a", "b"), "run": {"keep": 1}}
    RunFolder(tmp_path / "run").claim(recipe)
    RunFolder(tmp_path / "run").claim(recipe)  # the same again, tuples and all
    other = {**recipe, "optimizer": {"rate": 2e-3, "steps": 10}}
    with pytest.raises(RecipeError, match=r"optimizer\.rate was 0\.001, is 0\.002"):
        RunFolder(tmp_path / "run").claim(other)
    more = {**recipe, "name": "x"}
    with pytest.raises(RecipeError, match="name was None, is 'x'"):
        RunFolder(tmp_path / "run").claim(more)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 1
    RunFolder(tmp_path / "run").claim({**recipe, "run": {"keep": 2}}, free=["run"])
    RunFolder(tmp_path / "run").claim(
        {**recipe, "run": {"keep": 3}, "new": 5}, free=["run"], complete=lambda r: {"new": 5, **r}
    )
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["run"] == {"keep": 3}


def test_the_newest_checkpoint_is_loaded_and_few_are_kept(folder):
    assert load(folder) is None
    for step in (1, 2, 30):
        save(folder, step)
    assert sorted(f.name for f in folder.checkpoints.iterdir()) == ["step-000000002", "step-000000030"]
    files = sorted(f.name for f in (folder.checkpoints / "step-000000030").iterdir())
    assert files == ["facts.json", "hashes.json", "shard-00001.safetensors"]
    assert load(folder) == (30, 30.0, 30.0)
    assert folder.last_facts() == {"step": 30, "words": 300}
    assert not folder.warnings


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(folder, monkeypatch):
    """Training goes on while it is written."""
    from scmulan.train import checkpoint as module

    go, real = threading.Event(), module.save_file
    monkeypatch.setattr(module, "save_file", lambda *a: go.wait(5) and real(*a))
    tensors = state(1)
    folder.save(1, tensors, {}, 2)
    assert folder.busy
    tensors["model.weight"].fill_(99.0)
    go.set()
    folder.wait()
    assert not folder.busy
    assert load(folder) == (1, 1.0, 1.0)


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "facts.json", "hashes.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, file, damage):
    save(folder, 1)
    save(folder, 2)
    path = folder.checkpoints / "step-000000002" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert load(folder)[0] == 1
    assert len(folder.warnings) == 1 and "step-000000002" in folder.warnings[0] and "\n" not in folder.warnings[0]
    if file != "hashes.json":
        assert file in folder.warnings[0]
    assert "before it is used" in folder.warnings[0]


def test_every_flipped_byte_is_found(folder):
    save(folder, 1)
    for path in sorted((folder.checkpoints / "step-000000001").iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert folder.newest() is None, (path.name, at)
        path.write_bytes(whole)
    assert folder.newest() is not None


def test_the_state_of_another_network_is_refused(folder):
    save(folder, 1)
    with pytest.raises(RecipeError, match="step-000000001: not the state of this network"):
        load(folder, size=4)


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(folder):
    save(folder, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # a file can hold no more, as on a full disk
    try:
        with pytest.raises(OutputError, match=r"cannot write the checkpoint .*before it is still good") as error:
            save(folder, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value) and "too large" in str(error.value)
    assert [f.name for f in folder.checkpoints.iterdir()] == ["step-000000001"]
    assert load(folder) == (1, 1.0, 1.0)
    save(folder, 2)
    assert load(folder)[0] == 2


def test_a_folder_that_goes_away_is_one_line(folder):
    save(folder, 1)
    folder.checkpoints.rename(folder.path / "elsewhere")
    with pytest.raises(OutputError, match=r"cannot write the checkpoint .*No such file or directory"):
        save(folder, 2)
    (folder.path / "elsewhere").rename(folder.checkpoints)
    assert load(folder)[0] == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the run folder"):
        RunFolder(tmp_path / "file" / "run")


HOLD = """
import os, sys, time
from pathlib import Path
from scmulan.train.checkpoint import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.claim({})
child = os.fork() if len(sys.argv) > 2 else 0
if child or len(sys.argv) == 2:
    print("held", child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("with_child", [False, True])
def test_a_second_run_is_refused_until_the_first_is_gone_however_it_ended(folder, with_child):
    """A child that was forked, and lives on after the kill, does not keep the folder."""
    command = [sys.executable, "-c", HOLD, str(folder.path), *(["child"] if with_child else [])]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        held, child = first.stdout.readline().split()
        assert held == "held"
        with pytest.raises(OutputError, match=rf"a run is going on in this folder \(process {first.pid} on ") as error:
            folder.claim({})
        assert "\n" not in str(error.value)
        (folder.checkpoints / ".step-000000009.partial").mkdir()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    folder.claim({})
    if with_child:
        os.kill(int(child), signal.SIGKILL)
    first.stdout.close()
    assert not list(folder.checkpoints.glob(".*"))  # what the killed run had begun is cleared away
    folder.release()


def test_a_log_is_cut_at_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    log.write_text('{"step": 1}\n{"step": 3}\n{"step": 3, "validation": {}}\n{"step": 4}\n{"st')
    cut_log(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 3, "validation": {}}\n'
    cut_log(log, 0)
    assert log.read_text() == ""

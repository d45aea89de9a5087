"""Import of the published layout; what is not that layout is refused in one line, and none of it is run."""

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from scmulan.errors import ModelError, OutputError
from scmulan.model.loading import load_model
from scmulan.model.release import import_release
from scmulan.vocab.vocabulary import Vocabulary


def refused(path, tmp_path):
    with pytest.raises(ModelError) as caught:
        import_release(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.fixture
def save(tmp_path):
    def save(content, **how):
        torch.save(content, tmp_path / "release.pt", **how)
        return tmp_path / "release.pt"

    return save


def test_import(small_checkpoint, save, tmp_path):
    model = load_model(import_release(save(small_checkpoint), tmp_path / "out"))
    c = model.config
    assert (c.vocabulary, c.layers, c.heads, c.width, c.bias, c.levels) == (2222, 1, 2, 8, False, 10)
    assert not c.set_state
    assert not c.value_spread
    assert model.vocabulary == Vocabulary.published()
    assert model.card["licence"].startswith("MIT")
    assert "github.com/SuperBianC/scMulan" in model.card["source"]
    assert model.card["unknown"]
    theirs, ours = small_checkpoint["model"], model.network.state_dict()
    for a, b in {
        "transformer.wte": "word",
        "transformer.wee": "level",
        "transformer.h.0.ln_1": "blocks.0.norm_1",
        "transformer.h.0.attn.c_attn": "blocks.0.attention.qkv",
        "transformer.h.0.attn.c_proj": "blocks.0.attention.out",
        "transformer.h.0.ln_2": "blocks.0.norm_2",
        "transformer.h.0.mlp.c_fc": "blocks.0.up",
        "transformer.h.0.mlp.c_proj": "blocks.0.down",
        "transformer.ln_f": "norm",
        "lm_head": "entity_head",
        "epx_head": "value_head",
    }.items():
        assert torch.equal(theirs[f"{a}.weight"], ours[f"{b}.weight"])


def test_wrapped_and_decorated_checkpoint(small_checkpoint, save, tmp_path):
    plain = import_release(save(small_checkpoint), tmp_path / "plain")
    state = {f"module._orig_mod.{name}": t for name, t in small_checkpoint["model"].items()}
    decorated = {**small_checkpoint, "model": {**state, "step": 3}, "iter_num": 7, "config": {"lr": 1e-4}, "loss": None}
    wrapped = import_release(save(decorated), tmp_path / "wrapped")
    assert load_model(wrapped).weights_hash == load_model(plain).weights_hash


def test_old_file_format_and_half_precision(small_checkpoint, save, tmp_path):
    old = import_release(save(small_checkpoint, _use_new_zipfile_serialization=False), tmp_path / "old")
    half = {**small_checkpoint, "model": {n: t.half() for n, t in small_checkpoint["model"].items()}}
    new = import_release(save(half), tmp_path / "half")
    ours, theirs = (load_model(f).network.state_dict() for f in (old, new))
    assert all(torch.equal(ours[name].half().float(), theirs[name]) for name in ours)


# -- refusals -------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("how", ["zip", "old", "pickle", "in_model_args"])
def test_a_pickle_that_wants_to_run_code(tmp_path, small_checkpoint, how, recwarn):
    mark, path = tmp_path / "was_run", tmp_path / "release.pt"
    content = {**small_checkpoint, "extra": Bomb(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif how == "in_model_args":
        small_checkpoint["model_args"]["n_layer"] = Bomb(mark)
        torch.save(small_checkpoint, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refused(path, tmp_path)
    assert "nothing" in message
    assert "run" in message
    assert how == "pickle" or "system" in message
    assert not mark.exists()
    assert not recwarn.list
    if how == "pickle":  # the bomb is a real one
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_environment_cannot_switch_the_safety_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "was_run"
    torch.save(Bomb(mark), tmp_path / "release.pt")
    assert "refused" in refused(tmp_path / "release.pt", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "release.pt").write_bytes(content)
    assert "expected" in refused(tmp_path / "release.pt", tmp_path).lower()


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_truncated_checkpoint(save, small_checkpoint, tmp_path, share):
    path = save(small_checkpoint)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refused(path, tmp_path)


def test_missing_file_and_other_archives(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pt", tmp_path)
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    assert "damaged, or no torch checkpoint" in refused(tmp_path / "a.npz", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no 'model_args' in this checkpoint (found a list)"),
        ({"state_dict": {}}, "no 'model_args' in this checkpoint (found keys state_dict)"),
        ({"model_args": {}}, "no 'model' in this checkpoint (found keys model_args)"),
        ({"model_args": {}, "model": [1]}, "no 'model' in this checkpoint"),
        ({"model_args": {}, "model": {}}, "model_args lacks 'vocab_size'"),
    ],
)
def test_other_layouts(save, tmp_path, content, message):
    assert message in refused(save(content), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 2}, "model_args has n_layer = 2, but there are weights of 1"),
        ({"n_layer": 10**12}, "but there are weights of 1"),
        ({"n_layer": "1"}, "model_args has n_layer = '1', expected a whole number"),
        ({"n_head": 3}, "model width 8 is not a multiple of its 3 heads"),
        ({"n_embd": 16}, "weight word.weight has shape 2222 × 8, expected 2222 × 16"),
        ({"expression_level": 20}, "weight level.weight has shape 11 × 8, expected 21 × 8"),
        ({"bias": True}, "weight blocks.0.norm_1.bias is missing"),
        ({"bias": 0}, "model_args has bias = 0, expected true or false"),
        ({"vocab_size": 1011}, "made for 1011 words, expected the published vocabulary's 2222"),
        ({"ele": 0}, "model_args has ele = 0"),
    ],
)
def test_settings_that_do_not_fit(save, small_checkpoint, tmp_path, change, message):
    small_checkpoint["model_args"].update(change)
    assert message in refused(save(small_checkpoint), tmp_path)


def test_weights_that_do_not_fit(save, small_checkpoint, tmp_path):
    state = small_checkpoint["model"]
    norm = state.pop("transformer.ln_f.weight")
    assert "weight norm.weight is missing" in refused(save(small_checkpoint), tmp_path)
    state["transformer.ln_f.weight"] = norm.long()
    assert "ln_f.weight is torch.int64" in refused(save(small_checkpoint), tmp_path)
    state["transformer.ln_f.weight"] = norm
    state["transformer.wpe.weight"] = norm
    assert "'transformer.wpe.weight' is none of" in refused(save(small_checkpoint), tmp_path)


def test_existing_output(save, small_checkpoint, tmp_path):
    path = save(small_checkpoint)
    import_release(path, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        import_release(path, tmp_path / "out")
    import_release(path, tmp_path / "out", force=True)


# -- size -----------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")
def test_memory_stays_below_the_checkpoint(save, make_checkpoint, tmp_path):
    """A mapped file may be dropped from memory at any time; what is allocated beside it stays small."""
    path = save(make_checkpoint(seed=0, layers=3, heads=8, width=768, bias=False))
    size = path.stat().st_size
    assert size > 100e6
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    import_release(path, tmp_path / "out")
    stop.set()
    watcher.join()
    assert peak[0] > 0
    assert peak[0] - before < 0.3 * size

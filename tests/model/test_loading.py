"""Model folders: what is saved is what is loaded, and anything else is refused by name."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scmulan._io.outputs import sha256
from scmulan.errors import ModelError, OutputError
from scmulan.model.folder import HASHED, packaged_models, read_card, resolve_model, verify_hashes
from scmulan.model.loading import load_model, save_model
from scmulan.vocab.vocabulary import Family, Vocabulary

CARD = {"name": "tiny", "covered": 0.4, "rules": {"embedding": "mean"}}
FILES = {*HASHED, "hashes.json"}


@pytest.fixture
def vocabulary():
    return Vocabulary.build(["CD3E", "MS4A1", "LYZ"], {Family.FINE: ["B cell", "T cell"]})


@pytest.fixture
def network(make_network, vocabulary):
    return make_network(vocabulary=len(vocabulary), set_state=True, value_spread=True)


@pytest.fixture
def folder(tmp_path, network, vocabulary):
    return save_model(tmp_path / "tiny", network, vocabulary, CARD)


def rehash(folder):
    """Make the hashes fit, as in a folder that was wrong when it was written."""
    (folder / "hashes.json").write_text(json.dumps({name: sha256(folder / name) for name in HASHED}))


def refused(folder, **how):
    with pytest.raises(ModelError) as caught:
        load_model(folder, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- round trip -----------------------------------------------------------------------------------------------------


def test_round_trip(folder, network, vocabulary):
    loaded = load_model(folder)
    assert {p.name for p in folder.iterdir()} == FILES
    assert loaded.config == network.config
    assert loaded.vocabulary == vocabulary
    assert loaded.card == CARD
    assert loaded.folder == folder
    assert loaded.weights_hash == sha256(folder / "model.safetensors")
    assert not loaded.network.training
    state = network.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in loaded.network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_float32_in_memory(tmp_path, network, vocabulary, folder, dtype):
    half = save_model(tmp_path / "half", network, vocabulary, CARD, dtype=dtype)
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {dtype}
    assert (half / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    weights = load_model(half).network.state_dict()
    for name, weight in network.state_dict().items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight.to(dtype).float())


def test_loaded_weights_can_be_trained_and_cast(folder):
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.bfloat16}
    before = sha256(folder / "model.safetensors")
    network = load_model(folder).network
    with torch.no_grad():
        network.word.weight.zero_()  # not a view of the file
    assert all(p.requires_grad for p in network.parameters())
    assert sha256(folder / "model.safetensors") == before


def test_tied_weights_are_written_twice(tmp_path, network, vocabulary):
    network.value_head.weight = network.entity_head.weight
    weights = load_model(save_model(tmp_path / "tied", network, vocabulary, CARD)).network.state_dict()
    assert torch.equal(weights["value_head.weight"], weights["entity_head.weight"])


def test_all_files_are_equally_readable(folder):
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1


def test_described_without_torch(folder):
    code = (
        "import sys, scmulan.model.loading\n"
        "from scmulan.model.folder import read_card, read_config, read_vocabulary, resolve_model\n"
        "from pathlib import Path; folder = resolve_model(sys.argv[1])\n"
        "assert read_card(folder)['name'] == 'tiny' and read_config(folder)['width'] == 16\n"
        "assert len(read_vocabulary(folder)) == 9\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("verify", [True, False])
def test_missing_file(folder, name, verify):
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder, verify=verify)


@pytest.mark.parametrize("name", HASHED)
def test_one_altered_byte(folder, name):
    content = bytearray((folder / name).read_bytes())
    at = content.index(b"e")  # a letter, so that JSON stays JSON
    content[at] ^= 4
    (folder / name).write_bytes(content)
    assert name in refused(folder)
    with pytest.raises(ModelError, match=f"{name}: altered"):
        verify_hashes(folder)


def test_altered_hash(folder):
    hashes = json.loads((folder / "hashes.json").read_text())
    hashes["card.json"] = "0" * 64
    (folder / "hashes.json").write_text(json.dumps(hashes))
    assert "card.json: altered" in refused(folder)
    del hashes["card.json"]
    (folder / "hashes.json").write_text(json.dumps(hashes))
    assert "hashes.json: no hash of card.json" in refused(folder)


@pytest.mark.parametrize("name", [n for n in sorted(FILES) if n.endswith("json")])
@pytest.mark.parametrize("content", ['{"a": 1', "[1, 2]", "\udcff"])
def test_json_that_is_none(folder, name, content):
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    if name != "hashes.json":
        rehash(folder)
    assert name in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "scmulan-model/9"}, "config.json: format is 'scmulan-model/9', expected 'scmulan-model/1'"),
        ({"rotary": 1}, "config.json: unknown model setting 'rotary'"),
        ({"layers": 0}, "config.json: model layers is 0"),
        ({"layers": "two"}, "config.json: "),
        ({"heads": 3}, "config.json: model width 16 is not a multiple of its 3 heads"),
        ({"vocabulary": 10}, "vocabulary.json: 9 words, but config.json says 10"),
        ({"width": 32}, "model.safetensors: weight word.weight has shape 9 × 16, expected 9 × 32"),
        ({"layers": 3}, "model.safetensors: weight blocks.2.norm_1.weight is missing"),
        ({"layers": 1}, "model.safetensors: weight blocks.1.attention.out.weight is none of this network's"),
    ],
)
def test_config_that_does_not_fit(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)
    assert message in refused(folder)


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"families": {"gene": [99]}}, {"families": {"organelle": [1]}}, {"words": None}]
)
def test_vocabulary_that_is_none(folder, change):
    raw = json.loads((folder / "vocabulary.json").read_text()) | change
    (folder / "vocabulary.json").write_text(json.dumps(raw))
    rehash(folder)
    assert "vocabulary.json: " in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: altered" in refused(folder)
    assert "model.safetensors: not readable as safetensors" in refused(folder, verify=False)


def test_pickle_in_place_of_weights(folder, tmp_path):
    mark = tmp_path / "was_run"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    torch.save(Bomb(), folder / "model.safetensors")
    rehash(folder)
    assert "not readable as safetensors" in refused(folder)
    assert not mark.exists()


def test_card_can_be_read_by_itself(folder):
    (folder / "model.safetensors").unlink()
    assert read_card(folder) == CARD


# -- names ----------------------------------------------------------------------------------------------------------


def test_unknown_model(tmp_path):
    with pytest.raises(ModelError, match="no model 'maxi': neither a folder nor one of the packaged models"):
        resolve_model("maxi")
    (tmp_path / "release.pt").touch()
    with pytest.raises(ModelError, match=r"a file, expected a model folder; `scmulan model import"):
        resolve_model(tmp_path / "release.pt")


@pytest.mark.parametrize("name", packaged_models())
def test_packaged_model_by_name(name, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == packaged_models()[name]
    (tmp_path / name).mkdir()  # a folder that happens to have the name
    assert resolve_model(name) == packaged_models()[name]
    (tmp_path / name).rmdir()
    folder.rename(tmp_path / name)  # a model of one's own
    assert resolve_model(name).resolve() == tmp_path / name


# -- writing --------------------------------------------------------------------------------------------------------


def test_existing_folder_is_kept_unless_forced(folder, network, vocabulary):
    before = sha256(folder / "card.json")
    with pytest.raises(OutputError, match="exists already; give --force to replace it"):
        save_model(folder, network, vocabulary, {"name": "other"})
    assert sha256(folder / "card.json") == before
    save_model(folder, network, vocabulary, {"name": "other"}, force=True)
    assert load_model(folder).card == {"name": "other"}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_force_never_removes_other_things(tmp_path, network, vocabulary):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("…")
    with pytest.raises(OutputError, match="holds other things than a model"):
        save_model(tmp_path / "thesis", network, vocabulary, CARD, force=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file; give the path of a folder"):
        save_model(tmp_path / "file", network, vocabulary, CARD, force=True)
    (tmp_path / "empty").mkdir()
    assert load_model(save_model(tmp_path / "empty", network, vocabulary, CARD, force=True)).card == CARD


def test_nothing_half_written(tmp_path, network, vocabulary):
    with pytest.raises(TypeError):
        save_model(tmp_path / "out", network, vocabulary, {"numbers": np.arange(3)})  # no JSON
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="there is no folder"):
        save_model(tmp_path / "file" / "out", network, vocabulary, CARD)
    with pytest.raises(ModelError, match=r"vocabulary.json: 10 words, but config.json says 9"):
        save_model(tmp_path / "out", network, vocabulary.extend(Family.FINE, ["NK cell"]), CARD)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits are set as on Linux")
def test_full_disk_leaves_nothing(tmp_path):
    code = (
        "import resource, sys\n"
        "from scmulan.errors import OutputError\n"
        "from scmulan.vocab.vocabulary import Vocabulary\n"
        "from scmulan.model.loading import save_model\n"
        "from scmulan.model.network import Mulan, MulanConfig\n"
        "vocabulary = Vocabulary.build(['A'], {})\n"
        "network = Mulan(MulanConfig(vocabulary=len(vocabulary), layers=1, heads=1, width=128)).initialise(0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    save_model(sys.argv[1], network, vocabulary, {})\n"
        "except OutputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=True, capture_output=True, text=True)
    assert "disk full or file too large; nothing was written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_that_hold_something_else(folder):
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    rehash(folder)
    assert "weight log_scale is missing, expected one of shape 9" in refused(folder)

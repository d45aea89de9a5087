"""``scmulan corpus …`` as people use it."""

import json
import shutil

import pytest

from scmulan.cli.app import run
from scmulan.data.split import select_part
from scmulan.data.store import Corpus


@pytest.fixture
def folder(corpus_folder, tmp_path):
    """Copy of a corpus."""
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    return tmp_path / "corpus"


def test_build_says_what_was_lost(files, tmp_path, capsys):
    assert run(["corpus", "build", str(files / "spec.toml"), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "210 cells" in out and "210 cells written" in err
    logged = next(line for line in out.splitlines() if line.startswith("logged"))
    assert logged.split()[:3] == ["logged", "log1p", "50"]
    assert run(["corpus", "build", str(files / "spec.toml"), str(tmp_path / "out")]) == 2
    assert "exists already; give --force" in capsys.readouterr().err


def test_inspect_as_json(folder, capsys):
    assert run(["corpus", "inspect", str(folder), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["cells"] == 210 and about["shards"] == {"amounts": 1, "counts": 4, "log1p": 2}
    assert [study["name"] for study in about["studies"]] == ["counts", "logged", "amounts"]
    assert about["bytes"] == sum(f.stat().st_size for f in folder.rglob("*.*") if "manifest" not in f.name)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("shards/000004.safetensors", 4200),
        ("shards/000000.safetensors", -1),
        ("cells.safetensors", 30),
        ("cells.safetensors", -1),
        ("vocabulary.json", 100),
        ("manifest.json", 100),
        ("manifest.json", 2),
        ("manifest.sha256", 5),
    ],
)
def test_a_flipped_byte_is_found_and_named(folder, capsys, name, position):
    assert run(["corpus", "verify", str(folder)]) == 0
    assert "all as they were written" in capsys.readouterr().out
    content = bytearray((folder / name).read_bytes())
    content[position] ^= 1
    (folder / name).write_bytes(content)
    assert run(["corpus", "verify", str(folder), "--json"]) == 1
    out, err = capsys.readouterr()
    problems = json.loads(out)["problems"]
    assert len(problems) == 1 and name.partition(".")[0] in problems[0]
    assert problems[0] in err and err.startswith("scmulan: error: ")


def test_a_missing_file_is_named(folder, capsys):
    (folder / "shards" / "000002.safetensors").unlink()
    assert run(["corpus", "verify", str(folder)]) == 1
    assert "000002.safetensors: missing" in capsys.readouterr().err


def test_split_writes_into_the_corpus(folder, capsys):
    (folder.parent / "split.toml").write_text('corpus = "corpus"\n[studies]\nvalidation = ["logged"]\n')
    assert run(["corpus", "split", str(folder.parent / "split.toml")]) == 0
    assert "train 160, validation 50, test 0 cells" in capsys.readouterr().out
    assert len(select_part(Corpus(folder), "validation")) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[study]]\nfile = 'none.h5ad'", "training cells not found"),
        ("unknown = 'ask'\n[[study]]\nfile = 'x'", "unknown = 'ask': expected 'drop', 'add' or 'refuse'"),
        ("genes = 0\n[[study]]\nfile = 'x'", "genes = 0: expected a whole number of at least 1"),
        ("vocabulary = 'none.json'\n[[study]]\nfile = 'x'", "none.json not found"),
        ("genes =", "not TOML"),
    ],
)
def test_a_wrong_spec_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "spec.toml").write_text(text)
    assert run(["corpus", "build", str(tmp_path / "spec.toml"), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()

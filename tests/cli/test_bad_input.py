"""Bad input: one line that names the problem and the way out, exit code 2, nothing left behind."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch


def _with(value: float):
    def change(adata: ad.AnnData) -> ad.AnnData:
        adata.X.data[5] = value
        return adata

    return change


def _scaled(adata: ad.AnnData) -> ad.AnnData:
    x = adata.X.toarray()
    adata.X = (x - x.mean(0)) / x.std(0)
    return adata


def _renamed(rename):
    def change(adata: ad.AnnData) -> ad.AnnData:
        adata.var_names = [rename(i, name) for i, name in enumerate(adata.var_names)]
        return adata

    return change


# Change to good cells, and what the error must contain: the problem, and the way out.
BAD = {
    "no genes of ours": (_renamed(lambda i, name: f"probe_{i}"), ["probe_0", "expected human gene symbols"]),
    "mouse genes": (_renamed(lambda i, name: name.capitalize()), ["looks like mouse genes", "map orthologs first"]),
    "NaN": (_with(np.nan), ["X", "nan in cell 'cell-", "replace such values"]),
    "infinite": (_with(np.inf), ["X", "inf in cell 'cell-", "replace such values"]),
    "negative": (_with(-1), ["X", "-1 in cell 'cell-", "before scaling"]),
    "no cells": (lambda adata: adata[:0].copy(), ["0 cells × 300 genes", "expected at least one cell"]),
    "scaled": (_scaled, ["X holds", "scaled", "before scaling"]),
}


@pytest.mark.parametrize("verb", ["annotate", "embed"])
@pytest.mark.parametrize("kind", BAD)
def test_cells_that_cannot_be_used(scmulan, folder, tiny, make_cells, kind, verb):
    change, expected = BAD[kind]
    change(make_cells()).write_h5ad("in.h5ad")
    extra = ["--table", "t.csv"] if verb == "annotate" else []
    error = scmulan(verb, "in.h5ad", "-o", "out.h5ad", "--model", tiny, "--json", *extra).refused()
    for words in expected:
        assert words in error
    assert os.listdir(folder) == ["in.h5ad"]


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_files_that_cannot_be_opened(scmulan, folder, tiny, cells, verb):
    def error(name):
        return scmulan(verb, name, "-o", "out.h5ad", "--model", tiny).refused()

    shutil.copy(cells, "cells.h5ad")
    assert "cell.h5ad: no such file" in error("cell.h5ad")
    assert "did you mean cells.h5ad?" in error("cell.h5ad")
    Path("cut.h5ad").write_bytes(cells.read_bytes()[: cells.stat().st_size // 2])
    assert "cut.h5ad: the file is cut off" in error("cut.h5ad")
    assert "again" in error("cut.h5ad")
    Path("text.h5ad").write_text("CD3E,MS4A1\n")
    assert "text.h5ad: not an HDF5 file; expected an h5ad file" in error("text.h5ad")
    Path("empty.h5ad").write_text("")
    assert "empty.h5ad: the file is empty" in error("empty.h5ad")
    os.mkdir("folder")
    assert "folder: a folder, but not a zarr store" in error("folder")
    assert sorted(os.listdir(folder)) == ["cells.h5ad", "cut.h5ad", "empty.h5ad", "folder", "text.h5ad"]


@pytest.mark.parametrize("verb", ["annotate", "embed", "generate"])
def test_outputs_that_may_not_be_written(scmulan, folder, tiny, cells, verb):
    def error(*options):
        arguments = [] if verb == "generate" else ["in.h5ad"]
        return scmulan(verb, *arguments, "--model", tiny, *options).refused()

    shutil.copy(cells, "in.h5ad")
    Path("there.h5ad").write_text("mine")
    assert "there.h5ad: exists already; give --force" in error("-o", "there.h5ad")
    assert Path("there.h5ad").read_text() == "mine"
    assert "there is no folder" in error("-o", "no/such/out.h5ad")
    assert "expected a name that ends in .h5ad or .zarr" in error("-o", "out.loom")
    os.mkdir("folder.h5ad")
    assert "folder.h5ad: a folder" in error("-o", "folder.h5ad", "--force")
    if verb != "generate":
        os.symlink("in.h5ad", "link.h5ad")
        for same in ("in.h5ad", "./in.h5ad", "link.h5ad"):
            assert "is the input too; give another path" in error("-o", same, "--force")
        os.unlink("link.h5ad")
    if verb == "annotate":
        assert "ends in .csv or .tsv" in error("-o", "new.h5ad", "--table", "t.xlsx")
        assert "there.h5ad: exists already" in error("-o", "there.h5ad", "--table", "t.csv")
        Path("t.csv").write_text("mine")
        assert "t.csv: exists already" in error("-o", "new.h5ad", "--table", "t.csv")
        os.unlink("t.csv")
    assert (folder / "in.h5ad").read_bytes() == cells.read_bytes()
    assert sorted(os.listdir(folder)) == ["folder.h5ad", "in.h5ad", "there.h5ad"]


def test_force_replaces_an_output(scmulan, folder, tiny, cells):
    Path("out.h5ad").write_text("old")
    Path("t.csv").write_text("old")
    run = scmulan("annotate", cells, "-o", "out.h5ad", "--table", "t.csv", "--model", tiny, "--force")
    assert run.code == 0
    assert "scmulan_cell_type" in ad.read_h5ad("out.h5ad").obs
    assert Path("t.csv").read_text().startswith("cell,scmulan_cell_type")


@pytest.mark.parametrize("verb", ["annotate", "embed", "generate", "verify"])
def test_models_that_cannot_be_used(scmulan, folder, tiny, cells, verb):
    def error(model):
        if verb == "verify":
            return scmulan("model", "verify", model).refused()
        arguments = [] if verb == "generate" else [cells]
        return scmulan(verb, *arguments, "-o", "out.h5ad", "--model", model).refused()

    assert "no model 'nothing'" in error("nothing")
    assert "packaged models" in error("nothing")
    for name in os.listdir(tiny):
        shutil.copytree(tiny, "broken")
        os.unlink(f"broken/{name}")
        assert f"broken: {name} is missing" in error("broken")
        shutil.rmtree("broken")
    for name in ("model.safetensors", "vocabulary.json", "card.json"):
        shutil.copytree(tiny, "altered")
        content = bytearray((tiny / name).read_bytes())
        content[-3] ^= 1
        Path("altered", name).write_bytes(content)
        assert f"altered/{name}: altered since the model was written" in error("altered")
        assert "fetch or export the model again" in error("altered")
        shutil.rmtree("altered")
    assert not os.listdir(folder)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_with_code(scmulan, folder):
    torch.save({"model_args": {}, "model": Bomb()}, "bomb.pt")
    error = scmulan("model", "import", "bomb.pt", "out").refused()
    assert "bomb.pt: refused, loading it would run code" in error
    Path("bare.pt").write_bytes(pickle.dumps(Bomb()))
    assert "bare.pt: damaged, or no torch checkpoint; nothing" in scmulan("model", "import", "bare.pt", "out").refused()
    assert "none.pt: no such file" in scmulan("model", "import", "none.pt", "out").refused()
    assert sorted(os.listdir(folder)) == ["bare.pt", "bomb.pt"]


@pytest.mark.parametrize(
    "args",
    [
        ["annotat"],
        ["annotate"],
        ["annotate", "in.h5ad"],
        ["annotate", "in.h5ad", "-o", "out.h5ad", "--rule", "best"],
        ["annotate", "in.h5ad", "-o", "out.h5ad", "--threshold", "2"],
        ["annotate", "in.h5ad", "-o", "out.h5ad", "--batch-size", "many"],
        ["annotate", "in.h5ad", "-o", "out.h5ad", "--no-such-option"],
        ["model"],
        ["evaluate", "everything"],
    ],
)
def test_usage_errors_are_one_line_too(scmulan, folder, args):
    assert "--help)" in scmulan(*args).refused()
    assert not os.listdir(folder)


def test_a_missing_device(scmulan, folder, tiny, cells):
    error = scmulan("annotate", cells, "-o", "out.h5ad", "--model", tiny, "--device", "abacus").refused()
    assert "device 'abacus' is not usable here: expected 'auto'" in error
    assert not os.listdir(folder)


# -- no room ----------------------------------------------------------------------------------------------------------

LIMITED = """
import json, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from scmulan.cli.__main__ import main
sys.argv[1:] = json.loads(sys.argv[2])
sys.exit(main())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, make_cells):
    """Cells that take more room than there will be."""
    path = tmp_path_factory.mktemp("large") / "large.h5ad"
    adata = make_cells()
    adata.obsm["ballast"] = np.random.default_rng(0).random((40, 8_000))
    adata.write_h5ad(path)
    return path


def refused_for_room(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    assert done.stderr.startswith("scmulan: error: out.h5ad: disk full or file too large; nothing was written.")
    assert done.stderr.count("\n") == 1


def test_a_file_too_large_for_the_system(folder, tiny, large):
    pytest.importorskip("resource")
    annotate = ["annotate", str(large), "--table", "t.csv", "--json"]
    generate = ["generate", "-n", "100"]
    for limit, args in ((2_000_000, annotate), (50_000, generate)):
        command = json.dumps([*args, "-o", "out.h5ad", "--model", str(tiny)])
        refused_for_room(
            subprocess.run(
                [sys.executable, "-c", LIMITED, str(limit), command], capture_output=True, text=True, check=False
            )
        )
        assert not os.listdir(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tiny disk needs root")
def test_a_full_disk(folder, tiny, large):
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny disk is not allowed here")
    try:
        args = ["embed", str(large), "-o", "out.h5ad", "--model", str(tiny), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "scmulan", *args], cwd=disk, capture_output=True, text=True, check=False
        )
        assert not os.listdir(disk)
        refused_for_room(done)
    finally:
        subprocess.run(["umount", str(disk)], check=True)

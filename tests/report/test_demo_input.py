"""The demo's input is as people have their files."""

import subprocess
import sys

import anndata as ad

from scmulan.vocab.matrix import choose_matrix


def test_raw_holds_what_scmulan_chooses(demo_input):
    cells = ad.read_h5ad(demo_input)
    assert cells.shape == (700, 765) and cells.X.min() < 0
    chosen = choose_matrix(cells)
    assert (chosen.where, chosen.matrix_kind) == ("raw.X", "log1p")
    assert "bulk_labels" in cells.obs
    assert not cells.obsm and not cells.uns and not cells.varm and not cells.obsp


def test_bad_use_is_one_line(root, tmp_path):
    tool = [sys.executable, root / "tools" / "demo_input.py"]
    for arguments in ([], [tmp_path / "missing" / "x.h5ad"]):
        ran = subprocess.run([*tool, *arguments], capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr

import re

import anndata as ad
import numpy as np
import pytest
import scanpy
from hypothesis import given
from hypothesis import strategies as st

import scmulan
from scmulan._io.adata import write_h5ad
from scmulan.cli.__main__ import main
from scmulan.errors import InputError
from scmulan.tl._perturb import set_levels
from scmulan.vocab.binning import GeneTokens

pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")
B_GENES = {"CD79A": 0, "CD79B": 0, "MS4A1": 0, "CD74": 0, "HLA-DRA": 0}


@pytest.fixture(scope="module")
def mini():
    return scmulan.load("mini", device="cpu")


@pytest.fixture(scope="module")
def cells():
    found = scanpy.datasets.pbmc68k_reduced()
    found.uns.clear()
    return found[::4].copy()


@given(
    st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 10)), max_size=6),
    st.dictionaries(st.integers(0, 9), st.integers(0, 10), max_size=3),
)
def test_tokens_get_their_levels_and_others_stay(cells, levels):
    indptr = np.concatenate(([0], np.cumsum([len(c) for c in cells]))).astype(np.int64)
    gene = np.array([g for c in cells for g in sorted(c)], dtype=np.int32)
    level = np.array([c[g] for c in cells for g in sorted(c)], dtype=np.uint8)
    one = np.ones(len(cells), dtype=np.float32)
    out = set_levels(GeneTokens(indptr, gene, level, one, one), levels)
    for i, cell in enumerate(cells):
        part = slice(out.indptr[i], out.indptr[i + 1])
        expected = {g: v for g, v in {**cell, **levels}.items() if v > 0}
        assert out.gene[part].tolist() == sorted(expected)
        assert out.level[part].tolist() == [expected[g] for g in sorted(expected)]


def test_b_cells_without_their_markers_are_less_of_a_b_cell(mini, cells):
    scmulan.tl.annotate(cells, mini, precision="fp32")
    scmulan.tl.perturb(cells, mini, B_GENES, precision="fp32")
    obs = cells.obs
    b = obs["scmulan_cell_type"] == "B cell"
    assert b.sum() > 10 and obs["scmulan_perturbed"][b].all()
    before, after = obs["scmulan_perturbed_probability_before"], obs["scmulan_perturbed_probability"]
    assert after[b].mean() < before[b].mean() - 0.1
    t = obs["scmulan_cell_type"].astype(str).str.contains("T cell") & obs["scmulan_perturbed"]
    assert (before - after)[t].mean() < (before - after)[b].mean()
    same = ~obs["scmulan_perturbed"]
    assert (obs["scmulan_perturbed_shift"][same] == 0).all() and (obs["scmulan_perturbed_shift"][b] > 0).all()
    assert (obs["scmulan_perturbed_cell_type"][same].astype(str) == obs["scmulan_cell_type"][same].astype(str)).all()
    assert cells.uns["scmulan"]["parameters"]["perturb"]["genes"]["CD79A"] == 0


def test_from_file_to_file(cells, tmp_path, capsys):
    write_h5ad(cells[:20].copy(), tmp_path / "in.h5ad")
    code = main(["perturb", str(tmp_path / "in.h5ad"), "-o", str(tmp_path / "out.h5ad"), "--gene", "CD20=0"])
    assert code == 0 and "of another type now" in capsys.readouterr().out
    out = ad.read_h5ad(tmp_path / "out.h5ad")
    assert out.uns["scmulan"]["parameters"]["perturb"]["genes"] == {"MS4A1": 0}  # the alias's approved symbol
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("gene", "message"),
    [("MS4A11=0", "did you mean MS4A1"), ("MS4A1=11", r"0 \(silent\) to 10"), ("MS4A1", "GENE=LEVEL")],
)
def test_what_is_refused(cells, tmp_path, capsys, gene, message):
    write_h5ad(cells[:20].copy(), tmp_path / "in.h5ad")
    code = main(["perturb", str(tmp_path / "in.h5ad"), "-o", str(tmp_path / "out.h5ad"), "--gene", gene])
    error = capsys.readouterr().err
    assert code == 2 and not (tmp_path / "out.h5ad").exists()
    assert re.search(message, error), error


def test_levels_are_checked(mini, cells):
    with pytest.raises(InputError, match="level -1 of gene 'MS4A1'"):
        scmulan.tl.perturb(cells, mini, {"MS4A1": -1})

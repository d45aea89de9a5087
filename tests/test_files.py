"""What users give is opened or refused in one line, and what they get is what the input was, with the results."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata.io import read_elem

from scmulan._io.adata import copy_with_results, open_input, to_json, write_h5ad, write_json, write_table
from scmulan.errors import InputError


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    return sc.datasets.pbmc68k_reduced()


@pytest.fixture(scope="module")
def h5ad(pbmc, tmp_path_factory) -> Path:
    """The real cells with a layer, in a file."""
    path = tmp_path_factory.mktemp("input") / "pbmc.h5ad"
    adata = pbmc.copy()
    adata.layers["lognorm"] = adata.raw.X
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def zarr_folder(h5ad) -> Path:
    write_h5ad(ad.read_h5ad(h5ad), h5ad.with_suffix(".zarr"))
    return h5ad.with_suffix(".zarr")


@pytest.fixture(scope="module")
def results(pbmc) -> dict:
    """Results of every type that is written."""
    n = pbmc.n_obs
    obs = pd.DataFrame(
        {
            "scmulan_cell_type": ["B cell", "T cell"] * (n // 2),
            "scmulan_coarse": pd.Categorical(["lymphocyte"] * n),
            "scmulan_probability": np.linspace(0, 1, n, dtype=np.float32),
            "scmulan_words": np.arange(n),
            "scmulan_sure": np.arange(n) % 3 == 0,
            "phase": ["G1"] * n,  # is there already
        },
        index=pbmc.obs_names,
    )
    obs.loc[obs.index[0], "scmulan_cell_type"] = None
    return {
        "obs": obs,
        "obsm": {"X_scmulan": np.random.default_rng(0).random((n, 8), dtype=np.float32)},
        "uns": {"scmulan": {"version": "0.1.0", "coverage": {"found": 700, "share": 0.93}, "genes": ["A", "B"]}},
    }


def refusal(path: Path, **options) -> str:
    """Return the one line that a path is refused with, also when it is to be opened backed."""
    texts = set()
    for backed in (False, True):
        with pytest.raises(InputError) as error:
            open_input(path, backed=backed)
        texts.add(str(error.value))
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


# ---- inputs


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("kind", ["h5ad", "zarr_folder"])
def test_an_input_is_what_anndata_reads(request, pbmc, kind, backed):
    path = request.getfixturevalue(kind)
    adata = open_input(str(path), backed=backed)
    assert adata.isbacked == (backed and kind == "h5ad")
    pd.testing.assert_frame_equal(adata.obs, pbmc.obs)
    pd.testing.assert_frame_equal(adata.var, pbmc.var)
    assert adata.uns["louvain"]["params"]["random_state"] == pbmc.uns["louvain"]["params"]["random_state"]
    np.testing.assert_array_equal(adata.X[5:9], pbmc.X[5:9])
    np.testing.assert_array_equal(adata.raw.X[5:9].toarray(), pbmc.raw.X[5:9].toarray())
    np.testing.assert_array_equal(adata.layers["lognorm"][5:9].toarray(), pbmc.raw.X[5:9].toarray())
    np.testing.assert_array_equal(np.asarray(adata.obsm["X_umap"]), pbmc.obsm["X_umap"])
    assert isinstance(adata.X, np.ndarray) == (not backed)
    assert hasattr(adata.layers["lognorm"], "group") == backed
    if adata.isbacked:
        adata.file.close()


def test_a_missing_file_with_the_names_that_are_near(h5ad):
    assert "no such file in " in refusal(h5ad.parent / "abc.h5ad")
    assert "did you mean pbmc.h5ad" in refusal(h5ad.parent / "pmbc.h5ad")
    assert "and no folder" in refusal(h5ad.parent / "nowhere" / "pbmc.h5ad")


def test_a_file_cut_off_anywhere(h5ad, tmp_path):
    content = h5ad.read_bytes()
    path = tmp_path / "cut.h5ad"
    path.write_bytes(b"")
    assert "the file is empty" in refusal(path)
    for fraction in (0.0001, 0.3, 0.9, 0.99999):
        path.write_bytes(content[: int(fraction * len(content))])
        text = refusal(path)
        assert "the file is cut off" in text or fraction < 0.001


def test_a_file_damaged_inside(h5ad, tmp_path):
    """Bytes overwritten where the matrices and tables are: a refusal or the same cells, never another error."""
    content = bytearray(h5ad.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.h5ad"
    refused = 0
    for _ in range(15):
        damaged = bytearray(content)
        for start in rng.integers(2048, len(content) - 600, 40):
            damaged[start : start + 500] = rng.bytes(500)
        path.write_bytes(damaged)
        try:
            open_input(path)
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
    assert refused > 5


def test_files_of_other_kinds_with_the_way_to_read_them(tmp_path):
    for name, hint in {
        "cells.csv": "anndata.io.read_csv",
        "matrix.mtx.gz": "scanpy.read_10x_mtx",
        "seurat.rds": "anndataR",
        "cells.loom": "",
        "notes.h5ad": "expected an h5ad file of AnnData",
    }.items():
        (tmp_path / name).write_text("gene,cell\nA,1\n" * 100)
        assert "not an HDF5 file; expected an h5ad file" in refusal(tmp_path / name)
        assert hint in refusal(tmp_path / name)


def test_hdf5_files_that_are_not_anndata(tmp_path):
    with h5py.File(tmp_path / "filtered.h5", "w") as file:
        file["matrix/barcodes"] = [1, 2]
    assert "10x output, but not AnnData" in refusal(tmp_path / "filtered.h5")
    assert "scanpy.read_10x_h5" in refusal(tmp_path / "filtered.h5")
    with h5py.File(tmp_path / "multi.h5mu", "w") as file:
        file["mod/rna/X"] = [1, 2]
    assert "a MuData file" in refusal(tmp_path / "multi.h5mu")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["weights"] = [1, 2]
    assert "HDF5, but not AnnData (no obs and var in it)" in refusal(tmp_path / "other.h5ad")


def test_folders_that_are_not_anndata(tmp_path):
    import zarr

    (tmp_path / "empty").mkdir()
    assert "not a zarr store" in refusal(tmp_path / "empty")
    (tmp_path / "tenx").mkdir()
    (tmp_path / "tenx" / "matrix.mtx.gz").write_text("")
    assert "scanpy.read_10x_mtx" in refusal(tmp_path / "tenx")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    assert "a zarr store, but not AnnData" in refusal(tmp_path / "other.zarr")


def test_no_cells_and_no_genes(pbmc, tmp_path):
    pbmc[:0].copy().write_h5ad(tmp_path / "cells.h5ad")
    assert "0 cells × 765 genes; expected at least one cell" in refusal(tmp_path / "cells.h5ad")
    pbmc[:, :0].copy().write_h5ad(tmp_path / "genes.h5ad")
    assert "700 cells × 0 genes; expected" in refusal(tmp_path / "genes.h5ad")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(h5ad, tmp_path):
    path = tmp_path / "locked.h5ad"
    path.write_bytes(h5ad.read_bytes())
    path.chmod(0)
    assert "permission denied" in refusal(path)


def test_a_file_that_is_being_written(tmp_path):
    """HDF5 locks files while they are written to."""
    path = tmp_path / "busy.h5ad"
    script = "import h5py, sys; f = h5py.File(sys.argv[1], 'w'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "open\n"
        text = refusal(path)
        writer.communicate()
    assert "another program has it open" in text


@pytest.mark.parametrize("backed", [False, True])
def test_repeated_names(pbmc, tmp_path, backed):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* names are not unique", category=UserWarning)
        adata = ad.AnnData(pbmc.raw.X[:5], obs=pd.DataFrame(index=["a", "b", "a", "a-1", "a"]))
        adata.var_names = ["CD3D", "CD3D", *adata.var_names[2:]]
        adata.write_h5ad(tmp_path / "twice.h5ad")
    with pytest.warns(UserWarning, match="2 names of cells repeat earlier ones; made unique") as warned:
        open_study = open_input(tmp_path / "twice.h5ad", backed=backed)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert open_study.obs_names.is_unique
    assert list(open_study.obs_names[:2]) == ["a", "b"]
    assert list(open_study.var_names[:2]) == ["CD3D", "CD3D"]
    if backed:
        obs = pd.DataFrame({"label": list("vwxyz")}, index=open_study.obs_names)
        copy_with_results(tmp_path / "twice.h5ad", tmp_path / "out.h5ad", obs=obs)
        open_study.file.close()
        written = open_input(tmp_path / "out.h5ad")
        assert list(written.obs_names) == list(obs.index)
        assert list(written.obs["label"]) == list("vwxyz")


def test_a_backed_file_without_x(pbmc, tmp_path):
    adata = pbmc.copy()
    adata.layers["lognorm"] = adata.raw.X
    del adata.X
    del adata.raw
    adata.write_h5ad(tmp_path / "no_x.h5ad")
    open_study = open_input(tmp_path / "no_x.h5ad", backed=True)
    assert open_study.X is None
    assert open_study.layers["lognorm"].group.file.filename == str(tmp_path / "no_x.h5ad")
    open_study.layers["lognorm"].group.file.close()


# ---- outputs


def same(left: ad.AnnData, right: ad.AnnData) -> None:
    pd.testing.assert_frame_equal(left.obs, right.obs)
    pd.testing.assert_frame_equal(left.var, right.var)
    np.testing.assert_array_equal(left.X, right.X)
    np.testing.assert_array_equal(left.raw.X.toarray(), right.raw.X.toarray())
    for part in ("layers", "obsm", "varm", "obsp"):
        assert set(getattr(left, part)) == set(getattr(right, part))
    np.testing.assert_array_equal(left.obsm["X_pca"], right.obsm["X_pca"])
    np.testing.assert_array_equal(left.obsm["X_scmulan"], right.obsm["X_scmulan"])
    assert to_json(left.uns["scmulan"]) == to_json(right.uns["scmulan"])
    assert set(left.uns) == set(right.uns)


@pytest.mark.parametrize(("kind", "suffix"), [("h5ad", ".h5ad"), ("zarr_folder", ".zarr"), ("zarr_folder", ".h5ad")])
def test_a_copy_with_results_is_what_writing_from_memory_gives(request, kind, suffix, results, tmp_path):
    source = request.getfixturevalue(kind)
    expected = open_input(source)
    for column in results["obs"]:
        expected.obs[column] = results["obs"][column]
    expected.obsm.update(results["obsm"])
    expected.uns.update(results["uns"])
    write_h5ad(expected, tmp_path / f"expected{suffix}")
    copy_with_results(source, tmp_path / f"copy{suffix}", **results)
    expected, copy = open_input(tmp_path / f"expected{suffix}"), open_input(tmp_path / f"copy{suffix}")
    same(copy, expected)
    assert list(copy.obs["scmulan_cell_type"].cat.categories) == ["B cell", "T cell"]
    assert copy.obs["scmulan_cell_type"].isna().sum() == 1
    assert set(copy.obs["phase"]) == {"G1"}
    assert copy.obs["scmulan_probability"].dtype == np.float32


def test_a_copy_can_be_made_again_with_other_results(h5ad, results, tmp_path):
    copy_with_results(h5ad, tmp_path / "a.h5ad", **results)
    obs = pd.DataFrame({"scmulan_cell_type": "NK cell"}, index=results["obs"].index)
    copy_with_results(tmp_path / "a.h5ad", tmp_path / "b.h5ad", obs=obs, uns={"scmulan": {"version": "2"}})
    copy_with_results(tmp_path / "b.h5ad", tmp_path / "b.h5ad", obsm={"X_other": np.zeros((700, 2))})
    again = open_input(tmp_path / "b.h5ad")
    assert set(again.obs["scmulan_cell_type"]) == {"NK cell"}
    assert dict(again.uns["scmulan"]) == {"version": "2"}
    assert set(again.obsm) >= {"X_scmulan", "X_other", "X_pca"}
    assert list(again.obs.columns).count("scmulan_cell_type") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.h5ad", "b.h5ad"}


def test_a_copy_of_a_file_that_is_open(h5ad, results, tmp_path):
    backed = open_input(h5ad, backed=True)
    copy_with_results(backed.filename, tmp_path / "out.h5ad", **results)
    np.testing.assert_array_equal(backed.X[:5], open_input(tmp_path / "out.h5ad").X[:5])
    backed.file.close()
    assert "scmulan" not in open_input(h5ad).uns


def test_a_copy_never_reads_the_matrices(h5ad, results, tmp_path):
    """Matrices that cannot be read at all are copied as they are."""
    broken = tmp_path / "broken.h5ad"
    broken.write_bytes(h5ad.read_bytes())
    with h5py.File(broken, "r+") as file:
        for part in ("X", "raw/X/data", "layers/lognorm/data"):
            attributes = dict(file[part].attrs)
            del file[part]
            file[part] = np.full(3, b"not numbers")
            file[part].attrs.update(attributes)
    copy_with_results(broken, tmp_path / "out.h5ad", **results)
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert file["X"][0] == b"not numbers"
        np.testing.assert_array_equal(read_elem(file["obsm/X_scmulan"]), results["obsm"]["X_scmulan"])


def test_results_of_another_number_of_cells_are_an_error_and_leave_nothing(h5ad, results, tmp_path):
    with pytest.raises(ValueError, match="'obs' have 10 rows, the input has 700 cells"):
        copy_with_results(h5ad, tmp_path / "out.h5ad", obs=results["obs"][:10])
    with pytest.raises(ValueError, match="'X_s' have 3 rows"):
        copy_with_results(h5ad, tmp_path / "out.h5ad", obsm={"X_s": np.zeros((3, 2))})
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_file_in_an_older_layout_goes_through_memory(h5ad, results, tmp_path):
    """AnnData before 0.8 kept categories beside the columns; a mark says which layout a table has."""
    old = tmp_path / "old.h5ad"
    old.write_bytes(h5ad.read_bytes())
    with h5py.File(old, "r+") as file:
        for name in list(file["obs"]):
            if isinstance(file["obs"][name], h5py.Group):  # the categories
                del file["obs"][name]
        file["obs"].attrs["column-order"] = [name for name in file["obs"] if name != file["obs"].attrs["_index"]]
        file["obs"].attrs["encoding-version"] = "0.1.0"
    copy_with_results(old, tmp_path / "out.h5ad", **results)
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert file["obs"].attrs["encoding-version"] == "0.2.0"
    assert open_input(tmp_path / "out.h5ad").obs["scmulan_words"].tolist() == list(range(700))


@pytest.mark.parametrize("backed", [False, True])
def test_a_file_from_before_groups(pbmc, tmp_path, backed):
    """Before AnnData 0.7 tables were arrays of records."""
    names = [name.encode() for name in pbmc.obs_names[:4]]
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["X"] = pbmc.raw.X[:4, :3].toarray()
        file["obs"] = np.array(list(zip(names, range(4), strict=True)), dtype=[("index", "S16"), ("n", "i8")])
        file["var"] = np.array([(b"A",), (b"B",), (b"C",)], dtype=[("index", "S8")])
    adata = open_input(tmp_path / "old.h5ad", backed=backed)
    assert not adata.isbacked
    assert list(adata.obs_names) == list(pbmc.obs_names[:4])
    copy_with_results(tmp_path / "old.h5ad", tmp_path / "new.h5ad", obsm={"X_s": np.ones((4, 2))})
    new = open_input(tmp_path / "new.h5ad", backed=True)
    assert new.isbacked
    assert list(new.obs["n"]) == [0, 1, 2, 3]
    assert new.obsm["X_s"].shape == (4, 2)
    new.file.close()


def test_consolidated_zarr_knows_the_results(zarr_folder, results, tmp_path):
    import shutil

    import zarr

    shutil.copytree(zarr_folder, tmp_path / "in.zarr")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        zarr.consolidate_metadata(tmp_path / "in.zarr")
    copy_with_results(tmp_path / "in.zarr", tmp_path / "out.zarr", **results)
    assert "X_scmulan" in zarr.open_group(tmp_path / "out.zarr", mode="r")["obsm"]
    assert "scmulan_words" in open_input(tmp_path / "out.zarr").obs


def test_tables(tmp_path):
    table = pd.DataFrame({"cell_type": ["B, naive", "T"], "probability": [0.5, 1.0]}, index=pd.Index(["c1", "c2"]))
    table.index.name = "cell"
    for name, separator in [("t.csv", ","), ("t.tsv", "\t"), ("t.TSV.gz", "\t"), ("t.csv.gz", ",")]:
        write_table(table, tmp_path / name)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name, sep=separator, index_col=0), table)
    write_table(table.reset_index(drop=True), tmp_path / "plain.csv")
    assert (tmp_path / "plain.csv").read_text().startswith("cell_type,probability\n")
    assert (tmp_path / "t.csv.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_json_of_what_results_are_made_of(tmp_path):
    content = {
        "share": np.float32(0.5),
        "n": np.int64(3),
        "nan": math.nan,
        "array": np.array([[1.0, np.inf]]),
        "flags": (np.bool_(True), None),
        "path": Path("a") / "b",
        7: "Größe",
    }
    write_json(content, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {
        "share": 0.5,
        "n": 3,
        "nan": None,
        "array": [[1.0, None]],
        "flags": [True, None],
        "path": str(Path("a") / "b"),
        "7": "Größe",
    }


def test_files_loads_no_torch():
    script = "import scmulan._io.adata, scmulan.vocab.matrix, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)

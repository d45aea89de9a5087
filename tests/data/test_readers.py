"""Cells in other formats, and how AnnData is opened for a corpus."""

import gzip
import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from anndata.io import write_elem

from scmulan.data.build import build
from scmulan.data.readers import ConversionBlock, blocks, convert_to_h5ad, hash_input, matrix_of, open_study
from scmulan.data.spec import StudySpec, read_corpus_spec, read_spec
from scmulan.data.store import Corpus
from scmulan.errors import InputError, MatrixError, RecipeError
from scmulan.vocab.vocabulary import Family

PROTEIN = "CD3_antibody"


@pytest.fixture
def cells(made):
    """Counts of 30 cells, their table, and Ensembl-like ids."""
    return made.counts(30, 3), made.table(30)


def write_10x_h5(path, x, obs, genes, version):
    matrix = sp.csr_matrix(np.c_[x, np.full((len(x), 1), 7.0)] if version == 3 else x).astype(np.int32)
    names = [*genes, PROTEIN] if version == 3 else genes
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["barcodes"] = np.array(obs.index, "S")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape[::-1]
        if version == 2:
            group["genes"], group["gene_names"] = np.array(names, "S"), np.array(names, "S")
            return
        features = group.create_group("features")
        features["id"], features["name"] = np.array([f"id {n}" for n in names], "S"), np.array(names, "S")
        features["feature_type"] = np.array(["Gene Expression"] * len(genes) + ["Antibody Capture"], "S")


def write_mtx(folder, x, obs, genes, gz=True, order=slice(None)):
    folder.mkdir()
    matrix = sp.coo_matrix(np.c_[x, np.full((len(x), 1), 7.0)].T.astype(int))
    column = np.lexsort((matrix.row, matrix.col))[order]
    matrix = sp.coo_matrix((matrix.data[column], (matrix.row[column], matrix.col[column])), shape=matrix.shape)
    scipy.io.mmwrite(folder / "matrix.mtx", matrix)
    lines = [f"id {g}\t{g}\tGene Expression" for g in genes] + [f"x\t{PROTEIN}\tAntibody Capture"]
    (folder / "features.tsv").write_text("\n".join(lines) + "\n")
    (folder / "barcodes.tsv").write_text("\n".join(obs.index) + "\n")
    for path in list(folder.iterdir()) if gz else []:
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()


def write_soma(path, x, obs, genes):
    tiledbsoma_io = pytest.importorskip("tiledbsoma.io")
    whole = ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=pd.Index(genes, dtype=object)))
    tiledbsoma_io.from_anndata(str(path), whole, measurement_name="RNA")


def write_annbatch(path, x, obs, genes):
    import zarr

    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    for i, rows in enumerate((slice(0, 12), slice(12, 30))):
        part = ad.AnnData(sp.csr_matrix(x[rows]), obs=obs[rows], var=pd.DataFrame(index=pd.Index(genes, dtype=object)))
        write_elem(root, f"dataset_{i}", part)


WRITERS = {
    "v3.h5": lambda *a: write_10x_h5(*a, version=3),
    "v2.h5": lambda *a: write_10x_h5(*a, version=2),
    "mtx": write_mtx,
    "plain_mtx": lambda *a: write_mtx(*a, gz=False),
    "soma": write_soma,
    "annbatch.zarr": write_annbatch,
}


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding")
@pytest.mark.parametrize("name", list(WRITERS))
def test_other_formats_are_read_in_blocks(tmp_path, made, cells, name):
    x, obs = cells
    WRITERS[name](tmp_path / name, x, obs, made.genes)
    convert_to_h5ad(tmp_path / name, tmp_path / "converted.h5ad", block=ConversionBlock(cells=7, entries=101))
    converted = ad.read_h5ad(tmp_path / "converted.h5ad")
    assert np.array_equal(converted.X.toarray(), x) and converted.obs_names.tolist() == obs.index.tolist()
    obs.to_csv(tmp_path / "cells.csv")
    text = (
        f'genes = 100\n[columns]\ncell_type = "label"\ndonor = "donor"\n[[study]]\nfile = "{name}"\nobs = "cells.csv"\n'
    )
    (tmp_path / "spec.toml").write_text(text)
    build(read_corpus_spec(tmp_path / "spec.toml"), tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    genes = [made.genes.index(gene) for gene in corpus.vocabulary.genes]
    assert np.array_equal(corpus.rows(np.arange(30)).toarray(), x[:, genes])
    assert corpus.total.tolist() == x.sum(1).tolist()  # proteins are no genes
    fine = [corpus.vocabulary.tokens[w] if w >= 0 else "" for w in corpus.tokens(Family.FINE)]
    assert fine == obs["label"].tolist()
    assert corpus.donors == [(corpus.studies[0], "d1"), (corpus.studies[0], "d2")]


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "zarr2", "zarr3"])
@pytest.mark.filterwarnings(
    "ignore:Writing zarr v2 data", "ignore:zarr v3 autosharding", "ignore:Consolidated metadata"
)
def test_anndata_is_read_as_it_lies(tmp_path, made, cells, kind):
    x, obs = cells
    adata = made.adata(x, obs=obs)
    adata.X = {"csc": sp.csc_matrix(x), "dense": x}.get(kind, sp.csr_matrix(x))
    path = tmp_path / ("a.zarr" if "zarr" in kind else "a.h5ad")
    if "zarr" in kind:
        with ad.settings.override(zarr_write_format=int(kind[-1])):
            adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    spec = StudySpec(file=path, name="a", columns={})
    with open_study(spec) as found:
        matrix = matrix_of(found, spec)
        for first, last in ((0, 30), (4, 21)):
            if kind == "csc" and first:
                continue
            parts = list(blocks(matrix, first, last, values=16 * len(made.genes)))
            assert [start for start, _ in parts] == list(range(first, last, 16))
            assert np.array_equal(sp.vstack([part for _, part in parts]).toarray(), x[first:last])
    text = 'genes = 100\nshard_cells = 8\n[[study]]\nfile = "' + path.name + '"\n'
    (tmp_path / "spec.toml").write_text(text)
    build(read_corpus_spec(tmp_path / "spec.toml"), tmp_path / "out", block_values=16 * len(made.genes))
    corpus = Corpus(tmp_path / "out")
    assert [shard["cells"] for shard in corpus.manifest["shards"]] == [8, 8, 8, 6]
    genes = [made.genes.index(gene) for gene in corpus.vocabulary.genes]
    assert np.array_equal(corpus.rows(np.arange(30)).toarray(), x[:, genes])


def test_a_matrix_may_be_named(tmp_path, made, cells):
    x, obs = cells
    adata = made.adata(x, obs=obs)
    adata.layers["other"] = sp.csr_matrix(np.log1p(x))
    adata.write_h5ad(tmp_path / "a.h5ad")
    text = 'genes = 100\n[[study]]\nfile = "a.h5ad"\nlayer = "other"\nmatrix_kind = "log1p"\n'
    (tmp_path / "spec.toml").write_text(text)
    build(read_corpus_spec(tmp_path / "spec.toml"), tmp_path / "out")
    assert Corpus(tmp_path / "out").logged.all()
    (tmp_path / "spec.toml").write_text(text.replace("other", "nothing"))
    with pytest.raises(MatrixError, match=r"a\.h5ad: the input has no matrix 'nothing'"):
        build(read_corpus_spec(tmp_path / "spec.toml"), tmp_path / "out2")


def test_what_cannot_be_read_is_named(tmp_path, made, cells):
    x, obs = cells

    def refused(name, message):
        with pytest.raises(InputError, match=message):
            convert_to_h5ad(tmp_path / name, tmp_path / "out.h5ad")
        assert not (tmp_path / "out.h5ad").exists() and not list(tmp_path.glob(".tmp*"))

    write_mtx(tmp_path / "shuffled", x, obs, made.genes, order=slice(None, None, -1))
    refused("shuffled", "entries are not in the order of cells")
    write_mtx(tmp_path / "fewer", x, obs, made.genes[:-1])
    refused("fewer", r"121 × 30, but 120 features and 30 barcodes")
    write_mtx(tmp_path / "part", x, obs, made.genes)
    (tmp_path / "part" / "barcodes.tsv.gz").unlink()
    refused("part", r"matrix\.mtx without barcodes\.tsv")
    write_mtx(tmp_path / "cut", x, obs, made.genes)
    cut = tmp_path / "cut" / "matrix.mtx.gz"
    cut.write_bytes(cut.read_bytes()[:1000])
    refused("cut", "cut: cannot be read")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"], file["b"] = 1, 2
    refused("other.h5", "neither AnnData nor 10x output of one genome")


def test_a_table_of_some_cells_leaves_the_others(tmp_path, made, cells):
    x, obs = cells
    made.adata(x, obs=obs).write_h5ad(tmp_path / "a.h5ad")
    named = pd.DataFrame({"label": ["mast cell", ""], "note": "by hand"}, index=obs.index[[4, 2]])
    named.to_csv(tmp_path / "cells.csv")
    with open_study(StudySpec(file=tmp_path / "a.h5ad", name="a", columns={}, obs=tmp_path / "cells.csv")) as adata:
        found = adata.obs
    expected = obs["label"].astype(object)
    expected.iloc[[4, 2]] = ["mast cell", ""]
    assert found["label"].tolist() == expected.tolist() and found["donor"].tolist() == obs["donor"].tolist()
    assert found["note"].fillna("-").value_counts().to_dict() == {"-": len(obs) - 2, "by hand": 2}


def test_a_table_may_count_its_cells(tmp_path, made, cells):
    """Without their names: by their index in the file, from 0."""
    x, obs = cells
    made.adata(x, obs=obs).write_h5ad(tmp_path / "a.h5ad")
    spec = StudySpec(file=tmp_path / "a.h5ad", name="a", columns={}, obs=tmp_path / "cells.csv")
    pd.DataFrame({"label": ["mast cell", ""]}, index=pd.Index([4, 2], name="row")).to_csv(spec.obs)
    with open_study(spec) as adata:
        found = adata.obs["label"].tolist()
    expected = obs["label"].astype(object)
    expected.iloc[[4, 2]] = ["mast cell", ""]
    assert found == expected.tolist()
    for wrong in (len(obs), -1, 1.5, "c3", ""):
        pd.DataFrame({"label": "mast cell"}, index=pd.Index([0, wrong], name="row")).to_csv(spec.obs)
        with pytest.raises(InputError, match=f"row '{wrong}' is none of the {len(obs)} cells, counted from 0"):
            open_study(spec).__enter__()


def test_a_table_may_lie_beside_the_recipe(tmp_path, made, cells):
    x, obs = cells
    (tmp_path / "data").mkdir()
    made.adata(x, obs=obs).write_h5ad(tmp_path / "data" / "a.h5ad")
    obs.to_csv(tmp_path / "cells.csv")
    raw = {"folder": "data", "study": [{"file": "a.h5ad", "obs": "cells.csv"}]}
    assert read_spec(raw, tmp_path)[0].obs == tmp_path / "cells.csv"
    obs.to_csv(tmp_path / "data" / "cells.csv")
    assert read_spec(raw, tmp_path)[0].obs == tmp_path / "data" / "cells.csv"  # the data's own comes first
    with pytest.raises(RecipeError, match="training cells not found"):
        read_spec({"folder": "data", "study": [{"file": "a.h5ad", "obs": "none.csv"}]}, tmp_path)


def test_a_table_of_other_cells_is_refused(tmp_path, made, cells):
    x, obs = cells
    made.adata(x, obs=obs).write_h5ad(tmp_path / "a.h5ad")
    obs.rename(index=lambda name: f"other {name}").to_csv(tmp_path / "cells.tsv", sep="\t")
    with pytest.raises(InputError, match=r"cells\.tsv: none of its 30 cells \(other c0, other c1, …\) is in the data"):
        with open_study(StudySpec(file=tmp_path / "a.h5ad", name="a", columns={}, obs=tmp_path / "cells.tsv")):
            pass


def test_the_hash_of_a_folder_tells_its_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a").write_text("1")
    assert hash_input(tmp_path / "one") == hash_input(tmp_path / "two")
    (tmp_path / "two" / "sub" / "a").rename(tmp_path / "two" / "sub" / "b")
    assert hash_input(tmp_path / "one") != hash_input(tmp_path / "two")


def test_some_cells_of_a_soma_experiment(tmp_path, made, cells):
    x, obs = cells
    write_soma(tmp_path / "soma", x, obs, made.genes)
    convert_to_h5ad(tmp_path / "soma", tmp_path / "out.h5ad", "label == 'T cell'")
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    assert np.array_equal(found.X.toarray(), x[obs["label"] == "T cell"])
    for where, message in (
        ("label == 'dragon'", "no cell where label == 'dragon'"),
        ("color == 1", "cells where color == 1 cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            convert_to_h5ad(tmp_path / "soma", tmp_path / "none.h5ad", where)
    write_mtx(tmp_path / "mtx", x, obs, made.genes)
    with pytest.raises(InputError, match="`where` chooses cells of SOMA experiments only"):
        convert_to_h5ad(tmp_path / "mtx", tmp_path / "none.h5ad", "label == 'T cell'")


def test_a_missing_package_is_named_with_its_extra(files, tmp_path, monkeypatch, made, cells):
    write_soma(tmp_path / "soma", *cells, made.genes)
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(InputError, match=r"pip install 'scmulan\[soma\]'"):
        convert_to_h5ad(tmp_path / "soma", tmp_path / "out.h5ad")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'scmulan\[dask\]'"):
        build(read_corpus_spec(files / "spec.toml"), tmp_path / "out", dask="tcp://127.0.0.1:1")

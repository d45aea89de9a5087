#!/usr/bin/env python
"""Name the cells of a study that has no names, or only vague ones, by its clusters and their marker genes.

What a biologist does by hand: cluster (Leiden), look which markers a cluster shows, name it. A cell gets the name of
its cluster where its own nearest neighbours show the same markers; otherwise it stays without one. Names that the
study gave itself are kept, except those listed with ``--vague``.

    python tools/name_by_markers.py STUDY.h5ad ... --markers recipes/mini/markers.tsv -o TABLES/
    python tools/name_by_markers.py STUDY.h5ad ... --markers MARKERS.tsv --vague "myeloid cell" -o TABLES/

``--markers`` is a table of ``label``, ``coarse``, ``given`` and ``markers`` (gene symbols; one with a minus speaks
against the type). ``given`` is ``yes``, or ``coarse`` where only the coarse name is given (kinds of T cells are not
told apart by a few genes, T cells and others are), or ``no``: the type only keeps its cells from getting another's
name. The result, TABLES/STUDY.csv with the ``row`` (from 0), ``label`` and ``coarse`` of every such cell (empty
where nothing is sure), is given to a recipe as ``obs`` of its [[data.study]]; cells that it does not list keep the
names of the study. ``--copies`` also writes STUDY.h5ad with these names as ``label`` (the coarse one where there is no
finer), for what reads files alone: a baseline, say. The same file and the same scanpy and igraph give the same names.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

# A cluster is named when its best type is ahead of every other by this much of a marker's standard deviation.
AHEAD = 0.2
NEIGHBOURS = 15


def scores(adata: ad.AnnData, markers: pd.DataFrame) -> pd.DataFrame:
    """How much every cell shows the markers of every type: the mean of their z-scores."""
    out = {}
    for label, text in markers["markers"].items():
        signs = {gene.removeprefix("-"): -1.0 if gene.startswith("-") else 1.0 for gene in text.split()}
        genes = [gene for gene in signs if gene in adata.var_names]
        values = adata[:, genes].to_df()
        # Rare genes would swing with single counts: their spread is held up by a tenth.
        z = (values - values.mean()) / (values.std() + 0.1) * [signs[gene] for gene in genes]
        out[label] = z.mean(axis=1)
    return pd.DataFrame(out).dropna(axis=1)


def clusters(adata: ad.AnnData, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Leiden cluster of every cell, and the neighbours' weights (each row sums to one)."""
    sc.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars // 2))
    sc.pp.pca(adata, n_comps=30, random_state=0)
    sc.pp.neighbors(adata, n_neighbors=NEIGHBOURS, random_state=0)
    sc.tl.leiden(adata, resolution=resolution, random_state=0, flavor="igraph", n_iterations=-1)
    near = (adata.obsp["connectivities"] > 0).astype(float).toarray() + np.eye(adata.n_obs)
    return adata.obs["leiden"].to_numpy().astype(int), near / near.sum(axis=1, keepdims=True)


def name(adata: ad.AnnData, markers: pd.DataFrame, resolution: float) -> pd.Series:
    """Type of every cell by its cluster, empty where cluster and neighbours are not of one mind."""
    shown = scores(adata, markers)
    cluster, near = clusters(adata, resolution)
    mean = shown.groupby(cluster).mean()
    best = np.sort(mean.to_numpy(), axis=1)
    named = mean.idxmax(axis=1).where(best[:, -1] - best[:, -2] >= AHEAD, "")
    named = named.where(named.map(markers["given"]).isin(["yes", "coarse"]), "")
    by_cluster = named.reindex(cluster).to_numpy()
    by_neighbours = shown.columns.to_numpy()[(near @ shown.to_numpy()).argmax(axis=1)]
    return pd.Series(np.where(by_cluster == by_neighbours, by_cluster, ""), index=adata.obs_names, dtype=object)


def name_study(study: Path, markers: pd.DataFrame, vague: list[str], resolution: float) -> pd.DataFrame:
    """Table of ``label`` and ``coarse`` of the cells of a study that have no name, or a vague one."""
    adata = ad.read_h5ad(study)
    if adata.uns.get("x_is", "counts") == "counts":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    own = adata.obs["label"].astype(str)
    open_ = own.isin(["", "nan", *vague])
    table = name(adata, markers, resolution).to_frame("label").set_axis(range(adata.n_obs))[open_.to_numpy()]
    table["coarse"] = table["label"].map(markers["coarse"]).fillna("")
    table["label"] = table["label"].where(table["label"].map(markers["given"]) == "yes", "")
    return table.rename_axis("row")


def write_copy(study: Path, names: pd.Series, folder: Path) -> None:
    """Copy a study with other names for some of its cells."""
    folder.mkdir(parents=True, exist_ok=True)
    adata = ad.read_h5ad(study)
    label = adata.obs["label"].astype(str).to_numpy(dtype=object)
    label[names.index] = names
    adata.obs["label"] = label
    adata.write_h5ad(folder / study.name)


def main() -> None:
    """Read the studies, name their cells, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path, nargs="+")
    parser.add_argument("--markers", type=Path, required=True)
    parser.add_argument("--vague", action="append", default=[], help="a label of the studies that is no name to keep")
    parser.add_argument("--resolution", type=float, default=2.0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--copies", type=Path, help="folder for copies of the studies with these names")
    given = parser.parse_args()
    markers = pd.read_csv(given.markers, sep="\t", index_col="label")
    given.output.mkdir(parents=True, exist_ok=True)
    for study in given.study:
        table = name_study(study, markers, given.vague, given.resolution)
        file = given.output / f"{study.stem}.csv"
        table.to_csv(file)
        shown = table["label"].where(table["label"] != "", table["coarse"])
        print(f"{file}: {int((shown != '').sum())} of {len(table)} cells named")
        print(shown.value_counts().to_string())
        if given.copies is not None:
            write_copy(study, shown, given.copies)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Label the cells of a study that has no labels, or only vague ones, by clusters and their marker genes.

As a biologist does by hand: cluster (Leiden), see which markers a cluster expresses, label it. A cell gets the label of
its cluster if its own nearest neighbours express the same markers; otherwise it stays without one. Labels of the study
itself are kept, except those listed with ``--vague``.

    python tools/name_by_markers.py STUDY.h5ad ... --markers recipes/mini/markers.tsv -o TABLES/
    python tools/name_by_markers.py STUDY.h5ad ... --markers MARKERS.tsv --vague "myeloid cell" -o TABLES/

``--markers`` is a table of ``label``, ``coarse``, ``given`` and ``markers`` (gene symbols; one with a minus counts
against the type). ``given`` is ``yes``, or ``coarse`` where only the coarse label is given (a few genes tell T cells
from others, but not their kinds), or ``no``: the type only keeps its cells from getting the label of another type.
The result, TABLES/STUDY.csv with the ``row`` (from 0), ``label`` and ``coarse`` of every such cell (empty where nothing
is certain), is used in a recipe as ``obs`` of its [[data.study]]; cells that it does not list keep the labels of the
study. ``--copies`` also writes STUDY.h5ad with these labels as ``label`` (the coarse one where there is no finer), for
programs that read files alone, such as a baseline. The same file, scanpy and igraph give the same labels.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

# A cluster is labelled if the score of its best type exceeds every other by this much, in standard deviations.
MIN_LEAD = 0.2
N_NEIGHBOURS = 15


def score_markers(adata: ad.AnnData, markers: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean z-score of the markers of each type (columns) in each cell (rows)."""
    scores = {}
    for label, text in markers["markers"].items():
        signs = {gene.removeprefix("-"): -1.0 if gene.startswith("-") else 1.0 for gene in text.split()}
        genes = [gene for gene in signs if gene in adata.var_names]
        values = adata[:, genes].to_df()
        # The added tenth keeps the z-scores of rare genes from varying with single counts.
        z = (values - values.mean()) / (values.std() + 0.1) * [signs[gene] for gene in genes]
        scores[label] = z.mean(axis=1)
    return pd.DataFrame(scores).dropna(axis=1)


def cluster_cells(adata: ad.AnnData, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the Leiden cluster of each cell, and weights of its neighbours ``[cells, cells]`` (rows sum to one)."""
    sc.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars // 2))
    sc.pp.pca(adata, n_comps=30, random_state=0)
    sc.pp.neighbors(adata, n_neighbors=N_NEIGHBOURS, random_state=0)
    sc.tl.leiden(adata, resolution=resolution, random_state=0, flavor="igraph", n_iterations=-1)
    weights = (adata.obsp["connectivities"] > 0).astype(float).toarray() + np.eye(adata.n_obs)
    return adata.obs["leiden"].to_numpy().astype(int), weights / weights.sum(axis=1, keepdims=True)


def label_cells(adata: ad.AnnData, markers: pd.DataFrame, resolution: float) -> pd.Series:
    """Return the type of each cell by its cluster, empty where cluster and neighbours disagree."""
    scores = score_markers(adata, markers)
    cluster, weights = cluster_cells(adata, resolution)
    mean = scores.groupby(cluster).mean()
    ranked = np.sort(mean.to_numpy(), axis=1)
    label = mean.idxmax(axis=1).where(ranked[:, -1] - ranked[:, -2] >= MIN_LEAD, "")
    label = label.where(label.map(markers["given"]).isin(["yes", "coarse"]), "")
    by_cluster = label.reindex(cluster).to_numpy()
    by_neighbours = scores.columns.to_numpy()[(weights @ scores.to_numpy()).argmax(axis=1)]
    return pd.Series(np.where(by_cluster == by_neighbours, by_cluster, ""), index=adata.obs_names, dtype=object)


def label_study(study: Path, markers: pd.DataFrame, vague: list[str], resolution: float) -> pd.DataFrame:
    """Return a table of ``label`` and ``coarse`` for the cells of a study that have no label, or a vague one."""
    adata = ad.read_h5ad(study)
    if adata.uns.get("x_is", "counts") == "counts":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    unlabelled = adata.obs["label"].astype(str).isin(["", "nan", *vague]).to_numpy()
    table = label_cells(adata, markers, resolution).to_frame("label").set_axis(range(adata.n_obs))[unlabelled]
    table["coarse"] = table["label"].map(markers["coarse"]).fillna("")
    table["label"] = table["label"].where(table["label"].map(markers["given"]) == "yes", "")
    return table.rename_axis("row")


def write_copy(study: Path, labels: pd.Series, folder: Path) -> None:
    """Copy a study with other labels for some of its cells (by row)."""
    folder.mkdir(parents=True, exist_ok=True)
    adata = ad.read_h5ad(study)
    label = adata.obs["label"].astype(str).to_numpy(dtype=object)
    label[labels.index] = labels
    adata.obs["label"] = label
    adata.write_h5ad(folder / study.name)


def main() -> None:
    """Read the studies, label their cells, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path, nargs="+")
    parser.add_argument("--markers", type=Path, required=True)
    parser.add_argument("--vague", action="append", default=[], help="a label of the studies not to keep")
    parser.add_argument("--resolution", type=float, default=2.0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--copies", type=Path, help="folder for copies of the studies with these labels")
    args = parser.parse_args()
    markers = pd.read_csv(args.markers, sep="\t", index_col="label")
    args.output.mkdir(parents=True, exist_ok=True)
    for study in args.study:
        table = label_study(study, markers, args.vague, args.resolution)
        file = args.output / f"{study.stem}.csv"
        table.to_csv(file)
        labels = table["label"].where(table["label"] != "", table["coarse"])
        print(f"{file}: {int((labels != '').sum())} of {len(table)} cells named")
        print(labels.value_counts().to_string())
        if args.copies is not None:
            write_copy(study, labels, args.copies)


if __name__ == "__main__":
    main()

"""A corpus of any size, made in seconds from some real cells: what loaders are measured on."""

import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

import scmulan
from scmulan.corpus.finish import write_manifest, write_table
from scmulan.corpus.kernels import fold
from scmulan.corpus.shards import ShardWriter, sha256
from scmulan.corpus.store import VOCABULARY
from scmulan.jit import compiled
from scmulan.language.genes import GeneTable
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.outputs import atomic_path

GENES = 5000
SHARD_CELLS = 60_000
BLOCK = 10_000
# Words that the average cell has.
WORDS = 600
TYPES = ("B cell", "T cell", "monocyte", "natural killer cell", "fibroblast", "epithelial cell")
ORGANS = ("Blood", "Lung", "Breast", "Colon")
DONORS = 4


def real_cells(genes: int = GENES) -> tuple[list[str], sp.csr_matrix]:
    """Some thousand real cells in the genes that most of them have, or cells drawn from rates where none are at hand.

    Returns
    -------
    names : list of str
        Approved symbols of the genes.
    cells : scipy.sparse.csr_matrix
        Counts, float32 ``[cells, genes]``, of 200 words or more each.
    """
    root = Path(scmulan.__file__).resolve().parents[2]
    folder = Path(os.environ.get("SCMULAN_SHARED", root.parent / "shared")) / "data" / "train"
    files = [folder / f"{name}.h5ad" for name in ("10x_pbmc4k", "kim2020_lung_adenocarcinoma", "wu2021_breast_tumour")]
    table = GeneTable.load()
    if not all(file.is_file() for file in files):
        rng = np.random.default_rng(0)
        rates = rng.gamma(0.25, 0.6, (40, 1, genes)) * rng.lognormal(0, 0.4, (40, 50, 1))
        counts = rng.poisson(rates.reshape(-1, genes)).astype(np.float32)
        return table.symbols[:genes], sp.csr_matrix(counts)
    parts = []
    for file in files:
        adata = ad.read_h5ad(file)
        if adata.uns["x_is"] == "counts":
            symbols = table.resolve(adata.var_names)
            place = {name: i for i, name in enumerate(table.symbols)}
            columns = np.array([-1 if s is None else place[s] for s in symbols], dtype=np.int32)
            block = sp.csr_matrix(adata.X, dtype=np.float32)
            lengths, gene, value, _, _ = fold(block, columns, len(place), logged=False)
            indptr = np.r_[0, np.cumsum(lengths)]
            parts.append(sp.csr_matrix((np.rint(value), gene, indptr), shape=(len(lengths), len(place))))
    cells = sp.csr_matrix(sp.vstack(parts))
    most = np.sort(np.argsort(-np.diff(cells.tocsc().indptr), kind="stable")[:genes])
    cells = sp.csr_matrix(cells[:, most])
    cells.eliminate_zeros()
    cells = cells[np.diff(cells.indptr) >= 200]
    cells.sort_indices()
    return [table.symbols[i] for i in most], cells


@compiled()
def _resample(indptr, indices, data, wanted, seed, length, gene, value):
    np.random.seed(seed)
    n = 0
    for row in range(len(wanted)):
        one, two = np.random.randint(len(indptr) - 1), np.random.randint(len(indptr) - 1)
        # Words of two real cells, thinned to the wanted number: genes that occur together, no cell like another.
        a, b = indptr[one], indptr[two]
        both = indptr[one + 1] - a + indptr[two + 1] - b
        keep = min(wanted[row] / both, 1.0)
        first = n
        while a < indptr[one + 1] or b < indptr[two + 1]:
            g, x = 1 << 30, 0.0
            if a < indptr[one + 1]:
                g = indices[a]
            if b < indptr[two + 1] and indices[b] < g:
                g = indices[b]
            if a < indptr[one + 1] and indices[a] == g:
                x += data[a]
                a += 1
            if b < indptr[two + 1] and indices[b] == g:
                x += data[b]
                b += 1
            if np.random.random() < keep:
                gene[n] = g
                value[n] = x
                n += 1
        length[row] = n - first
    return n


def resampled(cells: sp.csr_matrix, number: int, seed: int, words: int = WORDS) -> tuple[np.ndarray, ...]:
    """Draw cells of about so many words on average: lengths, gene and value, as ragged arrays."""
    rng = np.random.default_rng(seed)
    wanted = np.clip(rng.lognormal(np.log(words), 0.45, number), 50, 3 * words)
    size = number * 2 * int(np.diff(cells.indptr).max())
    gene, value = np.empty(size, np.int32), np.empty(size, np.float32)
    length = np.zeros(number, np.int64)
    n = _resample(cells.indptr, cells.indices, cells.data, wanted, seed, length, gene, value)
    return length, gene[:n], value[:n]


def synthetic_corpus(out: Path, cells: int, *, seed: int = 0) -> Path:
    """Write a corpus of cells that are resampled from real ones, with eight studies of four donors each.

    Parameters
    ----------
    out
        Folder to write; replaced if it exists.
    cells
        Number of cells, of about 600 words on average.
    seed
        Of the drawing.

    Returns
    -------
    Path
        ``out``.
    """
    names, source = real_cells()
    vocabulary = Vocabulary.build(names, {Family.ORGAN: ORGANS, Family.COARSE: TYPES, Family.FINE: TYPES})
    studies = 8
    donors = [(f"study {i}", f"donor {j}") for i in range(studies) for j in range(DONORS)]
    with atomic_path(out) as folder:
        (folder / "shards").mkdir(parents=True)
        vocabulary.save(folder / VOCABULARY)
        shards: list[dict[str, Any]] = []
        bounds = np.linspace(0, cells, studies + 1).astype(np.int64)
        for study in range(studies):
            for first in range(bounds[study], bounds[study + 1], SHARD_CELLS):
                number = min(SHARD_CELLS, int(bounds[study + 1]) - first)
                name = f"shards/{len(shards):05d}.safetensors"
                record = _write(folder / name, number, source, vocabulary, study, (seed, len(shards)))
                shards.append({"file": name, "study": study, "first": first - int(bounds[study]), **record})
        write_table(folder, shards, np.ones((studies, len(names)), bool), None)
        about = [
            {"name": f"study {i}", "cells": int(bounds[i + 1] - bounds[i]), "covered": 1.0} for i in range(studies)
        ]
        write_manifest(folder, shards, {"studies": about, "donors": donors, "settings": {"synthetic": cells}})
    return Path(out)


def _write(
    path: Path, cells: int, source: sp.csr_matrix, vocabulary: Vocabulary, study: int, seed: tuple[int, int]
) -> dict[str, Any]:
    rng = np.random.default_rng((*seed, 1))
    with path.open("wb") as file:
        writer = ShardWriter(file, cells, "counts")
        for start in range(0, cells, BLOCK):
            n = min(BLOCK, cells - start)
            drawn = int(np.random.default_rng((*seed, 2, start)).integers(2**31))
            lengths, gene, value = resampled(source, n, drawn)
            total = np.add.reduceat(value, np.r_[0, np.cumsum(lengths)[:-1]])
            metadata = np.full((n, len(METADATA)), -1, np.int32)
            for family in (Family.ORGAN, Family.COARSE, Family.FINE):
                metadata[:, METADATA.index(family)] = rng.choice(vocabulary.ids(family), n)
            metadata[:, METADATA.index(Family.COARSE)] = (
                metadata[:, METADATA.index(Family.FINE)]
                + vocabulary.ids(Family.COARSE)[0]
                - vocabulary.ids(Family.FINE)[0]
            )
            donor = DONORS * study + rng.integers(DONORS, size=n)
            writer.add(lengths, gene, value, total=total, donor=donor, metadata=metadata)
        words = writer.finish({"study": str(study)})
    return {
        "encoding": "counts",
        "cells": cells,
        "words": words,
        "rounded": writer.rounded,
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
    }

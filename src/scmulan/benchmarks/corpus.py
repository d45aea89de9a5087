"""Building a corpus: cells per second, memory and bytes, from h5ad files that are made for it.

A corpus of any size, made in seconds from some real cells: what loaders are measured on.
"""

import contextlib
import multiprocessing
import os
import re
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import sparse_dataset, write_elem

import scmulan
from scmulan._io.outputs import atomic_path, sha256
from scmulan._numba import compiled
from scmulan.data.build import build, write_manifest, write_table
from scmulan.data.shards import ShardWriter, fold
from scmulan.data.spec import read_corpus_spec
from scmulan.data.store import VOCABULARY
from scmulan.vocab.genes import GeneTable
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

# Cells of a file, its genes, and the genes that a cell shows: as of a 10x library.
FILE_CELLS = 125_000
FILE_GENES = 18_000
FILE_WORDS = 1000
GENES = 4000


def run(*, quick: bool = False, cells: int | None = None, jobs: int | None = None) -> dict[str, Any]:
    """Make h5ad files, build a corpus from them with a new vocabulary, and say what that took.

    Parameters
    ----------
    quick
        20,000 cells, if ``cells`` says nothing else.
    cells
        Number of cells; 1,000,000 by default.
    jobs
        Processes; as many as there are cores by default.

    Returns
    -------
    dict
        ``cells_per_second``; ``peak_mib`` (of the largest process), ``processes``; ``cells``; ``bytes_per_cell`` of the
        corpus, ``input_bytes_per_cell``; ``seconds`` of each step; ``machine``.
    """
    from scmulan.benchmarks.ceiling import machine  # torch, which the process that is measured does not need

    cells = cells or (20_000 if quick else 1_000_000)
    jobs = jobs or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="scmulan-bench-") as name:
        folder = Path(name)
        studies = _files(folder, cells)
        text = f"genes = {GENES}\nshard_cells = {min(60_000, -(-cells // (2 * jobs)))}\n"
        text += '[columns]\norgan = "organ"\nfine_type = "type"\ndonor = "donor"\n'
        text += "".join(f'[[study]]\nfile = "{file}"\n' for file in studies)
        (folder / "spec.toml").write_text(text, encoding="utf-8")
        # A process of its own: what it takes is what the build takes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, peak, size = pool.submit(_build, folder, jobs).result()
        inputs = sum((folder / file).stat().st_size for file in studies)
    return {
        "cells": cells,
        "cells_per_second": round(cells / sum(seconds.values()), 1),
        "peak_mib": round(peak, 1),
        "processes": jobs,
        "bytes_per_cell": round(size / cells, 1),
        "input_bytes_per_cell": round(inputs / cells, 1),
        "seconds": {step: round(spent, 2) for step, spent in seconds.items()},
        "files": len(studies),
        "machine": machine(quick=quick),
    }


def _build(folder: Path, jobs: int) -> tuple[dict[str, float], float, int]:
    """Seconds of each step, MiB of the largest process, bytes of the corpus."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def progress(step: str, _: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[step] = seconds.get(step, 0.0) + now - last
        last = now

    peaks: dict[int, float] = {}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done, peaks))
    watcher.start()
    try:
        manifest = build(read_corpus_spec(folder / "spec.toml"), folder / "out", jobs=jobs, progress=progress)
    finally:
        done.set()
        watcher.join()
    seconds["finish"] = time.perf_counter() - last
    return seconds, max(peaks.values()), sum(entry["bytes"] for entry in manifest["files"].values())


def _watch(done: threading.Event, peaks: dict[int, float]) -> None:
    """Note the high-water mark of this process and its workers (``getrusage`` would count that of their parents)."""
    while True:
        for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
            with contextlib.suppress(OSError, TypeError):  # it has just ended
                found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
                peaks[pid or 0] = int(found[1]) / 1024  # type: ignore[index]
        if done.wait(0.05):
            return


def _files(folder: Path, cells: int) -> list[str]:
    """Write h5ad files of resampled cells, block by block; return their names."""
    names, source = real_cells(FILE_GENES)
    var = pd.DataFrame(index=pd.Index(names, dtype=object))
    rng = np.random.default_rng(0)
    files: list[str] = []
    for first in range(0, cells, FILE_CELLS):
        n = min(FILE_CELLS, cells - first)
        obs = {
            "organ": pd.Categorical(rng.choice(ORGANS, n)),
            "type": pd.Categorical(rng.choice(TYPES, n)),
            "donor": pd.Categorical([f"donor {i}" for i in rng.integers(DONORS, size=n)]),
        }
        index = pd.Index([f"cell {i}" for i in range(n)], dtype=object)
        name = f"study_{len(files):03d}.h5ad"
        ad.AnnData(obs=pd.DataFrame(obs, index=index), var=var).write_h5ad(folder / name)
        with h5py.File(folder / name, "r+") as file:
            settings = {"indptr_dtype": np.int64, "chunks": (2**18,)}
            write_elem(file, "X", sp.csr_matrix((0, len(names)), dtype=np.float32), dataset_kwargs=settings)
            stored: Any = sparse_dataset(file["X"])
            for start in range(0, n, BLOCK):
                lengths, gene, value = resampled(source, min(BLOCK, n - start), first + start, FILE_WORDS)
                indptr = np.r_[0, np.cumsum(lengths)]
                stored.append(sp.csr_matrix((value, gene, indptr), shape=(len(lengths), len(names))))
        files.append(name)
    return files


SYNTHETIC_GENES = 5000
SHARD_CELLS = 60_000
BLOCK = 10_000
# Words that the average cell has.
WORDS = 600
TYPES = ("B cell", "T cell", "monocyte", "natural killer cell", "fibroblast", "epithelial cell")
ORGANS = ("Blood", "Lung", "Breast", "Colon")
DONORS = 4


def real_cells(genes: int = SYNTHETIC_GENES) -> tuple[list[str], sp.csr_matrix]:
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

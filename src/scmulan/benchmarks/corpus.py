"""Corpus build: cells per second, memory and bytes, from h5ad files that are made for it.

:func:`synthetic_corpus` writes a corpus of any size from some real cells within seconds, for the loader's benchmark.
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
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
from scmulan._progress import Advance, Progress
from scmulan.data.build import Shard, build, write_manifest, write_table
from scmulan.data.shards import FoldedCells, ShardWriter, fold
from scmulan.data.spec import read_corpus_spec
from scmulan.data.store import VOCABULARY
from scmulan.vocab.genes import GeneTable
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

FILE_CELLS = 125_000
FILE_GENES = 18_000
FILE_TOKENS = 1000
"""Genes expressed by the average cell, as in a 10x library."""
VOCABULARY_GENES = 4000


def run(*, quick: bool = False, cells: int | None = None, jobs: int | None = None) -> dict[str, Any]:
    """Make h5ad files, and measure the build of a corpus with a new vocabulary from them.

    Parameters
    ----------
    quick
        20,000 cells by default.
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
        text = f"genes = {VOCABULARY_GENES}\nshard_cells = {min(60_000, -(-cells // (2 * jobs)))}\n"
        text += '[columns]\norgan = "organ"\nfine_type = "type"\ndonor = "donor"\n'
        text += "".join(f'[[study]]\nfile = "{file}"\n' for file in studies)
        (folder / "spec.toml").write_text(text, encoding="utf-8")
        # A process of its own: its memory is that of the build.
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


class _StepTimes(Progress):
    """Progress that measures the seconds of each step of a build."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def bar(self, total: int, unit: str = "cells") -> Iterator[Advance]:
        """Measure while the context is open."""
        start = time.perf_counter()
        yield lambda finished: None
        step = {"files surveyed": "look", "cells added up": "genes", "cells written": "write"}[unit]
        self.seconds[step] = time.perf_counter() - start


def _build(folder: Path, jobs: int) -> tuple[dict[str, float], float, int]:
    """Return the seconds of each step, MiB of the largest process, bytes of the corpus."""
    steps = _StepTimes()
    peaks: dict[int, float] = {}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done, peaks))
    watcher.start()
    start = time.perf_counter()
    try:
        manifest = build(read_corpus_spec(folder / "spec.toml"), folder / "out", jobs=jobs, progress=steps)
    finally:
        done.set()
        watcher.join()
    rest = time.perf_counter() - start - sum(steps.seconds.values())
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return {**steps.seconds, "finish": rest}, max(peaks.values()), size


def _watch(done: threading.Event, peaks: dict[int, float]) -> None:
    """Record the peak memory of this process and its workers (``getrusage`` would count that of their parents)."""
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
            for start in range(0, n, BLOCK_CELLS):
                drawn = resample(source, min(BLOCK_CELLS, n - start), first + start, FILE_TOKENS)
                stored.append(drawn.to_csr(len(names)))
        files.append(name)
    return files


SYNTHETIC_GENES = 5000
SHARD_CELLS = 60_000
BLOCK_CELLS = 10_000
MEAN_TOKENS = 600
"""Gene tokens of the average synthetic cell."""
STUDIES = 8
TYPES = ("B cell", "T cell", "monocyte", "natural killer cell", "fibroblast", "epithelial cell")
ORGANS = ("Blood", "Lung", "Breast", "Colon")
DONORS = 4


def real_cells(genes: int = SYNTHETIC_GENES) -> tuple[list[str], sp.csr_matrix]:
    """Read some thousand real cells in the genes that most of them express; draw cells from rates where there are none.

    Returns
    -------
    names : list of str
        Approved symbols of the genes.
    cells : scipy.sparse.csr_matrix
        Counts, float32 ``[cells, genes]``; at least 200 genes per cell.
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
            index = {name: i for i, name in enumerate(table.symbols)}
            symbols = table.resolve(adata.var_names)
            columns = np.array([-1 if s is None else index[s] for s in symbols], dtype=np.int32)
            part = fold(sp.csr_matrix(adata.X, dtype=np.float32), columns, len(index), logged=False).to_csr(len(index))
            part.data = np.rint(part.data)
            parts.append(part)
    cells = sp.csr_matrix(sp.vstack(parts))
    common = np.sort(np.argsort(-np.diff(cells.tocsc().indptr), kind="stable")[:genes])
    cells = sp.csr_matrix(cells[:, common])
    cells.eliminate_zeros()
    cells = cells[np.diff(cells.indptr) >= 200]
    cells.sort_indices()
    return [table.symbols[i] for i in common], cells


@compiled()
def _resample(indptr, indices, data, wanted, seed, length, gene, value):
    np.random.seed(seed)
    n = 0
    for row in range(len(wanted)):
        one, two = np.random.randint(len(indptr) - 1), np.random.randint(len(indptr) - 1)
        # Tokens of two real cells, thinned to the wanted number: genes that occur together, no cell like another.
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


def resample(cells: sp.csr_matrix, number: int, seed: int, mean_tokens: int = MEAN_TOKENS) -> FoldedCells:
    """Draw cells of about ``mean_tokens`` tokens on average."""
    rng = np.random.default_rng(seed)
    wanted = np.clip(rng.lognormal(np.log(mean_tokens), 0.45, number), 50, 3 * mean_tokens)
    size = number * 2 * int(np.diff(cells.indptr).max())
    gene, value = np.empty(size, np.int32), np.empty(size, np.float32)
    lengths = np.zeros(number, np.int64)
    n = _resample(cells.indptr, cells.indices, cells.data, wanted, seed, lengths, gene, value)
    total = np.add.reduceat(value[:n], np.r_[0, np.cumsum(lengths)[:-1]])
    return FoldedCells(lengths, gene[:n], value[:n], total, total)


def synthetic_corpus(out: Path, cells: int, *, seed: int = 0) -> Path:
    """Write a corpus of cells that are resampled from real ones, with eight studies of four donors each.

    Parameters
    ----------
    out
        Folder to write; replaced if it exists.
    cells
        Number of cells, of about 600 tokens on average.
    seed
        Of the drawing.

    Returns
    -------
    Path
        ``out``.
    """
    names, source = real_cells()
    vocabulary = Vocabulary.build(names, {Family.ORGAN: ORGANS, Family.COARSE: TYPES, Family.FINE: TYPES})
    donors = [(f"study {i}", f"donor {j}") for i in range(STUDIES) for j in range(DONORS)]
    with atomic_path(out) as folder:
        (folder / "shards").mkdir(parents=True)
        vocabulary.save(folder / VOCABULARY)
        shards: list[Shard] = []
        bounds = np.linspace(0, cells, STUDIES + 1).astype(np.int64).tolist()
        for study, (first_cell, end) in enumerate(itertools.pairwise(bounds)):
            for first in range(first_cell, end, SHARD_CELLS):
                name = f"shards/{len(shards):05d}.safetensors"
                number = min(SHARD_CELLS, end - first)
                shard = _write_shard(folder / name, number, source, vocabulary, study, (seed, len(shards)))
                shards.append({**shard, "file": name, "study": study, "first": first - first_cell})
        write_table(folder, shards, np.ones((STUDIES, len(names)), bool))
        studies = [
            {"name": f"study {i}", "cells": end - first, "covered": 1.0}
            for i, (first, end) in enumerate(itertools.pairwise(bounds))
        ]
        write_manifest(folder, shards, {"studies": studies, "donors": donors, "settings": {"synthetic": cells}})
    return Path(out)


def _write_shard(
    path: Path, cells: int, source: sp.csr_matrix, vocabulary: Vocabulary, study: int, seed: tuple[int, int]
) -> Shard:
    rng = np.random.default_rng((*seed, 1))
    with path.open("wb") as file:
        writer = ShardWriter(file, cells, "counts")
        for start in range(0, cells, BLOCK_CELLS):
            n = min(BLOCK_CELLS, cells - start)
            drawn = resample(source, n, int(np.random.default_rng((*seed, 2, start)).integers(2**31)))
            metadata = np.full((n, len(METADATA)), -1, np.int32)
            for family in (Family.ORGAN, Family.COARSE, Family.FINE):
                metadata[:, METADATA.index(family)] = rng.choice(vocabulary.ids(family), n)
            metadata[:, METADATA.index(Family.COARSE)] = (
                metadata[:, METADATA.index(Family.FINE)]
                + vocabulary.ids(Family.COARSE)[0]
                - vocabulary.ids(Family.FINE)[0]
            )
            donor = DONORS * study + rng.integers(DONORS, size=n)
            writer.add(drawn, donor=donor, metadata=metadata)
        tokens = writer.finish({"study": str(study)})
    return Shard(
        encoding="counts",
        cells=cells,
        words=tokens,
        rounded=writer.rounded,
        sha256=sha256(path),
        bytes=path.stat().st_size,
    )

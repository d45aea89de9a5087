"""Building a corpus: cells per second, memory and bytes, from h5ad files that are made for it."""

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

from scmulan.benchmarks.synthetic import BLOCK, DONORS, ORGANS, TYPES, real_cells, resampled
from scmulan.corpus.build import build
from scmulan.corpus.spec import read_corpus_spec

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

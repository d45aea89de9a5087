"""Batches of words from a corpus on disk, cold and warm, beside AnnData's own loader on the same cells."""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scmulan._machine import cpu
from scmulan.benchmarks.ceiling import machine
from scmulan.benchmarks.corpus import synthetic_corpus
from scmulan.data.loader import LoadedBatch, Loader
from scmulan.data.sampling import EpochOrder
from scmulan.data.store import Corpus

BATCH = 256


def run(*, quick: bool = False, cells: int | None = None, folder: str | None = None) -> dict[str, Any]:
    """Read shuffled batches of 256 cells, as words, in the order in which training would.

    Parameters
    ----------
    quick
        50,000 cells, if ``cells`` says nothing else.
    cells
        Number of cells; 1,000,000 by default.
    folder
        Where the corpus is written for the time of the run (default: the system's folder for such files, which should
        be on a disk).

    Returns
    -------
    dict
        ``cells_per_second_cold`` (nothing of the corpus in memory), ``cells_per_second_warm``, ``ratio_anndata`` (warm,
        over AnnLoader on a backed h5ad), ``ratio_anndata_memory`` (over AnnLoader on cells in memory), ``padding`` (of
        batches by the order's length buckets), ``words_per_cell``, ``bytes_per_cell``.
    """
    cells = cells or (50_000 if quick else 1_000_000)
    threads = 4 * int(cpu()["usable_cores"])  # while the corpus is cold, most of them wait for the disk
    with tempfile.TemporaryDirectory(prefix="scmulan-bench-", dir=folder) as name:
        path = synthetic_corpus(Path(name) / "corpus", cells, seed=0)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        _warm_up(path)
        _forget(path)
        corpus = Corpus(path)
        loader = Loader(corpus, EpochOrder(corpus.lengths, 0, batch=BATCH), workers=threads)
        cold, _ = _cells_per_second(loader.epoch(0))
        warm, lengths = _cells_per_second(loader.epoch(1))
        backed, memory = _anndata(corpus, Path(name) / "some.h5ad", 512 if quick else 2048)
    longest = [int(batch.max()) * len(batch) for batch in lengths]
    return {
        "machine": machine(quick=quick),
        "cells": cells,
        "batch": BATCH,
        "threads": threads,
        "cells_per_second_cold": round(cold),
        "cells_per_second_warm": round(warm),
        "cells_per_second_anndata": round(backed, 1),
        "cells_per_second_anndata_memory": round(memory, 1),
        "ratio_anndata": round(warm / backed, 1),
        "ratio_anndata_memory": round(warm / memory, 1),
        "padding": round(1 - sum(int(batch.sum()) for batch in lengths) / sum(longest), 4),
        "words_per_cell": round(sum(int(batch.sum()) for batch in lengths) / sum(map(len, lengths)), 1),
        "bytes_per_cell": round(size / cells, 1),
    }


def _warm_up(path: Path) -> None:
    """Compile, on a corpus that is then closed: pages in use could not be dropped."""
    corpus = Corpus(path)
    Loader(corpus, EpochOrder(corpus.lengths, 0, batch=BATCH), workers=0).batch(0, 0)


def _forget(path: Path) -> None:
    """Write what is not yet on disk, and drop the files of a folder from the system's page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cells_per_second(batches: Iterator[LoadedBatch]) -> tuple[float, list[np.ndarray]]:
    start = time.perf_counter()
    lengths = [batch.words.lengths for batch in batches]
    return sum(map(len, lengths)) / (time.perf_counter() - start), lengths


def _anndata(corpus: Corpus, file: Path, number: int) -> tuple[float, float]:
    """Cells per second of AnnLoader, shuffled batches of the same size: backed by an h5ad, and in memory.

    It gives expression values; making words of them would come on top.
    """
    from anndata.experimental import AnnLoader

    chosen = np.arange(min(len(corpus), 20_000))
    index = pd.Index([str(i) for i in chosen], dtype=object)
    memory = ad.AnnData(corpus.rows(chosen), obs=pd.DataFrame(index=index))
    memory.write_h5ad(file)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata and torch about each other
        for adata in (ad.read_h5ad(file, backed="r"), memory):
            start = time.perf_counter()
            batches = AnnLoader(adata, batch_size=BATCH, shuffle=True)
            read = sum(batch.X.shape[0] for batch in islice(iter(batches), -(-number // BATCH)))
            found.append(read / (time.perf_counter() - start))
    return found[0], found[1]

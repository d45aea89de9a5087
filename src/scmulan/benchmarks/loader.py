"""Training batches from a corpus on disk, cold and warm, beside AnnData's own loader on the same cells."""

import os
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scmulan.benchmarks.ceiling import machine
from scmulan.benchmarks.corpus import synthetic_corpus
from scmulan.data.store import Corpus
from scmulan.train.batches import BatchConfig, Batches

ANNDATA_BATCH = 256
ANNDATA_CELLS = 20_000


def run(*, quick: bool = False, cells: int | None = None, folder: str | None = None) -> dict[str, Any]:
    """Time the batches of two epochs as training gets them: read, varied, binned, padded, with their targets.

    Parameters
    ----------
    quick
        50,000 cells by default, and fewer of AnnData's batches.
    cells
        Number of cells; 1,000,000 by default.
    folder
        Where the corpus is written for the time of the run (default: the system's folder for such files, which should
        be on a disk).

    Returns
    -------
    dict
        ``cells_per_second_cold``, ``tokens_per_second_cold`` (first epoch, nothing of the corpus in memory),
        ``cells_per_second_warm``, ``tokens_per_second_warm`` (second epoch), ``ratio_anndata`` (warm cells per second
        over AnnLoader on a backed h5ad), ``ratio_anndata_memory`` (over AnnLoader on cells in memory), ``padding``
        (fraction of a batch), ``tokens_per_sentence``, ``bytes_per_cell``.
    """
    cells = cells or (50_000 if quick else 1_000_000)
    with tempfile.TemporaryDirectory(prefix="scmulan-bench-", dir=folder) as name:
        path = synthetic_corpus(Path(name) / "corpus", cells, seed=0)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        _compile(path)
        _drop_from_memory(path)
        corpus = Corpus(path)
        batches = Batches(corpus, corpus.vocabulary, BatchConfig(order="epoch"), seed=0)
        cold = _time_epoch(batches, 0)
        warm = _time_epoch(batches, 1)
        backed, memory = _anndata(corpus, Path(name) / "some.h5ad", 512 if quick else 2048)
    return {
        "machine": machine(quick=quick),
        "cells": cells,
        "steps": batches.epoch_steps,
        "cells_per_second_cold": round(cold["cells"] / cold["seconds"]),
        "cells_per_second_warm": round(warm["cells"] / warm["seconds"]),
        "tokens_per_second_cold": round(cold["tokens"] / cold["seconds"]),
        "tokens_per_second_warm": round(warm["tokens"] / warm["seconds"]),
        "cells_per_second_anndata": round(backed, 1),
        "cells_per_second_anndata_memory": round(memory, 1),
        "ratio_anndata": round(warm["cells"] / warm["seconds"] / backed, 1),
        "ratio_anndata_memory": round(warm["cells"] / warm["seconds"] / memory, 1),
        "padding": round(1 - warm["tokens"] / warm["padded"], 4),
        "tokens_per_sentence": round(warm["tokens"] / warm["cells"], 1),
        "bytes_per_cell": round(size / cells, 1),
    }


def _compile(path: Path) -> None:
    """Compile all loops, on a corpus that is then closed: pages in use could not be dropped."""
    corpus = Corpus(path)
    tasks = BatchConfig().tasks
    for task in tasks:
        Batches(corpus, corpus.vocabulary, BatchConfig(tasks={task: 1.0}, prefetch=0), seed=0).batch(0)


def _drop_from_memory(path: Path) -> None:
    """Write what is not yet on disk, and drop the files of a folder from the system's page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _time_epoch(batches: Batches, epoch: int) -> dict[str, float]:
    """Take all batches of an epoch; return their cells, tokens with and without padding, and seconds."""
    cells = tokens = padded = 0
    start = time.perf_counter()
    for step in range(epoch * batches.epoch_steps, (epoch + 1) * batches.epoch_steps):
        batch = batches.batch(step)
        cells += batch.all_cells
        tokens += batch.tokens
        padded += batch.entity.numel()
    return {"cells": cells, "tokens": tokens, "padded": padded, "seconds": time.perf_counter() - start}


def _anndata(corpus: Corpus, file: Path, number: int) -> tuple[float, float]:
    """Return the cells per second of AnnLoader in shuffled batches: backed by an h5ad, and in memory.

    It gives expression values; making training batches of them would come on top.
    """
    from anndata.experimental import AnnLoader

    chosen = np.arange(min(len(corpus), ANNDATA_CELLS))
    index = pd.Index([str(i) for i in chosen], dtype=object)
    memory = ad.AnnData(corpus.rows(chosen), obs=pd.DataFrame(index=index))
    memory.write_h5ad(file)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata and torch about each other
        for adata in (ad.read_h5ad(file, backed="r"), memory):
            start = time.perf_counter()
            batches = AnnLoader(adata, batch_size=ANNDATA_BATCH, shuffle=True)
            read = sum(batch.X.shape[0] for batch in islice(iter(batches), -(-number // ANNDATA_BATCH)))
            found.append(read / (time.perf_counter() - start))
    return found[0], found[1]

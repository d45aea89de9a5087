"""Expression to tokens: the compiled pass beside vectorised scipy and the release's cell-by-cell way."""

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan.benchmarks.ceiling import machine
from scmulan.vocab.binning import LEVELS, TARGET_SUM, GeneTokens, tokenize

GENES, VOCABULARY, NON_ZEROS = 20_000, 2_000, 1_500
T = TypeVar("T")


def run(*, quick: bool = False) -> dict[str, object]:
    """Measure cells per second of one core; every way reads the same counts and has to give the same tokens.

    Seconds are CPU time, so that a busy machine does not make them longer.
    """
    cells = 2_000 if quick else 20_000
    few = 100 if quick else 500
    matrix, columns = synthetic_cells(cells)
    part = matrix[:few]
    logged = matrix.copy()
    logged.data = np.log1p(logged.data)
    tokenize(part, columns, VOCABULARY, matrix_kind="counts")  # compiles
    repeats = 3 if quick else 5
    ours, tokens = _seconds(lambda: tokenize(matrix, columns, VOCABULARY, matrix_kind="counts"), repeats)
    log_seconds, _ = _seconds(lambda: tokenize(logged, columns, VOCABULARY, matrix_kind="log1p"), repeats)
    scipy_seconds, scipy_tokens = _seconds(lambda: with_scipy(matrix, columns, VOCABULARY), repeats)
    first_seconds, first_tokens = _seconds(lambda: with_scipy(matrix, columns, VOCABULARY, subset_first=True), repeats)
    release_seconds, release_tokens = _seconds(lambda: as_released(part, columns, VOCABULARY), 2)
    some = GeneTokens(tokens.indptr[: few + 1], tokens.gene, tokens.level, tokens.maximum, tokens.covered)
    pairs = ((tokens, scipy_tokens), (tokens, first_tokens), (some, release_tokens))
    if not all(same_tokens(a, b) for a, b in pairs):
        raise AssertionError("the ways disagree about the words of the same cells")
    return {
        "machine": machine(quick=quick),
        "cells": cells,
        "non_zeros": NON_ZEROS,
        "genes": GENES,
        "vocabulary": VOCABULARY,
        "cells_per_second": round(cells / ours),
        "cells_per_second_log1p": round(cells / log_seconds),
        "cells_per_second_scipy": round(cells / scipy_seconds),
        "cells_per_second_scipy_subset_first": round(cells / first_seconds),
        "cells_per_second_release": round(few / release_seconds),
        "ratio_scipy": round(scipy_seconds / ours, 2),
        "ratio_scipy_subset_first": round(first_seconds / ours, 2),
        "ratio_release": round(release_seconds / few / (ours / cells), 1),
    }


def synthetic_cells(cells: int, seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return counts ``[cells, 20,000]``: 1,500 non-zeros each, mostly ones; a tenth of the genes in the vocabulary."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(GENES, NON_ZEROS, replace=False)) for _ in range(cells)]
    data = rng.geometric(0.6, cells * NON_ZEROS).astype(np.float32)
    indptr = np.arange(0, cells * NON_ZEROS + 1, NON_ZEROS)
    matrix = sp.csr_matrix((data, np.concatenate(rows).astype(np.int32), indptr), shape=(cells, GENES))
    columns = np.full(GENES, -1, dtype=np.int32)
    columns[rng.choice(GENES, VOCABULARY, replace=False)] = np.arange(VOCABULARY)
    return matrix, columns


def with_scipy(matrix: sp.csr_matrix, columns: np.ndarray, genes: int, *, subset_first: bool = False) -> GeneTokens:
    """Tokenise by whole-matrix operations of numpy and scipy.

    In the order of the rule (normalise, log1p, choose genes, bin), or with the genes chosen first, so that logarithms
    are taken of a tenth of the values.
    """
    total = np.asarray(matrix.sum(1, dtype=np.float64)).ravel()
    inside = np.flatnonzero(columns >= 0)
    wanted = inside[np.argsort(columns[inside])]
    chosen = matrix[:, wanted] if subset_first else matrix.copy()
    number = np.diff(chosen.indptr)
    chosen.data = np.log1p(chosen.data * np.repeat(TARGET_SUM / total, number)).astype(np.float32)
    if not subset_first:
        chosen = chosen[:, wanted]
    chosen.sort_indices()
    number, values = np.diff(chosen.indptr), chosen.data
    maximum = np.zeros(len(number), dtype=np.float32)
    some = number > 0
    maximum[some] = np.maximum.reduceat(values, chosen.indptr[:-1][some])
    step = np.repeat(maximum.astype(np.float64) / LEVELS, number)
    # Rounding may put a value on the wrong side of an edge, by one bin: the edges decide.
    level = np.ceil(values / step)
    level -= values <= (level - 1) * step
    level += values > level * step
    level = np.clip(level, 1, LEVELS).astype(np.uint8)
    return GeneTokens(chosen.indptr.astype(np.int64), chosen.indices, level, maximum, total)


def as_released(matrix: sp.csr_matrix, columns: np.ndarray, genes: int) -> GeneTokens:
    """Tokenise as the release does: a dense table of the vocabulary's genes, then a series, names and bins per cell."""
    inside = np.flatnonzero(columns >= 0)
    total = np.asarray(matrix.sum(1, dtype=np.float64)).ravel()
    amounts = matrix[:, inside[np.argsort(columns[inside])]].toarray() * (TARGET_SUM / total)[:, None]
    names = [f"G{i}" for i in range(genes)]
    index = {name: i for i, name in enumerate(names)}
    cells = [f"cell {i}" for i in range(len(total))]
    table = pd.DataFrame(np.log1p(amounts).astype(np.float32), index=cells, columns=names)
    lengths, gene, level = [0], [], []
    for cell in cells:
        series = table.loc[cell]
        expressed = series[series > 0].index.tolist()
        values = series[expressed].values
        expressed_values = dict(zip(expressed, values, strict=True))
        edges = np.linspace(0, np.max(list(expressed_values.values())), LEVELS + 1)
        level.append(np.digitize(list(expressed_values.values()), edges, right=True))
        gene.append([index[name] for name in expressed_values])
        lengths.append(len(expressed_values))
    maximum = table.to_numpy().max(1)
    return GeneTokens(np.cumsum(lengths), np.concatenate(gene), np.concatenate(level), maximum, total)


def same_tokens(a: GeneTokens, b: GeneTokens) -> bool:
    """Return whether two batches have the same genes and levels in every cell."""
    end = a.indptr[-1]
    return (
        np.array_equal(a.indptr, b.indptr)
        and np.array_equal(a.gene[:end], b.gene)
        and np.array_equal(a.level[:end], b.level)
    )


def _seconds(work: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Return the CPU seconds of the fastest run, and its result."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        found = work()
        seconds.append(time.process_time() - start)
    return min(seconds), found

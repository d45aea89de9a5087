"""Growth of annotation's time and memory with cells, with tokens per cell, and with the cells of one pass."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from scmulan.benchmarks.ceiling import machine
from scmulan.infer.batching import TokenBudget
from scmulan.infer.scoring import score_labels
from scmulan.model.loading import LoadedModel, load
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.vocabulary import Family

CELLS = (100, 1_000, 10_000, 100_000)
TOKENS = (100, 200, 400, 800, 1_550)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
# Cells made at a time.
BLOCK_CELLS = 2_048


def run(*, quick: bool = False, plot: Path | None = None) -> dict[str, Any]:
    """Time the small model over each of three quantities, the other two held.

    Parameters
    ----------
    quick
        Fewer and smaller points.
    plot
        Path of a figure of the curves (PNG or SVG; needs matplotlib).

    Returns
    -------
    dict
        ``cells``, ``words`` and ``batch``: points with ``seconds`` and ``mib`` (peak above what the process had), and
        ``exponent``, the slope of log seconds against log n (1 is linear).
    """
    model = load("mini", device="cpu")
    score_labels(model, _sentences(model, 8, 100))
    found = {
        "cells": _curve(model, [(n, n, 100, None) for n in (CELLS[:2] if quick else CELLS)]),
        "words": _curve(model, [(n, 32, n, None) for n in (TOKENS[:3] if quick else TOKENS)]),
        "batch": _curve(model, [(n, max(16 if quick else 128, n), 300, n) for n in (BATCH[:5] if quick else BATCH)]),
    }
    if plot is not None:
        _draw(found, plot)
    return {"machine": machine(quick=quick), "model": "mini", **found, "plot": None if plot is None else str(plot)}


def _curve(model: LoadedModel, points: list[tuple[int, int, int, int | None]]) -> dict[str, Any]:
    """Measure points (n, cells, tokens of each, cells per pass) in turn."""
    out: dict[str, Any] = {"n": [], "seconds": [], "mib": []}
    for n, cells, n_tokens, batch in points:
        budget = None if batch is None else TokenBudget(max_tokens=batch * n_tokens)
        before = _reset_peak()
        start = time.perf_counter()
        for begin in range(0, cells, BLOCK_CELLS):
            score_labels(model, _sentences(model, min(BLOCK_CELLS, cells - begin), n_tokens, seed=begin), budget=budget)
        out["n"].append(n)
        out["seconds"].append(round(time.perf_counter() - start, 3))
        out["mib"].append(None if before is None else round((_peak() - before) / 2**20, 1))
    slope = np.polyfit(np.log(out["n"]), np.log(out["seconds"]), 1)[0]
    return {**out, "exponent": round(float(slope), 2)}


def _sentences(model: LoadedModel, n: int, n_tokens: int, seed: int = 0) -> Sentences:
    """Return annotation prompts of random genes."""
    rng = np.random.default_rng(seed)
    genes, prompt_token = model.vocabulary.ids(Family.GENE).astype(np.int32), model.vocabulary.prompts["annotate"]
    entity = np.empty((n, n_tokens), dtype=np.int32)
    for row in entity:
        row[:-1] = rng.choice(genes, n_tokens - 1, replace=False)
    entity[:, -1] = prompt_token
    value = rng.integers(1, 11, (n, n_tokens)).astype(np.uint8)
    value[:, -1] = 0
    lengths = np.full(n, n_tokens, dtype=np.int64)
    return Sentences(np.arange(n + 1, dtype=np.int64) * n_tokens, entity.ravel(), value.ravel(), lengths)


def _reset_peak() -> int | None:
    """Reset the peak of this process and return its bytes in use; None where the system cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    """Return the peak of this process' memory in bytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {
        "cells": "cells of 100 words",
        "words": "words per cell, 32 cells",
        "batch": "cells of 300 words per pass",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        curve = found[name]
        axis.loglog(curve["n"], curve["seconds"], "o-", color="#1f6f8b", label="seconds")
        axis.set(xlabel=title, title=f"time ∝ n^{curve['exponent']}")
        # A point that took no more than the process had already cannot be shown on a logarithmic axis.
        shown = [(n, mib) for n, mib in zip(curve["n"], curve["mib"], strict=True) if mib is not None and mib > 0]
        if shown:
            numbers, mib = zip(*shown, strict=True)
            memory = axis.twinx()
            memory.loglog(numbers, mib, "s--", color="#b5651d")
            memory.set_ylabel("peak MiB", color="#b5651d")
            memory.set_ylim(min(mib) / 10, max(mib) * 10)
            memory.minorticks_off()
        axis.set_ylabel("seconds", color="#1f6f8b")
        axis.set_ylim(min(curve["seconds"]) / 3, max(curve["seconds"]) * 3)
        axis.minorticks_off()
    figure.savefig(path, dpi=150)

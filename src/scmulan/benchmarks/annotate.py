"""Cells named or placed, beside the release's way and the ceiling of matrix products in the same run.

What each stage of a job takes, by timing the functions that the job calls.

Cells placed, beside the release's way (which decodes three words to get there): see :mod:`.annotate`.
"""

import functools
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from scmulan.benchmarks.ceiling import machine
from scmulan.benchmarks.release_way import ReleaseWay
from scmulan.infer.precision import apply_precision, block_seconds, compare_precision
from scmulan.infer.scoring import last_hidden, score_labels
from scmulan.model.cost import sentence_flops
from scmulan.model.loading import LoadedModel, load
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.storage import read_rows
from scmulan.vocab.vocabulary import Family, Vocabulary

WORDS = (300, 600)
CELLS = 4


def run(*, quick: bool = False, data: Path | None = None, verb: str = "annotate") -> dict[str, Any]:
    """Time annotation (or embedding) of the published shape with random weights, and of the small model on a file.

    Parameters
    ----------
    quick
        A narrower and shallower network, fewer cells.
    data
        File of real cells for the small model: agreement of precisions with fp32, and cells per second from file to
        file. Cells that the model writes itself stand in for it.
    verb
        ``"annotate"`` or ``"embed"``.

    Returns
    -------
    dict
        The figures of one JSON line; ``by_words`` holds those of each length.
    """
    with tempfile.TemporaryDirectory() as room:
        small = load("mini", device="cpu")
        source = data or _written_cells(small, Path(room), n=64 if quick else 512)
        agreeing = _agreement(small, source, most=48 if quick else 512)
        large = published_shape(quick=quick)
        by_words = {}
        for words in WORDS[: 1 if quick else 2]:
            by_words[words] = _of_one_length(large, words, CELLS, verb, agreeing)
        files = _from_file_to_file(small, source, Path(room), verb, copies=1 if quick else 4)
    last = by_words[max(by_words)]
    return {
        "machine": machine(quick=quick),
        "shape": {"layers": large.config.layers, "width": large.config.width, "weights": "random"},
        "words": list(by_words),
        "share_of_ceiling_fp32": min(found["share_of_ceiling_fp32"] for found in by_words.values()),
        "ratio_release_fp32": min(found["ratio_release_fp32"] for found in by_words.values()),
        "ratio_release_best": min(found["ratio_release_best"] for found in by_words.values()),
        "precision": last["precision"],
        "label_agreement": agreeing.get(last["precision"], {"labels": 1.0})["labels"],
        "agreement": agreeing,
        "mini_cells_per_second": files["cells_per_second"],
        "mini": files,
        "by_words": by_words,
    }


def published_shape(*, quick: bool = False) -> LoadedModel:
    """The 368 M shape with random weights and the published words (for ``quick``, four layers of it)."""
    config = MulanConfig(layers=4) if quick else MulanConfig()
    return LoadedModel(
        network=Mulan(config).initialise(0).eval(),
        config=config,
        vocabulary=Vocabulary.published(),
        card={"objective": "published"},
        folder=Path("random"),
        weights_hash="random",
    )


def random_cells(vocabulary: Vocabulary, words: int, n: int, seed: int = 0) -> tuple[np.ndarray, Sentences]:
    """Cells as dense log1p rows over the vocabulary's genes, and as annotation prompts of ``words`` words each."""
    from scmulan.benchmarks.release_way import prompt_of

    rng = np.random.default_rng(seed)
    genes, ask = vocabulary.ids(Family.GENE), vocabulary.prompts["annotate"]
    rows = np.zeros((n, len(genes)), dtype=np.float32)
    for row in rows:
        row[rng.permutation(len(genes))[: words - 1]] = rng.gamma(2.0, 0.6, words - 1) + 0.05
    said = [prompt_of(row, genes, ask) for row in rows]
    prompts = Sentences.join([(np.array(entity), np.array(value), len(entity)) for entity, value in said])
    return rows, prompts


def seconds_of(work: Callable[[], object], repeats: int = 2) -> float:
    """Seconds of the fastest of some runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _of_one_length(
    model: LoadedModel, words: int, cells: int, verb: str, agreeing: dict[str, dict[str, float]]
) -> dict[str, Any]:
    rows, prompts = random_cells(model.vocabulary, words, cells)
    genes, ask = model.vocabulary.ids(Family.GENE), model.vocabulary.prompts["annotate"]
    heads_at = 1 if verb == "annotate" else 0
    # What one pass has to do: the last layer gives keys and values everywhere, the rest of it at one position.
    W, flops = model.config.width, sentence_flops(model.config, words, heads_at=heads_at)
    needed = flops - (words - 1) * (20 * W * W + 4 * W * (words + 1) / 2)
    names: Any = ("fp32", *(p for p in agreeing if agreeing[p]["good"]))
    ways = {name: apply_precision(model, name) for name in names}
    score = score_labels if verb == "annotate" else last_hidden
    for way in ways.values():
        score(way, prompts.take([0]))
    # The ceiling is taken between the passes that it judges, so that both meet the same neighbours on the machine.
    ceiling = [gemm_ceiling(words, W)]
    seconds = {}
    for name, way in ways.items():
        seconds[name] = seconds_of(lambda way=way: score(way, prompts)) / cells  # type: ignore[misc]
        ceiling.append(gemm_ceiling(words, W))
    plain = ReleaseWay(network=model.network, end=model.vocabulary.end)
    release = seconds_of(lambda: plain.annotate(rows[0], genes, ask), 1)
    cached = ReleaseWay(network=model.network, end=model.vocabulary.end, cached=True)
    release_cached = seconds_of(lambda: cached.annotate(rows[0], genes, ask), 1)
    best = min(seconds, key=seconds.__getitem__)
    return {
        "seconds_per_cell": {name: round(s, 4) for name, s in seconds.items()},
        "release_seconds_per_cell": round(release, 4),
        "release_cached_seconds_per_cell": round(release_cached, 4),
        "gflops_fp32": round(needed / seconds["fp32"] / 1e9, 1),
        "gemm_ceiling_fp32": round(max(ceiling) / 1e9, 1),
        "share_of_ceiling_fp32": round(needed / seconds["fp32"] / max(ceiling), 3),
        "ratio_release_fp32": round(release / seconds["fp32"], 2),
        "ratio_release_best": round(release / seconds[best], 2),
        "ratio_release_cached_best": round(release_cached / seconds[best], 2),
        "precision": best,
    }


def gemm_ceiling(rows: int, width: int) -> float:
    """Operations per second of the fp32 feed-forward product of this width; the best of a few shapes and runs."""
    from scmulan.benchmarks.ceiling import gemm_flops

    return max(gemm_flops(n, width, 4 * width, torch.float32, repeats=2) for n in (rows, 1024))


def _written_cells(model: LoadedModel, room: Path, n: int) -> Path:
    """File of cells that a model writes itself, for where no real ones are given."""
    import scmulan
    from scmulan._io.adata import write_h5ad

    kinds = model.vocabulary.names(Family.FINE)[:8]
    parts = [scmulan.tl.generate(model, {"cell_type": kind}, n=n // len(kinds), seed=i) for i, kind in enumerate(kinds)]
    import anndata as ad

    cells = ad.concat(parts, index_unique="-")
    write_h5ad(cells, room / "cells.h5ad")
    return room / "cells.h5ad"


def _prompts(model: LoadedModel, source: Path, most: int) -> Sentences:
    from scmulan._io.adata import open_input
    from scmulan.tl._blockwise import CellReader
    from scmulan.vocab.sentences import gene_prompts
    from scmulan.vocab.tasks import ANNOTATE

    reader = CellReader(open_input(source), model)
    _, words = next(reader.blocks(len(reader)))
    prompts = gene_prompts(words, model.vocabulary, ANNOTATE)
    filled = np.flatnonzero(prompts.lengths > 1)
    return prompts.take(filled[np.linspace(0, len(filled) - 1, min(most, len(filled))).astype(np.int64)])


def _agreement(model: LoadedModel, source: Path, most: int) -> dict[str, dict[str, Any]]:
    """How far each precision that can be used here gives the small model's results of fp32."""
    prompts = _prompts(model, source, most)
    out = {}
    for precision in block_seconds(model.config, torch.device("cpu"), 64):
        if precision != "fp32":
            seen = compare_precision(model, apply_precision(model, precision), prompts)  # type: ignore[arg-type]
            out[precision] = {**asdict(seen), "cosine": round(seen.cosine, 6), "good": seen.sufficient}
    return out


def _from_file_to_file(model: LoadedModel, source: Path, room: Path, verb: str, copies: int) -> dict[str, Any]:
    """Cells per second of the small model from h5ad to h5ad, and what each stage takes of it."""
    import anndata as ad

    from scmulan.tl._files import annotate_file, embed_file

    cells = ad.read_h5ad(source)
    many = ad.concat([cells] * copies, index_unique="-", merge="same")
    many.write_h5ad(room / "many.h5ad")
    work = annotate_file if verb == "annotate" else embed_file
    work(source, room / "out.h5ad", model=model.folder, force=True)  # compiles what is compiled on first use
    with Stages() as stages:
        start = time.perf_counter()
        account = work(room / "many.h5ad", room / "out.h5ad", model=model.folder, force=True)
        seconds = time.perf_counter() - start
    return {
        "cells": account["cells"],
        "words_per_cell": round(account["words_per_cell"], 1),
        "precision": account["parameters"][verb]["precision"],
        "cells_per_second": round(account["cells"] / seconds, 1),
        "seconds": round(seconds, 2),
        "shares": stages.shares(seconds),
    }


class Stages:
    """Seconds by stage while the context is open: reading, tokenising, the model, writing; the rest is glue."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reading", "tokenising", "model", "writing"), 0.0)
        self._patches = ExitStack()

    def __enter__(self) -> "Stages":
        from scmulan.tl import _blockwise, _files

        for where, name, stage in (
            ("scmulan.vocab.storage.read_rows", read_rows, "reading"),
            ("scmulan.tl._files.open_input", _files.open_input, "reading"),
            ("scmulan.tl._blockwise.choose_matrix", _blockwise.choose_matrix, "reading"),
            ("scmulan.tl._blockwise.tokenize", _blockwise.tokenize, "tokenising"),
            ("scmulan.tl._blockwise.match_genes", _blockwise.match_genes, "tokenising"),
            ("scmulan.tl._files.copy_with_results", _files.copy_with_results, "writing"),
        ):
            self._patches.enter_context(patch(where, self._timed(name, stage)))
        for method in ("forward_last", "forward", "entity_logits"):
            self._patches.enter_context(patch.object(Mulan, method, self._timed(getattr(Mulan, method), "model")))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def shares(self, total: float) -> dict[str, float]:
        """Share of each stage in so many seconds; ``other`` is what none of them took."""
        found = {stage: round(seconds / total, 3) for stage, seconds in self.seconds.items()}
        return {**found, "other": round(1 - sum(found.values()), 3)}

    def _timed(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self.seconds[stage] += time.perf_counter() - start

        return timed

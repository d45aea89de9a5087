"""Annotation and embedding, beside the release's way and the ceiling of matrix products; stages of a whole job."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from scmulan.benchmarks.ceiling import gemm_flops, machine
from scmulan.benchmarks.release_way import ReleaseDecoder, prompt_of
from scmulan.infer.precision import apply_precision, block_seconds, compare_precision
from scmulan.infer.scoring import last_hidden, score_labels
from scmulan.model.cost import sentence_flops
from scmulan.model.loading import LoadedModel, load
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.sentences import Sentences
from scmulan.vocab.storage import read_rows
from scmulan.vocab.vocabulary import Family, Vocabulary

# Tokens per cell, and number of cells, of the published shape.
TOKENS = (300, 600)
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
    with tempfile.TemporaryDirectory() as temporary:
        folder, small = Path(temporary), load("mini", device="cpu")
        source = data or _write_generated_cells(small, folder, n=64 if quick else 512)
        agreeing = _agreement(small, source, max_cells=48 if quick else 512)
        large = published_shape(quick=quick)
        by_length = {n: _one_length(large, n, verb, agreeing) for n in TOKENS[: 1 if quick else 2]}
        files = _file_to_file(small, source, folder, verb, copies=1 if quick else 4)
    last = by_length[max(by_length)]
    return {
        "machine": machine(quick=quick),
        "shape": {"layers": large.config.layers, "width": large.config.width, "weights": "random"},
        "words": list(by_length),
        "share_of_ceiling_fp32": min(found["share_of_ceiling_fp32"] for found in by_length.values()),
        "ratio_release_fp32": min(found["ratio_release_fp32"] for found in by_length.values()),
        "ratio_release_best": min(found["ratio_release_best"] for found in by_length.values()),
        "precision": last["precision"],
        "label_agreement": agreeing.get(last["precision"], {"labels": 1.0})["labels"],
        "agreement": agreeing,
        "mini_cells_per_second": files["cells_per_second"],
        "mini": files,
        "by_words": by_length,
    }


def published_shape(*, quick: bool = False) -> LoadedModel:
    """Return the 368 M shape with random weights and the published vocabulary (for ``quick``, four layers of it)."""
    config = MulanConfig(layers=4) if quick else MulanConfig()
    return LoadedModel(
        network=Mulan(config).initialise(0).eval(),
        config=config,
        vocabulary=Vocabulary.published(),
        card={"objective": "published"},
        folder=Path("random"),
        weights_hash="random",
    )


def random_cells(vocabulary: Vocabulary, n_tokens: int, n: int, seed: int = 0) -> tuple[np.ndarray, Sentences]:
    """Return random cells as log1p values ``[n, genes]``, and as annotation prompts of ``n_tokens`` tokens each."""
    rng = np.random.default_rng(seed)
    genes, prompt_token = vocabulary.ids(Family.GENE), vocabulary.prompts["annotate"]
    rows = np.zeros((n, len(genes)), dtype=np.float32)
    for row in rows:
        row[rng.permutation(len(genes))[: n_tokens - 1]] = rng.gamma(2.0, 0.6, n_tokens - 1) + 0.05
    pairs = [prompt_of(row, genes, prompt_token) for row in rows]
    return rows, Sentences.join([(np.array(entity), np.array(value), len(entity)) for entity, value in pairs])


def _one_length(model: LoadedModel, n_tokens: int, verb: str, agreeing: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Time ours and the release's way on cells of one length."""
    rows, prompts = random_cells(model.vocabulary, n_tokens, CELLS)
    genes, prompt_token = model.vocabulary.ids(Family.GENE), model.vocabulary.prompts["annotate"]
    heads_at = 1 if verb == "annotate" else 0
    # What one pass has to do: the last layer gives keys and values everywhere, the rest of it at one position.
    W, flops = model.config.width, sentence_flops(model.config, n_tokens, heads_at=heads_at)
    needed = flops - (n_tokens - 1) * (20 * W * W + 4 * W * (n_tokens + 1) / 2)
    precisions: Any = ("fp32", *(p for p in agreeing if agreeing[p]["good"]))
    score = score_labels if verb == "annotate" else last_hidden
    # The ceiling is taken between the passes that it judges, so that both meet the same neighbours on the machine.
    ceilings = [_gemm_ceiling(n_tokens, W)]
    seconds = {}
    for precision in precisions:
        converted = apply_precision(model, precision)
        score(converted, prompts.take([0]))
        seconds[precision] = _fastest(partial(score, converted, prompts), runs=2) / CELLS
        ceilings.append(_gemm_ceiling(n_tokens, W))
    ceiling = max(ceilings)
    plain, cached = (
        ReleaseDecoder(network=model.network, end=model.vocabulary.end, cached=cached) for cached in (False, True)
    )
    release = _fastest(lambda: plain.annotate(rows[0], genes, prompt_token))
    release_cached = _fastest(lambda: cached.annotate(rows[0], genes, prompt_token))
    best = min(seconds, key=seconds.__getitem__)
    return {
        "seconds_per_cell": {name: round(s, 4) for name, s in seconds.items()},
        "release_seconds_per_cell": round(release, 4),
        "release_cached_seconds_per_cell": round(release_cached, 4),
        "gflops_fp32": round(needed / seconds["fp32"] / 1e9, 1),
        "gemm_ceiling_fp32": round(ceiling / 1e9, 1),
        "share_of_ceiling_fp32": round(needed / seconds["fp32"] / ceiling, 3),
        "ratio_release_fp32": round(release / seconds["fp32"], 2),
        "ratio_release_best": round(release / seconds[best], 2),
        "ratio_release_cached_best": round(release_cached / seconds[best], 2),
        "precision": best,
    }


def _fastest(work: Callable[[], object], *, runs: int = 1) -> float:
    """Return the seconds of the fastest of some runs, the first included."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _gemm_ceiling(rows: int, width: int) -> float:
    """Measure the operations per second of the fp32 feed-forward product of this width; the best of two shapes."""
    return max(gemm_flops(n, width, 4 * width, torch.float32, repeats=2) for n in (rows, 1024))


def _write_generated_cells(model: LoadedModel, folder: Path, n: int) -> Path:
    """Write a file of cells that the model generates, where no real ones are given."""
    import anndata as ad

    import scmulan
    from scmulan._io.adata import write_h5ad

    types = model.vocabulary.names(Family.FINE)[:8]
    parts = [scmulan.tl.generate(model, {"cell_type": name}, n=n // len(types), seed=i) for i, name in enumerate(types)]
    write_h5ad(ad.concat(parts, index_unique="-"), folder / "cells.h5ad")
    return folder / "cells.h5ad"


def _prompts(model: LoadedModel, source: Path, max_cells: int) -> Sentences:
    """Return annotation prompts of up to ``max_cells`` cells of a file that have genes."""
    from scmulan._io.adata import open_input
    from scmulan.tl._blockwise import CellReader
    from scmulan.vocab.sentences import gene_prompts
    from scmulan.vocab.tasks import ANNOTATE

    reader = CellReader(open_input(source), model)
    _, tokens = next(reader.blocks(len(reader)))
    prompts = gene_prompts(tokens, model.vocabulary, ANNOTATE)
    filled = np.flatnonzero(prompts.lengths > 1)
    return prompts.take(filled[np.linspace(0, len(filled) - 1, min(max_cells, len(filled))).astype(np.int64)])


def _agreement(model: LoadedModel, source: Path, max_cells: int) -> dict[str, dict[str, Any]]:
    """Compare results of the small model in each precision that can be used here with those in fp32."""
    prompts = _prompts(model, source, max_cells)
    out = {}
    for precision in block_seconds(model.config, torch.device("cpu"), 64):
        if precision != "fp32":
            agreement = compare_precision(model, apply_precision(model, precision), prompts)  # type: ignore[arg-type]
            out[precision] = {**asdict(agreement), "cosine": round(agreement.cosine, 6), "good": agreement.sufficient}
    return out


def _file_to_file(model: LoadedModel, source: Path, folder: Path, verb: str, copies: int) -> dict[str, Any]:
    """Measure the cells per second of the small model from h5ad to h5ad, and the fraction that each stage takes."""
    import anndata as ad

    from scmulan.tl._files import annotate_file, embed_file

    cells = ad.read_h5ad(source)
    many = ad.concat([cells] * copies, index_unique="-", merge="same")
    many.write_h5ad(folder / "many.h5ad")
    work = annotate_file if verb == "annotate" else embed_file
    work(source, folder / "out.h5ad", model=model.folder, force=True)  # compiles what is compiled on first use
    with _Stages() as stages:
        start = time.perf_counter()
        account = work(folder / "many.h5ad", folder / "out.h5ad", model=model.folder, force=True)
        seconds = time.perf_counter() - start
    return {
        "cells": account["cells"],
        "words_per_cell": round(account["words_per_cell"], 1),
        "precision": account["parameters"][verb]["precision"],
        "cells_per_second": round(account["cells"] / seconds, 1),
        "seconds": round(seconds, 2),
        "shares": stages.fractions(seconds),
    }


class _Stages:
    """Seconds that reading, tokenising, the model and writing take while the context is open."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reading", "tokenising", "model", "writing"), 0.0)
        self._patches = ExitStack()

    def __enter__(self) -> "_Stages":
        from scmulan.tl import _blockwise, _files

        for target, function, stage in (
            ("scmulan.vocab.storage.read_rows", read_rows, "reading"),
            ("scmulan.tl._files.open_input", _files.open_input, "reading"),
            ("scmulan.tl._blockwise.choose_matrix", _blockwise.choose_matrix, "reading"),
            ("scmulan.tl._blockwise.tokenize", _blockwise.tokenize, "tokenising"),
            ("scmulan.tl._blockwise.match_genes", _blockwise.match_genes, "tokenising"),
            ("scmulan.tl._files.copy_with_results", _files.copy_with_results, "writing"),
        ):
            self._patches.enter_context(patch(target, self._timed(function, stage)))
        for method in ("forward_last", "forward", "entity_logits"):
            self._patches.enter_context(patch.object(Mulan, method, self._timed(getattr(Mulan, method), "model")))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def fractions(self, total: float) -> dict[str, float]:
        """Return the fraction of ``total`` seconds that each stage took; ``other`` is what none of them took."""
        found = {stage: round(seconds / total, 3) for stage, seconds in self.seconds.items()}
        return {**found, "other": round(1 - sum(found.values()), 3)}

    def _timed(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(work)
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self.seconds[stage] += time.perf_counter() - start

        return timed

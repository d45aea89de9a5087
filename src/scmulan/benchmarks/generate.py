"""Throughput of generation, beside the release's way with its key-value cache: one cell at a time, token by token.

Two networks are timed: the published shape with random weights, in the middle of a cell of some hundred tokens; and the
packaged small model, from prompt to end token. *Same rule* means softmax over the logits and rounded values, token by
token, in float32: what batches alone bring. *Best* adds speculative decoding and another precision.

Tokens per pass of speculative decoding depend on what a network has learned, so for the published shape (random
weights) the seconds of a pass are measured at each draft length, and the tokens that such a pass keeps are those
measured on the small model, with its own rule; the result says so.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scmulan
from scmulan.benchmarks.ceiling import machine
from scmulan.benchmarks.release_way import ReleaseDecoder
from scmulan.errors import ModelError
from scmulan.generate.decoding import CellDecoder, DecodingConfig
from scmulan.infer.precision import apply_precision
from scmulan.model.cost import forward_flops_per_token, kv_bytes_per_token, weight_bytes
from scmulan.model.loading import LoadedModel
from scmulan.model.network import PUBLISHED, Mulan, MulanConfig
from scmulan.vocab.vocabulary import Vocabulary

DRAFT_LENGTHS = (2, 4, 8, 16, 32)
PRECISIONS = ("fp32", "bf16", "int8")
METADATA = {"organ": "Blood", "cell_type": "B cell"}
TIMED_STEPS = 2
HOW_COUNTED = (
    "seconds per pass measured at the published shape with random weights; words kept per pass measured on the small"
    " model, rule exact"
)


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure tokens per second.

    Returns
    -------
    dict
        ``words`` (of a cell while it is timed), ``ratio_release_cached_same_rule``, ``ratio_release_cached_best``,
        ``accepted_words_per_pass`` (by number drafted), ``precision`` (of the best), how block decoding is
        counted, ``large`` and ``mini`` with the figures behind them.
    """
    about = machine(quick=quick)
    mini = _mini(quick)
    large = _large(quick, mini["accepted_words_per_pass"], about)
    return {
        "machine": about,
        "words": large["words"],
        "ratio_release_cached_same_rule": large["ratio_same_rule"],
        "ratio_release_cached_best": large["ratio_best"],
        "accepted_words_per_pass": mini["accepted_words_per_pass"],
        "precision": large["precision"],
        "block_decoding": HOW_COUNTED,
        "large": large,
        "mini": mini,
    }


def _model(config: MulanConfig, vocabulary: Vocabulary) -> LoadedModel:
    network = Mulan(config).initialise(0).eval()
    return LoadedModel(
        network=network, config=config, vocabulary=vocabulary, card={"objective": "published"}, folder=Path(),
        weights_hash="random weights",
    )  # fmt: skip


def _pass_seconds(model: LoadedModel, prompt: np.ndarray, rows: int, draft: int) -> float:
    """Measure the seconds of one pass of many rows right after a prompt: the fastest but for the first."""
    decoder = CellDecoder(model, DecodingConfig(rule="release", sample_values=False, batch_size=rows, draft=draft))
    slots = decoder.new_slots(rows, len(prompt))
    prefix = decoder.read_prompt(prompt)
    for row in range(rows):
        decoder.start_row(slots, row, prefix, 0, row)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        decoder.step(slots)
        seconds.append((time.perf_counter() - start) / decoder.passes_per_check)
    return min(seconds[1:])


def _release_seconds(model: LoadedModel, prompt: np.ndarray, n_tokens: int) -> float:
    """Measure the seconds of one token in the release's cached way, reading of the prompt not counted."""
    decoder = ReleaseDecoder(network=model.network, end=-1, cached=True)  # random weights do not know when to end
    fastest = {1: float("inf"), 1 + n_tokens: float("inf")}
    for number in (*fastest, *fastest):
        start = time.perf_counter()
        decoder.generator = torch.Generator().manual_seed(0)
        decoder.generate(prompt.tolist(), [0] * len(prompt), number)
        fastest[number] = min(fastest[number], time.perf_counter() - start)
    return (fastest[1 + n_tokens] - fastest[1]) / n_tokens


def _large(quick: bool, kept: dict[str, float], about: dict[str, Any]) -> dict[str, Any]:
    config = replace(PUBLISHED, layers=4) if quick else PUBLISHED
    n_tokens, rows = (300, 16) if quick else (300, 64)
    model = _model(config, Vocabulary.published())
    genes = np.flatnonzero(model.vocabulary.is_gene)
    prompt = np.append(np.random.default_rng(0).permutation(genes)[:n_tokens], model.vocabulary.prompts["generate"])
    release = _release_seconds(model, prompt, 4 if quick else 12)
    alone = _pass_seconds(model, prompt, 1, 1)
    one_by_one = _pass_seconds(model, prompt, rows, 1)
    fastest_alone = 0.0
    best: dict[str, Any] = {"words_per_second": 0.0}
    speeds: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        try:
            other = apply_precision(model, precision)  # type: ignore[arg-type]
        except ModelError:
            continue
        speeds[precision] = {}
        for draft in (1, 4, 8) if quick or precision == "fp32" else (1, 4, 8, 16):
            seconds = _pass_seconds(other, prompt, rows, draft)
            speed = rows * kept[str(draft)] / seconds
            speeds[precision][str(draft)] = round(speed, 1)
            if draft == 1:
                fastest_alone = max(fastest_alone, speed)
            if speed > best["words_per_second"]:
                best = {"words_per_second": round(speed, 1), "precision": precision, "draft": draft}
            if seconds > 4 * one_by_one * draft:
                break  # emulated: not worth the time
    moved = weight_bytes(config, "fp32") + rows * n_tokens * kv_bytes_per_token(config, "fp32")
    alone_moved = weight_bytes(config, "fp32") + n_tokens * kv_bytes_per_token(config, "fp32")
    # A copy reads and writes each byte; decoding reads.
    copy = about["copy_gb_per_second"] * 1e9
    flops = rows * forward_flops_per_token(config, context=n_tokens)
    return {
        "layers": config.layers,
        "words": n_tokens,
        "rows": rows,
        "release_cached_words_per_second": round(1 / release, 2),
        "one_row_words_per_second": round(1 / alone, 2),
        "batched_words_per_second": round(rows / one_by_one, 1),
        "ratio_same_rule": round(rows / one_by_one * release, 2),
        "ratio_same_rule_fastest_precision": round(fastest_alone * release, 2),
        "ratio_best": round(best["words_per_second"] * release, 2),
        "precision": best["precision"],
        "draft": best["draft"],
        "words_per_second": speeds,
        "bandwidth_share": round(moved / one_by_one / copy, 3),
        "bandwidth_share_one_row": round(alone_moved / alone / copy, 3),
        "share_of_ceiling_fp32": round(flops / one_by_one / (about["gemm_gflops"]["fp32"] * 1e9), 3),
    }


def _decode(
    model: LoadedModel, prompt: np.ndarray, rows: int, config: DecodingConfig
) -> tuple[float, CellDecoder, int]:
    """Decode whole cells; return tokens per second, all included, the decoder, and the mean tokens of a cell."""
    decoder = CellDecoder(model, config)
    start = time.perf_counter()
    decoder.decode([prompt], [(0, i) for i in range(rows)], seed=0)
    tokens = decoder.stats.tokens
    return tokens / (time.perf_counter() - start), decoder, round(tokens / rows)


def _mini(quick: bool) -> dict[str, Any]:
    model = scmulan.load("mini", device="cpu")
    v = model.vocabulary
    prompt = np.array([*v.metadata_ids(METADATA), v.prompts["generate"]])
    rows, max_tokens = (16, 150) if quick else (64, 1550)
    accepted: dict[str, float] = {}
    speeds: dict[str, float] = {}
    _decode(model, prompt, 2, DecodingConfig(max_tokens=20))  # compiles what is compiled
    for draft in (1, *DRAFT_LENGTHS):
        speed, decoder, mean = _decode(model, prompt, rows, DecodingConfig(draft=draft, max_tokens=max_tokens))
        accepted[str(draft)] = round(decoder.stats.tokens_per_pass, 2)
        speeds[str(draft)] = round(speed, 1)
    best: dict[str, Any] = {"words_per_second": 0.0}
    for precision in PRECISIONS:
        try:
            other = apply_precision(model, precision)  # type: ignore[arg-type]
        except ModelError:
            continue
        speed, decoder, _ = _decode(other, prompt, rows, DecodingConfig(max_tokens=max_tokens))
        if speed > best["words_per_second"]:
            best = {"words_per_second": round(speed, 1), "precision": precision, "draft": decoder.draft_length.best()}
    # The release's network has neither set state nor spread of values: its way is timed without.
    plain = replace(model.config, set_state=False, value_spread=False, word_bias=False, bounded_genes=False)
    release_model = _model(plain, v)
    release = 1 / _release_seconds(release_model, prompt, mean)
    same = DecodingConfig(rule="release", sample_values=False, draft=1, max_tokens=mean)
    batched, _, _ = _decode(release_model, prompt, rows, same)
    return {
        "rows": rows,
        "most_words": max_tokens,
        "mean_words": mean,
        "release_cached_words_per_second": round(release, 1),
        "batched_words_per_second": round(batched, 1),
        "ratio_same_rule": round(batched / release, 2),
        "ratio_best": round(best["words_per_second"] / release, 2),
        "precision": best["precision"],
        "draft": best["draft"],
        "words_per_second": best["words_per_second"],
        "words_per_second_by_draft": speeds,
        "accepted_words_per_pass": accepted,
    }

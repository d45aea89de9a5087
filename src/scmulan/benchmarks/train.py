"""Fraction of the speed of the machine's matrix products that training reaches, and what takes the rest.

Operations are those that the computation needs (:func:`scmulan.model.cost.batch_flops`); the ceiling is the best matrix
product of the same run.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from scmulan.benchmarks.ceiling import machine
from scmulan.data.memory import CellStore
from scmulan.model.cost import batch_flops
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.batches import Batch, BatchConfig, Batches
from scmulan.train.config import ObjectiveConfig, OptimizerConfig
from scmulan.train.estimate import synthetic_batch, typical_step
from scmulan.train.trainer import batch_loss, make_optimizer
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

TARGETS = {"share_of_ceiling_368m": 0.60, "share_of_ceiling_mini": 0.35}
# The small model that ships, and its recipe's batches.
MINI = MulanConfig(
    layers=3, heads=4, width=128, set_state=True, value_spread=True, word_bias=True, bounded_genes=True, dropout=0.1
)
MINI_BATCHES = {"tasks": {"annotate": 0.66, "generate": 0.28, "locate": 0.06}, "max_positions": 1024}
# The batch of recipes/scmulan-368m.toml, all of whose tokens are read.
LARGE_CELLS = 408
LARGE_BATCHES = BatchConfig(
    cells=LARGE_CELLS, generate_cells=LARGE_CELLS, tokens=10**9, max_prompt_genes=1550, min_prompt_genes=1550,
    max_target_genes=1550, min_target_genes=1550, positions=0,
)  # fmt: skip


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure a few steps of the published shape and of the small model.

    Returns
    -------
    dict
        ``share_of_ceiling_368m``, ``share_of_ceiling_mini`` (forward, backward and optimiser), ``padding`` (fraction
        of a pool's tokens), ``optimizer_share`` (the larger one, of mini's steps and of a recipe's step at 368 M),
        ``loss_memory_ratio``, the figures behind them, and ``profile`` of what falls short of its target.
    """
    about = machine(quick=quick)
    ceiling = about["gemm_gflops"]["fp32"] * 1e9  # type: ignore[index]
    mini, mini_profile = _mini(quick, ceiling)
    large, large_profile = _large(quick, ceiling)
    dense, chunked = (_loss_memory(form, quick) for form in ("dense", "chunked"))
    found: dict[str, Any] = {
        "machine": about,
        "share_of_ceiling_368m": large["share"],
        "share_of_ceiling_mini": mini["share"],
        "padding": mini["padding"],
        "optimizer_share": max(mini["optimizer_share"], large["optimizer_share"]),
        "loss_memory_ratio": round(chunked / dense, 4),
        "loss_mib": {"dense": round(dense / 2**20), "chunked": round(chunked / 2**20)},
        "mini": mini,
        "large": large,
    }
    profiles = {"share_of_ceiling_mini": mini_profile, "share_of_ceiling_368m": large_profile}
    short = {name: profiles[name] for name, target in TARGETS.items() if found[name] < target}
    return found | ({"profile": short} if short else {})


def _mini(quick: bool, ceiling: float) -> tuple[dict[str, Any], Any]:
    """Time steps of the small model on cells of realistic lengths."""
    vocabulary, store = made_up_cells()
    config = replace(MINI, vocabulary=len(vocabulary))
    batches = Batches(store, vocabulary, BatchConfig(**MINI_BATCHES), 0)  # type: ignore[arg-type]
    objective = ObjectiveConfig()
    model = Mulan(config).initialise(0)
    optimizer = make_optimizer(model, OptimizerConfig())
    pool = range(16 if quick else batches.config.pool)
    steps = [batches.batch(i) for i in pool]
    padding = 1 - sum(b.tokens for b in steps) / sum(b.entity.numel() for b in steps)
    timed = _some_of_each(steps, 1 if quick else 4)
    _step(model, optimizer, timed[0], objective)
    flops, seconds, optimizing = 0.0, 0.0, 0.0
    for batch in timed:
        # A task counts as often as it comes.
        weight = sum(b.task == batch.task for b in steps) / sum(b.task == batch.task for b in timed)
        took, update = min(_step(model, optimizer, batch, objective) for _ in range(2))
        flops += weight * batch_flops(config, batch.tokens, len(batch.entity), len(batch.positions))
        seconds, optimizing = seconds + weight * took, optimizing + weight * update
    figures = {
        "share": round(flops / seconds / ceiling, 4),
        "optimizer_share": round(optimizing / seconds, 4),
        "padding": round(padding, 4),
        "words_per_second": round(sum(b.tokens for b in steps) / seconds),
        "seconds_per_step": round(seconds / len(steps), 4),
    }
    return figures, _profile(lambda: [_step(model, optimizer, batch, objective) for batch in timed])


def _some_of_each(steps: list[Batch], number: int) -> list[Batch]:
    return [b for task in dict.fromkeys(b.task for b in steps) for b in [s for s in steps if s.task == task][:number]]


def _large(quick: bool, ceiling: float) -> tuple[dict[str, Any], Any]:
    """Time steps of the published shape (for ``quick``, two blocks of it) on few sentences of 300–600 tokens."""
    config = MulanConfig(layers=2 if quick else 24)
    sentences, words = (1, 300) if quick else (3, 512)
    objective = ObjectiveConfig(name="published", value_weight=200.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mulan(config)
    optimizer = make_optimizer(model, OptimizerConfig())
    batch = synthetic_batch(config, sentences, words, sentences * words)
    flops = batch_flops(config, batch.tokens, sentences, len(batch.positions))
    _step(model, optimizer, batch, objective)
    took, update = min(_step(model, optimizer, batch, objective) for _ in range(2))
    # One update serves all the tokens of a recipe's step.
    full = typical_step(LARGE_BATCHES, "generate")
    whole = batch_flops(config, full.tokens, full.sentences, full.positions) / (flops / (took - update))
    figures = {
        "share": round(flops / took / ceiling, 4),
        "words": batch.tokens,
        "layers": config.layers,
        "seconds_per_step": round(took, 3),
        "optimizer_seconds": round(update, 3),
        "optimizer_share": round(update / (update + whole), 6),
        "words_per_second": round(batch.tokens / took, 1),
    }
    return figures, _profile(lambda: _step(model, optimizer, batch, objective)) if figures["share"] < 0.6 else None


def _step(
    model: Mulan, optimizer: torch.optim.Optimizer, batch: Batch, objective: ObjectiveConfig
) -> tuple[float, float]:
    """Take a step; return its seconds, and those of the optimiser in it (with clipping)."""
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    entity, value = batch_loss(model, batch, objective)
    (entity + objective.value_weight * value).backward()
    before = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    end = time.perf_counter()
    return end - start, end - before


def _profile(work: Any, top: int = 12) -> dict[str, float]:
    """Return the fractions of the time that the slowest operations take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        work()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {e.key: round(e.self_cpu_time_total / total, 4) for e in events[:top]}


def made_up_cells(cells: int = 1500, genes: int = 5000) -> tuple[Vocabulary, CellStore]:
    """Make cells with the lengths of real ones (lognormal, about 480 genes), whose genes mean nothing."""
    rng = np.random.default_rng(0)
    words = {Family.FINE: 50, Family.COARSE: 20, Family.ORGAN: 9}
    vocabulary = Vocabulary.build(
        [f"G{i}" for i in range(genes)], {f: [f"{f} {i}" for i in range(n)] for f, n in words.items()}
    )
    lengths = np.clip(rng.lognormal(6.0, 0.6, cells), 60, genes // 2).astype(int)
    indices = np.concatenate([np.sort(rng.choice(genes, n, replace=False)) for n in lengths])
    counts = rng.geometric(0.2, lengths.sum()).astype(np.float32)
    matrix = sp.csr_matrix((counts, indices, np.r_[0, lengths.cumsum()]), shape=(cells, genes))
    metadata = np.full((cells, len(METADATA)), -1, dtype=np.int32)
    for family in words:
        metadata[:, METADATA.index(family)] = rng.choice(vocabulary.ids(family), cells)
    total = 2 * np.asarray(matrix.sum(1)).ravel()
    study = np.zeros(cells, dtype=np.int64)
    measured = np.ones((1, genes), dtype=bool)
    return vocabulary, CellStore(matrix, total, study.astype(bool), study, ["made up"], measured, metadata)


# -- memory of the loss -----------------------------------------------------------------------------------------------


def _loss_memory(form: str, quick: bool) -> int:
    """Measure the largest number of bytes that a form of the loss takes at once, in a process of its own."""
    code = f"from scmulan.benchmarks.train import loss_bytes; print(loss_bytes({form!r}, {2 if quick else 8}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def loss_bytes(form: str, sentences: int, words: int = 1550) -> int:
    """Measure how far this process grows by forward and backward pass of the published loss on given hidden states.

    Parameters
    ----------
    form
        ``"chunked"``: ours; ``"dense"``: targets, logits and values as tables of positions × tokens, as released.
    """
    config = MulanConfig(layers=1)
    model = Mulan(config)
    batch = synthetic_batch(config, sentences, words, sentences * words)
    hidden = torch.zeros(len(batch.positions), config.width, requires_grad=True)
    objective = ObjectiveConfig(name="published", value_weight=200.0)
    loss = dense_loss if form == "dense" else _chunked
    loss(model, hidden[:64], first_positions(batch, 64), objective).backward()  # whatever is made on first use
    model.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    loss(model, hidden, batch, objective).backward()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Read a size of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def first_positions(batch: Batch, number: int) -> Batch:
    """Return a batch with its first positions only."""
    t = batch.targets
    targets = replace(t, row=t.row[:number], index=t.index[:number], weight=t.weight[:number])
    return replace(batch, positions=batch.positions[:number], targets=targets)


def _chunked(model: Mulan, hidden: torch.Tensor, batch: Batch, objective: ObjectiveConfig) -> torch.Tensor:
    from scmulan.train.losses import objective_loss

    entity, value = objective_loss(model, hidden, batch.targets, objective="published", value_weight=200.0)
    return entity + objective.value_weight * value


def dense_loss(model: Mulan, hidden: torch.Tensor, batch: Batch, objective: ObjectiveConfig) -> torch.Tensor:
    """Compute the published loss with one table of positions × tokens for each of its parts."""
    t = batch.targets
    target = (t.order[t.row] >= t.index[:, None]).float()
    entity = F.binary_cross_entropy_with_logits(model.entity_logits(hidden), target, reduction="none").mean(1)
    squared = F.mse_loss(model.value_mean(hidden), t.level[t.row].float(), reduction="none")
    value = (squared * target).sum() / target.sum()
    return model.config.vocabulary * (entity * t.weight).sum() + objective.value_weight * value

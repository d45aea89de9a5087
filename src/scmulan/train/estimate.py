"""What a run will cost, before it starts: operations, memory, hours; no cell's expression is read for it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmulan.data.readers import open_study
from scmulan.model.cost import batch_flops, count_parameters, faster_precision, gemm_rates
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.batches import Batch, BatchConfig
from scmulan.train.config import ObjectiveConfig, Recipe
from scmulan.train.export import model_config
from scmulan.train.losses import Targets, chunk_rows
from scmulan.train.trainer import batch_loss
from scmulan.vocab.tasks import TASKS
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

# Operations of the step that is timed, at most: a second or so on one core.
TIMED_FLOPS = 1e11
# Tables of positions × words that a chunk of the loss has at a time, about.
LOSS_TABLES = 6


@dataclass(kw_only=True)
class Step:
    """Size of a typical step of a task."""

    sentences: int
    words: int
    positions: int


def estimate(plan: Recipe, base: Path, world: int = 1) -> dict[str, Any]:
    """Cost of a recipe's run.

    Parameters
    ----------
    plan, base
        The recipe and its folder.
    world
        Processes that would share it.

    Returns
    -------
    dict
        ``cells``, ``genes``, ``parameters``, ``steps``; ``flops_per_step``, ``flops_total``; ``bytes_per_rank``
        (``weights``, ``gradients``, ``optimizer``, ``activations``); ``precision``, ``flops_per_second`` (of a short
        step here, one process), ``hours`` (of ``world`` such processes) and ``cell_passes``. Sentences are taken to be
        as long as the recipe lets them be; where they are shorter, a run is faster.
    """
    cells, vocabulary_size, genes = _sizes(plan, base)
    config = model_config(plan, vocabulary_size)
    shares = plan.batches.tasks
    steps = {name: typical_step(plan.batches, name) for name in shares}
    weight = {name: share / sum(shares.values()) for name, share in shares.items()}
    flops = sum(w * batch_flops(config, s.words, s.sentences, s.positions) for (_, s), w in _zip(steps, weight))
    if plan.run.recompute:
        flops *= 4 / 3
    precision: str = plan.run.precision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = faster_precision(gemm_rates(config, device))
    speed = measured_speed(config, plan.objective, precision, device)
    largest = max(steps.values(), key=lambda s: s.words + s.positions)
    total = flops * plan.optimizer.steps
    return {
        "cells": cells,
        "genes": genes,
        "parameters": count_parameters(config),
        "steps": plan.optimizer.steps,
        "cell_passes": round(plan.optimizer.steps * sum(w * s.sentences for (_, s), w in _zip(steps, weight))),
        "flops_per_step": flops,
        "flops_total": total,
        "processes": world,
        "bytes_per_rank": bytes_per_rank(config, plan, largest, world, precision),
        "precision": precision,
        "flops_per_second": speed,
        "hours": total / speed / world / 3600,
    }


def _zip(steps: Mapping[str, Step], weight: Mapping[str, float]) -> list[tuple[tuple[str, Step], float]]:
    return [((name, step), weight[name]) for name, step in steps.items()]


def _sizes(plan: Recipe, base: Path) -> tuple[int, int, int]:
    """Cells, words of the vocabulary, genes; from manifests and obs columns alone."""
    corpus = plan.corpus(base)
    if corpus is not None:
        from scmulan.data.store import Corpus

        store = Corpus(corpus)
        return len(store), len(store.vocabulary), len(store.vocabulary.genes)
    cells = 0
    words: dict[Family, set[str]] = {family: set() for family in METADATA}
    for spec in plan.studies(base):
        with open_study(spec) as adata:
            obs = adata.obs
        cells += len(obs)
        for family, column in spec.metadata(obs).items():
            words[family] |= set(column.unique()) - {""}
    if plan.vocabulary.file:
        there = plan.vocabulary.file == "published"
        vocabulary = Vocabulary.published() if there else Vocabulary.load(base / plan.vocabulary.file)
        return cells, len(vocabulary), len(vocabulary.genes)
    genes = plan.vocabulary.genes
    stand_in = Vocabulary.build([f"gene {i}" for i in range(genes)], {f: sorted(w) for f, w in words.items()})
    return cells, len(stand_in), genes


def typical_step(config: BatchConfig, task: str) -> Step:
    """Sentences, words and loss positions of a task's mean step, with sentences as long as the recipe allows."""
    if Family.GENE in TASKS[task].prompt:
        most, cells = config.max_prompt_genes, config.cells
        least = min(config.min_prompt_genes, most)
        length = (least + most) / 2
        answer = len(TASKS[task].target) + 1
    else:
        least, most = min(config.min_target_genes, config.max_target_genes), config.max_target_genes
        cells = config.generate_cells
        length = (most - least) / math.log(most / least) if most > least else float(most)
        answer = round(length)
    sentences = min(cells, max(4, config.tokens // round(length)))
    if Family.GENE not in TASKS[task].prompt and config.positions:
        answer = min(answer, config.positions, max(4, config.max_positions // sentences))
    return Step(sentences=sentences, words=round(sentences * (length + 4)), positions=sentences * answer)


def bytes_per_rank(config: MulanConfig, plan: Recipe, step: Step, world: int, precision: str) -> dict[str, int]:
    """Memory of one process: weights, gradients and AdamW's moments in fp32, and what is kept for the backward pass.

    A running average of the weights counts as the optimiser's.
    """
    number = count_parameters(config)
    parts = world if plan.run.parallel == "fsdp" else 1
    block = 12 * config.width**2
    gathered = 4 * (block + number - config.layers * block) if parts > 1 else 0
    share = 1 / (world * plan.run.accumulate)
    return {
        "weights": 4 * number // parts + gathered,
        "gradients": 4 * number // parts,
        "optimizer": (12 if plan.optimizer.ema_decay else 8) * number // parts,
        "activations": activation_bytes(
            config, math.ceil(step.words * share), math.ceil(step.positions * share),
            recompute=plan.run.recompute, precision=precision,
        ),
    }  # fmt: skip


def activation_bytes(
    config: MulanConfig, words: int, positions: int, *, recompute: bool = False, precision: str = "fp32"
) -> int:
    """Bytes kept for the backward pass, about.

    A block keeps 16 vectors of the model's width per word (two norms' inputs and outputs, queries, keys, values, what
    attention gave, four each of the feed-forward's two sides), halved by bf16 where matrix products read them.
    """
    size = 4.0 if precision == "fp32" else 2.5
    block = 16 * config.width * words * size
    kept = config.layers * config.width * words * 4.0 + block if recompute else config.layers * block
    if config.set_state:
        kept += 9 * config.width * words * 4.0
    loss = LOSS_TABLES * min(positions, chunk_rows(config.vocabulary, "cpu")) * config.vocabulary * 4.0
    heads = 2 * config.vocabulary * config.width * 4.0 + 3 * positions * config.width * 4.0
    return round(kept + loss + heads)


def synthetic_batch(config: MulanConfig, sentences: int, words: int, positions: int, seed: int = 0) -> Batch:
    """Sentences of random words, as many positions of which are asked for as given: a step's work without cells."""
    rng = np.random.default_rng(seed)
    V = config.vocabulary
    order = np.stack([rng.permutation(V - 1)[: min(words, V - 1)] + 1 for _ in range(sentences)])
    words = order.shape[1]
    place = np.full((sentences, V), -1, dtype=np.int16)
    np.put_along_axis(place, order, np.arange(words, dtype=np.int16)[None], axis=1)
    place[:, 0] = words
    level = np.where(place >= 0, rng.integers(1, config.levels + 1, place.shape), 0).astype(np.uint8)
    level[:, 0] = 0
    each = max(1, positions // sentences)
    said = np.concatenate([np.sort(rng.choice(words, size=min(each, words), replace=False)) for _ in range(sentences)])
    row = np.repeat(np.arange(sentences), len(said) // sentences)
    return Batch(
        task="generate",
        entity=torch.from_numpy(order),
        value=torch.from_numpy(np.take_along_axis(level, order, 1).astype(np.int64)),
        positions=torch.from_numpy(row * words + said),
        targets=Targets(
            row=torch.from_numpy(row),
            index=torch.from_numpy(said),
            weight=torch.full((len(row),), 1 / len(row)),
            order=torch.from_numpy(place),
            level=torch.from_numpy(level),
            end=0,
            allowed=torch.ones(sentences, V, dtype=torch.bool),
            labelled=torch.zeros(sentences, dtype=torch.bool),
        ),
        tokens=sentences * words,
        cells=np.arange(sentences),
        all_cells=sentences,
        all_tokens=sentences * words,
    )


def measured_speed(config: MulanConfig, objective: ObjectiveConfig, precision: str, device: str = "cpu") -> float:
    """Operations per second of forward and backward, on a network of the same width with as few blocks as time allows.

    Counted as in :func:`scmulan.model.cost.batch_flops`; the faster of two short steps.
    """
    sentences, words = 4, min(256, config.vocabulary - 1)
    flops = batch_flops(replace(config, layers=1), sentences * words, sentences, sentences * words // 4)
    layers = max(1, min(config.layers, round(TIMED_FLOPS / flops)))
    small = replace(config, layers=layers)
    model = Mulan(small).to(device)
    batch = synthetic_batch(small, sentences, words, sentences * words // 4)
    if device != "cpu":
        batch = batch.to(torch.device(device))
    seconds = math.inf
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            entity, value = batch_loss(model, batch, objective)
        (entity + objective.value_weight * value).backward()
        entity.item()  # waits for an accelerator
        seconds = min(seconds, time.perf_counter() - start)
    return batch_flops(small, sentences * words, sentences, len(batch.positions)) / seconds


def describe_estimate(report: Mapping[str, Any]) -> str:
    """Say it in a few lines."""
    memory = report["bytes_per_rank"]
    hours = report["hours"]
    took = f"{hours:,.1f} hours" if hours < 100 else f"{hours / 24:,.0f} days"
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    return (
        f"{report['parameters']:,} parameters, {report['genes']:,} genes, {report['cells']:,} cells, "
        f"{report['steps']:,} steps, {report['cell_passes']:,} cell passes\n"
        f"{report['flops_per_step'] / 1e12:,.3g} TFLOP per step, {report['flops_total'] / 1e18:,.3g} EFLOP in total "
        "(sentences as long as the recipe allows)\n"
        f"{sum(memory.values()) / 2**30:.2f} GiB per process ({parts})\n"
        f"{took} on {report['processes']} process(es) like this one: {report['flops_per_second'] / 1e9:,.0f} GFLOP/s "
        f"in a short {report['precision']} step here"
    )

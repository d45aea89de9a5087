"""Estimate what a run will cost before it starts: operations, memory, hours; no cell's expression is read."""

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
from scmulan.train.losses import Targets, chunk_positions
from scmulan.train.trainer import batch_loss
from scmulan.vocab.tasks import TASKS
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

TIMED_FLOPS = 1e11  # of the step that is timed, at most: a second or so on one core
LOSS_TABLES = 6  # float32 tables of positions × vocabulary that a chunk of the loss has at a time, about


@dataclass(kw_only=True)
class Step:
    """Size of a typical step of a task."""

    sentences: int
    tokens: int
    positions: int


def estimate(recipe: Recipe, base: Path, world: int = 1) -> dict[str, Any]:
    """Estimate the cost of a recipe's run.

    Parameters
    ----------
    recipe, base
        The recipe and its folder.
    world
        Number of processes that would share it.

    Returns
    -------
    dict
        ``cells``, ``genes``, ``parameters``, ``steps``; ``flops_per_step``, ``flops_total``; ``bytes_per_rank``
        (``weights``, ``gradients``, ``optimizer``, ``activations``); ``precision``, ``flops_per_second`` (of a short
        step here, one process), ``hours`` (of ``world`` such processes) and ``cell_passes``. Sentences are taken to be
        as long as the recipe lets them be; where they are shorter, a run is faster.
    """
    cells, vocabulary_size, genes = _sizes(recipe, base)
    config = model_config(recipe, vocabulary_size)
    steps = {task: typical_step(recipe.batches, task) for task in recipe.batches.tasks}
    total_weight = sum(recipe.batches.tasks.values())
    mean = [(weight / total_weight, steps[task]) for task, weight in recipe.batches.tasks.items()]
    flops = sum(w * batch_flops(config, s.tokens, s.sentences, s.positions) for w, s in mean)
    if recipe.run.recompute:
        flops *= 4 / 3
    precision: str = recipe.run.precision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = faster_precision(gemm_rates(config, device))
    speed = measured_speed(config, recipe.objective, precision, device)
    largest = max(steps.values(), key=lambda s: s.tokens + s.positions)
    total = flops * recipe.optimizer.steps
    return {
        "cells": cells,
        "genes": genes,
        "parameters": count_parameters(config),
        "steps": recipe.optimizer.steps,
        "cell_passes": round(recipe.optimizer.steps * sum(w * s.sentences for w, s in mean)),
        "flops_per_step": flops,
        "flops_total": total,
        "processes": world,
        "bytes_per_rank": bytes_per_rank(config, recipe, largest, world, precision),
        "precision": precision,
        "flops_per_second": speed,
        "hours": total / speed / world / 3600,
    }


def _sizes(recipe: Recipe, base: Path) -> tuple[int, int, int]:
    """Count cells, tokens of the vocabulary and genes, from manifests and obs columns alone."""
    corpus = recipe.corpus(base)
    if corpus is not None:
        from scmulan.data.store import Corpus

        store = Corpus(corpus)
        return len(store), len(store.vocabulary), len(store.vocabulary.genes)
    cells = 0
    names: dict[Family, set[str]] = {family: set() for family in METADATA}
    for spec in recipe.studies(base):
        with open_study(spec) as adata:
            obs = adata.obs
        cells += len(obs)
        for family, column in spec.metadata(obs).items():
            names[family] |= set(column.unique()) - {""}
    fixed = recipe.fixed_vocabulary(base)
    if fixed is not None:
        return cells, len(fixed), len(fixed.genes)
    genes = recipe.vocabulary.genes
    stand_in = Vocabulary.build([f"gene {i}" for i in range(genes)], {f: sorted(n) for f, n in names.items()})
    return cells, len(stand_in), genes


def typical_step(config: BatchConfig, task: str) -> Step:
    """Return the size of a task's mean step, its sentences as long as the recipe allows.

    Parameters
    ----------
    config
        The recipe's batches.
    task
        Name of the task.
    """
    if Family.GENE in TASKS[task].prompt:
        longest, cells = config.max_prompt_genes, config.cells
        shortest = min(config.min_prompt_genes, longest)
        length = (shortest + longest) / 2
        answer = len(TASKS[task].target) + 1
    else:
        longest, cells = config.max_target_genes, config.generate_cells
        shortest = min(config.min_target_genes, longest)
        length = float(longest)
        if longest > shortest:  # mean of a limit that is uniform in its logarithm
            length = (longest - shortest) / math.log(longest / shortest)
        answer = round(length)
    sentences = min(cells, max(4, config.tokens // round(length)))
    if Family.GENE not in TASKS[task].prompt and config.positions:
        answer = min(answer, config.positions, max(4, config.max_positions // sentences))
    return Step(sentences=sentences, tokens=round(sentences * (length + 4)), positions=sentences * answer)


def bytes_per_rank(config: MulanConfig, recipe: Recipe, step: Step, world: int, precision: str) -> dict[str, int]:
    """Estimate the memory of one process.

    It holds weights, gradients and AdamW's moments in fp32 (a running average counts as the optimiser's), and what the
    backward pass keeps.

    Parameters
    ----------
    config
        Shape of the network.
    plan
        The recipe: whether parameters are sharded, blocks recomputed, batches accumulated, weights averaged.
    step
        Size of the largest step, over all processes.
    world
        Number of processes.
    precision
        Of the matrix products: ``"fp32"`` or ``"bf16"``.

    Returns
    -------
    dict
        Bytes of ``weights``, ``gradients``, ``optimizer`` and ``activations``.
    """
    number = count_parameters(config)
    parts = world if recipe.run.parallel == "fsdp" else 1
    block = 12 * config.width**2
    gathered = 4 * (block + number - config.layers * block) if parts > 1 else 0
    fraction = 1 / (world * recipe.run.accumulate)
    return {
        "weights": 4 * number // parts + gathered,
        "gradients": 4 * number // parts,
        "optimizer": (12 if recipe.optimizer.ema_decay else 8) * number // parts,
        "activations": activation_bytes(
            config, math.ceil(step.tokens * fraction), math.ceil(step.positions * fraction),
            recompute=recipe.run.recompute, precision=precision,
        ),
    }  # fmt: skip


def activation_bytes(
    config: MulanConfig, tokens: int, positions: int, *, recompute: bool = False, precision: str = "fp32"
) -> int:
    """Estimate the bytes kept for the backward pass.

    A block keeps 16 vectors of the model's width per token (two norms' inputs and outputs, queries, keys, values, what
    attention gave, four each of the feed-forward's two sides), halved by bf16 where matrix products read them.

    Parameters
    ----------
    config
        Shape of the network.
    tokens, positions
        Tokens and loss positions of a process's part of the batch.
    recompute
        Whether the activations of a block are computed again in the backward pass, instead of being kept.
    precision
        Of the matrix products: ``"fp32"`` or ``"bf16"``.
    """
    size = 4.0 if precision == "fp32" else 2.5
    block = 16 * config.width * tokens * size
    kept = config.layers * config.width * tokens * 4.0 + block if recompute else config.layers * block
    if config.set_state:
        kept += 9 * config.width * tokens * 4.0
    loss = LOSS_TABLES * min(positions, chunk_positions(config.vocabulary, "cpu")) * config.vocabulary * 4.0
    heads = 2 * config.vocabulary * config.width * 4.0 + 3 * positions * config.width * 4.0
    return round(kept + loss + heads)


def synthetic_batch(config: MulanConfig, sentences: int, tokens: int, positions: int, seed: int = 0) -> Batch:
    """Make a batch of sentences of random tokens: a step's work without cells.

    Parameters
    ----------
    config
        Shape of the network.
    sentences
        Number of sentences.
    tokens
        Length of each, the vocabulary's size less one at most.
    positions
        Loss positions of all sentences together.
    seed
        Of the random tokens.
    """
    rng = np.random.default_rng(seed)
    V = config.vocabulary
    order = np.stack([rng.permutation(V - 1)[: min(tokens, V - 1)] + 1 for _ in range(sentences)])
    tokens = order.shape[1]
    index_of = np.full((sentences, V), -1, dtype=np.int16)
    np.put_along_axis(index_of, order, np.arange(tokens, dtype=np.int16)[None], axis=1)
    index_of[:, 0] = tokens
    level = np.where(index_of >= 0, rng.integers(1, config.levels + 1, index_of.shape), 0).astype(np.uint8)
    level[:, 0] = 0
    each = max(1, positions // sentences)
    index = np.concatenate(
        [np.sort(rng.choice(tokens, size=min(each, tokens), replace=False)) for _ in range(sentences)]
    )
    row = np.repeat(np.arange(sentences), len(index) // sentences)
    return Batch(
        task="generate",
        entity=torch.from_numpy(order),
        value=torch.from_numpy(np.take_along_axis(level, order, 1).astype(np.int64)),
        positions=torch.from_numpy(row * tokens + index),
        targets=Targets(
            row=torch.from_numpy(row),
            index=torch.from_numpy(index),
            weight=torch.full((len(row),), 1 / len(row)),
            order=torch.from_numpy(index_of),
            level=torch.from_numpy(level),
            end=0,
            allowed=torch.ones(sentences, V, dtype=torch.bool),
            labelled=torch.zeros(sentences, dtype=torch.bool),
        ),
        tokens=sentences * tokens,
        cells=np.arange(sentences),
        all_cells=sentences,
        all_tokens=sentences * tokens,
    )


def measured_speed(config: MulanConfig, objective: ObjectiveConfig, precision: str, device: str = "cpu") -> float:
    """Measure operations per second of forward and backward, on a network of the same width with few blocks.

    Counted as in :func:`scmulan.model.cost.batch_flops`; the fastest of three short steps.

    Parameters
    ----------
    config
        Shape of the network.
    objective
        Loss whose gradient is computed.
    precision
        Of the matrix products: ``"fp32"`` or ``"bf16"``.
    device
        Torch device.
    """
    sentences, tokens = 4, min(256, config.vocabulary - 1)
    flops = batch_flops(replace(config, layers=1), sentences * tokens, sentences, sentences * tokens // 4)
    layers = max(1, min(config.layers, round(TIMED_FLOPS / flops)))
    small = replace(config, layers=layers)
    model = Mulan(small).to(device)
    batch = synthetic_batch(small, sentences, tokens, sentences * tokens // 4)
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
    return batch_flops(small, sentences * tokens, sentences, len(batch.positions)) / seconds


def describe_estimate(report: Mapping[str, Any]) -> str:
    """Describe an estimate in a few lines.

    Parameters
    ----------
    report
        From :func:`estimate`.
    """
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

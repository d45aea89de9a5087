"""The loop: batch, loss, step, log, checkpoint; by one process, or by all those of a torchrun job together.

What is needed to look into a run whose loss or gradient is not finite.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from scmulan._dist import Ranks
from scmulan.errors import RecipeError
from scmulan.model.cost import batch_flops
from scmulan.model.network import Mulan
from scmulan.train.batches import Batch, Batches
from scmulan.train.checkpoint import RunFolder, cut_log
from scmulan.train.config import ObjectiveConfig, OptimizerConfig, RunConfig
from scmulan.train.ema import WeightAverage
from scmulan.train.losses import objective_loss, value_pairs
from scmulan.train.parallel import recompute_blocks, spread, synchronised

T = TypeVar("T")


def make_optimizer(model: Mulan, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, norms, scales and biases do not. Its moments exist from the start."""
    decay = [p for n, p in model.named_parameters() if p.dim() >= 2 and "gain" not in n and p.requires_grad]
    rest = [p for n, p in model.named_parameters() if (p.dim() < 2 or "gain" in n) and p.requires_grad]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.beta_1, config.beta_2), fused=True
    )
    # What AdamW would make at the first gradient: so a checkpoint holds the same tensors at every step.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Rate of a step: linear warm-up, then a cosine down to ``final_learning_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    first, last = config.learning_rate, config.final_learning_rate
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batch_loss(
    model: Mulan, batch: Batch, objective: ObjectiveConfig, pairs: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entity and value loss of one batch (``pairs``: see :func:`objective_loss`)."""
    hidden = model(batch.entity, batch.value)
    picked = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    value_weight = objective.value_weight if batch.task == "generate" or objective.name == "published" else 0.0
    return objective_loss(
        model, picked, batch.targets, objective=objective.name, value_weight=value_weight, pairs=pairs
    )  # fmt: skip


class Losses(nn.Module):
    """A step's forward pass, as the one module that DDP and ``fully_shard`` wrap."""

    def __init__(self, model: Mulan, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, pairs: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Entity and value loss."""
        return batch_loss(self.model, batch, self.objective, pairs)


class Trainer:
    """Training of one model in one run folder.

    Parameters
    ----------
    model
        Network with its initial weights.
    batches
        Training batches by step.
    folder
        Run folder; a checkpoint in it is continued.
    objective, optimizer, run
        Sections of the recipe; ``run.precision`` is ``"fp32"`` or ``"bf16"`` here.
    validate
        Called with the model every ``run.validate_every`` steps; its figures go into the log.
    ranks
        Processes that work together; one by default.
    ceiling
        Operations per second that matrix products reach in all processes together, for the log's ``mfu``; 0: unknown.
    """

    def __init__(
        self,
        model: Mulan,
        batches: Batches,
        folder: RunFolder,
        *,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        run: RunConfig,
        validate: Callable[[Mulan], dict[str, float]] | None = None,
        ranks: Ranks | None = None,
        ceiling: float = 0.0,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.model = model.to(self.ranks.device)
        self.batches = batches
        self.folder = folder
        self.objective = objective
        self.config = optimizer
        self.run_config = run
        self.validate = validate
        self.ceiling = ceiling
        if run.recompute:
            recompute_blocks(model)
        self.losses = spread(Losses(model, objective), model, self.ranks, run.parallel)
        self.optimizer = make_optimizer(model, optimizer)
        self.average = WeightAverage(model, optimizer.ema_decay) if optimizer.ema_decay else None
        self.step = 0
        self.tokens = 0
        self.cells = 0
        self.flops = 0.0
        self.log_path = folder.path / "log.jsonl"
        self._stop: int | None = None
        self._saved: int | None = None

    # -- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes while training, by name."""
        out = {f"model.{name}": weight.detach() for name, weight in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, moment in self.optimizer.state.get(parameter, {}).items():
                out[f"{key}.{name}"] = moment
        return out | (self.average.tensors() if self.average else {})

    def resume(self) -> bool:
        """Continue from the folder's newest whole checkpoint; False where there is none."""
        facts = self.folder.load(self.tensors(), ranks=self.ranks)
        if facts is None:
            if self.ranks.first:
                self.log_path.unlink(missing_ok=True)
            return False
        self.step, self.tokens, self.cells, self.flops = (facts[k] for k in ("step", "words", "cells", "flops"))
        self._saved = self.step
        if self.ranks.first:
            cut_log(self.log_path, self.step)
        return True

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of this moment, beside the next steps unless ``wait`` is set."""
        facts = {
            "words": self.tokens,
            "cells": self.cells,
            "flops": self.flops,
            "precision": self.run_config.precision,
            "processes": self.ranks.world,
        }
        self.folder.save(self.step, self.tensors(), facts, self.run_config.keep, ranks=self.ranks)
        self._saved = self.step
        if wait:
            self.folder.settle()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the last step.

        Returns
        -------
        bool
            True when the last step is done; False when a signal asked to stop (a checkpoint was written).

        Raises
        ------
        RecipeError
            If loss or gradient are not finite; the last good checkpoint stays.
        OutputError
            If a checkpoint cannot be written.
        """
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.model.train()
        quiet = not (self.ranks.first and sys.stderr.isatty())
        try:
            with (
                Log(self.log_path, self.run_config.tensorboard, write=self.ranks.first) as log,
                tqdm(total=self.config.steps, initial=self.step, unit="step", disable=quiet) as bar,
            ):
                recent: dict[str, list[float]] = {}
                started = last_save = time.monotonic()
                while self.step < self.config.steps:
                    minutes = (time.monotonic() - last_save) / 60
                    due = self.ranks.first and minutes > self.run_config.checkpoint_minutes and not self.folder.busy
                    stop, save = self.ranks.max(self._stop is not None, due)
                    if stop:
                        break
                    if save:
                        self.save(wait=False)
                        last_save = time.monotonic()
                    self._one_step(recent)
                    bar.update()
                    done = self.step == self.config.steps
                    if done or self.step % self.run_config.log_every == 0:
                        line = self._log_line(recent, time.monotonic() - started)
                        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in line.items() if "entity" in k))
                        log.write(line)
                        recent, started = {}, time.monotonic()
                    every = self.run_config.validate_every
                    if self.validate is not None and every and (done or self.step % every == 0):
                        before = time.monotonic()
                        with self.average.in_use() if self.average else nullcontext():
                            log.write({"step": self.step, "validation": self.validate(self.model)})
                        started += time.monotonic() - before
                if self._saved != self.step:
                    self.save(wait=False)
                self.folder.settle()
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)
        return self.step >= self.config.steps

    def _one_step(self, recent: dict[str, list[float]]) -> None:
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        accumulate = self.run_config.accumulate
        numbers = [self.ranks.rank * accumulate + i for i in range(accumulate)]
        mine = self.batches.batch(self.step, self.ranks.rank, self.ranks.world)
        parts = [cut(mine, i, accumulate) for i in range(accumulate)]
        task = mine.task
        weight = self.objective.task_weights.get(task, 1.0)
        pairs = 0.0
        if self.objective.name == "published":
            (pairs,) = self.ranks.sum(sum(value_pairs(part.targets) for part in parts))
        self.optimizer.zero_grad(set_to_none=True)
        entity, value = 0.0, 0.0
        for number, part in zip(numbers, parts, strict=True):
            with synchronised(self.losses, last=number == numbers[-1]):
                e, v = self._losses(part, number, pairs)
                # Gradients are averaged over the processes, and each has its share of one global loss.
                ((e + self.objective.value_weight * v) * weight * self.ranks.world).backward()
            entity, value = entity + e.item(), value + v.item()
        entity, value, words, cells, padded, positions = self.ranks.sum(
            entity, value, mine.tokens, len(mine.entity), mine.entity.numel(), len(mine.positions)
        )
        norm = float(torch.as_tensor(_whole(self._clip())))
        if not math.isfinite(entity + value + norm):
            where = save_divergence(self, parts, {"entity": entity, "value": value, "gradient": norm, "task": task})
            what = f"loss is {entity + self.objective.value_weight * value}"
            if math.isfinite(entity + value):
                what = f"gradient is {norm} (the loss {entity + self.objective.value_weight * value:.4g})"
            raise RecipeError(
                f"the {what} at step {self.step} (task {task}); weights, sentences and a report are in {where}, the "
                "last checkpoint is older than that: lower optimizer.learning_rate or optimizer.grad_clip and start "
                "again in another folder"
            )
        self.optimizer.step()
        self.step += 1
        if self.average:
            self.average.update(self.step)
        self.tokens += int(words)
        self.cells += int(cells)
        flops = batch_flops(self.model.config, int(words), int(cells), int(positions))
        self.flops += flops
        recent.setdefault(f"{task}.entity", []).append(entity)
        if task == "generate":
            recent.setdefault("generate.value", []).append(value)
        for name, number_ in (("gradient", norm), ("words", words), ("cells", cells), ("flops", flops)):
            recent.setdefault(name, []).append(number_)
        recent.setdefault("padding", []).append(1 - words / padded)

    def _losses(self, part: Batch, number: int, pairs: float) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.ranks.device
        bf16 = self.run_config.precision == "bf16"
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices, device_type="cuda"),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            # Dropout follows from the step and the part of the batch: a continued run repeats it.
            torch.manual_seed(self.batches.seed * 1_000_003 + self.step + number * 7_919_000_003)
            losses: tuple[torch.Tensor, torch.Tensor] = self.losses(moved(part, device), pairs)
            return losses

    def _clip(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)

    def _log_line(self, recent: dict[str, list[float]], seconds: float) -> dict[str, Any]:
        sums = {k: sum(recent.get(k, [])) / max(seconds, 1e-9) for k in ("cells", "words", "flops")}
        mean = {k: float(f"{sum(v) / len(v):.7g}") for k, v in recent.items() if k not in sums}
        line = {
            "step": self.step,
            **mean,
            "rate": learning_rate(self.step - 1, self.config),
            "words": self.tokens,
            "cells": self.cells,
            "words_per_second": round(sums["words"]),
            "cells_per_second": round(sums["cells"], 2),
        }
        return line | ({"mfu": round(sums["flops"] / self.ceiling, 4)} if self.ceiling else {})

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stop = number


class Log:
    """The run's ``log.jsonl``, and TensorBoard's files beside it if wanted."""

    def __init__(self, path: Path, tensorboard: bool, *, write: bool) -> None:
        self.file = open(path, "a", encoding="utf-8") if write else None
        self.board: Any = None
        if write and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.with_name("tensorboard")))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for thing in (self.file, self.board):
            if thing is not None:
                thing.close()

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if self.file is None:
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            figures = {f"validation/{k}": v for k, v in line.get("validation", {}).items()} or line
            for name, figure in figures.items():
                if name != "step":
                    self.board.add_scalar(name, figure, line["step"])


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cut(batch: Batch, part: int, parts: int) -> Batch:
    """Every ``parts``-th sentence; where there is none, one without weight, as all processes do the same work."""
    if parts == 1:
        return batch
    rows = torch.arange(min(part, len(batch.entity)), len(batch.entity), parts)
    empty = len(rows) == 0
    rows = rows if not empty else torch.zeros(1, dtype=torch.int64)
    t = batch.targets
    place = torch.full((len(batch.entity),), -1)
    place[rows] = torch.arange(len(rows))
    mine = place[t.row] >= 0
    width = batch.entity.shape[1]
    targets = replace(
        t,
        row=place[t.row[mine]],
        index=t.index[mine],
        weight=t.weight[mine] * (not empty),
        order=t.order[rows],
        level=t.level[rows],
        allowed=None if t.allowed is None else t.allowed[rows],
        labelled=None if t.labelled is None else t.labelled[rows],
    )
    at = batch.positions[mine] - t.row[mine] * width + targets.row * width
    tokens = 0 if empty else int(batch.tokens * len(rows) / len(batch.entity))
    return replace(
        batch, entity=batch.entity[rows], value=batch.value[rows], positions=at, targets=targets, tokens=tokens
    )


def moved(thing: T, device: torch.device) -> T:
    """A dataclass with its tensors on a device."""
    if device.type == "cpu":
        return thing
    assert is_dataclass(thing) and not isinstance(thing, type)
    changed: dict[str, Any] = {}
    for f in fields(thing):
        value = getattr(thing, f.name)
        if isinstance(value, torch.Tensor):
            changed[f.name] = value.to(device, non_blocking=True)
        elif is_dataclass(value):
            changed[f.name] = moved(value, device)
    return replace(thing, **changed)


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


NAME = "diverged"


def save_divergence(trainer: "Trainer", parts: list[Batch], losses: dict[str, float | str]) -> Path:
    """Write the state before the step that failed, its sentences and a report; all processes have to call.

    Parameters
    ----------
    trainer
        Before the optimiser's step: its weights are those that gave the losses.
    parts
        This process' parts of the batch.
    losses
        What was found.

    Returns
    -------
    Path
        Folder ``diverged`` of the run: a checkpoint like the others (never resumed from) in ``state``,
        ``sentences-RANK.safetensors`` and ``report.json``.
    """
    folder = trainer.folder.path / NAME
    folder.mkdir(exist_ok=True)
    sentences: dict[str, torch.Tensor] = {}
    for i, part in enumerate(parts):
        named = {"entity": part.entity, "value": part.value, "positions": part.positions}
        named |= {"row": part.targets.row, "said": part.targets.index, "weight": part.targets.weight}
        sentences |= {f"{i}.{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(sentences, folder / f"sentences-{trainer.ranks.rank}.safetensors")
    names: dict[str, list[str]] = {}
    for name, parameter in trainer.model.named_parameters():
        for kind, tensor in (("weight", parameter), ("gradient", parameter.grad)):
            if tensor is not None and not torch.isfinite(_local(tensor)).all():
                names.setdefault(kind, []).append(name)
    facts = {"words": trainer.tokens, "cells": trainer.cells, "flops": trainer.flops}
    trainer.folder.save(trainer.step, trainer.tensors(), facts, 10**9, ranks=trainer.ranks, name=NAME)
    trainer.folder.settle()
    if trainer.ranks.first:
        report = {
            "step": trainer.step,
            # JSON knows no NaN
            **{k: v if isinstance(v, str) or math.isfinite(v) else str(v) for k, v in losses.items()},
            "rate": trainer.optimizer.param_groups[0]["lr"],
            "not_finite": names,
            "checkpoint": str(trainer.folder.checkpoints / NAME),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return folder


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

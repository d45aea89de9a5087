"""The training loop: batch, loss, step, log, checkpoint; in one process, or in all those of a torchrun job together."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from scmulan._dist import Ranks
from scmulan._progress import SILENT, Progress
from scmulan.errors import RecipeError
from scmulan.model.cost import batch_flops
from scmulan.model.network import Mulan
from scmulan.train.batches import Batch, Batches
from scmulan.train.checkpoint import RunFolder, cut_log
from scmulan.train.config import ObjectiveConfig, OptimizerConfig, RunConfig
from scmulan.train.ema import WeightAverage
from scmulan.train.losses import objective_loss, value_pairs
from scmulan.train.parallel import local, parallelise, recompute_blocks, synchronised, whole

DIVERGED = "diverged"
"""Folder of the run, and checkpoint, for what led to a loss or gradient that is not finite."""


def make_optimizer(model: Mulan, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make a fused AdamW: matrices decay, norms, scales and biases do not. Its moments exist from the start."""
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
    """Compute the learning rate of a step: linear warm-up, then a cosine down to ``final_learning_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    first, last = config.learning_rate, config.final_learning_rate
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batch_loss(
    model: Mulan, batch: Batch, objective: ObjectiveConfig, pairs: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute entity and value loss of one batch (``pairs``: see :func:`scmulan.train.losses.objective_loss`)."""
    hidden = model(batch.entity, batch.value)
    picked = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    value_weight = objective.value_weight if batch.task == "generate" or objective.name == "published" else 0.0
    return objective_loss(
        model, picked, batch.targets, objective=objective.name, value_weight=value_weight, pairs=pairs
    )


class BatchLoss(nn.Module):
    """Forward pass of a step, as the one module that DDP and ``fully_shard`` wrap."""

    def __init__(self, model: Mulan, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, pairs: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute entity and value loss."""
        return batch_loss(self.model, batch, self.objective, pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Figures of one optimiser step, over all processes.

    Parameters
    ----------
    task
        Task of the batch.
    entity, value
        Losses before the step; the value loss is not weighted.
    grad_norm
        Norm of the gradient before clipping.
    tokens, cells
        Tokens without padding, and sentences.
    padding
        Fraction of the batch that is padding.
    flops
        Operations that forward and backward pass need.
    """

    task: str
    entity: float
    value: float
    grad_norm: float
    tokens: int
    cells: int
    padding: float
    flops: float

    def figures(self) -> dict[str, float]:
        """Return the figures that the log takes the mean of, under the log's names."""
        value = {"generate.value": self.value} if self.task == "generate" else {}
        return {f"{self.task}.entity": self.entity, **value, "gradient": self.grad_norm, "padding": self.padding}


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
    progress
        Shows a bar of the steps.
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
        progress: Progress = SILENT,
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
        self.progress = progress if self.ranks.first else SILENT
        if run.recompute:
            recompute_blocks(model)
        self.loss = parallelise(BatchLoss(model, objective), model, self.ranks, run.parallel)
        self.optimizer = make_optimizer(model, optimizer)
        self.average = WeightAverage(model, optimizer.ema_decay) if optimizer.ema_decay else None
        self.steps_done = 0
        self.tokens = 0
        self.cells = 0
        self.flops = 0.0
        self.log_path = folder.path / "log.jsonl"
        self._signal: int | None = None
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything that changes while training, by name."""
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
        self.steps_done, self.tokens, self.cells, self.flops = (facts[k] for k in ("step", "words", "cells", "flops"))
        self._saved_step = self.steps_done
        if self.ranks.first:
            cut_log(self.log_path, self.steps_done)
        return True

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of this moment, beside the next steps unless ``wait`` is set."""
        facts = self._facts() | {"precision": self.run_config.precision, "processes": self.ranks.world}
        self.folder.save(self.steps_done, self.tensors(), facts, self.run_config.keep, ranks=self.ranks)
        self._saved_step, self._saved_at = self.steps_done, time.monotonic()
        if wait:
            self.folder.wait()

    def _facts(self) -> dict[str, Any]:
        return {"words": self.tokens, "cells": self.cells, "flops": self.flops}

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
        self.model.train()
        self._saved_at = time.monotonic()
        with (
            self._signals_noted(),
            Log(self.log_path, self.run_config.tensorboard, write=self.ranks.first) as log,
            self.progress.bar(self.config.steps, "steps") as advance,
        ):
            advance(self.steps_done)
            recent: list[StepMetrics] = []
            started = time.monotonic()
            while self.steps_done < self.config.steps:
                stop, save = self._stop_or_save()
                if stop:
                    break
                if save:
                    self.save(wait=False)
                recent.append(self.step())
                advance(1)
                if self._due(self.run_config.log_every):
                    line = self._log_line(recent, time.monotonic() - started)
                    self.progress.note(" ".join(f"{name} {line[name]:.3f}" for name in line if "entity" in name))
                    log.write(line)
                    recent, started = [], time.monotonic()
                if self.validate is not None and self._due(self.run_config.validate_every):
                    before = time.monotonic()
                    with self.average.in_use() if self.average else nullcontext():
                        log.write({"step": self.steps_done, "validation": self.validate(self.model)})
                    started += time.monotonic() - before
            if self._saved_step != self.steps_done:
                self.save(wait=False)
            self.folder.wait()
        return self.steps_done >= self.config.steps

    def step(self) -> StepMetrics:
        """Take one optimiser step.

        Raises
        ------
        RecipeError
            If loss or gradient are not finite; the weights are then those before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, self.config)
        batch = self.batches.batch(self.steps_done, self.ranks.rank, self.ranks.world)
        micro_batches = [batch.micro_batch(i, self.run_config.accumulate) for i in range(self.run_config.accumulate)]
        metrics = self._metrics(batch, *self._backward(micro_batches))
        if not math.isfinite(metrics.entity + metrics.value + metrics.grad_norm):
            self._report_divergence(metrics, micro_batches)
        self.optimizer.step()
        self.steps_done += 1
        if self.average:
            self.average.update(self.steps_done)
        self.tokens += metrics.tokens
        self.cells += metrics.cells
        self.flops += metrics.flops
        return metrics

    def _backward(self, micro_batches: Sequence[Batch]) -> tuple[float, float, float]:
        """Compute and clip the gradient over micro-batches; return this process' losses and the norm."""
        weight = self.objective.task_weights.get(micro_batches[0].task, 1.0)
        pairs = 0.0
        if self.objective.name == "published":
            (pairs,) = self.ranks.sum(sum(value_pairs(micro_batch.targets) for micro_batch in micro_batches))
        self.optimizer.zero_grad(set_to_none=True)
        entity, value = 0.0, 0.0
        for i, micro_batch in enumerate(micro_batches):
            with synchronised(self.loss, last=i == len(micro_batches) - 1):
                e, v = self._losses(micro_batch, self.ranks.rank * len(micro_batches) + i, pairs)
                # Gradients are averaged over the processes, and each has its part of one global loss.
                ((e + self.objective.value_weight * v) * weight * self.ranks.world).backward()
            entity, value = entity + e.item(), value + v.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        return entity, value, float(torch.as_tensor(whole(norm)))

    def _losses(self, micro_batch: Batch, number: int, pairs: float) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.ranks.device
        bf16 = self.run_config.precision == "bf16"
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices, device_type="cuda"),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            # Dropout follows from the step and the part of the batch: a continued run repeats it.
            torch.manual_seed(self.batches.seed * 1_000_003 + self.steps_done + number * 7_919_000_003)
            losses: tuple[torch.Tensor, torch.Tensor] = self.loss(micro_batch.to(device), pairs)
            return losses

    def _metrics(self, batch: Batch, entity: float, value: float, norm: float) -> StepMetrics:
        """Add up what the processes did."""
        entity, value, tokens, cells, padded, positions = self.ranks.sum(
            entity, value, batch.tokens, len(batch.entity), batch.entity.numel(), len(batch.positions)
        )
        return StepMetrics(
            task=batch.task,
            entity=entity,
            value=value,
            grad_norm=norm,
            tokens=int(tokens),
            cells=int(cells),
            padding=1 - tokens / padded,
            flops=batch_flops(self.model.config, int(tokens), int(cells), int(positions)),
        )

    def _due(self, every: int) -> bool:
        """Return whether something that happens every so many steps (0: never), and at the end, is due."""
        return every > 0 and (self.steps_done == self.config.steps or self.steps_done % every == 0)

    def _stop_or_save(self) -> tuple[bool, bool]:
        """Decide, for all processes, whether to stop because of a signal, and whether a checkpoint is due."""
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.ranks.first and minutes > self.run_config.checkpoint_minutes and not self.folder.busy
        stop, save = self.ranks.max(self._signal is not None, due)
        return bool(stop), bool(save)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM, so that the loop ends after its step."""

        def note(number: int, _frame: object) -> None:
            self._signal = number

        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    # -- what is written ---------------------------------------------------------------------------------------------

    def _log_line(self, recent: Sequence[StepMetrics], seconds: float) -> dict[str, Any]:
        """Summarise the steps since the last line."""
        figures: dict[str, list[float]] = {}
        for metrics in recent:
            for name, figure in metrics.figures().items():
                figures.setdefault(name, []).append(figure)
        tokens, cells, flops = (
            sum(getattr(m, name) for m in recent) / max(seconds, 1e-9) for name in ("tokens", "cells", "flops")
        )
        line = {
            "step": self.steps_done,
            **{name: float(f"{sum(values) / len(values):.7g}") for name, values in figures.items()},
            "rate": learning_rate(self.steps_done - 1, self.config),
            "words": self.tokens,
            "cells": self.cells,
            "words_per_second": round(tokens),
            "cells_per_second": round(cells, 2),
        }
        return line | ({"mfu": round(flops / self.ceiling, 4)} if self.ceiling else {})

    def _report_divergence(self, metrics: StepMetrics, micro_batches: Sequence[Batch]) -> None:
        """Write what led to a loss or gradient that is not finite, and raise; all processes have to call."""
        folder = self.folder.path / DIVERGED
        self._save_divergence(folder, metrics, micro_batches)
        loss = metrics.entity + self.objective.value_weight * metrics.value
        what = f"loss is {loss}"
        if math.isfinite(metrics.entity + metrics.value):
            what = f"gradient is {metrics.grad_norm} (the loss {loss:.4g})"
        raise RecipeError(
            f"the {what} at step {self.steps_done} (task {metrics.task}); weights, sentences and a report are in "
            f"{folder}, the last checkpoint is older than that: lower optimizer.learning_rate or optimizer.grad_clip "
            "and start again in another folder"
        )

    def _save_divergence(self, folder: Path, metrics: StepMetrics, micro_batches: Sequence[Batch]) -> None:
        """Write a checkpoint of before the step (never resumed from), each process' sentences, and a report."""
        folder.mkdir(exist_ok=True)
        sentences: dict[str, torch.Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            named = {"entity": micro_batch.entity, "value": micro_batch.value, "positions": micro_batch.positions}
            named |= {
                "row": micro_batch.targets.row,
                "index": micro_batch.targets.index,
                "weight": micro_batch.targets.weight,
            }
            sentences |= {f"{i}.{name}": tensor.contiguous() for name, tensor in named.items()}
        save_file(sentences, folder / f"sentences-{self.ranks.rank}.safetensors")
        not_finite: dict[str, list[str]] = {}
        for name, parameter in self.model.named_parameters():
            for kind, tensor in (("weight", parameter), ("gradient", parameter.grad)):
                if tensor is not None and not torch.isfinite(local(tensor)).all():
                    not_finite.setdefault(kind, []).append(name)
        self.folder.save(self.steps_done, self.tensors(), self._facts(), 10**9, ranks=self.ranks, name=DIVERGED)
        self.folder.wait()
        if self.ranks.first:
            losses = {"entity": metrics.entity, "value": metrics.value, "gradient": metrics.grad_norm}
            report = {
                "step": self.steps_done,
                # JSON knows no NaN
                **{name: loss if math.isfinite(loss) else str(loss) for name, loss in losses.items()},
                "task": metrics.task,
                "rate": self.optimizer.param_groups[0]["lr"],
                "not_finite": not_finite,
                "checkpoint": str(self.folder.checkpoints / DIVERGED),
            }
            (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


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
        for output in (self.file, self.board):
            if output is not None:
                output.close()

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
    """Read the lines of a run's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

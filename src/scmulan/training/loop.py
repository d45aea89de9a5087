"""One process, one loop: batch, loss, step, log, checkpoint."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scmulan.errors import RecipeError
from scmulan.model.transformer import Mulan
from scmulan.training.batches import Batch, Batches
from scmulan.training.objective import objective_loss
from scmulan.training.recipe import ObjectiveSection, OptimizerSection, RunSection
from scmulan.training.state import RunFolder, cut_log


def make_optimizer(model: Mulan, config: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, norms, scales and biases do not."""
    decay = [p for n, p in model.named_parameters() if p.dim() >= 2 and "gain" not in n and p.requires_grad]
    rest = [p for n, p in model.named_parameters() if (p.dim() < 2 or "gain" in n) and p.requires_grad]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.rate, betas=(config.beta_1, config.beta_2), fused=True
    )


def learning_rate(step: int, config: OptimizerSection) -> float:
    """Rate of a step: linear warm-up, then a cosine down to ``final_rate``."""
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_rate + (config.rate - config.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batch_loss(model: Mulan, batch: Batch, objective: ObjectiveSection) -> tuple[torch.Tensor, torch.Tensor]:
    """Entity and value loss of one batch."""
    hidden = model(batch.entity, batch.value)
    picked = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    value_weight = objective.value_weight if batch.task == "generate" or objective.name == "published" else 0.0
    return objective_loss(model, picked, batch.targets, objective=objective.name, value_weight=value_weight)  # type: ignore[arg-type]


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
        Sections of the recipe.
    validate
        Called with the model every ``run.validate_every`` steps; its figures go into the log.
    """

    def __init__(
        self,
        model: Mulan,
        batches: Batches,
        folder: RunFolder,
        *,
        objective: ObjectiveSection,
        optimizer: OptimizerSection,
        run: RunSection,
        validate: Callable[[Mulan], dict[str, float]] | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.folder = folder
        self.objective = objective
        self.config = optimizer
        self.run_config = run
        self.validate = validate
        self.optimizer = make_optimizer(model, optimizer)
        self.step = 0
        self.words = 0
        self.log_path = folder.path / "log.jsonl"
        self._stop: int | None = None

    def resume(self) -> bool:
        """Continue from the folder's newest whole checkpoint; False where there is none."""
        state = self.folder.load()
        if state is None:
            self.log_path.unlink(missing_ok=True)
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.words = state["step"], state["words"]
        cut_log(self.log_path, self.step)
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "words": self.words,
        }
        self.folder.save(self.step, state, self.run_config.keep)

    def train(self) -> bool:
        """Run to the last step.

        Returns
        -------
        bool
            True when the last step is done; False when a signal asked to stop (a checkpoint was written).

        Raises
        ------
        RecipeError
            If the loss is not finite; the last good checkpoint stays.
        """
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.model.train()
        last_save = time.monotonic()
        try:
            with (
                open(self.log_path, "a", encoding="utf-8") as log,
                tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not sys.stderr.isatty()) as bar,
            ):
                recent: dict[str, list[float]] = {}
                started = time.monotonic()
                while self.step < self.config.steps and self._stop is None:
                    self._one_step(recent)
                    bar.update()
                    done = self.step == self.config.steps
                    if done or self.step % self.run_config.log_every == 0:
                        line = self._log_line(recent, time.monotonic() - started)
                        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in line.items() if "entity" in k))
                        _write_line(log, line)
                        recent, started = {}, time.monotonic()
                    every = self.run_config.validate_every
                    if self.validate is not None and every and (done or self.step % every == 0):
                        _write_line(log, {"step": self.step, "validation": self.validate(self.model)})
                        started = time.monotonic()
                    if done or time.monotonic() - last_save > 60 * self.run_config.checkpoint_minutes:
                        self.save()
                        last_save = time.monotonic()
                if self._stop is not None:
                    self.save()
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)
        return self.step >= self.config.steps

    def _one_step(self, recent: dict[str, list[float]]) -> None:
        batch = self.batches.batch(self.step)
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        bf16 = self.run_config.precision == "bf16"
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            # Dropout follows from the step, as the batch does: a continued run repeats it.
            torch.manual_seed(self.batches.seed * 1_000_003 + self.step)
            entity, value = batch_loss(self.model, batch, self.objective)
        loss = (entity + self.objective.value_weight * value) * self.objective.task_weights.get(batch.task, 1.0)
        if not torch.isfinite(loss):
            raise RecipeError(
                f"the loss is {loss.item()} at step {self.step} (task {batch.task}); the last checkpoint is older "
                "than that: lower optimizer.rate or optimizer.clip and start again in another folder"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.step += 1
        self.words += batch.words
        recent.setdefault(f"{batch.task}.entity", []).append(entity.item())
        if batch.task == "generate":
            recent.setdefault("generate.value", []).append(value.item())
        recent.setdefault("gradient", []).append(norm.item())
        recent.setdefault("words", []).append(batch.words)
        recent.setdefault("padding", []).append(1 - batch.words / batch.entity.numel())

    def _log_line(self, recent: dict[str, list[float]], seconds: float) -> dict[str, Any]:
        mean = {k: round(sum(v) / len(v), 5) for k, v in recent.items() if k != "words"}
        return {
            "step": self.step,
            **mean,
            "rate": learning_rate(self.step - 1, self.config),
            "words": self.words,
            "words_per_second": round(sum(recent.get("words", [])) / max(seconds, 1e-9)),
        }

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stop = number


def _write_line(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

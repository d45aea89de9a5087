"""What is needed to look into a run whose loss or gradient is not finite."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from scmulan.training.batches import Batch

if TYPE_CHECKING:
    from scmulan.training.loop import Trainer

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
        named |= {"row": part.targets.row, "said": part.targets.said, "weight": part.targets.weight}
        sentences |= {f"{i}.{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(sentences, folder / f"sentences-{trainer.ranks.rank}.safetensors")
    names: dict[str, list[str]] = {}
    for name, parameter in trainer.model.named_parameters():
        for kind, tensor in (("weight", parameter), ("gradient", parameter.grad)):
            if tensor is not None and not torch.isfinite(_local(tensor)).all():
                names.setdefault(kind, []).append(name)
    facts = {"words": trainer.words, "cells": trainer.cells, "flops": trainer.flops}
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

"""Export a run: from its newest checkpoint to a model folder with a card that says how it was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scmulan
from scmulan._io.adata import write_json
from scmulan._io.outputs import atomic_path
from scmulan.data.memory import StudyCells
from scmulan.data.store import CellSource
from scmulan.errors import InputError
from scmulan.model.cost import count_parameters
from scmulan.model.loading import save_model
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.checkpoint import RunFolder, read_facts, read_tensors
from scmulan.train.config import Recipe, recipe_from_json
from scmulan.train.gene_count import CellGroups, fit_gene_counts
from scmulan.train.trainer import read_log
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

DATA, GROUPS = "data.json", "kinds.npz"
CURVE_POINTS = 200
MAX_COVERED_CELLS = 20_000
"""Cells over which the fraction of a cell's total in the vocabulary is averaged."""
# Figures of the log that belong to the machine, not to the training.
MACHINE_FIGURES = {"words_per_second", "cells_per_second", "mfu", "words", "cells", "rate", "padding"}


def save_data_facts(
    run: Path, manifest: Sequence[Mapping[str, Any]], store: CellSource, vocabulary: Vocabulary
) -> None:
    """Write into a run folder what a card has to say about the training cells, so that an export needs no cells."""
    label = store.tokens(Family.FINE)
    counts = np.bincount(label[label >= 0], minlength=len(vocabulary))
    content = {
        "data": list(manifest),
        "cells": len(store),
        "cells_with_words": int((store.lengths > 0).sum()),
        "cell_types": {vocabulary.tokens[t]: int(counts[t]) for t in vocabulary.ids(Family.FINE)},
        "metadata": {str(f): vocabulary.names(f) for f in METADATA if f not in (Family.COARSE, Family.FINE)},
        "covered": store.covered(MAX_COVERED_CELLS),
    }
    write_json(content, run / DATA)
    groups = CellGroups.of(store, len(vocabulary))
    if groups is not None:
        with atomic_path(run / GROUPS) as temporary:
            groups.save(temporary)
    with atomic_path(run / "vocabulary.json") as temporary:
        vocabulary.save(temporary)


def file_manifest(studies: Sequence[StudyCells]) -> list[dict[str, Any]]:
    """List the files that the cells came from, with their hashes."""
    return [
        {
            "study": s.spec.name,
            "file": s.spec.file.name,
            "sha256": s.sha256,
            "cells": len(s.total),
            "genes_resolved": len(s.genes),
            "matrix": s.matrix_kind,
        }
        for s in studies
    ]


def export_run(run: str | Path, out: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Turn the newest whole checkpoint of a run into a model folder.

    Parameters
    ----------
    run
        Folder that ``scmulan pretrain`` wrote; the run may be going on.
    out
        Model folder to write.
    force
        Replace an existing model folder.

    Returns
    -------
    dict
        ``model`` (folder), ``step``, ``words``, ``flops``, ``parameters``.

    Raises
    ------
    InputError
        If the folder holds no run, or no whole checkpoint.
    OutputError
        If ``out`` exists (without ``force``) or cannot be written.
    """
    run = Path(run)
    recipe, vocabulary = read_run(run)
    folder = RunFolder(run)
    checkpoint = folder.newest()
    if checkpoint is None:
        raise InputError(f"{run}: holds no whole checkpoint yet; export it after the first one is written")
    config = model_config(recipe, len(vocabulary))
    with torch.device("meta"):
        network = Mulan(config)
    network.to_empty(device="cpu")
    weights = "average" if recipe.optimizer.ema_decay else "model"
    read_tensors(checkpoint, {f"{weights}.{name}": p.detach() for name, p in network.named_parameters()})
    facts = read_facts(checkpoint)
    card = training_card(run, recipe, vocabulary, network.eval(), facts)
    target = save_model(out, network, vocabulary, card, dtype=torch.float16, force=force)
    return {
        "model": str(target),
        "step": facts["step"],
        "words": facts["words"],
        "flops": facts["flops"],
        "parameters": count_parameters(config),
    }


def read_run(run: Path) -> tuple[Recipe, Vocabulary]:
    """Read the recipe and the vocabulary of a run folder.

    Raises
    ------
    InputError
        If it lacks a file that every run has.
    RecipeError
        If its recipe cannot be used.
    VocabularyError
        If its vocabulary cannot be used.
    """
    for name in ("recipe.json", "vocabulary.json", DATA):
        if not (run / name).is_file():
            raise InputError(f"{run}: no {name}; expected a folder that `scmulan pretrain` wrote")
    raw = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    return recipe_from_json(raw, str(run / "recipe.json")), Vocabulary.load(run / "vocabulary.json")


def model_config(recipe: Recipe, vocabulary_size: int) -> MulanConfig:
    """Return the shape of a recipe's network."""
    return MulanConfig(vocabulary=vocabulary_size, **asdict(recipe.model))


def training_card(
    run: Path, recipe: Recipe, vocabulary: Vocabulary, network: Mulan, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the card, which says how the model was made."""
    log = [line for line in read_log(run / "log.jsonl") if line["step"] <= facts["step"]]
    checks = [line for line in log if "validation" in line]
    last: dict[str, Any] = {}
    for line in log:
        last.update({k: v for k, v in line.items() if k != "validation"})
    groups = CellGroups.load(run / GROUPS) if (run / GROUPS).is_file() else None
    return {
        "name": recipe.name,
        "description": recipe.description,
        "made_by": f"scmulan {scmulan.__version__}, torch {torch.__version__}",
        "objective": recipe.objective.name,
        "recipe": {k: v for k, v in recipe.to_json().items() if k not in ("data", "validation")},
        **json.loads((run / DATA).read_text(encoding="utf-8")),
        "depth": fit_gene_counts(network, groups, vocabulary),
        "steps": facts["step"],
        "steps_planned": recipe.optimizer.steps,
        "words_read": facts["words"],
        "cells_read": facts["cells"],
        "flops": facts["flops"],
        "precision": facts["precision"],
        "parameters": count_parameters(network.config),
        "validation": checks[-1]["validation"] if checks else None,
        "not_trained_on": "validation cells are watched only; no test study was read",
        "final_losses": {k: v for k, v in last.items() if "entity" in k or "value" in k},
        "curve": curve(log),
    }


def curve(log: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Summarise losses and validations of a run in at most a few hundred points: means over stretches of the log."""
    lines = [line for line in log if "validation" not in line]
    size = -(-len(lines) // CURVE_POINTS)
    losses = []
    for start in range(0, len(lines), size or 1):
        part = lines[start : start + size]
        names = dict.fromkeys(k for line in part for k in line if k not in MACHINE_FIGURES and k != "step")
        found = {k: [line[k] for line in part if k in line] for k in names}
        losses.append({"step": part[-1]["step"], **{k: round(sum(v) / len(v), 4) for k, v in found.items()}})
    checks = [{"step": line["step"], **line["validation"]} for line in log if "validation" in line]
    kept = checks[:: -(-len(checks) // CURVE_POINTS) or 1]
    overall = [{k: v for k, v in check.items() if k == "step" or "." not in k or "entity" in k} for check in kept]
    return {"losses": losses, "validation": overall}

"""``scmulan pretrain RECIPE.toml``: from a recipe to a model folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scmulan
from scmulan.corpus.memory import CellStore, StudyCells, build_store, build_vocabulary, read_studies
from scmulan.language.ontology import Ontology
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.model.checkpoint import save_model
from scmulan.model.transformer import Mulan, MulanConfig
from scmulan.training.batches import Batches
from scmulan.training.depth import measure_depth
from scmulan.training.loop import Trainer, read_log
from scmulan.training.recipe import Recipe, read_recipe
from scmulan.training.start import start_from_cells
from scmulan.training.state import RunFolder
from scmulan.training.validate import validate


def label_relations(vocabulary: Vocabulary) -> np.ndarray:
    """Which word may stand for which: bool ``[V, V]``, ``[v, u]`` where cell type u is v or a finer kind of it.

    Within the fine and within the coarse types; any other word stands only for itself.
    """
    out = np.eye(len(vocabulary), dtype=bool)
    ontology = Ontology.load()
    for family in (Family.COARSE, Family.FINE):
        ids = vocabulary.ids(family)
        if len(ids):
            out[np.ix_(ids, ids)] = ontology.label_matrix(vocabulary.names(family))
    return out


def pretrain(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    changes: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a model as a recipe says; the same call continues a run that was interrupted.

    Parameters
    ----------
    recipe
        TOML file, see :mod:`scmulan.training.recipe`.
    out
        Run folder (default ``runs/NAME``); the finished model is in its folder ``model``.
    changes
        Settings that win over the file's: ``"optimizer.steps=200"``.
    dry_run
        Read the cells and report what would be trained, without training.

    Returns
    -------
    dict
        ``model`` (folder, or None when interrupted or dry), ``parameters``, ``cells``, ``steps``, ``words``.
    """
    path = Path(recipe)
    plan = read_recipe(path, changes)
    studies = read_studies(plan.studies(path.parent))
    vocabulary = _vocabulary(plan, studies, path.parent)
    store = build_store(studies, vocabulary)
    config = MulanConfig(vocabulary=len(vocabulary), **_shape(plan))
    model = Mulan(config).initialise(plan.seed)
    start_from_cells(model, store, vocabulary, plan.seed)
    relations = label_relations(vocabulary) if plan.objective.ontology else np.eye(len(vocabulary), dtype=bool)
    batches = Batches(store, vocabulary, plan.batches, plan.seed, relations if plan.objective.ontology else None)
    report: dict[str, Any] = {
        "model": None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cells": len(store),
        "genes": len(vocabulary.genes),
        "steps": plan.optimizer.steps,
        "words": 0,
    }
    if dry_run:
        return report
    folder = RunFolder(Path(out) if out is not None else Path("runs") / plan.name)
    folder.claim(plan.to_json())
    vocabulary.save(folder.path / "vocabulary.json")
    watched = plan.validation_studies(path.parent)
    watch = build_store(read_studies(watched), vocabulary) if watched else None
    trainer = Trainer(
        model,
        batches,
        folder,
        objective=plan.objective,
        optimizer=plan.optimizer,
        run=plan.run,
        validate=None if watch is None else lambda m: validate(m, watch, vocabulary, relations),
    )
    trainer.resume()
    if trainer.train():
        card = training_card(plan, studies, store, vocabulary, trainer)
        target = folder.path / "model"
        save_model(target, model.eval(), vocabulary, card, dtype=torch.float16, force=True)
        report["model"] = str(target)
    report["words"] = trainer.words
    return report


def _vocabulary(plan: Recipe, studies: Sequence[StudyCells], base: Path) -> Vocabulary:
    if plan.vocabulary.file == "published":
        return Vocabulary.published()
    if plan.vocabulary.file:
        return Vocabulary.load(base / plan.vocabulary.file)
    return build_vocabulary(studies, plan.vocabulary.genes)


def _shape(plan: Recipe) -> dict[str, Any]:
    return {f: getattr(plan.model, f) for f in plan.model.__dataclass_fields__}


def training_card(
    plan: Recipe, studies: Sequence[StudyCells], store: CellStore, vocabulary: Vocabulary, trainer: Trainer
) -> dict[str, Any]:
    """What a model's user has to know about how it was made."""
    log = read_log(trainer.log_path)
    checks = [line for line in log if "validation" in line]
    seen = store.lengths > 0
    label = store.words(Family.FINE)
    counts = {vocabulary.words[w]: int((label == w).sum()) for w in vocabulary.ids(Family.FINE)}
    return {
        "name": plan.name,
        "description": plan.description,
        "made_by": f"scmulan {scmulan.__version__}, torch {torch.__version__}",
        "objective": plan.objective.name,
        "recipe": {k: v for k, v in plan.to_json().items() if k not in ("data", "validation")},
        "data": [
            {
                "study": s.spec.name,
                "file": s.spec.file.name,
                "sha256": s.sha256,
                "cells": len(s.total),
                "genes_resolved": len(s.genes),
                "matrix": s.state,
            }
            for s in studies
        ],
        "cells": len(store),
        "cells_with_words": int(seen.sum()),
        "cell_types": counts,
        "metadata": {str(f): vocabulary.names(f) for f in METADATA if f not in (Family.COARSE, Family.FINE)},
        "covered": store.covered(),
        "depth": measure_depth(trainer.model.eval(), store, vocabulary),
        "steps": trainer.step,
        "words_read": trainer.words,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation": checks[-1]["validation"] if checks else None,
        "not_trained_on": "validation studies are watched only; no test study was read",
        "final_losses": {k: v for k, v in _last(log).items() if "entity" in k or "value" in k},
    }


def _last(log: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for line in log:
        if "validation" not in line:
            out.update(line)
    return out


def describe(report: dict[str, Any]) -> str:
    """Report of :func:`pretrain` in a few lines."""
    if report["model"] is None:
        return (
            f"{report['parameters']:,} parameters, {report['genes']:,} genes, {report['cells']:,} cells, "
            f"{report['steps']:,} steps; {report['words']:,} words read so far, no model yet"
        )
    return f"model with {report['parameters']:,} parameters from {report['cells']:,} cells: {report['model']}"

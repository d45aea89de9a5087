"""``scmulan pretrain RECIPE.toml``: from a recipe to a model folder, alone or as one process of a torchrun job."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scmulan._dist import Ranks, training_ranks
from scmulan._io.outputs import sha256
from scmulan._progress import SILENT, Progress
from scmulan.data.memory import StudyCells, build_store, build_vocabulary, read_studies
from scmulan.data.store import CellSource
from scmulan.errors import RecipeError
from scmulan.model.cost import count_parameters, faster_precision, gemm_rates
from scmulan.model.network import Mulan
from scmulan.train.batches import Batches
from scmulan.train.checkpoint import RunFolder
from scmulan.train.config import Recipe, read_recipe, recipe_from_json
from scmulan.train.estimate import describe_estimate, estimate
from scmulan.train.export import export_run, file_manifest, model_config, remember_cells
from scmulan.train.init import init_from_counts
from scmulan.train.parallel import whole_network
from scmulan.train.trainer import Trainer
from scmulan.train.validate import validate
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.vocabulary import Family, Vocabulary

# What may differ when a run is continued.
FREE = ("run", "name", "description")


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


@dataclass(kw_only=True)
class Data:
    """Cells of a run.

    Parameters
    ----------
    vocabulary
        Words.
    train, watch
        Cells to train on, and held-out ones to watch (or None).
    manifest
        Where the training cells came from, with hashes.
    """

    vocabulary: Vocabulary
    train: CellSource
    watch: CellSource | None
    manifest: list[dict[str, Any]]


def read_data(plan: Recipe, base: Path) -> Data:
    """Cells that a recipe names: h5ad files in memory, or a corpus on disk with its own vocabulary and split."""
    corpus = plan.corpus(base)
    if corpus is not None:
        from scmulan.data.split import select_part
        from scmulan.data.store import MANIFEST, Corpus

        store = Corpus(corpus)
        if plan.vocabulary.file and _named_vocabulary(plan, base) != store.vocabulary:
            raise RecipeError(
                f"{corpus}: its words are not those of vocabulary.file ({plan.vocabulary.file}); build the corpus with "
                "that vocabulary, or leave the setting out"
            )
        split = plan.corpus_split(base)
        source = {"corpus": corpus.name, "sha256": sha256(corpus / MANIFEST)}
        return Data(
            vocabulary=store.vocabulary,
            train=select_part(store, "train", split),
            watch=select_part(store, "validation", split) if plan.run.validate_every else None,
            manifest=[
                source,
                *({k: v for k, v in study.items() if k != "path"} for study in store.manifest["studies"]),
            ],
        )
    studies = read_studies(plan.studies(base))
    vocabulary = _vocabulary(plan, studies, base)
    watched = plan.validation_studies(base)
    return Data(
        vocabulary=vocabulary,
        train=build_store(studies, vocabulary),
        watch=build_store(read_studies(watched), vocabulary) if watched else None,
        manifest=file_manifest(studies),
    )


def _vocabulary(plan: Recipe, studies: Sequence[StudyCells], base: Path) -> Vocabulary:
    if plan.vocabulary.file:
        return _named_vocabulary(plan, base)
    return build_vocabulary(studies, plan.vocabulary.genes)


def _named_vocabulary(plan: Recipe, base: Path) -> Vocabulary:
    there = plan.vocabulary.file == "published"
    return Vocabulary.published() if there else Vocabulary.load(base / plan.vocabulary.file)


def pretrain(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    changes: Sequence[str] = (),
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train a model as a recipe says; the same call continues a run that was interrupted.

    Parameters
    ----------
    recipe
        TOML file, see :mod:`scmulan.train.config`.
    out
        Run folder (default ``runs/NAME``); the finished model is in its folder ``model``.
    changes
        Settings that win over the file's: ``"optimizer.steps=200"``.
    dry_run
        Report what would be trained and what it would cost, without reading the cells' matrices.
    progress
        Shows a bar of the steps.

    Returns
    -------
    dict
        ``model`` (folder, or None when interrupted or dry), ``parameters``, ``cells``, ``steps``, ``words``; of a dry
        run also what :func:`scmulan.train.estimate.estimate` found.
    """
    path = Path(recipe)
    plan = read_recipe(path, changes)
    if dry_run:
        return {"model": None, "words": 0, **estimate(plan, path.parent, int(os.environ.get("WORLD_SIZE", 1)))}
    with training_ranks(plan.run.timeout_seconds) as ranks:
        return _train(plan, path.parent, Path(out) if out is not None else Path("runs") / plan.name, ranks, progress)


def _train(plan: Recipe, base: Path, out: Path, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    def claimed() -> RunFolder:
        folder = RunFolder(out)
        ranks.run_on_first(lambda: folder.claim(plan.to_json(), free=FREE, complete=_completed))
        return folder

    # A folder in use is refused before any cell is read; a new one is made when the cells are known to be good.
    there = ranks.broadcast((out / "recipe.json").is_file())
    folder = claimed() if there else None
    data = read_data(plan, base)
    folder = folder or claimed()
    try:
        vocabulary = data.vocabulary
        ranks.run_on_first(lambda: remember_cells(folder.path, data.manifest, data.train, vocabulary))
        config = model_config(plan, len(vocabulary))
        model = Mulan(config).initialise(plan.seed)
        init_from_counts(model, data.train, vocabulary, plan.seed)
        relations = label_relations(vocabulary) if plan.objective.ontology else np.eye(len(vocabulary), dtype=bool)
        run, ceiling = _with_precision(plan, model, folder, ranks)
        trainer = Trainer(
            model,
            Batches(data.train, vocabulary, plan.batches, plan.seed, relations if plan.objective.ontology else None),
            folder,
            objective=plan.objective,
            optimizer=plan.optimizer,
            run=run,
            validate=_watching(plan, data, relations, ranks),
            ranks=ranks,
            ceiling=ceiling,
            progress=progress,
        )
        trainer.resume()
        report: dict[str, Any] = {
            "model": None,
            "parameters": count_parameters(config),
            "cells": len(data.train),
            "genes": len(vocabulary.genes),
            "steps": plan.optimizer.steps,
        }
        if trainer.train():
            report["model"] = ranks.run_on_first(lambda: export_run(folder.path, folder.path / "model", force=True))[
                "model"
            ]
        report["words"] = trainer.tokens
        return report
    finally:
        folder.release()


def _completed(raw: dict[str, Any]) -> dict[str, Any]:
    return recipe_from_json(raw, "recipe.json").to_json()


def _watching(
    plan: Recipe, data: Data, relations: np.ndarray, ranks: Ranks
) -> Callable[[Mulan], dict[str, float]] | None:
    watch = data.watch
    if watch is None:
        return None
    return lambda model: validate(
        whole_network(model), watch, data.vocabulary, relations, batches=plan.batches, objective=plan.objective,
        max_cells=plan.run.validate_cells, seed=plan.seed, ranks=ranks,
    )  # fmt: skip


def _with_precision(plan: Recipe, model: Mulan, folder: RunFolder, ranks: Ranks) -> tuple[Any, float]:
    """``run`` with a precision decided on, and the ceiling of matrix products in it over all processes.

    A run that is continued keeps the precision that "auto" chose at its start.
    """
    rates = gemm_rates(model.config, ranks.device)
    precision = plan.run.precision
    if precision == "auto":
        precision = ranks.broadcast(folder.last_facts().get("precision") or faster_precision(rates))
    (ceiling,) = ranks.sum(rates[precision])
    return replace(plan.run, precision=precision), ceiling


def describe(report: Mapping[str, Any]) -> str:
    """Report of :func:`pretrain` in a few lines."""
    if "flops_total" in report:
        return describe_estimate(report)
    if report["model"] is None:
        return (
            f"{report['parameters']:,} parameters, {report['genes']:,} genes, {report['cells']:,} cells, "
            f"{report['steps']:,} steps; {report['words']:,} words read so far, no model yet"
        )
    return f"model with {report['parameters']:,} parameters from {report['cells']:,} cells: {report['model']}"

"""Pretraining: from a recipe to a model folder, alone or as one process of a torchrun job."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scmulan._dist import Ranks, training_ranks
from scmulan._io.outputs import sha256
from scmulan._progress import SILENT, Progress
from scmulan.data.memory import build_store, build_vocabulary, read_studies
from scmulan.data.store import CellSource
from scmulan.errors import RecipeError
from scmulan.model.cost import count_parameters, faster_precision, gemm_rates
from scmulan.model.network import Mulan
from scmulan.train.batches import Batches
from scmulan.train.checkpoint import RunFolder
from scmulan.train.config import Recipe, RunConfig, read_recipe, recipe_from_json
from scmulan.train.estimate import describe_estimate, estimate
from scmulan.train.export import export_run, file_manifest, model_config, save_data_facts
from scmulan.train.init import init_from_counts
from scmulan.train.labels import label_relations
from scmulan.train.parallel import whole_network
from scmulan.train.trainer import Trainer
from scmulan.train.validate import validate
from scmulan.vocab.vocabulary import Vocabulary

# Sections and settings of a recipe that may differ when a run is continued.
CHANGEABLE = ("run", "name", "description")


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
        ``model`` (folder, or None when interrupted or dry), ``parameters``, ``cells``, ``genes``, ``steps``, ``words``
        (tokens read); of a dry run also what :func:`scmulan.train.estimate.estimate` found.

    Raises
    ------
    RecipeError
        If the recipe cannot be followed, another recipe was followed in the run folder, or training diverges.
    InputError, MatrixError, GeneError, VocabularyError
        If cells or vocabulary cannot be used.
    OutputError
        If the run folder is in use or cannot be written.
    """
    path = Path(recipe)
    settings = read_recipe(path, changes)
    if dry_run:
        return {"model": None, "words": 0, **estimate(settings, path.parent, int(os.environ.get("WORLD_SIZE", 1)))}
    run = Path(out) if out is not None else Path("runs") / settings.name
    with training_ranks(settings.run.timeout_seconds) as ranks:
        folder, data = _claim_and_read(settings, path.parent, run, ranks)
        try:
            return _train(settings, data, folder, ranks, progress)
        finally:
            folder.release()


# -- prepare ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class TrainingData:
    """Cells of a run.

    Parameters
    ----------
    vocabulary
        Tokens.
    train, validation
        Cells to train on, and held-out ones to score (or None).
    manifest
        Where the training cells came from, with hashes.
    """

    vocabulary: Vocabulary
    train: CellSource
    validation: CellSource | None
    manifest: list[dict[str, Any]]


def _claim_and_read(recipe: Recipe, base: Path, out: Path, ranks: Ranks) -> tuple[RunFolder, TrainingData]:
    """Claim the run folder and read the cells.

    A folder that has a run is claimed first, so that one in use is refused before any cell is read; a new one is made
    when the cells are known to be good.
    """

    def claim() -> RunFolder:
        folder = RunFolder(out)
        ranks.run_on_first(lambda: folder.claim(recipe.to_json(), free=CHANGEABLE, complete=_with_defaults))
        return folder

    if not ranks.broadcast((out / "recipe.json").is_file()):
        data = read_data(recipe, base)
        return claim(), data
    folder = claim()
    try:
        return folder, read_data(recipe, base)
    except BaseException:
        folder.release()
        raise


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Add to an earlier version's recipe the settings that it lacks."""
    return recipe_from_json(raw, "recipe.json").to_json()


def read_data(recipe: Recipe, base: Path) -> TrainingData:
    """Read the cells that a recipe names: files into memory, or a corpus on disk with its own vocabulary and split.

    Parameters
    ----------
    recipe, base
        The recipe and its folder, where relative paths start.
    """
    corpus = recipe.corpus(base)
    return _open_corpus(recipe, base, corpus) if corpus is not None else _read_files(recipe, base)


def _open_corpus(recipe: Recipe, base: Path, path: Path) -> TrainingData:
    from scmulan.data.split import select_part
    from scmulan.data.store import MANIFEST, Corpus

    corpus = Corpus(path)
    fixed = recipe.fixed_vocabulary(base)
    if fixed is not None and fixed != corpus.vocabulary:
        raise RecipeError(
            f"{path}: its words are not those of vocabulary.file ({recipe.vocabulary.file}); build the corpus with "
            "that vocabulary, or leave the setting out"
        )
    split = recipe.corpus_split(base)
    studies = [{k: v for k, v in study.items() if k != "path"} for study in corpus.manifest["studies"]]
    return TrainingData(
        vocabulary=corpus.vocabulary,
        train=select_part(corpus, "train", split),
        validation=select_part(corpus, "validation", split) if recipe.run.validate_every else None,
        manifest=[{"corpus": path.name, "sha256": sha256(path / MANIFEST)}, *studies],
    )


def _read_files(recipe: Recipe, base: Path) -> TrainingData:
    studies = read_studies(recipe.studies(base))
    vocabulary = recipe.fixed_vocabulary(base) or build_vocabulary(studies, recipe.vocabulary.genes)
    held_out = recipe.validation_studies(base)
    return TrainingData(
        vocabulary=vocabulary,
        train=build_store(studies, vocabulary),
        validation=build_store(read_studies(held_out), vocabulary) if held_out else None,
        manifest=file_manifest(studies),
    )


# -- train -----------------------------------------------------------------------------------------------------------


def _train(recipe: Recipe, data: TrainingData, folder: RunFolder, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    """Train from the newest checkpoint or from counts, export, and report."""
    vocabulary, ontology = data.vocabulary, recipe.objective.ontology
    ranks.run_on_first(lambda: save_data_facts(folder.path, data.manifest, data.train, vocabulary))
    config = model_config(recipe, len(vocabulary))
    model = Mulan(config).initialise(recipe.seed)
    init_from_counts(model, data.train, vocabulary, recipe.seed)
    relations = label_relations(vocabulary) if ontology else np.eye(len(vocabulary), dtype=bool)
    run, ceiling = _choose_precision(recipe.run, model, folder, ranks)
    trainer = Trainer(
        model,
        Batches(data.train, vocabulary, recipe.batches, recipe.seed, relations if ontology else None),
        folder,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        run=run,
        validate=_validation(recipe, data, relations, ranks),
        ranks=ranks,
        ceiling=ceiling,
        progress=progress,
    )
    trainer.resume()
    exported = None
    if trainer.train():
        exported = ranks.run_on_first(lambda: export_run(folder.path, folder.path / "model", force=True)["model"])
    return {
        "model": exported,
        "parameters": count_parameters(config),
        "cells": len(data.train),
        "genes": len(vocabulary.genes),
        "steps": recipe.optimizer.steps,
        "words": trainer.tokens,
    }


def _validation(
    recipe: Recipe, data: TrainingData, relations: np.ndarray, ranks: Ranks
) -> Callable[[Mulan], dict[str, float]] | None:
    held_out = data.validation
    if held_out is None:
        return None
    return lambda model: validate(
        whole_network(model), held_out, data.vocabulary, relations, batches=recipe.batches, objective=recipe.objective,
        max_cells=recipe.run.validate_cells, seed=recipe.seed, ranks=ranks,
    )  # fmt: skip


def _choose_precision(run: RunConfig, model: Mulan, folder: RunFolder, ranks: Ranks) -> tuple[RunConfig, float]:
    """Decide on the precision.

    Returns
    -------
    RunConfig
        With "fp32" or "bf16"; a run that is continued keeps the precision that "auto" chose at its start.
    float
        Operations per second that matrix products reach in it, over all processes.
    """
    rates = gemm_rates(model.config, ranks.device)
    precision = run.precision
    if precision == "auto":
        precision = ranks.broadcast(folder.last_facts().get("precision") or faster_precision(rates))
    (ceiling,) = ranks.sum(rates[precision])
    return replace(run, precision=precision), ceiling


# -- describe --------------------------------------------------------------------------------------------------------


def describe(report: Mapping[str, Any]) -> str:
    """Describe the report of :func:`pretrain` in a few lines."""
    if "flops_total" in report:
        return describe_estimate(report)
    if report["model"] is None:
        return (
            f"{report['parameters']:,} parameters, {report['genes']:,} genes, {report['cells']:,} cells, "
            f"{report['steps']:,} steps; {report['words']:,} words read so far, no model yet"
        )
    return f"model with {report['parameters']:,} parameters from {report['cells']:,} cells: {report['model']}"

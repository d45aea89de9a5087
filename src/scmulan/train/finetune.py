"""``scmulan finetune``: teach a model the cell types of somebody's own cells."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import torch

import scmulan
from scmulan._io.adata import open_input, read_column
from scmulan._io.outputs import check_output, sha256
from scmulan.data.memory import CellStore, store_from_adata, take
from scmulan.errors import OutputError, ScmulanError
from scmulan.model.folder import HASHES
from scmulan.model.loading import LoadedModel, load_model, save_model
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.checkpoint import RunFolder
from scmulan.train.config import ObjectiveConfig, OptimizerConfig, RunConfig
from scmulan.train.early_stopping import EarlyStopping, StopTraining, score
from scmulan.train.gene_count import fit_gene_counts
from scmulan.train.init import fit_head, resize_vocabulary
from scmulan.train.labels import hold_out, label_relations_among, read_words
from scmulan.train.trainer import Trainer, read_log
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

METHODS = {"full": "all weights are trained"}
CHECKS = 20


def finetune(
    model: LoadedModel | str | Path,
    data: ad.AnnData | str | Path,
    labels: str,
    out: str | Path,
    *,
    coarse: str | None = None,
    metadata: Mapping[str, str] | None = None,
    donor: str | None = None,
    method: str = "full",
    epochs: float | None = None,
    steps: int | None = None,
    rate: float = 1e-3,
    validation_share: float = 0.1,
    patience: int = 6,
    ontology: bool = False,
    seed: int = 0,
    layer: str | None = None,
    matrix_kind: Literal["counts", "log1p"] | None = None,
    min_genes: int = 20,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Teach a model new cells and new labels; the same call continues a run that was interrupted.

    Labels that the vocabulary lacks become new words. All three tasks are trained, cells without a label on
    generation (and on organ and region, where known) only; the weights that name the held-out cells best are kept.

    Parameters
    ----------
    model
        Model to start from: loaded, a folder, or the name of a packaged one.
    data
        Cells × genes, or an h5ad file.
    labels
        ``obs`` column of cell types, used as they are spelled; empty or missing values are unlabelled cells.
    out
        Model folder to write. While the run goes on, its state is in ``.NAME.run`` beside it.
    coarse
        ``obs`` column of coarse types. By default the coarse types of the model that the Cell Ontology puts above
        the labels.
    metadata
        ``obs`` column of further fields (``{"organ": "tissue"}``), whose new words are added too. By default columns
        with the names of fields (``organ``, ``region``, ``sex`` …) are read, as far as the model has their words.
    donor
        ``obs`` column of donors (or batches): hold out whole donors, not a share of each label.
    method
        ``"full"``: all weights.
    epochs, steps
        How long at most: passes over the labelled cells, or optimiser steps. By default 20 passes, but at least 200
        and at most 3,000 steps.
    rate
        Highest learning rate.
    validation_share
        Share of the labelled cells that is held out, at most about 500 cells.
    patience
        Stop when so many checks (of 20) in a row found nothing better.
    ontology
        Count a finer type of the Cell Ontology as right where a label is coarser: for data in which some cells are
        labelled less finely than others. By default labels exclude each other.
    seed
        The same seed gives the same weights on the same machine.
    layer, matrix_kind
        Which matrix holds expression, and what it holds; found by looking unless given.
    min_genes
        Fewest genes of the model's vocabulary that the cells must have.
    force
        Replace an existing model folder.
    progress
        Called with a line of text now and then.

    Returns
    -------
    dict
        ``model`` (folder, or None when interrupted), ``cells``, ``held_out``, ``labels`` (cells of each),
        ``new_words`` (by family), ``steps``, ``best_step``, ``validation`` (``accuracy``, ``macro_recall``, ``recall``
        of each label) and the same ``before`` training.

    Raises
    ------
    InputError, MatrixError, GeneError
        If the cells cannot be used, have no such column, or fewer than two labels.
    ModelError, OutputError, RecipeError
        If the model cannot be used, the output exists, or an unfinished run with other settings is in its place.
    """
    out = Path(out)
    _check_settings(method, epochs=epochs, steps=steps, rate=rate, share=validation_share)
    _check_folder(out, force)
    parent = model if isinstance(model, LoadedModel) else load_model(model)
    path = None if isinstance(data, ad.AnnData) else Path(data)
    adata = data if isinstance(data, ad.AnnData) else open_input(data)
    source = "the cells" if path is None else path.name

    words = read_words(adata.obs, labels, parent.vocabulary, source, coarse=coarse, metadata=metadata)
    donors = None if donor is None else read_column(adata.obs, donor, source)
    vocabulary = parent.vocabulary
    for family in METADATA:
        vocabulary = vocabulary.extend(family, sorted(set(words.get(family, ())) - {""}))
    store, matrix, match = store_from_adata(
        adata, vocabulary, words, name=source, layer=layer, matrix_kind=matrix_kind, min_genes=min_genes
    )
    held = hold_out(store, donors, validation_share, seed)
    train, watch = take(store, np.setdiff1d(np.arange(len(store)), held)), take(store, held)

    # Many short prompts: the same cell says other genes each time, and labels come from many cells at each step.
    batches = BatchConfig(
        cells=64, generate_cells=32, max_prompt_genes=160, tasks=_task_shares(train), panel=0.25, downsample=0.25
    )
    objective = _objective(parent)
    number = steps or _steps(train, epochs, batches)
    optimizer = OptimizerConfig(
        steps=number, learning_rate=rate, final_learning_rate=rate / 100, warmup_steps=max(1, number // 20)
    )
    every = max(10, number // CHECKS)
    settings = {
        "parent": parent.weights_hash,
        "cells": _digest(store),
        "labels": labels,
        "method": method,
        "ontology": ontology,
        "patience": patience,
        "seed": seed,
        "batches": asdict(batches),
        "objective": asdict(objective),
        "optimizer": asdict(optimizer),
        "held_out": hashlib.sha256(held.tobytes()).hexdigest(),
    }
    folder = RunFolder(out.absolute().with_name(f".{out.name}.run"))
    folder.claim(settings)

    network = resize_vocabulary(parent.network, parent.vocabulary, vocabulary, seed)
    relations = label_relations_among(store, vocabulary) if ontology else np.eye(len(vocabulary), dtype=bool)
    best = EarlyStopping(folder.path, lambda m: score(m, watch, vocabulary, relations), patience * every, progress)
    trainer = Trainer(
        network,
        Batches(train, vocabulary, batches, seed, relations if ontology else None),
        folder,
        objective=objective,
        optimizer=optimizer,
        run=RunConfig(validate_every=every),
        validate=lambda m: best.check(m, trainer.steps_done),
    )
    report = _describe(store, watch, parent.vocabulary, vocabulary)
    progress(_plan_line(report, number))
    if not trainer.resume():
        fit_head(network, train, vocabulary, objective.name, seed)
        best.start(network)
    try:
        finished = trainer.train()
    except StopTraining:
        finished = True
    report |= {"steps": trainer.steps_done, **best.report()}
    if not finished:
        return report

    network.load_state_dict(best.weights())
    name = parent.card.get("name", parent.folder.name)
    card = {
        "name": out.name,
        "description": f"{name}, fine-tuned on {source} to name its {len(report['labels'])} cell types. Words that "
        "these cells do not use were not trained again and may be forgotten.",
        "made_by": f"scmulan {scmulan.__version__}, torch {torch.__version__}",
        "objective": objective.name,
        "parent": {"name": name, "weights_hash": parent.weights_hash},
        "recipe": settings,
        "data": [
            {
                "study": source,
                "file": None if path is None else path.name,
                "sha256": None if path is None or path.is_dir() else sha256(path),
                "cells": len(store),
                "genes_resolved": len(match.found),
                "matrix": f"{matrix.where}: {matrix.matrix_kind}",
            }
        ],
        "cells": len(store),
        "cells_with_words": int((store.lengths > 0).sum()),
        "cell_types": report["labels"],
        "new_words": report["new_words"],
        "metadata": {str(f): vocabulary.names(f) for f in METADATA if f not in (Family.COARSE, Family.FINE)},
        "covered": store.covered(),
        "depth": fit_gene_counts(network.eval(), store, vocabulary),
        "steps": trainer.steps_done,
        "best_step": report["best_step"],
        "words_read": trainer.tokens,
        "parameters": sum(p.numel() for p in network.parameters()),
        "validation": {
            "held_out": "a share of each label" if donor is None else f"whole donors, by obs[{donor!r}]",
            "cells": len(watch),
            **report["validation"],
            "before": report["before"],
        },
        "checks": [
            {"step": line["step"], **line["validation"]} for line in read_log(trainer.log_path) if "validation" in line
        ],
    }
    save_model(out, network.eval(), vocabulary, card, dtype=torch.float16, force=force or out.is_dir())
    shutil.rmtree(folder.path)
    return {**report, "model": str(out)}


def _check_settings(method: str, *, epochs: float | None, steps: int | None, rate: float, share: float) -> None:
    if method not in METHODS:
        there = ", ".join(f"{name!r} ({what})" for name, what in METHODS.items())
        raise ScmulanError(f"method {method!r} is unknown: there is {there}")
    for name, number in (("epochs", epochs), ("steps", steps), ("rate", rate)):
        if number is not None and not number > 0:
            raise ScmulanError(f"{name} is {number}: expected a positive number")
    if not 0 < share <= 0.5:
        raise ScmulanError(f"validation_share is {share}: expected more than 0 and at most 0.5")


def _check_folder(out: Path, force: bool) -> None:
    """Refuse now what would be refused when the model is saved."""
    check_output(out, force, folder=True)
    if out.is_dir() and any(out.iterdir()) and not (out / HASHES).is_file():
        raise OutputError(f"{out}: holds other things than a model, so --force does not replace it")


def _objective(parent: LoadedModel) -> ObjectiveConfig:
    """Objective of the parent; a model that does not say which it had follows the publication."""
    if parent.card.get("objective", "published") == "published":
        return ObjectiveConfig(name="published", value_weight=200.0)
    return ObjectiveConfig(task_weights={"annotate": 1.0, "generate": 0.3, "locate": 0.5})


def _task_shares(store: CellStore) -> dict[str, float]:
    """Share of batches of each task; none of organ and region where no cell knows them."""
    places = (store.tokens(Family.ORGAN) >= 0) | (store.tokens(Family.REGION) >= 0)
    return {"annotate": 0.8, "generate": 0.15} | ({"locate": 0.05} if places.any() else {})


def _steps(store: CellStore, epochs: float | None, batches: BatchConfig) -> int:
    labelled = store.tokens(Family.FINE) >= 0
    share = batches.tasks["annotate"] / sum(batches.tasks.values())
    longest = min(float(store.lengths[labelled].mean()), batches.max_prompt_genes)
    cells = min(batches.cells, max(4, batches.tokens / longest))  # long sentences leave room for fewer
    steps = int(np.ceil((20 if epochs is None else epochs) * labelled.sum() / cells / share))
    return steps if epochs is not None else min(max(steps, 200), 3000)


def _digest(store: CellStore) -> str:
    digest = hashlib.sha256()
    for array in (store.matrix.data, store.matrix.indices, store.matrix.indptr, store.metadata):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _describe(store: CellStore, watch: CellStore, old: Vocabulary, new: Vocabulary) -> dict[str, Any]:
    words, number = np.unique(store.tokens(Family.FINE), return_counts=True)
    added = {str(f): [new.tokens[i] for i in new.ids(f) if i >= len(old)] for f in METADATA}
    return {
        "model": None,
        "cells": len(store),
        "held_out": len(watch),
        "labels": {new.tokens[w]: int(n) for w, n in zip(words, number, strict=True) if w >= 0},
        "new_words": {family: names for family, names in added.items() if names},
    }


def _plan_line(report: dict[str, Any], steps: int) -> str:
    new = len(report["new_words"].get(str(Family.FINE), ()))
    return (
        f"{len(report['labels'])} cell types, {new} of them new to the model; {report['cells'] - report['held_out']:,} "
        f"cells to learn from, {report['held_out']:,} held out; at most {steps:,} steps"
    )

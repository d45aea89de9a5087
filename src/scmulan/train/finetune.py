"""Fine-tuning: train a model further on somebody's own labelled cells."""

import hashlib
import inspect
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch

import scmulan
from scmulan._io.adata import open_input, read_column
from scmulan._io.outputs import check_output, sha256
from scmulan._progress import SILENT, Progress
from scmulan._settings import convert
from scmulan.data.memory import CellStore, store_from_adata, take
from scmulan.errors import OutputError
from scmulan.model.folder import HASHES
from scmulan.model.loading import LoadedModel, load_model, save_model
from scmulan.model.network import Mulan
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.checkpoint import RunFolder
from scmulan.train.config import ObjectiveConfig, OptimizerConfig, RunConfig
from scmulan.train.early_stopping import EarlyStopping, StopTraining, score
from scmulan.train.finetune_config import FinetuneConfig
from scmulan.train.gene_count import CellGroups, fit_gene_counts
from scmulan.train.init import fit_head, resize_vocabulary
from scmulan.train.labels import hold_out, label_relations, read_metadata
from scmulan.train.trainer import Trainer, read_log
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

__all__ = ["FinetuneConfig", "finetune"]

CHECKS = 20  # of the held-out cells, over the longest run
MIN_CHECK_STEPS = 10
DEFAULT_EPOCHS = 20
DEFAULT_STEPS = 200, 3000  # bounds of a length that follows from DEFAULT_EPOCHS


def finetune(
    model: LoadedModel | str | Path,
    data: ad.AnnData | str | Path,
    labels: str,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> dict[str, Any]:
    """Train a model on new cells and new labels; the same call continues a run that was interrupted.

    Labels that the vocabulary lacks become new tokens. All three tasks are trained, cells without a label on
    generation (and on organ and region, where known) only; the weights that annotate the held-out cells best are kept.

    Parameters
    ----------
    model
        Model to start from: loaded, a folder, or the name of a packaged one.
    data
        Cells × genes, or an h5ad file.
    labels
        ``obs`` column of cell types, used as they are spelled; empty or missing values are unlabelled cells.
    out
        Model folder to write. While the run goes on, its checkpoints are in ``.NAME.run`` beside it.
    force
        Replace an existing model folder.
    progress
        Gets a line for the plan and for each check.
    **settings
        Fields of :class:`FinetuneConfig`: ``coarse``, ``metadata``, ``donor``, ``method``, ``epochs``, ``steps``,
        ``rate``, ``validation_share``, ``patience``, ``ontology``, ``seed``, ``layer``, ``matrix_kind``, ``min_genes``.

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
        If the model cannot be used, the output exists, a setting is unknown or out of bounds, or an unfinished run
        with other settings is in its place.
    """
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
    config = convert(FinetuneConfig, plain, "finetune")
    out = Path(out)
    _check_folder(out, force)
    parent = model if isinstance(model, LoadedModel) else load_model(model)
    cells = _read_cells(data, labels, parent.vocabulary, config)
    plan = _make_plan(cells, parent, labels, config)
    with RunFolder(out.absolute().with_name(f".{out.name}.run")) as folder:
        folder.claim(plan.settings)

        report = _report(cells, parent.vocabulary)
        progress.log(_plan_line(report, plan.optimizer.steps))
        trainer, best, finished = _train(parent, cells, plan, config, folder, progress)
        report |= {"steps": trainer.steps_done, **best.report()}
        if not finished:
            return report

        trainer.model.load_state_dict(best.weights())
        card = _card(out.name, parent, cells, plan, config, trainer, report)
        save_model(out, trainer.model, cells.vocabulary, card, dtype=torch.float16, force=force or out.is_dir())
    shutil.rmtree(folder.path)
    return {**report, "model": str(out)}


# Completion and help() show the settings one by one.
_SETTINGS = [
    inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=setting.default, annotation=setting.type)
    for setting in fields(FinetuneConfig)
]
_PARAMETERS = list(inspect.signature(finetune).parameters.values())
finetune.__signature__ = inspect.Signature([*_PARAMETERS[:-1], *_SETTINGS])  # type: ignore[attr-defined]


def _check_folder(out: Path, force: bool) -> None:
    """Refuse now what would be refused when the model is saved."""
    check_output(out, force, folder=True)
    if out.is_dir() and any(out.iterdir()) and not (out / HASHES).is_file():
        raise OutputError(f"{out}: holds other things than a model, so --force does not replace it")


# -- prepare ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class _Cells:
    """Cells to learn from.

    Parameters
    ----------
    store, train, held_out
        All cells, those to train on, and those to choose the best weights with.
    held_out_rows
        int64: rows of the latter in ``store``.
    vocabulary
        That of the model, with new tokens at its end.
    source
        Where the cells come from, for the card.
    """

    store: CellStore
    train: CellStore
    held_out: CellStore
    held_out_rows: np.ndarray
    vocabulary: Vocabulary
    source: dict[str, Any]


@dataclass(kw_only=True, frozen=True)
class _Plan:
    """Sections of a training run, and ``settings``: all that an unfinished run must have in common to be continued."""

    batches: BatchConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    check_every: int
    settings: dict[str, Any]


def _read_cells(data: ad.AnnData | str | Path, labels: str, vocabulary: Vocabulary, config: FinetuneConfig) -> _Cells:
    """Read cells and labels, add tokens for new labels, and hold out cells."""
    path = None if isinstance(data, ad.AnnData) else Path(data)
    adata = data if isinstance(data, ad.AnnData) else open_input(data)
    name = "the cells" if path is None else path.name
    metadata = read_metadata(
        adata.obs, labels, vocabulary, name, coarse=config.coarse, metadata=config.metadata, stacklevel=4
    )
    donors = None if config.donor is None else read_column(adata.obs, config.donor, name)
    for family in METADATA:
        vocabulary = vocabulary.extend(family, sorted(set(metadata.get(family, ())) - {""}))
    store, matrix, match = store_from_adata(
        adata, vocabulary, metadata, name=name,
        layer=config.layer, matrix_kind=config.matrix_kind, min_genes=config.min_genes,
    )  # fmt: skip
    held_out = hold_out(store, donors, config.validation_share, config.seed)
    source = {
        "study": name,
        "file": None if path is None else path.name,
        "sha256": None if path is None or path.is_dir() else sha256(path),
        "cells": len(store),
        "genes_resolved": len(match.found),
        "matrix": f"{matrix.where}: {matrix.matrix_kind}",
    }
    return _Cells(
        store=store,
        train=take(store, np.setdiff1d(np.arange(len(store)), held_out)),
        held_out=take(store, held_out),
        held_out_rows=held_out,
        vocabulary=vocabulary,
        source=source,
    )


def _make_plan(cells: _Cells, parent: LoadedModel, labels: str, config: FinetuneConfig) -> _Plan:
    # Many short prompts: the same cell shows other genes each time, and labels come from many cells at each step.
    batches = BatchConfig(
        cells=64, generate_cells=32, max_prompt_genes=160, tasks=_task_weights(cells.train), panel=0.25, downsample=0.25
    )
    objective = _objective(parent)
    steps = config.steps or _default_steps(cells.train, config.epochs, batches)
    optimizer = OptimizerConfig(
        steps=steps,
        learning_rate=config.rate,
        final_learning_rate=config.rate / 100,
        warmup_steps=max(1, steps // 20),
    )
    settings = {
        "parent": parent.weights_hash,
        "cells": _digest(cells.store),
        "labels": labels,
        "method": config.method,
        "ontology": config.ontology,
        "patience": config.patience,
        "seed": config.seed,
        "batches": asdict(batches),
        "objective": asdict(objective),
        "optimizer": asdict(optimizer),
        "held_out": hashlib.sha256(cells.held_out_rows.tobytes()).hexdigest(),
    }
    return _Plan(
        batches=batches,
        objective=objective,
        optimizer=optimizer,
        check_every=max(MIN_CHECK_STEPS, steps // CHECKS),
        settings=settings,
    )


def _task_weights(store: CellStore) -> dict[str, float]:
    """Return the relative number of batches of each task; none of organ and region where no cell knows them."""
    located = (store.tokens(Family.ORGAN) >= 0) | (store.tokens(Family.REGION) >= 0)
    return {"annotate": 0.8, "generate": 0.15} | ({"locate": 0.05} if located.any() else {})


def _objective(parent: LoadedModel) -> ObjectiveConfig:
    """Return the objective of the parent; a model that does not say which it had follows the publication."""
    if parent.objective == "published":
        return ObjectiveConfig(name="published", value_weight=200.0)
    return ObjectiveConfig(task_weights={"annotate": 1.0, "generate": 0.3, "locate": 0.5})


def _default_steps(store: CellStore, epochs: float | None, batches: BatchConfig) -> int:
    """Count the steps that pass the labelled cells ``epochs`` times through the task "annotate"."""
    labelled = store.tokens(Family.FINE) >= 0
    fraction = batches.tasks["annotate"] / sum(batches.tasks.values())
    longest = min(float(store.lengths[labelled].mean()), batches.max_prompt_genes)
    cells = min(batches.cells, max(4, batches.tokens / longest))  # long sentences leave room for fewer
    steps = int(np.ceil((epochs or DEFAULT_EPOCHS) * labelled.sum() / cells / fraction))
    return steps if epochs is not None else int(np.clip(steps, *DEFAULT_STEPS))


def _digest(store: CellStore) -> str:
    digest = hashlib.sha256()
    for array in (store.matrix.data, store.matrix.indices, store.matrix.indptr, store.metadata):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# -- train -----------------------------------------------------------------------------------------------------------


def _train(
    parent: LoadedModel, cells: _Cells, plan: _Plan, config: FinetuneConfig, folder: RunFolder, progress: Progress
) -> tuple[Trainer, EarlyStopping, bool]:
    """Train until the held-out cells are annotated no better; False where a signal interrupted it."""
    vocabulary = cells.vocabulary
    network = resize_vocabulary(parent.network, parent.vocabulary, vocabulary, config.seed)
    relations = np.eye(len(vocabulary), dtype=bool)
    if config.ontology:
        relations = label_relations(vocabulary, cells.store)

    def measure(model: Mulan) -> dict[str, Any]:
        return score(model, cells.held_out, vocabulary, relations)

    best = EarlyStopping(folder.path, measure, config.patience * plan.check_every, progress)
    trainer = Trainer(
        network,
        Batches(cells.train, vocabulary, plan.batches, config.seed, relations if config.ontology else None),
        folder,
        objective=plan.objective,
        optimizer=plan.optimizer,
        run=RunConfig(validate_every=plan.check_every),
        validate=lambda model: best.check(model, trainer.steps_done),
        progress=progress,
    )
    if not trainer.resume():
        fit_head(network, cells.train, vocabulary, plan.objective.name, config.seed)
        best.start(network)
    try:
        finished = trainer.train()
    except StopTraining:
        finished = True
    return trainer, best, finished


# -- describe --------------------------------------------------------------------------------------------------------


def _report(cells: _Cells, old: Vocabulary) -> dict[str, Any]:
    """Describe the cells and the labels, before training; the first part of the result of :func:`finetune`."""
    new = cells.vocabulary
    tokens, number = np.unique(cells.store.tokens(Family.FINE), return_counts=True)
    added = {str(f): [new.tokens[i] for i in new.ids(f) if i >= len(old)] for f in METADATA}
    return {
        "model": None,
        "cells": len(cells.store),
        "held_out": len(cells.held_out),
        "labels": {new.tokens[t]: int(n) for t, n in zip(tokens, number, strict=True) if t >= 0},
        "new_words": {family: names for family, names in added.items() if names},
    }


def _plan_line(report: Mapping[str, Any], steps: int) -> str:
    new = len(report["new_words"].get(str(Family.FINE), ()))
    return (
        f"{len(report['labels'])} cell types, {new} of them new to the model; {report['cells'] - report['held_out']:,} "
        f"cells to learn from, {report['held_out']:,} held out; at most {steps:,} steps"
    )


def _card(
    name: str,
    parent: LoadedModel,
    cells: _Cells,
    plan: _Plan,
    config: FinetuneConfig,
    trainer: Trainer,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Make the card, which says how the model was made; ``trainer`` holds the best weights."""
    network, store, vocabulary = trainer.model.eval(), cells.store, cells.vocabulary
    parent_name = parent.name
    checks = [line for line in read_log(trainer.log_path) if "validation" in line]
    return {
        "name": name,
        "description": f"{parent_name}, fine-tuned on {cells.source['study']} to name its {len(report['labels'])} cell "
        "types. Words that these cells do not use were not trained again and may be forgotten.",
        "made_by": f"scmulan {scmulan.__version__}, torch {torch.__version__}",
        "objective": plan.objective.name,
        "parent": {"name": parent_name, "weights_hash": parent.weights_hash},
        "recipe": plan.settings,
        "data": [cells.source],
        "cells": len(store),
        "cells_with_words": int((store.lengths > 0).sum()),
        "cell_types": report["labels"],
        "new_words": report["new_words"],
        "metadata": {str(f): vocabulary.names(f) for f in METADATA if f not in (Family.COARSE, Family.FINE)},
        "covered": store.covered(),
        "depth": fit_gene_counts(network, CellGroups.of(store, len(vocabulary)), vocabulary),
        "steps": trainer.steps_done,
        "best_step": report["best_step"],
        "words_read": trainer.tokens,
        "parameters": sum(p.numel() for p in network.parameters()),
        "validation": {
            "held_out": "a fraction of each label"
            if config.donor is None
            else f"whole donors, by obs[{config.donor!r}]",
            "cells": len(cells.held_out),
            **report["validation"],
            "before": report["before"],
        },
        "checks": [{"step": line["step"], **line["validation"]} for line in checks],
    }

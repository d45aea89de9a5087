"""The recipe of a training run: one TOML file that can be reviewed, every setting with a default and its bounds."""

import dataclasses
import importlib.util
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from scmulan._settings import Meta, OneOf, convert, read_toml
from scmulan.data.spec import StudySpec, parse_studies, read_spec
from scmulan.errors import RecipeError
from scmulan.train.batches import BatchConfig
from scmulan.vocab.tasks import TASKS
from scmulan.vocab.vocabulary import Vocabulary


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelConfig:
    """Shape of the network; its vocabulary's size follows from the data."""

    layers: Annotated[int, Meta(ge=1)] = 4
    """Decoder blocks."""
    heads: Annotated[int, Meta(ge=1)] = 4
    """Attention heads."""
    width: Annotated[int, Meta(ge=1)] = 128
    """Size of a hidden state; a multiple of ``heads``."""
    bias: bool = False
    """Biases in linear layers and norms."""
    set_state: bool = True
    """A summary of the tokens so far at the input of each position."""
    value_spread: bool = True
    """Values as distributions over the bins."""
    word_bias: bool = True
    """A bias of each token in the entity head; with it, weights are initialised from counts (``train/init.py``)."""
    bounded_genes: bool = True
    """Genes compete to be the next token with weight σ(logit) instead of exp(logit)."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Dropout of the residual branches."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width}: expected a multiple of heads, which is {self.heads}")


@dataclass(kw_only=True, frozen=True, slots=True)
class VocabularyConfig:
    """Which tokens the model has."""

    genes: Annotated[int, Meta(ge=1)] = 4000
    """Number of genes, the most variable over all studies."""
    file: str = ""
    """A vocabulary JSON to use instead ("published" for the release's 2,222 tokens)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ObjectiveConfig:
    """What is minimised."""

    name: Literal["next_word", "published"] = "next_word"
    """"next_word": cross-entropy of the next token; "published": the release's set prediction."""
    value_weight: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the value loss (published: 200)."""
    task_weights: dict[Annotated[str, OneOf(TASKS)], Annotated[float, Meta(ge=0)]] = field(
        default_factory=lambda: {"annotate": 1.0, "generate": 1.0, "locate": 1.0}
    )
    """Weight of each task's loss."""
    ontology: bool = False
    """Whether a finer cell type satisfies a coarser label. Off by default: where no study tells the two apart, all
    cells of the coarser label may drift to the finer one (all B cells to plasmablasts)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    steps: Annotated[int, Meta(ge=1)] = 1000
    """Optimiser steps."""
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    """Highest learning rate."""
    final_learning_rate: Annotated[float, Meta(ge=0)] = 1e-5
    """Learning rate at the end."""
    warmup_steps: Annotated[int, Meta(ge=0)] = 100
    """Steps of warm-up."""
    beta_1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta_2: Annotated[float, Meta(ge=0, lt=1)] = 0.98
    """Decay of the second moment."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.1
    """Decay of matrices (not of norms, scales, biases)."""
    grad_clip: Annotated[float, Meta(gt=0)] = 1.0
    """Largest norm of a step's gradient."""
    ema_decay: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Fraction of an exponential moving average of the weights that each step leaves (0: none is kept). Where it is
    kept, it is what is validated and exported."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RunConfig:
    """How the run behaves; all of it may change when a run is continued."""

    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """"bf16": autocast; "auto": the faster one, by timing a few matrix products of the model's shapes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How the processes of a torchrun job work together: "ddp" (each holds all weights) or "fsdp" (``fully_shard``)."""
    accumulate: Annotated[int, Meta(ge=1)] = 1
    """Parts into which each process cuts its rows of a batch: less memory, the same step."""
    recompute: bool = False
    """Activation checkpointing: blocks are computed again in the backward pass; a third more work, far less memory."""
    timeout_seconds: Annotated[float, Meta(gt=0)] = 60.0
    """How long a process waits for another one before the job ends."""
    tensorboard: bool = False
    """Whether the log is also written for TensorBoard."""
    checkpoint_minutes: Annotated[float, Meta(ge=0)] = 5.0
    """Minutes between checkpoints."""
    keep: Annotated[int, Meta(ge=1)] = 2
    """Checkpoints kept."""
    log_every: Annotated[int, Meta(ge=1)] = 20
    """Steps between lines of the log."""
    validate_every: Annotated[int, Meta(ge=0)] = 500
    """Steps between validations (0: never)."""
    validate_cells: Annotated[int, Meta(ge=1)] = 4000
    """Largest number of held-out cells that a validation reads."""


@dataclass(kw_only=True, frozen=True, slots=True)
class CorpusData:
    """The ``[data]`` of a recipe that trains on a corpus."""

    corpus: Annotated[str, Meta(min_length=1)]
    """Folder that ``scmulan corpus build`` wrote."""
    split: str | None = None
    """File of ``scmulan corpus split``; by default the corpus' own."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
    """Everything that determines a training run."""

    name: Annotated[str, Meta(min_length=1)] = "model"
    """Name of the resulting model."""
    description: str = ""
    """One paragraph for its card: what it is for."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """All randomness follows from it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """Tokens."""
    batches: BatchConfig = field(default_factory=BatchConfig)
    """Batches of sentences."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    run: RunConfig = field(default_factory=RunConfig)
    """Behaviour."""
    data: dict[str, Any] = field(default_factory=dict)
    """Training cells: h5ad files, see :mod:`scmulan.data.spec`; or a corpus, see :class:`CorpusData`."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Held-out files to score, in the same form; may be left out."""

    def corpus(self, base: Path) -> Path | None:
        """Return the corpus folder that is trained on, or None where it is files."""
        return (base / self.data["corpus"]).resolve() if "corpus" in self.data else None

    def corpus_split(self, base: Path) -> Path | None:
        """Return the split file of the corpus, or None for its own."""
        return (base / self.data["split"]).resolve() if "split" in self.data else None

    def fixed_vocabulary(self, base: Path) -> Vocabulary | None:
        """Return the vocabulary that the recipe names, or None where it follows from the cells."""
        if not self.vocabulary.file:
            return None
        published = self.vocabulary.file == "published"
        return Vocabulary.published() if published else Vocabulary.load(base / self.vocabulary.file)

    def studies(self, base: Path) -> list[StudySpec]:
        """Return the training files; relative paths start at ``base``, the recipe's folder."""
        return read_spec(self.data, base)

    def validation_studies(self, base: Path) -> list[StudySpec]:
        """Return the validation files, with the training cells' renaming; may be empty."""
        if not self.validation:
            return []
        shared: dict[str, Any] = {k: self.data[k] for k in ("columns", "rename") if k in self.data}
        return read_spec(shared | self.validation, base, section="validation")

    def to_json(self) -> dict[str, Any]:
        """Return all settings, defaults included."""
        return dataclasses.asdict(self)


# Former names of settings.
RENAMED = {
    "batches.words": "batches.tokens",
    "batches.least_cells": "batches.min_cells",
    "batches.prompt_words": "batches.max_prompt_genes",
    "batches.prompt_words_least": "batches.min_prompt_genes",
    "batches.target_words": "batches.max_target_genes",
    "batches.target_words_least": "batches.min_target_genes",
    "batches.positions_total": "batches.max_positions",
    "batches.thin": "batches.downsample",
    "batches.ahead": "batches.prefetch",
    "optimizer.rate": "optimizer.learning_rate",
    "optimizer.final_rate": "optimizer.final_learning_rate",
    "optimizer.warmup": "optimizer.warmup_steps",
    "optimizer.clip": "optimizer.grad_clip",
    "optimizer.average": "optimizer.ema_decay",
}


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file.

    Parameters
    ----------
    path
        The file.
    changes
        Settings that win over the file's, as ``section.key=value`` with a TOML value.

    Raises
    ------
    RecipeError
        If the file is missing or no TOML, or a setting is unknown, of the wrong type or out of bounds.
    """
    if not path.is_file():
        raise RecipeError(f"no such recipe: {path}")
    raw = read_toml(path, "a recipe")
    for change in changes:
        _apply(raw, change)
    recipe = recipe_from_json(raw, str(path))
    if recipe.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("run.tensorboard: the package is missing; pip install 'scmulan[tensorboard]'")
    return recipe


def recipe_from_json(raw: dict[str, Any], source: str) -> Recipe:
    """Convert parsed TOML, or the JSON that a run keeps, into a recipe.

    Parameters
    ----------
    raw
        The parsed file.
    source
        Its name, for errors.

    Raises
    ------
    RecipeError
        If a setting is unknown, of the wrong type or out of bounds, or the data of a corpus have settings of files.
    """
    recipe = convert(Recipe, raw, source, renamed=RENAMED)
    if "corpus" in recipe.data:
        extra = sorted(set(recipe.data) - {f.name for f in dataclasses.fields(CorpusData)})
        if extra:
            raise RecipeError(
                f"{source}: data.{extra[0]} beside corpus: a corpus has its studies and vocabulary already"
            )
        convert(CorpusData, recipe.data, source, section="data")
    else:
        parse_studies(recipe.data, source, "data")
    parse_studies(recipe.validation, source, "validation")
    return recipe


def _apply(raw: dict[str, Any], change: str) -> None:
    """Put a setting such as ``optimizer.steps=200`` into a parsed recipe."""
    key, sign, text = change.partition("=")
    if not sign:
        raise RecipeError(f"--set {change!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {change!r}: {section} is no section of the recipe")
    raw[last] = value

"""A training run as one reviewable TOML file; every setting has a default, unknown ones are refused."""

import dataclasses
import importlib.util
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from scmulan.data.spec import StudySpec, read_spec
from scmulan.errors import RecipeError
from scmulan.train.batches import BatchConfig

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class ModelSection:
    """Shape of the network; its vocabulary's size follows from the data."""

    layers: int = 4
    """Decoder blocks."""
    heads: int = 4
    """Attention heads."""
    width: int = 128
    """Size of a hidden state."""
    bias: bool = False
    """Biases in linear layers and norms."""
    set_state: bool = True
    """A summary of the words so far at the input of each position."""
    value_spread: bool = True
    """Values as distributions over the bins."""
    word_bias: bool = True
    """A bias of each word in the entity head; with it, weights start from counts (``training/start.py``)."""
    bounded_genes: bool = True
    """Genes compete to be the next word with weight σ(logit) instead of exp(logit)."""
    dropout: float = 0.0
    """Dropout of the residual branches."""


@dataclass(kw_only=True, slots=True)
class VocabularySection:
    """Which words the model has."""

    genes: int = 4000
    """Number of gene words, the most variable over all studies."""
    file: str = ""
    """A vocabulary JSON to use instead ("published" for the release's 2,222 words)."""


@dataclass(kw_only=True, slots=True)
class ObjectiveSection:
    """What is minimised."""

    name: str = "next_word"
    """"next_word" or "published"."""
    value_weight: float = 1.0
    """Weight of the value loss (published: 200)."""
    task_weights: dict[str, float] = field(default_factory=lambda: {"annotate": 1.0, "generate": 1.0, "locate": 1.0})
    """Weight of each task's loss."""
    ontology: bool = False
    """Whether a finer cell type satisfies a coarser label. Off by default: where no study tells the two apart, all
    cells of the coarser label may drift to the finer one (all B cells to plasmablasts)."""


@dataclass(kw_only=True, slots=True)
class OptimizerSection:
    """AdamW with linear warm-up and cosine decay."""

    steps: int = 1000
    """Optimiser steps."""
    rate: float = 1e-3
    """Highest learning rate."""
    final_rate: float = 1e-5
    """Learning rate at the end."""
    warmup: int = 100
    """Steps of warm-up."""
    beta_1: float = 0.9
    """Decay of the first moment."""
    beta_2: float = 0.98
    """Decay of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices (not of norms, scales, biases)."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    average: float = 0.0
    """Share of a running average of the weights that each step leaves (0: none is kept). Where it is kept, it is what
    is validated and exported."""


@dataclass(kw_only=True, slots=True)
class RunSection:
    """How the run behaves."""

    precision: str = "fp32"
    """"fp32", "bf16" (autocast), or "auto": the faster one, by timing a few matrix products of the model's shapes."""
    parallel: str = "ddp"
    """How the processes of a torchrun job work together: "ddp" (each holds all weights) or "fsdp" (``fully_shard``)."""
    accumulate: int = 1
    """Parts into which each process cuts its share of a batch: less memory, the same step."""
    recompute: bool = False
    """Activation checkpointing: blocks are computed again in the backward pass; a third more work, far less memory."""
    timeout_seconds: float = 60.0
    """How long a process waits for another one before the job ends."""
    tensorboard: bool = False
    """Whether the log is also written for TensorBoard."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 20
    """Steps between lines of the log."""
    validate_every: int = 500
    """Steps between validations (0: never)."""
    validate_cells: int = 4000
    """Held-out cells that a validation reads, at most."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Everything that determines a training run."""

    name: str = "model"
    """Name of the resulting model."""
    description: str = ""
    """One paragraph for its card: what it is for."""
    seed: int = 0
    """All randomness follows from it."""
    model: ModelSection = field(default_factory=ModelSection)
    """Network."""
    vocabulary: VocabularySection = field(default_factory=VocabularySection)
    """Words."""
    batches: BatchConfig = field(default_factory=BatchConfig)
    """Sentences."""
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    """Loss."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    """Optimiser."""
    run: RunSection = field(default_factory=RunSection)
    """Behaviour."""
    data: dict[str, Any] = field(default_factory=dict)
    """Training cells: h5ad files, see :mod:`scmulan.data.spec`; or ``corpus``, a folder that ``scmulan corpus build``
    wrote, with its own vocabulary, and ``split``, a file of ``scmulan corpus split`` (default: the corpus' own)."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Cells of other studies to watch, in the same form; may be left out."""

    def corpus(self, base: Path) -> Path | None:
        """Corpus folder that is trained on, or None where it is files."""
        if "corpus" not in self.data:
            return None
        unknown = set(self.data) - {"corpus", "split"}
        if unknown:
            raise RecipeError(
                f"[data]: {sorted(unknown)[0]!r} beside corpus: a corpus has its studies and words already"
            )
        return (base / self.data["corpus"]).resolve()

    def corpus_split(self, base: Path) -> Path | None:
        """Split file of the corpus, or None for its own."""
        return (base / self.data["split"]).resolve() if "split" in self.data else None

    def studies(self, base: Path) -> list[StudySpec]:
        """Training files; relative paths start at ``base``, the recipe's folder."""
        return read_spec(self.data, base)

    def validation_studies(self, base: Path) -> list[StudySpec]:
        """Validation files, with the training cells' renaming; may be empty."""
        if not self.validation:
            return []
        shared: dict[str, Any] = {k: self.data[k] for k in ("columns", "rename") if k in self.data}
        return read_spec(shared | self.validation, base)

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults included."""
        return dataclasses.asdict(self)

    def check(self) -> "Recipe":
        """Refuse settings that cannot work."""
        if self.objective.name not in ("next_word", "published"):
            raise RecipeError(f"objective {self.objective.name!r} is unknown: expected 'next_word' or 'published'")
        if self.run.precision not in ("fp32", "bf16", "auto"):
            raise RecipeError(f"precision {self.run.precision!r} is unknown: expected 'fp32', 'bf16' or 'auto'")
        if self.run.parallel not in ("ddp", "fsdp"):
            raise RecipeError(f"run.parallel {self.run.parallel!r} is unknown: expected 'ddp' or 'fsdp'")
        if self.run.accumulate < 1:
            raise RecipeError(f"run.accumulate is {self.run.accumulate}: expected at least 1")
        if self.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise RecipeError("run.tensorboard: the package is missing; pip install 'scmulan[tensorboard]'")
        if self.optimizer.steps < 1:
            raise RecipeError(f"optimizer.steps is {self.optimizer.steps}: expected at least 1")
        if not 0 <= self.optimizer.average < 1:
            raise RecipeError(f"optimizer.average is {self.optimizer.average}: expected a share below 1, or 0 for none")
        return self


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Recipe from a TOML file.

    Parameters
    ----------
    path
        The file.
    changes
        Settings that win over the file's, as ``section.key=value`` with a TOML value.

    Raises
    ------
    RecipeError
        If the file is missing or no TOML, or a setting is unknown or of the wrong type.
    """
    if not path.is_file():
        raise RecipeError(f"no such recipe: {path}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from None
    for change in changes:
        _apply(raw, change)
    return from_mapping(Recipe, raw, str(path)).check()


def _apply(raw: dict[str, Any], change: str) -> None:
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


def from_mapping(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    """Dataclass from parsed TOML or JSON, with checked keys and types."""
    hints = typing.get_type_hints(cls)
    unknown = set(raw) - set(hints)
    if unknown:
        raise RecipeError(f"{where}: unknown setting {sorted(unknown)[0]!r}; expected one of {', '.join(hints)}")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        kind = hints[key]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {key} is {value!r}, expected a section")
            values[key] = from_mapping(kind, value, f"{where} [{key}]")
            continue
        plain = typing.get_origin(kind) or kind
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(plain, type) and not isinstance(plain, types.UnionType):
            if not isinstance(value, plain) or (plain is not bool and isinstance(value, bool)):
                raise RecipeError(f"{where}: {key} is {json.dumps(value)}, expected {plain.__name__}")
        values[key] = value
    return cls(**values)

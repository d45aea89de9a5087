"""Settings of fine-tuning: apart from its work, so that the command line can show them without loading torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from scmulan._settings import Meta


@dataclass(kw_only=True, frozen=True, slots=True)
class FinetuneConfig:
    """Settings of :func:`scmulan.finetune`, for Python and the command line alike."""

    coarse: str | None = None
    """``obs`` column of coarse types; by default the coarse types of the model that the Cell Ontology puts above the
    labels."""
    metadata: dict[str, str] | None = None
    """``obs`` column of further fields (``{"organ": "tissue"}``), whose new tokens are added too; by default columns
    with the names of fields (``organ``, ``region``, ``sex`` …) are read, as far as the model has their tokens."""
    donor: str | None = None
    """``obs`` column of donors (or batches): hold out whole donors, not a fraction of each label."""
    method: Literal["full"] = "full"
    """"full": all weights are trained."""
    epochs: Annotated[float, Meta(gt=0)] | None = None
    """Largest number of passes over the labelled cells; by default 20, but at least 200 and at most 3,000 steps."""
    steps: Annotated[int, Meta(ge=1)] | None = None
    """Largest number of optimiser steps, instead of ``epochs``."""
    rate: Annotated[float, Meta(gt=0)] = 5e-4
    """Highest learning rate."""
    validation_share: Annotated[float, Meta(gt=0, le=0.5)] = 0.1
    """Fraction of the labelled cells that is held out; at most about 500 cells are."""
    patience: Annotated[int, Meta(ge=1)] = 6
    """Stop when this many checks (of 20) in a row found nothing better."""
    ontology: bool = False
    """Count a finer type of the Cell Ontology as right where a label is coarser: for data in which some cells are
    labelled less finely than others. By default labels exclude each other."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """The same seed gives the same weights on the same machine."""
    layer: str | None = None
    """Which matrix holds expression; found by looking unless given."""
    matrix_kind: Literal["counts", "log1p"] | None = None
    """What it holds; found by looking unless given."""
    min_genes: Annotated[int, Meta(ge=0)] = 20
    """Smallest number of genes of the model's vocabulary that the cells must have."""

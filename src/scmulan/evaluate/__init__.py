"""Evaluate models: annotation, integration and generation, each beside a baseline.

Functions here take a model and labelled files and return a result with ``to_json()`` for machines and ``table()`` for
people. Metrics of integration are those of scib-metrics. Nothing of the vocabulary or the model is defined here, and
nothing is tuned on the cells that are scored.
"""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "annotation": ["evaluate_annotation"],
        "generation": ["evaluate_generation"],
        "integration": ["evaluate_integration"],
        "labels": ["lineage_of"],
    },
)

if TYPE_CHECKING:
    from scmulan.evaluate.annotation import evaluate_annotation as evaluate_annotation
    from scmulan.evaluate.generation import evaluate_generation as evaluate_generation
    from scmulan.evaluate.integration import evaluate_integration as evaluate_integration
    from scmulan.evaluate.labels import lineage_of as lineage_of

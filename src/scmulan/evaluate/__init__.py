"""How good is a model? Annotation, integration and generation, each beside a baseline worth beating.

Here live the questions put to models and the yardsticks: functions that take a model and labelled files and return a
result with ``to_json()`` for machines and ``table()`` for people. Metrics of integration are those of scib-metrics, not
our own. Nothing of the language or the model is defined here, and nothing is tuned on the cells that are scored.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scmulan.evaluate.annotation import evaluate_annotation
    from scmulan.evaluate.generation import evaluate_generation
    from scmulan.evaluate.integration import evaluate_integration
    from scmulan.evaluate.labels import lineage_of

_HOME = {
    "evaluate_annotation": "annotation",
    "evaluate_generation": "generation",
    "evaluate_integration": "integration",
    "lineage_of": "labels",
}
__all__ = ["evaluate_annotation", "evaluate_generation", "evaluate_integration", "lineage_of"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"scmulan.evaluate.{_HOME[name]}"), name)
    raise AttributeError(f"module 'scmulan.evaluate' has no attribute {name!r}")

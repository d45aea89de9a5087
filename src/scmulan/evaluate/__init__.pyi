from .annotation import AnnotationEvaluation, evaluate_annotation
from .generation import GenerationEvaluation, evaluate_generation
from .integration import IntegrationEvaluation, evaluate_integration
from .labels import lineage_of

__all__ = [
    "AnnotationEvaluation",
    "GenerationEvaluation",
    "IntegrationEvaluation",
    "evaluate_annotation",
    "evaluate_generation",
    "evaluate_integration",
    "lineage_of",
]

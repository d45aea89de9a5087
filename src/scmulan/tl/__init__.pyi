from ._annotate import Annotation, annotate
from ._embed import Embedding, embed
from ._generate import generate
from ._perturb import Perturbation, perturb
from ._smooth import smooth

__all__ = [
    "Annotation",
    "Embedding",
    "Perturbation",
    "annotate",
    "embed",
    "generate",
    "perturb",
    "smooth",
]

from ._annotate import Annotation, annotate, annotate_cells
from ._blockwise import ReadOptions
from ._embed import Embedding, embed, embed_cells
from ._generate import generate
from ._perturb import Perturbation, perturb, perturb_cells
from ._smooth import smooth

__all__ = [
    "Annotation",
    "Embedding",
    "Perturbation",
    "ReadOptions",
    "annotate",
    "annotate_cells",
    "embed",
    "embed_cells",
    "generate",
    "perturb",
    "perturb_cells",
    "smooth",
]

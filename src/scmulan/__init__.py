"""scmulan: a multitask generative language model of single cells.

``import scmulan`` is light: torch is imported when a model is loaded, not before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "finetune", "load", "pretrain", "tl"]

if TYPE_CHECKING:
    from scmulan import tl
    from scmulan.model.loading import load
    from scmulan.train.finetune import finetune
    from scmulan.train.pretrain import pretrain

_LAZY = {
    "load": ("scmulan.model.loading", "load"),
    "finetune": ("scmulan.train.finetune", "finetune"),
    "pretrain": ("scmulan.train.pretrain", "pretrain"),
}


def __getattr__(name: str) -> Any:
    if name == "tl":
        return import_module("scmulan.tl")
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'scmulan' has no attribute {name!r}")

"""scmulan: a multitask generative language model of single cells.

``import scmulan`` is light: names are imported when they are first used, torch with them. The stub ``__init__.pyi``
lists them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_names, "__version__"])


def __dir__() -> list[str]:
    return __all__

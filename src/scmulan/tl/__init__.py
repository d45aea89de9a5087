"""Verbs on AnnData, in the manner of scanpy: annotate, embed, smooth, generate, perturb.

Each changes an AnnData in place, or returns a changed copy (``copy=True``); ``generate`` returns a new one. Inputs are
read in blocks and never made dense. Importing a verb imports torch; importing this package does not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

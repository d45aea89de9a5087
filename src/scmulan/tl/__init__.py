"""Verbs on AnnData: annotate, embed, smooth, generate, perturb.

Each has two faces: a function that changes an AnnData in place, as scanpy's do, and one that returns its results,
which the command line writes into files of any size. Inputs are read in blocks and never made dense.
"""

from scmulan.tl.annotate import annotate
from scmulan.tl.embed import embed
from scmulan.tl.generate import generate
from scmulan.tl.perturb import perturb
from scmulan.tl.smooth import smooth

__all__ = ["annotate", "embed", "generate", "perturb", "smooth"]

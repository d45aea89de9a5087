"""Verbs on AnnData: annotate, embed, smooth, generate, perturb.

Each has two faces: a function that changes an AnnData in place, as scanpy's do, and one that returns its results,
which the command line writes into files of any size. Inputs are read in blocks and never made dense.
"""

from scmulan.tl._annotate import annotate
from scmulan.tl._embed import embed
from scmulan.tl._generate import generate
from scmulan.tl._perturb import perturb
from scmulan.tl._smooth import smooth

__all__ = ["annotate", "embed", "generate", "perturb", "smooth"]

"""Errors written for the person who meets them.

Every message is one line: what was given, what was found, what was expected, and how to fix it.
The command line prints that line and exits with 2.
"""


class ScmulanError(ValueError):
    """Anything that scmulan refuses because of what it was given."""


class InputError(ScmulanError):
    """A data file or AnnData that cannot be used as given."""


class GeneError(InputError):
    """The genes of the input do not meet the genes of the model."""


class MatrixError(InputError):
    """No matrix of the input holds usable expression values."""


class VocabularyError(ScmulanError):
    """A word or a vocabulary file that is not what it should be."""


class ModelError(ScmulanError):
    """A model folder, checkpoint or configuration that cannot be used."""


class OutputError(ScmulanError):
    """An output that cannot be written where it was asked for."""


class RecipeError(ScmulanError):
    """A training recipe that cannot be followed."""

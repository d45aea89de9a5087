"""Errors for people.

Every message is one line: the input, what was found, what was expected, and how to fix it. The command line prints the
line and exits with 2.
"""


class ScmulanError(ValueError):
    """Base of all errors that an input, file, option or output causes."""


class InputError(ScmulanError):
    """A data file or AnnData cannot be used."""


class GeneError(InputError):
    """Too few genes of the input match the genes of the model."""


class MatrixError(InputError):
    """No matrix of the input holds usable expression values."""


class VocabularyError(ScmulanError):
    """A token or a vocabulary file is wrong."""


class ModelError(ScmulanError):
    """A model folder, checkpoint or configuration cannot be used."""


class OutputError(ScmulanError):
    """An output cannot be written to its path."""


class RecipeError(ScmulanError):
    """A training recipe, corpus spec or split is wrong."""

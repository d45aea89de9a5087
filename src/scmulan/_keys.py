"""Names under which results stand in an AnnData, and the values of its categories.

They are part of the file format: files written by one version are read by the next.
"""

UNS = "scmulan"
"""Key of ``uns``: model, parameters of each verb, matrix and genes used."""
EMBEDDING = "X_scmulan"
"""Key of ``obsm``: embedding, float32 ``[cells, width]``."""

# Columns of ``obs``. Those of one verb begin with its first column, so that ``key_added`` renames them together.
CELL_TYPE = "scmulan_cell_type"
COARSE = f"{CELL_TYPE}_coarse"
PROBABILITY = f"{CELL_TYPE}_probability"
STATUS = f"{CELL_TYPE}_status"
ONTOLOGY_ID = f"{CELL_TYPE}_ontology_id"

SMOOTHED = f"{CELL_TYPE}_smoothed"
SMOOTHED_FRACTION = f"{SMOOTHED}_share"

PERTURBED = "scmulan_perturbed"
PERTURBED_CELL_TYPE = f"{PERTURBED}_cell_type"
PERTURBED_PROBABILITY = f"{PERTURBED}_probability"
PROBABILITY_BEFORE = f"{PERTURBED}_probability_before"
SHIFT = f"{PERTURBED}_shift"

UNKNOWN = "unknown"
"""Cell type of a cell without any gene of the vocabulary."""
STATUSES = ("confident", "uncertain", "conflict", "empty")
"""Categories of ``STATUS``, in the order of their codes."""
CONFIDENT, UNCERTAIN, CONFLICT, EMPTY = range(4)
"""Codes of the statuses."""

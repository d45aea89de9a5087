"""Shared by all verbs: load the model that a user names, and add results and their record to an AnnData."""

import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import anndata as ad
import pandas as pd

import scmulan
from scmulan._keys import UNS
from scmulan.model.loading import LoadedModel, load

ModelLike: TypeAlias = LoadedModel | str | os.PathLike[str]
"""A loaded model, or the name or folder of one (see :func:`scmulan.load`)."""


def as_model(model: ModelLike) -> LoadedModel:
    """Return a model, loaded if it was named."""
    return model if isinstance(model, LoadedModel) else load(os.fspath(model))


def provenance(model: LoadedModel, verb: str, parameters: Mapping[str, Any], **account: Any) -> dict[str, Any]:
    """Return the record of one verb for ``uns``: software, weights, what was read, and settings.

    Plain types that fit into h5ad and JSON; there is no None in an h5ad, so settings have an empty text for it.
    """
    return {
        "version": scmulan.__version__,
        "model": model.name,
        "weights_hash": model.weights_hash,
        **account,
        "parameters": {verb: {k: "" if v is None else v for k, v in parameters.items()}},
    }


def in_place_or_copy(adata: ad.AnnData, copy: bool) -> ad.AnnData:
    """Return what results are to be added to: the input, or a copy of it in memory."""
    if not copy:
        return adata
    return adata.to_memory() if adata.isbacked else adata.copy()


def add_columns(adata: ad.AnnData, table: pd.DataFrame, prefix: str, key_added: str | None) -> None:
    """Add columns to ``obs``, with ``key_added`` in place of the prefix of their names."""
    for column in table:
        adata.obs[str(column).replace(prefix, key_added or prefix, 1)] = table[column]


def add_record(adata: ad.AnnData, record: Mapping[str, Any], key: str | None = None) -> None:
    """Put a record into ``uns['scmulan']`` (or another key), beside those of other verbs with the same weights.

    Warns
    -----
    UserWarning
        If the record there is of another model; it is replaced.
    """
    key = key or UNS
    old = adata.uns.get(key, {})
    same = old.get("weights_hash") == record["weights_hash"]
    if old and not same:
        warnings.warn(f"uns[{key!r}] held results of another model; they are replaced", UserWarning, stacklevel=4)
    before = old.get("parameters", {}) if same else {}
    adata.uns[key] = {**record, "parameters": {**before, **record["parameters"]}}

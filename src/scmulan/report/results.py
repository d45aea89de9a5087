"""Results of annotation as plain tables for the page, and the colours of cell types in its figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scmulan._io.adata import to_json
from scmulan._keys import CELL_TYPE, COARSE, EMBEDDING, ONTOLOGY_ID, PROBABILITY, STATUS, STATUSES, UNKNOWN, UNS
from scmulan.errors import InputError
from scmulan.model.folder import packaged_models, read_card, read_hashes

# Twelve colours whose closest pair stays apart (OKLab distance ≥ 0.08) in normal sight and with each of the three
# colour deficiencies, and that are visible on white paper and on a dark screen. Types carry a number too: colour is
# never the only thing that tells them apart.
TYPE_COLOURS = (
    "#1a60b5", "#d68519", "#53b280", "#8a3889", "#dcc460", "#952a0d",
    "#6cd4dc", "#866fd6", "#aa625e", "#20594e", "#a4a5eb", "#248a9b",
)  # fmt: skip
OTHER_COLOUR = "#8b9098"
"""Types beyond the twelfth, and cells without a type."""
REAL_COLOUR, GENERATED_COLOUR = "#1a60b5", "#d68519"
"""Measured cells and generated ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellType:
    """Predicted type, a row of the page's table."""

    number: int
    """Rank by number of cells, from 1; labels the type in figures."""
    name: str
    """Label as predicted."""
    cells: int
    """Number of cells."""
    fraction: float
    """Fraction of all cells."""
    probability: float
    """Mean probability of its cells; NaN where none was given."""
    doubtful: int
    """Number of its cells that are uncertain or in conflict."""
    ontology_id: str
    """Cell Ontology id, or an empty string."""
    trained_on: int | None
    """Cells of this label in the model's training data, where its card says."""
    colour: str
    """Colour in figures."""
    shown: bool
    """Whether it has a colour and number of its own in figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Annotation of the cells of an AnnData."""

    cells: int
    """Number of cells."""
    label: np.ndarray
    """Predicted type of each cell, str."""
    coarse: np.ndarray
    """Predicted coarse type of each cell, str."""
    probability: np.ndarray
    """Probability of the type, float64; NaN where none was given."""
    status: np.ndarray
    """One of :data:`scmulan._keys.STATUSES` for each cell, str."""
    types: list[CellType]
    """Predicted types, the most frequent first, ``unknown`` last."""
    embedding: np.ndarray | None
    """``obsm['X_scmulan']``, or None where the cells were not embedded."""
    info: dict[str, Any]
    """``uns['scmulan']`` as plain types; empty where the file has lost it."""

    @property
    def status_counts(self) -> dict[str, int]:
        """Number of cells of each status."""
        return {status: int((self.status == status).sum()) for status in STATUSES}

    @property
    def threshold(self) -> float:
        """Probability below which a cell was called uncertain."""
        return float(self.parameters("annotate").get("threshold", 0.5))

    @property
    def max_cells(self) -> int:
        """Number of cells of the most frequent type."""
        return max(row.cells for row in self.types)

    def parameters(self, verb: str) -> dict[str, Any]:
        """Return the parameters that a verb was run with."""
        return dict(self.info.get("parameters", {}).get(verb, {}))


def read_results(adata: AnnData, card: Mapping[str, Any] | None = None) -> Results:
    """Read the annotation of an AnnData.

    Parameters
    ----------
    adata
        With the columns that :func:`scmulan.tl.annotate` adds to ``obs``.
    card
        Training card of the model.

    Raises
    ------
    InputError
        If the cells were not annotated.
    """
    needed = [CELL_TYPE, COARSE, PROBABILITY, STATUS, ONTOLOGY_ID]
    missing = [column for column in needed if column not in adata.obs]
    if missing:
        raise InputError(
            f"the input has no column {missing[0]!r} in obs: a report is about annotated cells; "
            "run `scmulan annotate IN.h5ad -o OUT.h5ad` first and give OUT.h5ad"
        )
    label, coarse = (_to_text(adata.obs[name], UNKNOWN) for name in needed[:2])
    status = _to_text(adata.obs[needed[3]], "uncertain")
    probability = adata.obs[needed[2]].to_numpy(dtype=np.float64)
    table = pd.DataFrame(
        {
            "label": label,
            "probability": probability,
            "doubtful": np.isin(status, ("uncertain", "conflict")),
            "id": _to_text(adata.obs[needed[4]], ""),
        }
    )
    embedding = adata.obsm.get(EMBEDDING)
    return Results(
        cells=adata.n_obs,
        label=label,
        coarse=coarse,
        probability=probability,
        status=status,
        types=_types(table, (card or {}).get("cell_types")),
        embedding=None if embedding is None else np.asarray(embedding[:], dtype=np.float32),
        info=read_info(adata),
    )


def _types(table: pd.DataFrame, trained: Mapping[str, int] | None) -> list[CellType]:
    groups = table.groupby("label", sort=True)
    summary = groups.agg(
        cells=("label", "size"), probability=("probability", "mean"), doubtful=("doubtful", "sum"), id=("id", "first")
    )
    summary["last"] = summary.index == UNKNOWN
    summary = summary.sort_values(["last", "cells"], ascending=[True, False], kind="stable")
    names = [str(name) for name in summary.index]
    colour = type_colours(names, UNKNOWN)
    return [
        CellType(
            number=number,
            name=name,
            cells=int(row.cells),
            fraction=row.cells / len(table),
            probability=float("nan") if name == UNKNOWN else float(row.probability),
            doubtful=int(row.doubtful),
            ontology_id=str(row.id),
            trained_on=None if trained is None or name == UNKNOWN else int(trained.get(name, 0)),
            colour=colour[name],
            shown=colour[name] != OTHER_COLOUR,
        )
        for number, (name, row) in enumerate(zip(names, summary.itertuples(), strict=True), start=1)
    ]


def type_colours(types: Sequence[str], unknown: str) -> dict[str, str]:
    """Choose the colour of each cell type.

    Parameters
    ----------
    types
        Names, the most frequent first.
    unknown
        Name of cells without a type, which is grey like the types that are left without a colour.
    """
    named = [name for name in types if name != unknown]
    chosen = dict(zip(named, TYPE_COLOURS, strict=False))
    return {name: chosen.get(name, OTHER_COLOUR) for name in types}


def find_card(weights_hash: str) -> dict[str, Any] | None:
    """Return the training card of the packaged model with these weights, or None."""
    for folder in packaged_models().values():
        if read_hashes(folder).get("model.safetensors") == weights_hash:
            return read_card(folder)
    return None


def read_info(adata: AnnData) -> dict[str, Any]:
    """Read ``uns['scmulan']`` as JSON types, whatever storage made of them; empty where the file has lost it."""
    return json.loads(to_json(adata.uns.get(UNS, {})))


def _to_text(values: pd.Series, missing: str) -> np.ndarray:
    """Return the values of a column as str; ``missing`` stands for missing ones."""
    column = values.astype(object)
    return column.where(column.notna(), missing).astype(str).to_numpy(dtype=object)

"""What do a cell's neighbours say it is?"""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scmulan._keys import CELL_TYPE, EMBEDDING, SMOOTHED, SMOOTHED_FRACTION, UNS
from scmulan.errors import InputError

NEIGHBOURS = 15
# Similarities of so many pairs of cells are held at a time: 128 MiB.
PAIRS = 2**25


def smooth(adata: ad.AnnData, *, neighbours: int = NEIGHBOURS, use_rep: str = EMBEDDING) -> None:
    """Give each cell the type that most of its nearest neighbours have, in place.

    Types of single cells scatter where few genes were seen; cells of a kind lie together. The published release
    offers a like vote (15 neighbours), CellTypist a majority within clusters.

    Parameters
    ----------
    adata
        Cells that :func:`annotate` and :func:`embed` have been at.
    neighbours
        How many cells vote, the cell itself among them.
    use_rep
        Key of ``obsm`` by which cells are near (cosine).

    Notes
    -----
    Adds to ``obs``: ``scmulan_cell_type_smoothed`` (category; where votes are equal, the cell's own type is kept) and
    ``scmulan_cell_type_smoothed_share`` (float32; share of the votes that the type has). ``scmulan_cell_type`` stays
    as it is. Cells without gene words (all zeros in ``use_rep``) have no vote, and keep their type with a share of 0.

    A cell's smoothed type depends on the other cells of the input. The search is exact: its time grows with the square
    of the number of cells.

    Raises
    ------
    InputError
        If types or embedding are missing, or ``neighbours`` is less than 1.
    """
    for where, key, verb in ((adata.obs, CELL_TYPE, "annotate"), (adata.obsm, use_rep, "embed")):
        if key not in where:
            raise InputError(f"{key!r} is missing: run scmulan.tl.{verb} before scmulan.tl.smooth")
    found = smooth_types(adata.obs[CELL_TYPE], np.asarray(adata.obsm[use_rep]), neighbours)
    for column in found:
        adata.obs[column] = found[column]
    told = dict(adata.uns.get(UNS, {}))
    told["parameters"] = {**told.get("parameters", {}), "smooth": {"neighbours": neighbours, "use_rep": use_rep}}
    adata.uns[UNS] = told


def smooth_types(types: pd.Series, states: np.ndarray, neighbours: int = NEIGHBOURS) -> pd.DataFrame:
    """Types by the vote of neighbours, and their shares; see :func:`smooth`.

    Parameters
    ----------
    types
        One per cell.
    states
        float ``[cells, width]``.
    neighbours
        How many cells vote.

    Returns
    -------
    pandas.DataFrame
        ``scmulan_cell_type_smoothed`` and ``…_share``, rows as ``types``.
    """
    if neighbours < 1:
        raise InputError(f"{neighbours} neighbours: expected at least 1, the cell itself")
    given = pd.Categorical(types.astype(str))
    own = torch.from_numpy(given.codes.astype(np.int64))
    voice = torch.from_numpy(np.linalg.norm(states, axis=1) > 0)
    said, share = own.clone(), torch.zeros(len(own))
    rows = voice.nonzero()[:, 0]
    unit = torch.nn.functional.normalize(torch.from_numpy(states[rows.numpy()].astype(np.float32)), dim=1)
    k = min(neighbours, len(rows))
    for block in rows.split(max(1, PAIRS // max(1, len(rows)))) if k else ():
        start = int(torch.searchsorted(rows, block[0]))
        near = _nearest(unit, start, len(block), k)
        votes = torch.zeros(len(block), len(given.categories))
        votes.scatter_add_(1, own[rows[near]], torch.ones(near.shape))
        # Half a vote more decides between equals.
        said[block] = votes.scatter_add(1, own[block, None], torch.full((len(block), 1), 0.5)).argmax(1)
        share[block] = votes.gather(1, said[block, None])[:, 0] / k
    return pd.DataFrame(
        {
            SMOOTHED: pd.Categorical.from_codes(said.numpy(), categories=given.categories).remove_unused_categories(),
            SMOOTHED_FRACTION: share.numpy(),
        },
        index=types.index,
    )


def _nearest(unit: torch.Tensor, start: int, n: int, k: int) -> torch.Tensor:
    """Places of the ``k`` nearest cells of ``n`` cells, the cell itself first."""
    near: Any = unit[start : start + n] @ unit.T
    near[torch.arange(n), torch.arange(start, start + n)] = 2.0  # ahead of cells that are its equal
    places: torch.Tensor = near.topk(k, dim=1).indices
    return places

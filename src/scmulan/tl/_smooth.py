"""``scmulan.tl.smooth``: let a cell's nearest neighbours vote on its type."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scmulan._keys import CELL_TYPE, EMBEDDING, SMOOTHED, SMOOTHED_FRACTION, UNS
from scmulan.errors import InputError
from scmulan.tl._record import add_columns, in_place_or_copy

N_NEIGHBORS = 15
"""As in the published release."""
MAX_PAIRS = 2**25
"""Pairs of cells whose similarities are held at a time: 128 MiB."""


def smooth(
    adata: ad.AnnData,
    *,
    n_neighbors: int = N_NEIGHBORS,
    use_rep: str = EMBEDDING,
    cell_type_key: str = CELL_TYPE,
    key_added: str | None = None,
    copy: bool = False,
) -> ad.AnnData | None:
    """Smooth cell types: give each cell the type that most of its nearest neighbours have.

    Types of single cells scatter where few genes were seen; cells of a kind lie together. The published release
    offers a similar vote (15 neighbours), CellTypist a majority within clusters.

    Parameters
    ----------
    adata
        Cells with the results of :func:`scmulan.tl.annotate` and :func:`scmulan.tl.embed`.
    n_neighbors
        Number of cells that vote, the cell itself among them.
    use_rep
        Key of ``obsm`` by which cells are near (cosine).
    cell_type_key
        Key of ``obs``: types to smooth.
    key_added
        Prefix of the columns, and key of ``uns``. Default: ``scmulan_cell_type_smoothed`` (the name of the types
        smoothed, and ``_smoothed``), and ``uns['scmulan']``.
    copy
        Return a copy with the results and leave ``adata`` as it is.

    Returns
    -------
    anndata.AnnData or None
        The copy with ``copy=True``, else None. Added to ``obs`` are ``scmulan_cell_type_smoothed`` (category; where
        votes are equal, the cell's own type is kept) and ``scmulan_cell_type_smoothed_share`` (float32, fraction of the
        votes that the type has). ``scmulan_cell_type`` stays as it is. Cells without gene tokens (all zeros in
        ``use_rep``) have no vote, and keep their type with a fraction of 0.

    Raises
    ------
    InputError
        If types or embedding are missing, or ``n_neighbors`` is less than 1.

    Notes
    -----
    A cell's smoothed type depends on the other cells of the input. The search is exact: its time grows with the square
    of the number of cells.
    """
    for where, key, verb in ((adata.obs, cell_type_key, "annotate"), (adata.obsm, use_rep, "embed")):
        if key not in where:
            raise InputError(f"{key!r} is missing: run scmulan.tl.{verb} before scmulan.tl.smooth")
    found = smooth_types(adata.obs[cell_type_key], np.asarray(adata.obsm[use_rep]), n_neighbors)
    adata = in_place_or_copy(adata, copy)
    add_columns(adata, found, SMOOTHED, key_added or f"{cell_type_key}_smoothed")
    record = dict(adata.uns.get(key_added or UNS, {}))
    parameters = smooth_parameters(n_neighbors, use_rep)
    adata.uns[key_added or UNS] = {**record, "parameters": {**record.get("parameters", {}), "smooth": parameters}}
    return adata if copy else None


def smooth_parameters(n_neighbors: int = N_NEIGHBORS, use_rep: str = EMBEDDING) -> dict[str, Any]:
    """Return the record of the parameters for ``uns``."""
    return {"neighbours": n_neighbors, "use_rep": use_rep}


def smooth_types(
    types: pd.Series, hidden: np.ndarray, n_neighbors: int = N_NEIGHBORS, *, max_pairs: int = MAX_PAIRS
) -> pd.DataFrame:
    """Return types by the vote of neighbours, and their fractions of the votes; see :func:`smooth`.

    Parameters
    ----------
    types
        One per cell.
    hidden
        float ``[cells, width]``.
    n_neighbors
        Number of cells that vote.
    max_pairs
        Pairs of cells whose similarities are held at a time.

    Returns
    -------
    pandas.DataFrame
        ``scmulan_cell_type_smoothed`` and ``…_share``, rows as ``types``.
    """
    if n_neighbors < 1:
        raise InputError(f"{n_neighbors} neighbours: expected at least 1, the cell itself")
    categories = pd.Categorical(types.astype(str))
    own = torch.from_numpy(categories.codes.astype(np.int64))
    winner, fraction = own.clone(), torch.zeros(len(own))
    voters = torch.from_numpy(np.linalg.norm(hidden, axis=1) > 0).nonzero()[:, 0]
    unit = torch.nn.functional.normalize(torch.from_numpy(hidden[voters.numpy()].astype(np.float32)), dim=1)
    k = min(n_neighbors, len(voters))
    for block in voters.split(max(1, max_pairs // max(1, len(voters)))) if k else ():
        start = int(torch.searchsorted(voters, block[0]))
        near = _nearest(unit, start, len(block), k)
        votes = torch.zeros(len(block), len(categories.categories))
        votes.scatter_add_(1, own[voters[near]], torch.ones(near.shape))
        # Half a vote more decides between equals.
        winner[block] = votes.scatter_add(1, own[block, None], torch.full((len(block), 1), 0.5)).argmax(1)
        fraction[block] = votes.gather(1, winner[block, None])[:, 0] / k
    smoothed = pd.Categorical.from_codes(winner.numpy(), categories=categories.categories)
    return pd.DataFrame(
        {SMOOTHED: smoothed.remove_unused_categories(), SMOOTHED_FRACTION: fraction.numpy()}, index=types.index
    )


def _nearest(unit: torch.Tensor, start: int, n: int, k: int) -> torch.Tensor:
    """Return the indices of the ``k`` nearest cells of ``n`` cells, int64 ``[n, k]``, the cell itself first."""
    similarity: Any = unit[start : start + n] @ unit.T
    similarity[torch.arange(n), torch.arange(start, start + n)] = 2.0  # ahead of cells that are its equal
    return similarity.topk(k, dim=1).indices

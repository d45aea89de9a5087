"""Cells on a plane."""

import warnings
from dataclasses import dataclass

import numpy as np

FEW = 50
NEIGHBOURS = 15
MIN_DIST = 0.3
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """Coordinates of cells for drawing."""

    xy: np.ndarray
    """float64 ``[cells, 2]``."""
    method: str
    """``UMAP`` or ``PCA``."""


def sample(n: int, most: int) -> np.ndarray:
    """Ascending numbers of at most ``most`` of ``n`` cells, the same ones every time."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(SEED).choice(n, most, replace=False))


def principal_components(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre and strongest directions of variation.

    Parameters
    ----------
    values
        ``[cells, features]``.
    n
        Most directions.

    Returns
    -------
    scores, mean, directions : numpy.ndarray
        ``[cells, n]``, ``[features]``, ``[features, n]``.
    """
    mean = values.mean(0)
    centred = values - mean
    n = min(n, *values.shape)
    # The smaller of the two Gram matrices holds the same directions.
    if values.shape[0] < values.shape[1]:
        weight, left = np.linalg.eigh(centred @ centred.T)
        size = np.sqrt(np.clip(weight[::-1][:n], 1e-12, None))
        directions = centred.T @ (left[:, ::-1][:, :n] / size)
    else:
        directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :n]
    return centred @ directions, mean, directions


def lay_out(values: np.ndarray) -> Plane:
    """Put cells on a plane: UMAP with a fixed seed, or the first two principal components of a few cells.

    Parameters
    ----------
    values
        ``[cells, features]``, at least one cell.
    """
    values = np.asarray(values, dtype=np.float32)
    if len(values) < FEW:
        scores = principal_components(values.astype(np.float64), 2)[0]
        xy = np.zeros((len(values), 2))
        xy[:, : scores.shape[1]] = scores
        return Plane(xy=xy, method="PCA")
    with warnings.catch_warnings():
        # It misses tensorflow, which nothing here needs.
        warnings.simplefilter("ignore", ImportWarning)
        from umap import UMAP

    # With a seed umap-learn runs on one core; starting from PCA keeps distant groups apart in the same way every time.
    umap = UMAP(n_neighbors=NEIGHBOURS, min_dist=MIN_DIST, metric="cosine", init="pca", random_state=SEED, n_jobs=1)
    return Plane(xy=umap.fit_transform(values).astype(np.float64), method="UMAP")


def crowded_places(xy: np.ndarray, groups: np.ndarray, names: list[str]) -> np.ndarray:
    """Place for the name of each group: its cell with the most cells of the group around it.

    Parameters
    ----------
    xy
        ``[cells, 2]``.
    groups
        Group of each cell.
    names
        Groups to place, each with a cell at least.

    Returns
    -------
    numpy.ndarray
        ``[groups, 2]``.
    """
    from scipy.spatial import cKDTree

    radius = 0.05 * np.ptp(xy, axis=0).max()
    places = np.zeros((len(names), 2))
    for place, name in zip(places, names, strict=True):
        own = xy[groups == name]
        own = own[sample(len(own), 2000)]
        place[:] = own[np.argmax(cKDTree(own).query_ball_point(own, radius, return_length=True))]
    return places


def spread_out(places: np.ndarray, distance: float) -> np.ndarray:
    """Move places apart until no two are closer than ``distance`` (or fifty rounds are over)."""
    places = places.copy()
    for _ in range(50):
        moved = False
        for i in range(len(places)):
            for j in range(i):
                gap = places[i] - places[j]
                length = float(np.hypot(*gap))
                if length < distance:
                    step = (gap / length if length > 0 else np.array([1.0, 0.0])) * (distance - length) / 2
                    places[i] += step
                    places[j] -= step
                    moved = True
        if not moved:
            break
    return places

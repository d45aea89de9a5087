"""Two-dimensional layout of cells, and of the labels on it."""

import warnings
from dataclasses import dataclass

import numpy as np

MIN_CELLS_FOR_UMAP = 50
N_NEIGHBOURS = 15
MIN_DIST = 0.3
SEED = 0
MAX_CELLS_FOR_DENSITY = 2000
MAX_PUSHES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Coordinates of cells in a figure."""

    xy: np.ndarray
    """float64 ``[cells, 2]``."""
    method: str
    """``UMAP`` or ``PCA``."""


def sample_rows(n: int, max_cells: int) -> np.ndarray:
    """Draw at most ``max_cells`` of ``n`` rows, ascending, the same ones every time."""
    if n <= max_cells:
        return np.arange(n)
    return np.sort(np.random.default_rng(SEED).choice(n, max_cells, replace=False))


def principal_components(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the first principal components.

    Parameters
    ----------
    values
        ``[cells, features]``.
    n
        Maximum number of components.

    Returns
    -------
    scores : numpy.ndarray
        ``[cells, n]``.
    mean : numpy.ndarray
        ``[features]``.
    directions : numpy.ndarray
        ``[features, n]``: ``scores = (values - mean) @ directions``.
    """
    mean = values.mean(0)
    centred = values - mean
    n = min(n, *values.shape)
    # Of the two Gram matrices the smaller one is decomposed: both give the same directions.
    if values.shape[0] < values.shape[1]:
        eigenvalues, left = np.linalg.eigh(centred @ centred.T)
        singular_values = np.sqrt(np.clip(eigenvalues[::-1][:n], 1e-12, None))
        directions = centred.T @ (left[:, ::-1][:, :n] / singular_values)
    else:
        directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :n]
    return centred @ directions, mean, directions


def lay_out(values: np.ndarray) -> Layout:
    """Lay out cells by UMAP with a fixed seed or, if they are few, by their first two principal components.

    Parameters
    ----------
    values
        ``[cells, features]``, at least one cell.
    """
    values = np.asarray(values, dtype=np.float32)
    if len(values) < MIN_CELLS_FOR_UMAP:
        scores = principal_components(values.astype(np.float64), 2)[0]
        xy = np.zeros((len(values), 2))
        xy[:, : scores.shape[1]] = scores
        return Layout(xy=xy, method="PCA")
    with warnings.catch_warnings():
        # It warns that tensorflow is missing, which is not needed here.
        warnings.simplefilter("ignore", ImportWarning)
        from umap import UMAP

    # With a seed umap-learn runs on one core; starting from PCA keeps distant groups apart in the same way every time.
    umap = UMAP(n_neighbors=N_NEIGHBOURS, min_dist=MIN_DIST, metric="cosine", init="pca", random_state=SEED, n_jobs=1)
    return Layout(xy=umap.fit_transform(values).astype(np.float64), method="UMAP")


def label_positions(xy: np.ndarray, groups: np.ndarray, names: list[str]) -> np.ndarray:
    """Return a position for the label of each group: its cell with the most cells of the group around it.

    Parameters
    ----------
    xy
        ``[cells, 2]``.
    groups
        Group of each cell.
    names
        Groups to label, each with at least one cell.

    Returns
    -------
    numpy.ndarray
        ``[groups, 2]``.
    """
    from scipy.spatial import cKDTree

    radius = 0.05 * np.ptp(xy, axis=0).max()
    positions = np.zeros((len(names), 2))
    for position, name in zip(positions, names, strict=True):
        own = xy[groups == name]
        own = own[sample_rows(len(own), MAX_CELLS_FOR_DENSITY)]
        position[:] = own[np.argmax(cKDTree(own).query_ball_point(own, radius, return_length=True))]
    return positions


def push_apart(positions: np.ndarray, min_distance: float) -> np.ndarray:
    """Move positions ``[n, 2]`` apart until no two are closer than ``min_distance`` (or after fifty rounds)."""
    positions = positions.copy()
    for _ in range(MAX_PUSHES):
        moved = False
        for i in range(len(positions)):
            for j in range(i):
                gap = positions[i] - positions[j]
                distance = float(np.hypot(*gap))
                if distance < min_distance:
                    direction = gap / distance if distance > 0 else np.array([1.0, 0.0])
                    positions[i] += direction * (min_distance - distance) / 2
                    positions[j] -= direction * (min_distance - distance) / 2
                    moved = True
        if not moved:
            break
    return positions

"""Evaluate integration: scib-metrics of embeddings, beside PCA."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._io.adata import read_column
from scmulan._progress import SILENT, Progress
from scmulan._text import format_table
from scmulan.errors import InputError
from scmulan.evaluate.inputs import (
    Expression,
    as_model,
    file_names,
    ignore_warnings,
    model_name,
    open_labelled,
    optional_packages,
    read_expression,
    require_files,
    trained_on,
    with_source,
)
from scmulan.evaluate.labels import LabelMap, as_label_map
from scmulan.model.loading import LoadedModel
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._embed import embed_cells

__all__ = ["IntegrationEvaluation", "evaluate_integration"]

MIN_CELLS_PER_TYPE = 5  # in the sample: metrics of single cells say nothing
MAX_NEIGHBOURS = 90  # largest number of neighbours that a metric of scib-metrics uses
AGGREGATES = ("Bio conservation", "Batch correction", "Total")
EmbeddingRule = Literal["default", "release"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegrationEvaluation:
    """Scores by scib-metrics of embeddings of the same cells."""

    model: str
    """Name of the model."""
    weights_hash: str
    """sha256 of its weights."""
    files: list[str]
    """Short names of the files."""
    trained_on: list[str]
    """Those among them that the model's card names as training data."""
    labels: str
    """Column of the cell types."""
    batch: str
    """Column of the batches, or ``file``."""
    cells: int
    """Cells scored."""
    of: int
    """Labelled cells that these were drawn from."""
    seed: int
    """Seed of the draw, and of PCA."""
    types: dict[str, int]
    """Cells of each type."""
    batches: dict[str, int]
    """Cells of each batch."""
    left_out: dict[str, int]
    """Types with too few cells in the sample, left out."""
    genes: int
    """Genes that all files share; PCA uses the most variable of them."""
    dimensions: dict[str, int]
    """Width of each embedding."""
    metrics: dict[str, str]
    """Metric → what it is about, ``Bio conservation`` or ``Batch correction``."""
    results: dict[str, dict[str, float | None]]
    """Embedding → metric → value, higher is better; and the means of the two kinds, and ``Total`` = 0.6 × bio
    conservation + 0.4 × batch correction."""

    def to_json(self) -> dict[str, Any]:
        """Return the contents as plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Return the scores as text, a column per embedding."""
        names = list(self.results)
        rows = [
            [metric, kind, *(self.results[name][metric] for name in names)] for metric, kind in self.metrics.items()
        ]
        rows += [[metric, "mean" if metric != "Total" else "0.6, 0.4", *(self.results[n][metric] for n in names)]
                 for metric in AGGREGATES]  # fmt: skip
        head = (
            f"Integration by model {self.model}, scib-metrics, higher is better\n"
            f"{self.cells:,} of {self.of:,} labelled cells of {', '.join(self.files)}\n"
            f"{len(self.types)} types (column {self.labels!r}), {len(self.batches)} batches ({self.batch!r}), "
            f"PCA on the most variable of {self.genes:,} genes"
        )
        notes = []
        if self.left_out:
            notes.append(f"left out, fewer than {MIN_CELLS_PER_TYPE} cells: " + ", ".join(self.left_out))
        if self.trained_on:
            notes.append(f"among the model's training data, whose scores say little: {', '.join(self.trained_on)}")
        return "\n\n".join([head, format_table(["metric", "about", *names], rows, text_columns=2), *notes])


def evaluate_integration(
    model: LoadedModel | str | Path,
    data: Sequence[str | Path],
    *,
    labels: str,
    batch: str | None = None,
    mapping: str | Path | LabelMap | None = None,
    rules: Sequence[EmbeddingRule] = ("default", "release"),
    max_cells: int = 1200,
    hvg: int = 2000,
    dimensions: int = 50,
    kbet: bool = False,
    min_genes: int = 20,
    seed: int = 0,
    progress: Progress = SILENT,
) -> IntegrationEvaluation:
    """Score whether embeddings keep cell types together and mix batches.

    Parameters
    ----------
    model
        From :func:`scmulan.load`, or its path or name.
    data
        Labelled h5ad files.
    labels
        Column of ``obs`` with the cell types; cells without are left out.
    batch
        Column with the batches (default: each file is one).
    mapping
        What the labels mean, see :func:`scmulan.evaluate.labels.read_label_map`.
    rules
        Embeddings of :func:`scmulan.tl.embed` to score.
    max_cells
        Maximum number of cells, drawn at random.
    hvg, dimensions
        Number of most variable genes for PCA, and number of its components.
    kbet
        Compute kBET per label too, which takes longer than all other metrics together.
    min_genes
        Minimum number of the model's genes that a file must have.
    seed
        Seed of the draw, and of PCA.
    progress
        Shows what is being done.

    Returns
    -------
    IntegrationEvaluation
        The metrics that ``scib_metrics.benchmark.Benchmarker`` takes by default, but for kBET: isolated labels, k-means
        NMI and ARI, silhouette of labels, cLISI; BRAS, iLISI, graph connectivity, PCR comparison with PCA; on exact
        nearest neighbours.

    Raises
    ------
    InputError
        If a file cannot be used, or the cells are of fewer than two types or batches.
    """
    require_files(data)
    loaded = as_model(model)
    names = file_names(data)
    label_map = as_label_map(mapping)
    obs = [_read_obs(path, name, labels, batch, label_map) for path, name in zip(data, names, strict=True)]
    labelled = pd.concat([cells[cells["type"] != ""] for cells in obs], ignore_index=True)
    drawn, left_out = _draw_cells(labelled, max_cells, seed)
    embeddings: dict[str, list[np.ndarray]] = {f"X_scmulan ({rule})": [] for rule in rules}
    expression: list[Expression] = []
    for path, name in zip(data, names, strict=True):
        rows = drawn.loc[drawn["file"] == name, "row"].to_numpy()
        if not len(rows):
            continue
        progress.log(f"{name}: embedding {len(rows):,} cells")
        adata = open_labelled(path, rows)
        with with_source(path):
            expression.append(read_expression(adata, str(path)))
            for rule in rules:
                reading = ReadOptions(min_genes=min_genes, precision="fp32")
                embedding = embed_cells(adata, loaded, rule=rule, reading=reading).values
                embeddings[f"X_scmulan ({rule})"].append(embedding)
    progress.log("PCA")
    pca, n_shared = _pca(expression, drawn["batch"].to_numpy(), hvg, dimensions, seed)
    spaces = {"X_pca": pca, **{name: np.concatenate(blocks) for name, blocks in embeddings.items()}}
    progress.log("scib-metrics")
    results, metrics = score_embeddings(spaces, drawn["type"].to_numpy(), drawn["batch"].to_numpy(), kbet=kbet)
    return IntegrationEvaluation(
        model=model_name(loaded),
        weights_hash=loaded.weights_hash,
        files=names,
        trained_on=[name for path, name in zip(data, names, strict=True) if trained_on(loaded, path)],
        labels=labels,
        batch=batch or "file",
        cells=len(drawn),
        of=len(labelled),
        seed=seed,
        types=_counts(drawn["type"]),
        batches=_counts(drawn["batch"]),
        left_out=left_out,
        genes=n_shared,
        dimensions={name: space.shape[1] for name, space in spaces.items()},
        metrics=metrics,
        results=results,
    )


def _read_obs(path: str | Path, name: str, labels: str, batch: str | None, label_map: LabelMap) -> pd.DataFrame:
    obs = open_labelled(path).obs
    raw = read_column(obs, labels, str(path))
    label_map.check(raw, str(path))
    batches = np.full(len(obs), name, dtype=object) if batch is None else read_column(obs, batch, str(path))
    return pd.DataFrame(
        {"file": name, "row": np.arange(len(obs)), "type": [label_map.term(label) for label in raw], "batch": batches}
    )


def _counts(values: pd.Series) -> dict[str, int]:
    return {str(name): int(n) for name, n in values.value_counts().items()}


def _draw_cells(cells: pd.DataFrame, max_cells: int, seed: int) -> tuple[pd.DataFrame, dict[str, int]]:
    """Draw cells, in the order of the files; drop the types with too few of them, and count those dropped."""
    cells = cells[cells["batch"] != ""]
    rows = np.sort(np.random.default_rng(seed).permutation(len(cells))[:max_cells])
    drawn = cells.iloc[rows].reset_index(drop=True)
    n = drawn["type"].map(drawn["type"].value_counts())
    chosen = drawn[n >= MIN_CELLS_PER_TYPE].reset_index(drop=True)
    for what in ("type", "batch"):
        if chosen[what].nunique() < 2:
            raise InputError(
                f"integration needs cells of two or more {'cell types' if what == 'type' else 'batches'}: found "
                f"{', '.join(map(repr, chosen[what].unique())) or 'none'} among {len(drawn):,} labelled cells; give "
                + ("another column of labels" if what == "type" else "a column of batches, or several files")
            )
    if len(chosen) <= MAX_NEIGHBOURS:
        raise InputError(f"integration needs more than {MAX_NEIGHBOURS} labelled cells: {len(chosen)} found")
    return chosen, _counts(drawn.loc[n < MIN_CELLS_PER_TYPE, "type"])


def _pca(
    files: Sequence[Expression], batches: np.ndarray, hvg: int, dimensions: int, seed: int
) -> tuple[np.ndarray, int]:
    """Compute scanpy's usual PCA (counts per 10,000, log1p, highly variable genes by batch), and count shared genes."""
    with optional_packages("the integration benchmark"):
        import scanpy as sc
    shared = sorted(set.intersection(*(set(file.genes) for file in files)))
    if len(shared) <= dimensions:
        raise InputError(f"the files share {len(shared):,} genes: PCA needs more than {dimensions}")
    x = sp.vstack([file.log1p(shared) for file in files], format="csr")
    obs = pd.DataFrame({"batch": pd.Categorical(batches)}, index=[str(i) for i in range(x.shape[0])])
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index(shared)))
    adata.uns["log1p"] = {}
    # With few cells some bins of the mean hold one gene; scanpy then warns about how it ranks this gene.
    with ignore_warnings("Some of the genes"):
        sc.pp.highly_variable_genes(adata, n_top_genes=min(hvg, len(shared)), batch_key="batch")
    sc.pp.pca(adata, n_comps=min(dimensions, x.shape[0] - 1), mask_var="highly_variable", random_state=seed)
    return np.asarray(adata.obsm["X_pca"], dtype=np.float32), len(shared)


def score_embeddings(
    spaces: dict[str, np.ndarray], types: np.ndarray, batches: np.ndarray, *, kbet: bool = False
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """Compute scib-metrics of embeddings of the same cells.

    Parameters
    ----------
    spaces
        Name → embedding ``[cells, width]``; ``X_pca`` must be among them, for the PCR comparison.
    types, batches
        ``[cells]`` each.
    kbet
        Compute kBET per label too.

    Returns
    -------
    results : dict
        Embedding → metric → value.
    metrics : dict
        Metric → ``Bio conservation`` or ``Batch correction``.

    Raises
    ------
    ScmulanError
        If scib-metrics or scikit-learn is not installed.
    """
    # UMAP, which scib-metrics imports, warns that one of its own extras is missing.
    with optional_packages("the integration benchmark"), ignore_warnings("Tensorflow not installed"):
        from scib_metrics.benchmark import BatchCorrection, Benchmarker
        from scib_metrics.nearest_neighbors import NeighborsResults
        from sklearn.neighbors import NearestNeighbors

    def neighbours(x: np.ndarray, k: int) -> Any:
        distances, indices = NearestNeighbors(n_neighbors=k).fit(x).kneighbors(x)
        return NeighborsResults(indices=indices, distances=distances)

    obs = pd.DataFrame(
        {"type": pd.Categorical(types), "batch": pd.Categorical(batches)}, index=[str(i) for i in range(len(types))]
    )
    adata = ad.AnnData(obs=obs, obsm=spaces)
    benchmarker = Benchmarker(
        adata, "batch", "type", list(spaces),
        batch_correction_metrics=BatchCorrection(kbet_per_label=kbet),
        pre_integrated_embedding_obsm_key="X_pca",
        progress_bar=False,
    )  # fmt: skip
    # PCR comparison is 0 where an embedding has more of the batch than PCA; scib-metrics warns of it.
    with quiet_scib_metrics(), ignore_warnings("PCR comparison score is negative"):
        benchmarker.prepare(neighbours)
        benchmarker.benchmark()
        frame = benchmarker.get_results()
    kinds = frame.loc["Metric Type"]
    values = {
        str(name): {str(m): _finite(frame.loc[name, m]) for m in frame.columns}
        for name in frame.index.drop("Metric Type")
    }
    return values, {str(m): str(kind) for m, kind in kinds.items() if kind != "Aggregate score"}


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(float(value)) else None


@contextmanager
def quiet_scib_metrics() -> Iterator[None]:
    """Keep scib-metrics from logging to standard output, and from collecting garbage in all of memory.

    It logs there that a type is too rare for one of its metrics, and collects garbage before each metric, which with
    torch, JAX and scanpy in memory takes longer than the metrics do.
    """
    logger = logging.getLogger("scib_metrics")
    level = logger.level
    logger.setLevel(logging.WARNING)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)

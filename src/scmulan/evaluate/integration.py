"""Whether an embedding keeps cell types together and mixes batches: scib-metrics, beside PCA."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._io.adata import read_column
from scmulan._text import grid
from scmulan.errors import InputError
from scmulan.evaluate.cells import (
    GeneCells,
    as_model,
    file_names,
    ignoring,
    model_name,
    named,
    need,
    need_files,
    open_labelled,
    read_genes,
    trained_on,
)
from scmulan.evaluate.labels import LabelMap, read_label_map
from scmulan.model.loading import LoadedModel
from scmulan.tl._embed import embed_cells

__all__ = ["IntegrationEvaluation", "evaluate_integration"]

FEWEST = 5  # cells of a type, in the sample: metrics of single cells say nothing
NEIGHBOURS = 90  # the most that a metric of scib-metrics asks for
AGGREGATES = ("Bio conservation", "Batch correction", "Total")
Rule = Literal["default", "release"]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegrationEvaluation:
    """scib-metrics of embeddings of the same cells."""

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
    """Labelled cells that they were drawn from."""
    seed: int
    """Of the draw, and of PCA."""
    types: dict[str, int]
    """Cells of each type."""
    batches: dict[str, int]
    """Cells of each batch."""
    left_out: dict[str, int]
    """Types with too few cells in the sample, left out."""
    genes: int
    """Genes that all files share; PCA sees the most variable of them."""
    dimensions: dict[str, int]
    """Width of each embedding."""
    metrics: dict[str, str]
    """Metric → what it is about, ``Bio conservation`` or ``Batch correction``."""
    results: dict[str, dict[str, float | None]]
    """Embedding → metric → value, higher is better; and the means of the two kinds, and ``Total`` = 0.6 × bio
    conservation + 0.4 × batch correction."""

    def to_json(self) -> dict[str, Any]:
        """Contents as plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Scores as text, a column per embedding."""
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
            notes.append(f"left out, fewer than {FEWEST} cells: " + ", ".join(self.left_out))
        if self.trained_on:
            notes.append(f"among the model's training data, whose scores say little: {', '.join(self.trained_on)}")
        return "\n\n".join([head, grid(["metric", "about", *names], rows, text=2), *notes])


def evaluate_integration(
    model: LoadedModel | str | Path,
    data: Sequence[str | Path],
    *,
    labels: str,
    batch: str | None = None,
    mapping: str | Path | LabelMap | None = None,
    rules: Sequence[Rule] = ("default", "release"),
    max_cells: int = 1200,
    hvg: int = 2000,
    dimensions: int = 50,
    kbet: bool = False,
    min_genes: int = 20,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> IntegrationEvaluation:
    """Score embeddings of labelled cells of several batches.

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
        Most cells, drawn at random.
    hvg, dimensions
        Genes that PCA sees, and its width.
    kbet
        Take kBET per label too, which needs more time than all other metrics together.
    min_genes
        Fewest genes of the model that a file must have.
    seed
        Of the draw, and of PCA.
    progress
        Called with a line of text now and then.

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
    need_files(data)
    loaded = as_model(model)
    table = LabelMap() if mapping is None else mapping if isinstance(mapping, LabelMap) else read_label_map(mapping)
    names = file_names(data)
    obs = [_read_obs(path, name, labels, batch, table) for path, name in zip(data, names, strict=True)]
    every = pd.concat([part[part["type"] != ""] for part in obs], ignore_index=True)
    chosen, left_out = _draw(every, max_cells, seed)
    embeddings: dict[str, list[np.ndarray]] = {f"X_scmulan ({rule})": [] for rule in rules}
    genes: list[GeneCells] = []
    for path, name in zip(data, names, strict=True):
        rows = chosen.loc[chosen["file"] == name, "row"].to_numpy()
        if not len(rows):
            continue
        progress(f"{name}: embedding {len(rows):,} cells")
        adata = open_labelled(path, rows)
        with named(path):
            genes.append(read_genes(adata, str(path)))
            for rule in rules:
                embedding = embed_cells(adata, loaded, rule=rule, min_genes=min_genes, precision="fp32").values
                embeddings[f"X_scmulan ({rule})"].append(embedding)
    progress("PCA")
    pca, shared = _pca(genes, chosen["batch"].to_numpy(), hvg, dimensions, seed)
    spaces = {"X_pca": pca, **{name: np.concatenate(parts) for name, parts in embeddings.items()}}
    progress("scib-metrics")
    results, metrics = _benchmark(spaces, chosen["type"].to_numpy(), chosen["batch"].to_numpy(), kbet)
    return IntegrationEvaluation(
        model=model_name(loaded),
        weights_hash=loaded.weights_hash,
        files=names,
        trained_on=[name for path, name in zip(data, names, strict=True) if trained_on(loaded, path)],
        labels=labels,
        batch=batch or "file",
        cells=len(chosen),
        of=len(every),
        seed=seed,
        types=_counts(chosen["type"]),
        batches=_counts(chosen["batch"]),
        left_out=left_out,
        genes=shared,
        dimensions={name: space.shape[1] for name, space in spaces.items()},
        metrics=metrics,
        results=results,
    )


def _read_obs(path: str | Path, name: str, labels: str, batch: str | None, table: LabelMap) -> pd.DataFrame:
    obs = open_labelled(path).obs
    raw = read_column(obs, labels, str(path))
    table.check(raw, str(path))
    batches = np.full(len(obs), name, dtype=object) if batch is None else read_column(obs, batch, str(path))
    return pd.DataFrame(
        {"file": name, "row": np.arange(len(obs)), "type": [table.term(label) for label in raw], "batch": batches}
    )


def _counts(values: pd.Series) -> dict[str, int]:
    return {str(name): int(n) for name, n in values.value_counts().items()}


def _draw(every: pd.DataFrame, most: int, seed: int) -> tuple[pd.DataFrame, dict[str, int]]:
    """Draw cells in the order of the files, and drop the types that are then too few."""
    every = every[every["batch"] != ""]
    rows = np.sort(np.random.default_rng(seed).permutation(len(every))[:most])
    drawn = every.iloc[rows].reset_index(drop=True)
    n = drawn["type"].map(drawn["type"].value_counts())
    chosen = drawn[n >= FEWEST].reset_index(drop=True)
    for what in ("type", "batch"):
        if chosen[what].nunique() < 2:
            raise InputError(
                f"integration needs cells of two or more {'cell types' if what == 'type' else 'batches'}: found "
                f"{', '.join(map(repr, chosen[what].unique())) or 'none'} among {len(drawn):,} labelled cells; give "
                + ("another column of labels" if what == "type" else "a column of batches, or several files")
            )
    if len(chosen) <= NEIGHBOURS:
        raise InputError(f"integration needs more than {NEIGHBOURS} labelled cells: {len(chosen)} found")
    return chosen, _counts(drawn.loc[n < FEWEST, "type"])


def _pca(
    parts: Sequence[GeneCells], batches: np.ndarray, hvg: int, dimensions: int, seed: int
) -> tuple[np.ndarray, int]:
    """PCA as scanpy's users do it: counts per 10,000, log1p, highly variable genes by batch."""
    with need("the integration benchmark"):
        import scanpy as sc
    shared = sorted(set.intersection(*(set(part.genes) for part in parts)))
    if len(shared) <= dimensions:
        raise InputError(f"the files share {len(shared):,} genes: PCA needs more than {dimensions}")
    x = sp.vstack([part.log1p(shared) for part in parts], format="csr")
    obs = pd.DataFrame({"batch": pd.Categorical(batches)}, index=[str(i) for i in range(x.shape[0])])
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index(shared)))
    adata.uns["log1p"] = {}
    # Of few cells some bins of the mean hold one gene; scanpy then says how it ranks this one.
    with ignoring("Some of the genes"):
        sc.pp.highly_variable_genes(adata, n_top_genes=min(hvg, len(shared)), batch_key="batch")
    sc.pp.pca(adata, n_comps=min(dimensions, x.shape[0] - 1), mask_var="highly_variable", random_state=seed)
    return np.asarray(adata.obsm["X_pca"], dtype=np.float32), len(shared)


def _benchmark(
    spaces: dict[str, np.ndarray], types: np.ndarray, batches: np.ndarray, kbet: bool
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    # UMAP, which scib-metrics imports, tells developers what one of its own extras would need.
    with need("the integration benchmark"), ignoring("Tensorflow not installed"):
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
    # PCR comparison is 0 where an embedding has more of the batch than PCA; its own warning says so.
    with _quick_and_quiet(), ignoring("PCR comparison score is negative"):
        benchmarker.prepare(neighbours)
        benchmarker.benchmark()
        frame = benchmarker.get_results()
    kinds = frame.loc["Metric Type"]
    values = {
        str(name): {str(m): _number(frame.loc[name, m]) for m in frame.columns}
        for name in frame.index.drop("Metric Type")
    }
    return values, {str(m): str(kind) for m, kind in kinds.items() if kind != "Aggregate score"}


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(float(value)) else None


@contextmanager
def _quick_and_quiet() -> Iterator[None]:
    """Keep scib-metrics from printing on standard output, and from walking through everything that lives.

    It says there that a type is too rare for one of its metrics, and collects garbage before each metric, which with
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

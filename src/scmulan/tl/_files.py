"""The verbs from file to file: outputs checked first, inputs read in blocks, results written whole or not at all."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import pandas as pd

import scmulan
from scmulan._dist import Ranks, inference_ranks
from scmulan._io.adata import copy_with_results, open_input, write_h5ad, write_table
from scmulan._io.outputs import check_output
from scmulan._keys import CELL_TYPE, EMBEDDING, PERTURBED, SHIFT, STATUS, STATUSES, UNS
from scmulan._progress import SILENT, Progress
from scmulan.errors import OutputError
from scmulan.model.loading import LoadedModel, load
from scmulan.tl._annotate import annotate_cells
from scmulan.tl._block_store import BlockStore
from scmulan.tl._blockwise import AnnotationRule, ReadOptions
from scmulan.tl._embed import embed_cells
from scmulan.tl._generate import generate
from scmulan.tl._perturb import perturb_cells
from scmulan.tl._record import add_record
from scmulan.tl._smooth import smooth_parameters, smooth_types
from scmulan.vocab.genes import choose_names
from scmulan.vocab.matrix import choose_matrix

PathLike = str | os.PathLike[str]
CELLS = (".h5ad", ".zarr")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def annotate_file(
    source: PathLike,
    out: PathLike,
    *,
    model: str | Path = "mini",
    table: PathLike | None = None,
    rule: AnnotationRule = "default",
    threshold: float = 0.5,
    embed: bool = False,
    smooth: bool = False,
    reading: ReadOptions | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Copy a file of cells and add cell types to the copy.

    Parameters
    ----------
    source
        ``*.h5ad`` or ``*.zarr``; its matrices are never loaded whole.
    out
        Where to write the copy; not the input itself.
    model
        Folder or name of a model.
    table
        Also write the types alone, as CSV or TSV.
    rule, threshold
        As in :func:`scmulan.tl.annotate`.
    embed
        Also store an embedding, as :func:`embed_file` does.
    smooth
        Also store the types that each cell's neighbours vote for, see :func:`scmulan.tl.smooth`. The embedding of all
        cells is then held in memory.
    reading
        How cells are read.
    device
        As in :func:`scmulan.load`.
    force
        Replace outputs that exist.
    progress
        Shows how far it is.

    Returns
    -------
    dict
        Account in plain types: ``input``, ``output``, ``table``, ``cells``, ``model``, ``matrix``, ``genes``,
        ``cell_types`` (most frequent first), ``status``, ``seconds`` …

    Raises
    ------
    ScmulanError
        If anything cannot be used as given; then nothing is written.
    """
    reading = reading or ReadOptions()
    check_outputs(source, {out: CELLS} if table is None else {out: CELLS, table: TABLES}, force)
    options = {"rule": rule, "threshold": threshold}
    keep_hidden = embed or smooth
    with _open_job(source, out, model, device, "annotate", reading, embed=keep_hidden, **options) as job:
        with job.clock():
            result = annotate_cells(
                job.adata, job.model, reading=reading, keep_hidden=keep_hidden, store=job.store, progress=progress,
                **options,  # type: ignore[arg-type]
            )  # fmt: skip
        parameters, obs = result.uns["parameters"], result.obs
        if embed:
            parameters["embed"] = {k: v for k, v in parameters["annotate"].items() if k != "threshold"}
        if smooth and result.hidden is not None and job.ranks.first:
            obs = obs.join(smooth_types(obs[CELL_TYPE], result.hidden.load()))
            parameters["smooth"] = smooth_parameters()
        obsm = {EMBEDDING: result.hidden} if embed else {}
        job.write(result.uns, obs=obs, obsm=obsm, table=table)
        return {
            **job.account(result.uns),
            "table": None if table is None else str(table),
            "cell_types": _counts(result.obs[CELL_TYPE]),
            "status": {name: int((result.obs[STATUS] == name).sum()) for name in STATUSES},
            "obs": list(obs.columns),
            "obsm": list(obsm),
        }


def embed_file(
    source: PathLike,
    out: PathLike,
    *,
    model: str | Path = "mini",
    rule: Literal["default", "release"] = "default",
    reading: ReadOptions | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Copy a file of cells and add an embedding to the copy.

    Parameters
    ----------
    source, out, model, reading, device, force, progress
        As in :func:`annotate_file`.
    rule
        As in :func:`scmulan.tl.embed`.

    Returns
    -------
    dict
        Account in plain types: ``input``, ``output``, ``cells``, ``model``, ``matrix``, ``genes``, ``obsm`` (the
        key), ``width``, ``seconds`` …

    Raises
    ------
    ScmulanError
        If anything cannot be used as given; then nothing is written.
    """
    reading = reading or ReadOptions()
    check_outputs(source, {out: CELLS}, force)
    with _open_job(source, out, model, device, "embed", reading, rule=rule) as job:
        with job.clock():
            result = embed_cells(job.adata, job.model, rule=rule, reading=reading, store=job.store, progress=progress)
        job.write(result.uns, obsm={EMBEDDING: result.values})
        return {**job.account(result.uns), "obsm": [EMBEDDING], "width": int(result.values.shape[1])}


def perturb_file(
    source: PathLike,
    out: PathLike,
    genes: Mapping[str, int],
    *,
    model: str | Path = "mini",
    reading: ReadOptions | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Copy a file of cells and add to the copy what changes with some genes at another level.

    Parameters
    ----------
    genes
        As in :func:`scmulan.tl.perturb`.
    source, out, model, reading, device, force, progress
        As in :func:`annotate_file`.

    Returns
    -------
    dict
        Account in plain types: ``input``, ``output``, ``cells``, ``model``, ``matrix``, ``genes``, ``changed`` (cells
        of which a token changed), ``other_type`` (cells of another type than before), ``mean_shift`` (of changed
        cells), ``seconds`` …

    Raises
    ------
    ScmulanError
        If anything cannot be used as given; then nothing is written.
    """
    reading = reading or ReadOptions()
    check_outputs(source, {out: CELLS}, force)
    with _open_job(source, out, model, device, "perturb", reading, levels=dict(genes)) as job:
        with job.clock():
            result = perturb_cells(job.adata, job.model, genes, reading=reading, store=job.store, progress=progress)
        job.write(result.uns, obs=result.obs)
        changed = result.obs[PERTURBED]
        return {
            **job.account(result.uns),
            "changed": int(changed.sum()),
            "other_type": int(result.other_type.sum()),
            "mean_shift": round(float(result.obs.loc[changed, SHIFT].mean()), 4) if changed.any() else 0.0,
            "obs": list(result.obs.columns),
        }


def generate_file(
    out: PathLike,
    metadata: Mapping[str, str],
    *,
    model: str | Path = "mini",
    genes_from: PathLike | None = None,
    device: str = "auto",
    n: int = 100,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Generate cells into a file.

    Parameters
    ----------
    out
        ``*.h5ad`` or ``*.zarr``.
    metadata
        What the cells should be.
    model, device, force, progress
        As in :func:`annotate_file`.
    genes_from
        File whose genes are the only ones that may be drawn.
    n, **options
        As in :func:`scmulan.tl.generate`.

    Returns
    -------
    dict
        Account in plain types: ``output``, ``cells``, ``genes``, ``model``, ``prompt``, ``words_per_cell`` (mean and
        standard deviation), ``complete`` (cells that ended by themselves), ``parameters``, ``seconds``.

    Raises
    ------
    ScmulanError
        If anything cannot be used as given; then nothing is written.
    """
    check_outputs(genes_from, {out: CELLS}, force)
    loaded = load(model, device=device)
    genes = None if genes_from is None else gene_names(genes_from, loaded)
    with inference_ranks() as ranks:
        start = time.perf_counter()
        cells = generate(loaded, metadata, n=n, genes=genes, progress=progress, **options)
        seconds = round(time.perf_counter() - start, 3)
        if ranks.first:
            write_h5ad(cells, out)
        ranks.gather(None)  # wait for the file
    words = cells.obs["words"].to_numpy()
    record = cells.uns[UNS]
    return {
        "output": str(out),
        "cells": cells.n_obs,
        "genes": cells.n_vars,
        "model": record["model"],
        "weights_hash": record["weights_hash"],
        "prompt": record["prompt"],
        "words_per_cell": {"mean": round(float(words.mean()), 2), "sd": round(float(words.std()), 2)},
        "complete": int(cells.obs["complete"].sum()),
        "rank": ranks.rank,
        "processes": ranks.world,
        "parameters": record["parameters"]["generate"],
        "seconds": seconds,
    }


def gene_names(source: PathLike, model: LoadedModel) -> list[str]:
    """Return the genes that a file measured, from wherever in its ``var`` most of them are genes of the model."""
    with _open_backed(source) as adata:
        return choose_names(choose_matrix(adata).var, model.vocabulary.genes)[0]


def check_outputs(source: PathLike | None, outputs: Mapping[Any, tuple[str, ...]], force: bool) -> None:
    """Make sure, before any work, that all outputs can be written and none is the input.

    Parameters
    ----------
    source
        The input, if there is one.
    outputs
        Expected ends of the name of each output.
    force
        Whether outputs that exist may be replaced; never the input.

    Raises
    ------
    OutputError
        Naming the first output that cannot be written.
    """
    for path, suffixes in outputs.items():
        if source is not None and os.path.realpath(path) == os.path.realpath(source):
            raise OutputError(f"{path}: is the input too; give another path for the output")
        check_output(path, force, suffixes=suffixes)


@dataclass(kw_only=True, slots=True)
class _Job:
    """A verb's work from file to file."""

    source: PathLike
    out: PathLike
    adata: ad.AnnData
    """The input, backed."""
    model: LoadedModel
    store: BlockStore
    ranks: Ranks
    seconds: float = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Measure the seconds of the work while the context is open."""
        start = time.perf_counter()
        yield
        self.seconds = round(time.perf_counter() - start, 3)

    def write(
        self,
        uns: Mapping[str, Any],
        *,
        obs: pd.DataFrame | None = None,
        obsm: Mapping[str, Any] | None = None,
        table: PathLike | None = None,
    ) -> None:
        """Let the first process write the results, and wait for it."""
        add_record(self.adata, uns)
        if self.ranks.first:
            copy_with_results(self.source, self.out, obs=obs, obsm=obsm, uns={UNS: self.adata.uns[UNS]})
            if table is not None and obs is not None:
                write_table(obs.rename_axis("cell"), table)
            self.store.remove()
        self.ranks.gather(None)

    def account(self, uns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of the account that all verbs share."""
        record = {name: uns[name] for name in ("cells", "model", "weights_hash", "words_per_cell", "matrix", "genes")}
        return {
            "input": str(self.source),
            "output": str(self.out),
            **record,
            "summary": uns["summary"],
            "device": str(self.model.network.device),
            "rank": self.ranks.rank,
            "processes": self.ranks.world,
            "parameters": uns["parameters"],
            "seconds": self.seconds,
            "cells_per_second": round(uns["cells"] / self.seconds, 1) if self.seconds else None,
        }


@contextmanager
def _open_job(
    source: PathLike,
    out: PathLike,
    model: str | Path,
    device: str,
    verb: str,
    reading: ReadOptions,
    **options: Any,
) -> Iterator[_Job]:
    """Open input, model and store of a job; ``options`` are what decides the results beside the reading."""
    with inference_ranks() as ranks, _open_backed(source) as adata:
        loaded = load(model, device=device)
        store = BlockStore()
        # A job of a single block has nothing to continue from, and leaves nothing on the disk.
        if adata.n_obs > reading.cells_per_block(loaded):
            decisive = {k: v for k, v in asdict(reading).items() if k != "batch_tokens"}
            software = {"scmulan": scmulan.__version__, "device": loaded.network.device.type}
            job = {"verb": verb, "weights": loaded.weights_hash, **software, **decisive, **options}
            store = BlockStore.of_job(source, out, job)
        yield _Job(source=source, out=out, adata=adata, model=loaded, store=store, ranks=ranks)


@contextmanager
def _open_backed(source: PathLike) -> Iterator[ad.AnnData]:
    adata = open_input(source, backed=True)
    try:
        yield adata
    finally:
        if adata.isbacked:
            adata.file.close()


def _counts(types: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in types.value_counts().items() if count}

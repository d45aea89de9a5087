"""The verbs from file to file: outputs checked first, inputs read in blocks, results written whole or not at all."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import pandas as pd

import scmulan
from scmulan._dist import Ranks, inference_ranks
from scmulan._io.adata import check_output, copy_with_results, open_input, write_h5ad, write_table
from scmulan._keys import CELL_TYPE, EMBEDDING, PERTURBED, SHIFT, STATUS, STATUSES, UNS
from scmulan._progress import Advance as Progress
from scmulan.errors import OutputError
from scmulan.infer.precision import Precision
from scmulan.model.loading import LoadedModel, load
from scmulan.tl._annotate import annotate_cells
from scmulan.tl._blockwise import BlockStore, Rule, block_cells, merge_uns, parts_of
from scmulan.tl._embed import embed_cells
from scmulan.tl._generate import generate
from scmulan.tl._perturb import perturb_cells
from scmulan.tl._smooth import NEIGHBOURS, smooth_types
from scmulan.vocab.genes import choose_names
from scmulan.vocab.matrix import choose_matrix

CELLS = (".h5ad", ".zarr")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

# Given the number of cells, yields what is called with each number of cells done.
ProgressOf = Callable[[int], AbstractContextManager[Progress]]


def no_progress(total: int) -> AbstractContextManager[Progress]:
    """Show nothing."""
    return nullcontext(lambda n: None)


@dataclass(kw_only=True, slots=True)
class ReadOptions:
    """How cells are read and passed through a model; as in :func:`scmulan.tl.annotate`."""

    layer: str | None = None
    """Matrix to use: ``"X"``, ``"raw"`` or the name of a layer (default: chosen by looking)."""
    matrix_kind: Literal["counts", "log1p"] | None = None
    """What it holds (default: found by looking)."""
    min_genes: int = 20
    """Fewest genes of the model that the input must have."""
    device: str = "auto"
    """Where to compute."""
    batch_tokens: int | None = None
    """Padded words per forward pass (default: what suits the device and its memory)."""
    precision: Precision = "auto"
    """In what to compute."""

    def options(self) -> dict[str, Any]:
        """Arguments of :func:`annotate_cells` and :func:`embed_cells`, all of which but the last decide results."""
        return {
            "layer": self.layer,
            "matrix_kind": self.matrix_kind,
            "min_genes": self.min_genes,
            "precision": self.precision,
            "batch_tokens": self.batch_tokens,
        }


def annotate_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | Path = "mini",
    table: str | os.PathLike[str] | None = None,
    rule: Rule = "default",
    threshold: float = 0.5,
    embed: bool = False,
    smooth: bool = False,
    reading: ReadOptions | None = None,
    force: bool = False,
    progress: ProgressOf = no_progress,
) -> dict[str, Any]:
    """Copy a file of cells and put a type for each cell into the copy.

    Parameters
    ----------
    source
        ``*.h5ad`` or ``*.zarr``; its matrices are never loaded whole.
    out
        Where the copy shall be; not the input itself.
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
    outputs = {out: CELLS} if table is None else {out: CELLS, table: TABLES}
    check_outputs(source, outputs, force)
    with inference_ranks() as here, _cells(source) as adata:
        loaded = load(model, device=reading.device)
        asked = {"rule": rule, "threshold": threshold, **reading.options()}
        parts = _parts(source, out, adata.n_obs, loaded, "annotate", embed=embed or smooth, **asked)
        with progress(-(-adata.n_obs // here.world)) as done, _Clock() as clock:
            result = annotate_cells(adata, loaded, keep_hidden=embed or smooth, parts=parts, progress=done, **asked)
        used, obs = result.uns["parameters"], result.obs
        if embed:
            used["embed"] = {k: v for k, v in used["annotate"].items() if k != "threshold"}
        if smooth and result.hidden is not None and here.rank == 0:
            obs = obs.join(smooth_types(obs[CELL_TYPE], result.hidden.load()))
            used["smooth"] = {"neighbours": NEIGHBOURS, "use_rep": EMBEDDING}
        merge_uns(adata, result.uns)
        obsm = {EMBEDDING: result.hidden} if embed else {}
        if here.rank == 0:
            copy_with_results(source, out, obs=obs, obsm=obsm, uns={UNS: adata.uns[UNS]})
            if table is not None:
                write_table(obs.rename_axis("cell"), table)
            parts.remove()
        here.gather(None)
    return {
        **_account(source, out, loaded, result.uns, clock, here),
        "table": None if table is None else str(table),
        "cell_types": _counts(result.obs[CELL_TYPE]),
        "status": {name: int((result.obs[STATUS] == name).sum()) for name in STATUSES},
        "obs": list(obs.columns),
        "obsm": list(obsm),
    }


def embed_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | Path = "mini",
    rule: Literal["default", "release"] = "default",
    reading: ReadOptions | None = None,
    force: bool = False,
    progress: ProgressOf = no_progress,
) -> dict[str, Any]:
    """Copy a file of cells and put an embedding into the copy; parameters as in :func:`annotate_file`.

    Returns
    -------
    dict
        Account in plain types: ``input``, ``output``, ``cells``, ``model``, ``matrix``, ``genes``, ``obsm`` (the
        key), ``width``, ``seconds`` …
    """
    reading = reading or ReadOptions()
    check_outputs(source, {out: CELLS}, force)
    with inference_ranks() as here, _cells(source) as adata:
        loaded = load(model, device=reading.device)
        asked = {"rule": rule, **reading.options()}
        parts = _parts(source, out, adata.n_obs, loaded, "embed", **asked)
        with progress(-(-adata.n_obs // here.world)) as done, _Clock() as clock:
            result = embed_cells(adata, loaded, parts=parts, progress=done, **asked)
        merge_uns(adata, result.uns)
        if here.rank == 0:
            copy_with_results(source, out, obsm={EMBEDDING: result.values}, uns={UNS: adata.uns[UNS]})
            parts.remove()
        here.gather(None)
    account = _account(source, out, loaded, result.uns, clock, here)
    return {**account, "obsm": [EMBEDDING], "width": int(result.values.shape[1])}


def perturb_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    genes: Mapping[str, int],
    *,
    model: str | Path = "mini",
    reading: ReadOptions | None = None,
    force: bool = False,
    progress: ProgressOf = no_progress,
) -> dict[str, Any]:
    """Copy a file of cells and put into the copy what changes with some genes at another level.

    Parameters
    ----------
    genes
        As in :func:`scmulan.tl.perturb`.
    source, out, model, reading, force, progress
        As in :func:`annotate_file`.

    Returns
    -------
    dict
        Account in plain types: ``input``, ``output``, ``cells``, ``model``, ``matrix``, ``genes``, ``changed`` (cells
        of which a word changed), ``other_type`` (cells of another type than before), ``mean_shift`` (of changed
        cells), ``seconds`` …
    """
    reading = reading or ReadOptions()
    check_outputs(source, {out: CELLS}, force)
    with inference_ranks() as here, _cells(source) as adata:
        loaded = load(model, device=reading.device)
        parts = _parts(source, out, adata.n_obs, loaded, "perturb", levels=dict(genes), **reading.options())
        with progress(-(-adata.n_obs // here.world)) as done, _Clock() as clock:
            result = perturb_cells(adata, loaded, genes, parts=parts, progress=done, **reading.options())
        merge_uns(adata, result.uns)
        if here.rank == 0:
            copy_with_results(source, out, obs=result.obs, uns={UNS: adata.uns[UNS]})
            parts.remove()
        here.gather(None)
    changed = result.obs[PERTURBED]
    return {
        **_account(source, out, loaded, result.uns, clock, here),
        "changed": int(changed.sum()),
        "other_type": int(result.other_type.sum()),
        "mean_shift": round(float(result.obs.loc[changed, SHIFT].mean()), 4) if changed.any() else 0.0,
        "obs": list(result.obs.columns),
    }


def generate_file(
    out: str | os.PathLike[str],
    metadata: Mapping[str, str],
    *,
    model: str | Path = "mini",
    genes_from: str | os.PathLike[str] | None = None,
    device: str = "auto",
    n: int = 100,
    force: bool = False,
    progress: ProgressOf = no_progress,
    **options: Any,
) -> dict[str, Any]:
    """Write new cells into a file.

    Parameters
    ----------
    out
        ``*.h5ad`` or ``*.zarr``.
    metadata
        What the cells should be.
    model, device, force, progress
        As in :func:`annotate_file`.
    genes_from
        File whose genes are the only ones that may be written.
    n, **options
        As in :func:`scmulan.tl.generate`.

    Returns
    -------
    dict
        Account in plain types: ``output``, ``cells``, ``genes``, ``model``, ``prompt``, ``words_per_cell`` (mean and
        standard deviation), ``complete`` (cells that ended by themselves), ``parameters``, ``seconds``.
    """
    check_outputs(genes_from, {out: CELLS}, force)
    loaded = load(model, device=device)
    genes = None if genes_from is None else gene_names(genes_from, loaded)
    with inference_ranks() as here:
        with progress(-(-n // here.world)) as done, _Clock() as clock:
            cells = generate(loaded, metadata, n=n, genes=genes, progress=done, **options)
        if here.rank == 0:
            write_h5ad(cells, out)
        here.gather(None)
    words = cells.obs["words"].to_numpy()
    told = cells.uns[UNS]
    return {
        "output": str(out),
        "cells": cells.n_obs,
        "genes": cells.n_vars,
        "model": told["model"],
        "weights_hash": told["weights_hash"],
        "prompt": told["prompt"],
        "words_per_cell": {"mean": round(float(words.mean()), 2), "sd": round(float(words.std()), 2)},
        "complete": int(cells.obs["complete"].sum()),
        "rank": here.rank,
        "processes": here.world,
        "parameters": told["parameters"]["generate"],
        "seconds": clock.seconds,
    }


def gene_names(source: str | os.PathLike[str], model: LoadedModel) -> list[str]:
    """Names of the genes that a file measured, from wherever in its ``var`` most of them are genes of the model."""
    with _cells(source) as adata:
        return choose_names(choose_matrix(adata).var, model.vocabulary.genes)[0]


def check_outputs(source: str | os.PathLike[str] | None, outputs: Mapping[Any, tuple[str, ...]], force: bool) -> None:
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


@contextmanager
def _cells(source: str | os.PathLike[str]) -> Iterator[ad.AnnData]:
    adata = open_input(source, backed=True)
    try:
        yield adata
    finally:
        if adata.isbacked:
            adata.file.close()


class _Clock:
    """Seconds that a block took."""

    seconds = 0.0

    def __enter__(self) -> "_Clock":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(time.perf_counter() - self._start, 3)


def _parts(source: Any, out: Any, cells: int, model: LoadedModel, verb: str, **options: Any) -> BlockStore:
    """Parts of the job that these options make; how many words go together changes none of them.

    A job of a single block has nothing to go on from, and leaves nothing on the disk.
    """
    if cells <= block_cells(model):
        return BlockStore()
    job = {k: v for k, v in options.items() if k != "batch_tokens"}
    device = model.network.word.weight.device.type
    return parts_of(
        source, out, {"verb": verb, "weights": model.weights_hash, "scmulan": scmulan.__version__, "on": device, **job}
    )


def _account(
    source: Any, out: Any, model: LoadedModel, uns: Mapping[str, Any], clock: _Clock, here: Ranks
) -> dict[str, Any]:
    """Tell what both verbs have to tell."""
    told = {name: uns[name] for name in ("cells", "model", "weights_hash", "words_per_cell", "matrix", "genes")}
    return {
        "input": str(source),
        "output": str(out),
        **told,
        "summary": uns["summary"],
        "device": str(model.network.word.weight.device),
        "rank": here.rank,
        "processes": here.world,
        "parameters": uns["parameters"],
        "seconds": clock.seconds,
        "cells_per_second": round(uns["cells"] / clock.seconds, 1) if clock.seconds else None,
    }


def _counts(types: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in types.value_counts().items() if count}

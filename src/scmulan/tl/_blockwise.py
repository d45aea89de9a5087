"""Reading cells and passing them through a model, block by block.

The way of the data::

    AnnData ── CellReader ──> gene tokens of a block ── work ──> arrays, one row per cell ── BlockStore ──> results

Memory is bounded, an interrupted job continues where it was, and under ``torchrun`` each process does some blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import anndata as ad
import numpy as np

from scmulan._dist import Ranks, inference_ranks
from scmulan._io.adata import BlockArray
from scmulan._progress import SILENT, Advance, Progress
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision, apply_precision, choose_precision
from scmulan.model.cost import forward_flops_per_token
from scmulan.model.loading import LoadedModel
from scmulan.tl._block_store import BlockStore
from scmulan.tl._record import provenance
from scmulan.vocab.binning import GeneTokens, tokenize
from scmulan.vocab.genes import match_genes
from scmulan.vocab.matrix import MatrixKind, choose_matrix
from scmulan.vocab.sentences import Sentences, gene_prompts
from scmulan.vocab.tasks import ANNOTATE

AnnotationRule = Literal["default", "stepwise", "release"]
BlockFunction: TypeAlias = Callable[[LoadedModel, Sentences, GeneTokens, TokenBudget, Advance], dict[str, np.ndarray]]
"""Does one block: model, prompts, gene tokens, budget → arrays with one row per cell; calls the last for cells done."""

BLOCK_FLOPS = {"cpu": 5e12, "cuda": 5e15, "mps": 1e14}
"""Work of one block, which is lost when a job is interrupted: about a minute of a core, or of a GPU."""
LIKELY_TOKENS = 500
"""Tokens of a cell, before any was read."""
MIN_BLOCK_CELLS, MAX_BLOCK_CELLS = 128, 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How cells are read and passed through a model; see :func:`scmulan.tl.annotate`."""

    layer: str | None = None
    """Matrix to read: ``"X"``, ``"raw"`` or the name of a layer (default: found by looking)."""
    matrix_kind: MatrixKind | None = None
    """What the matrix holds (default: found by looking)."""
    min_genes: int = 20
    """Fewest genes of the model that the input must have."""
    precision: Precision = "auto"
    """Precision of the model's products, see :mod:`scmulan.infer.precision`."""
    batch_tokens: int | None = None
    """Padded tokens per forward pass (default: what suits the device and its memory). Speed only."""
    block_cells: int | None = None
    """Cells per block (default: about a minute of work)."""

    def cells_per_block(self, model: LoadedModel) -> int:
        """Return the number of cells of one block."""
        if self.block_cells is not None:
            return self.block_cells
        flops = LIKELY_TOKENS * forward_flops_per_token(model.config, context=LIKELY_TOKENS / 2)
        cells = BLOCK_FLOPS.get(model.network.device.type, BLOCK_FLOPS["cuda"]) / flops
        return int(np.clip(2 ** int(np.log2(max(1, cells))), MIN_BLOCK_CELLS, MAX_BLOCK_CELLS))


class CellReader:
    """Reads the gene tokens of the cells of one AnnData, block by block, never dense.

    Parameters
    ----------
    adata
        Cells × genes; backed files are read in blocks.
    model
        Whose vocabulary's genes are looked for.
    layer, matrix_kind, min_genes
        As in :class:`ReadOptions`.

    Raises
    ------
    MatrixError, GeneError
        If no matrix holds usable expression, or too few genes are known.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        model: LoadedModel,
        *,
        layer: str | None = None,
        matrix_kind: MatrixKind | None = None,
        min_genes: int = 20,
    ) -> None:
        self.model = model
        self.matrix = choose_matrix(adata, layer=layer, matrix_kind=matrix_kind)
        self.match = match_genes(self.matrix.var, model.vocabulary.genes, min_genes=min_genes)

    def __len__(self) -> int:
        return self.matrix.n_cells

    def blocks(
        self, size: int = MAX_BLOCK_CELLS, *, wanted: Callable[[slice], bool] = lambda rows: True
    ) -> Iterator[tuple[slice, GeneTokens]]:
        """Yield rows and gene tokens of consecutive cells, of those blocks that are wanted."""
        for rows, block in self.matrix.chunks(size, select=wanted):
            tokens = tokenize(
                block,
                self.match.columns,
                len(self.model.vocabulary.genes),
                matrix_kind=self.matrix.matrix_kind,
                levels=self.model.config.levels,
            )
            yield rows, tokens

    def account(self, n_tokens: int, covered: np.ndarray) -> dict[str, Any]:
        """Describe what was read, in plain types that fit into ``uns`` and JSON.

        Parameters
        ----------
        n_tokens
            Gene tokens of all cells together.
        covered
            Fraction of each cell's total that lies in the vocabulary.
        """
        fraction = float(covered.mean()) if len(covered) else 0.0
        return {
            "cells": len(self),
            "words_per_cell": n_tokens / max(1, len(self)),
            "matrix": {"where": self.matrix.where, "state": self.matrix.matrix_kind, "reason": self.matrix.reason},
            "genes": self.match.report(fraction),
            "summary": self.match.summary(fraction),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockResults:
    """Results of all blocks of a job."""

    reader: CellReader
    options: ReadOptions
    store: BlockStore
    cells: list[int]
    """Cells of each block."""
    precision: str
    """In which the model was used."""

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Return arrays of all cells, in the input's order."""
        read = [self.store.get(i, names) for i in range(len(self.cells))]
        return {name: np.concatenate([block[name] for block in read]) for name in names}

    def hidden(self, width: int) -> BlockArray:
        """Return the embedding, float32 ``[cells, width]``, to be read block by block."""

        def read() -> Iterator[np.ndarray]:
            for i in range(len(self.cells)):
                yield self.store.get(i, ("hidden",))["hidden"]

        return BlockArray(shape=(sum(self.cells), width), dtype=np.float32, blocks=read)

    def provenance(self, verb: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of the verb for ``uns``; how cells were read is added to its parameters."""
        options = self.options
        reading = {"layer": options.layer, "state": options.matrix_kind, "min_genes": options.min_genes}
        read = self.columns("tokens", "covered")
        account = self.reader.account(int(read["tokens"].sum()), read["covered"])
        parameters = {**parameters, **reading, "precision": self.precision}
        return provenance(self.reader.model, verb, parameters, **account)


def run_blocks(
    adata: ad.AnnData,
    model: LoadedModel,
    work: BlockFunction,
    options: ReadOptions,
    *,
    rule: AnnotationRule = "default",
    store: BlockStore | None = None,
    progress: Progress = SILENT,
) -> BlockResults:
    """Run all blocks that are not done yet, under ``torchrun`` this process's; each has all results afterwards.

    Parameters
    ----------
    adata
        The cells.
    model
        In float32.
    work
        Does a block.
    options
        How cells are read. Precision ``"auto"`` is chosen on the first cells (:func:`choose_precision`); among several
        processes it is what is known already.
    rule
        ``"release"`` runs in float32 unless another precision is asked for by name.
    store
        Where results go, in memory by default; blocks that are there are not done again.
    progress
        Shows a bar of cells.

    Returns
    -------
    BlockResults
        With the arrays that ``work`` gives, and ``tokens`` and ``covered`` of each cell.

    Raises
    ------
    MatrixError, GeneError
        If no matrix holds usable expression, or too few genes are known.
    """
    reader = CellReader(adata, model, layer=options.layer, matrix_kind=options.matrix_kind, min_genes=options.min_genes)
    store = store or BlockStore()
    size = options.cells_per_block(model)
    cells = [min(size, len(reader) - start) for start in range(0, len(reader), size)]
    with inference_ranks() as ranks:
        mine = [i for i in range(len(cells)) if ranks.owns(i)]
        todo = {i for i in mine if i not in store}
        precision = _known_precision(model, rule, options.precision, store, ranks)
        used = None if precision == "auto" else apply_precision(model, precision)
        budget = TokenBudget.of(model.network, options.batch_tokens)
        with progress.bar(sum(cells[i] for i in mine)) as advance:
            advance(sum(cells[i] for i in mine if i not in todo))
            for rows, tokens in reader.blocks(size, wanted=lambda rows: rows.start // size in todo):
                prompts = gene_prompts(tokens, model.vocabulary, ANNOTATE)
                if used is None:
                    used = choose_precision(model, prompts, total=len(reader))
                    store.keep_precision(used.network.precision)
                arrays = work(used, prompts, tokens, budget, advance)
                counts = {"tokens": tokens.lengths.astype(np.int32), "covered": tokens.covered}
                store.put(rows.start // size, {**arrays, **counts})
        if store.folder is None and ranks.world > 1:
            store.merge(ranks.gather(store))
        else:
            ranks.gather(None)  # wait for the others
    precision = (used or model).network.precision  # type: ignore[assignment]
    return BlockResults(reader=reader, options=options, store=store, cells=cells, precision=precision)


def zero_if_empty(hidden: np.ndarray, tokens: GeneTokens) -> np.ndarray:
    """Return hidden states ``[cells, width]`` with zeros for cells without gene tokens."""
    return np.where(tokens.lengths[:, None] > 0, hidden, np.float32(0))


def _known_precision(
    model: LoadedModel, rule: AnnotationRule, precision: Precision, store: BlockStore, ranks: Ranks
) -> Precision:
    """Return the precision of the job, so far as it is known before any cell is read."""
    if precision != "auto":
        return precision
    if rule == "release":
        return "fp32"
    precision = store.chosen_precision() or precision  # type: ignore[assignment]
    if ranks.world == 1:
        return precision
    known: Any = apply_precision(model, precision).network.precision
    return ranks.gather(known)[0]

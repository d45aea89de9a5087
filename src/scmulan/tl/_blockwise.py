"""The way in: from an AnnData to blocks of gene words, with an account of what was used.

Results of finished blocks of cells, kept until the job is through; on disk, they outlive an interruption.

The way through a model: blocks of cells in, arrays of each block out, shared among processes and resumable.
"""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np

import scmulan
from scmulan._dist import Ranks, inference_ranks
from scmulan._io.adata import BlockArray
from scmulan._keys import UNS
from scmulan._progress import Advance as Progress
from scmulan.errors import OutputError
from scmulan.infer.batching import TokenBudget
from scmulan.infer.precision import Precision, apply_precision, choose_precision
from scmulan.model.cost import forward_flops_per_token
from scmulan.model.loading import LoadedModel
from scmulan.vocab.binning import GeneTokens, tokenize
from scmulan.vocab.genes import match_genes
from scmulan.vocab.matrix import choose_matrix
from scmulan.vocab.sentences import Sentences, gene_prompts
from scmulan.vocab.tasks import ANNOTATE

BLOCK = 2048


class CellReader:
    """Gene words of the cells of one AnnData, block by block.

    Parameters
    ----------
    adata
        Cells × genes; backed files are read in blocks.
    model
        Its vocabulary's genes are looked for.
    layer
        Matrix to use: ``"X"``, ``"raw"`` or the name of a layer (default: chosen by looking).
    matrix_kind
        ``"counts"`` or ``"log1p"`` (default: found by looking).
    min_genes
        Fewest vocabulary genes the input must have.

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
        matrix_kind: Literal["counts", "log1p"] | None = None,
        min_genes: int = 20,
    ) -> None:
        self.model = model
        self.matrix = choose_matrix(adata, layer=layer, matrix_kind=matrix_kind)
        self.match = match_genes(self.matrix.var, model.vocabulary.genes, minimum=min_genes)

    def __len__(self) -> int:
        return self.matrix.n_cells

    def blocks(
        self, size: int = BLOCK, *, wanted: Callable[[slice], bool] = lambda rows: True
    ) -> Iterator[tuple[slice, GeneTokens]]:
        """Rows and gene words of consecutive cells, of those blocks that are wanted."""
        for rows, block in self.matrix.chunks(size, select=wanted):
            words = tokenize(
                block,
                self.match.columns,
                len(self.model.vocabulary.genes),
                matrix_kind=self.matrix.matrix_kind,
                levels=self.model.config.levels,
            )
            yield rows, words

    def account(self, words: int, covered: np.ndarray) -> dict[str, Any]:
        """What was read; plain types that fit into ``uns`` and JSON.

        Parameters
        ----------
        words
            Gene words of all cells together.
        covered
            Share of each cell's total that lies in the vocabulary.
        """
        share = float(covered.mean()) if len(covered) else 0.0
        return {
            "cells": len(self),
            "words_per_cell": words / max(1, len(self)),
            "matrix": {"where": self.matrix.where, "state": self.matrix.matrix_kind, "reason": self.matrix.reason},
            "genes": self.match.report(share),
            "summary": self.match.summary(share),
        }


def provenance(model: LoadedModel, verb: str, parameters: dict[str, Any], account: dict[str, Any]) -> dict[str, Any]:
    """Contents of ``uns['scmulan']``: which software and weights, on what, with which settings."""
    return {
        "version": scmulan.__version__,
        "model": str(model.card.get("name", model.folder.name)),
        "weights_hash": model.weights_hash,
        **account,
        "parameters": {verb: {k: "" if v is None else v for k, v in parameters.items()}},
    }


def merge_uns(adata: ad.AnnData, new: dict[str, Any]) -> None:
    """Put results into ``uns['scmulan']``, keeping the parameters of verbs that ran before with the same weights."""
    old = adata.uns.get(UNS, {})
    same = old.get("weights_hash") == new["weights_hash"]
    before = dict(old.get("parameters", {})) if same else {}
    if old and not same:
        warnings.warn("uns['scmulan'] held results of another model; they are replaced", UserWarning, stacklevel=3)
    adata.uns[UNS] = {**new, "parameters": {**before, **new["parameters"]}}


# Where a job's parts lie: a hidden folder beside its output.
PREFIX = ".scmulan-parts-"


class BlockStore:
    """Arrays of each block, by the block's number.

    Parameters
    ----------
    folder
        Where to keep them; in memory by default. Made with the first part.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[int, Mapping[str, np.ndarray]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._kept or (self.folder is not None and self._path(number).exists())

    def put(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a block's arrays, whole or not at all."""
        if self.folder is None:
            self._kept[number] = arrays
            return
        self._write(self._path(number), lambda path: _save(path, arrays))

    def get(self, number: int, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Arrays of a block, or some of them."""
        if self.folder is None:
            kept = self._kept[number]
            return {name: kept[name] for name in names or kept}
        with np.load(self._path(number), allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}

    @property
    def settled(self) -> dict[str, Any]:
        """What an earlier run of the job has decided."""
        if self.folder is None:
            return {}
        try:
            return dict(json.loads((self.folder / "settled.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def settle(self, decided: Mapping[str, Any]) -> None:
        """Keep a decision for those who go on with the job."""
        if self.folder is not None:
            text = json.dumps(dict(decided))
            self._write(self.folder / "settled.json", lambda path: path.write_text(text, encoding="utf-8"))

    def take_in(self, others: list["BlockStore"]) -> None:
        """Add the parts that other processes keep in memory."""
        for other in others:
            self._kept.update(other._kept)

    def remove(self) -> None:
        """Forget the parts: the job is through. Those of other jobs for the same output will not be wanted either."""
        self._kept = {}
        if self.folder is not None:
            name, _, _ = self.folder.name.rpartition("-")
            for folder in self.folder.parent.glob(f"{glob.escape(name)}-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:07d}.npz"

    def _write(self, path: Path, write: Any) -> None:
        temporary = path.with_name(f"tmp-{secrets.token_hex(4)}{path.suffix}")
        try:
            path.parent.mkdir(exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise OutputError(
                f"{path.parent}: results so far cannot be written ({error.strerror or error}); make room,"
                " then run the same command again"
            ) from error


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def parts_of(source: str | os.PathLike[str], out: str | os.PathLike[str], job: Mapping[str, Any]) -> BlockStore:
    """Parts of a job from file to file, those of an interrupted run among them.

    Parameters
    ----------
    source
        The input; a file that changed is another input.
    out
        The output.
    job
        All that decides the results: weights, parameters, software. JSON types.
    """
    source, target = Path(source).expanduser(), Path(os.path.realpath(Path(out).expanduser()))
    stat = source.stat()
    key = {"source": os.path.realpath(source), "size": stat.st_size, "changed": stat.st_mtime_ns, **job}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return BlockStore(target.with_name(f"{PREFIX}{target.name}-{digest}"))


Rule = Literal["default", "stepwise", "release"]
RULES: tuple[str, ...] = get_args(Rule)
# Does one block: model, prompts, words, budget → arrays, one row per cell each.
Work = Callable[[LoadedModel, Sentences, GeneTokens, TokenBudget], dict[str, np.ndarray]]

# A block that is not finished is lost when a job is interrupted: about a minute of work of a core, or of a GPU.
BLOCK_FLOPS = {"cpu": 5e12, "cuda": 5e15, "mps": 1e14}
LIKELY_WORDS = 500
FEWEST_CELLS = 128


def block_cells(model: LoadedModel) -> int:
    """Cells of one block."""
    flops = LIKELY_WORDS * forward_flops_per_token(model.config, context=LIKELY_WORDS / 2)
    cells = BLOCK_FLOPS.get(model.network.word.weight.device.type, BLOCK_FLOPS["cuda"]) / flops
    return int(np.clip(2 ** int(np.log2(max(1, cells))), FEWEST_CELLS, BLOCK))


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """Results of all blocks of a job.

    Parameters
    ----------
    parts
        Where they are.
    cells
        Cells of each block.
    precision
        That the model was used in.
    """

    parts: BlockStore
    cells: list[int]
    precision: str

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays of all cells, in the input's order."""
        read = [self.parts.get(i, names) for i in range(len(self.cells))]
        return {name: np.concatenate([part[name] for part in read]) for name in names}

    def hidden(self, width: int) -> BlockArray:
        """The embedding, float32 ``[cells, width]``, read from the parts block by block."""

        def read() -> Iterator[np.ndarray]:
            for i in range(len(self.cells)):
                yield self.parts.get(i, ("hidden",))["hidden"]

        return BlockArray(shape=(sum(self.cells), width), dtype=np.float32, blocks=read)


def run_blocks(
    reader: CellReader,
    model: LoadedModel,
    work: Work,
    *,
    rule: Rule = "default",
    precision: Precision,
    batch_tokens: int | None,
    parts: BlockStore | None,
    progress: Progress,
) -> Done:
    """Do all blocks that are not done yet, under ``torchrun`` this process's share; each has all results afterwards.

    Parameters
    ----------
    reader
        The cells.
    model
        In float32.
    work
        Does a block; tells ``progress`` of each cell itself.
    rule
        The release's is decoded in float32 unless another precision is asked for by name.
    precision
        ``"auto"`` chooses with the first cells (:func:`choose_precision`); among several processes it takes
        what is known already.
    batch_tokens
        Padded words per pass, None for what suits.
    parts
        Where results go, in memory by default; blocks that are there are not done again.
    progress
        Told of the cells whose results are there already.

    Returns
    -------
    Done
        With the arrays that ``work`` gives, and ``words`` and ``covered`` of each cell.
    """
    parts = parts or BlockStore()
    with inference_ranks() as here:
        return _run(reader, model, work, rule, precision, batch_tokens, parts, here, progress)


def _run(
    reader: CellReader,
    model: LoadedModel,
    work: Work,
    rule: Rule,
    precision: Precision,
    batch_tokens: int | None,
    parts: BlockStore,
    ranks: Ranks,
    progress: Progress,
) -> Done:
    size = block_cells(model)
    blocks = [slice(start, min(start + size, len(reader))) for start in range(0, len(reader), size)]
    todo = {i for i in range(len(blocks)) if ranks.owns(i) and i not in parts}
    progress(sum(rows.stop - rows.start for i, rows in enumerate(blocks) if ranks.owns(i) and i not in todo))
    chosen = _settled(model, rule, precision, parts, ranks)
    used = None if chosen == "auto" else apply_precision(model, chosen)
    budget = TokenBudget.of(model.network, batch_tokens)
    for rows, words in reader.blocks(size, wanted=lambda rows: rows.start // size in todo):
        prompts = gene_prompts(words, model.vocabulary, ANNOTATE)
        if used is None:
            used = choose_precision(model, prompts, total=len(reader))
            parts.settle({"precision": used.network.precision})
        arrays = work(used, prompts, words, budget)
        parts.put(rows.start // size, {**arrays, "words": words.lengths.astype(np.int32), "covered": words.covered})
    if parts.folder is None and ranks.world > 1:
        parts.take_in(ranks.gather(parts))
    else:
        ranks.gather(None)
    return Done(parts=parts, cells=[b.stop - b.start for b in blocks], precision=(used or model).network.precision)


def without_empty(states: np.ndarray, words: GeneTokens) -> np.ndarray:
    """States with zeros for cells without gene words."""
    return np.where(words.lengths[:, None] > 0, states, np.float32(0))


def _settled(model: LoadedModel, rule: Rule, precision: Precision, parts: BlockStore, ranks: Ranks) -> Precision:
    """Precision of the job, so far as it can be told before any cell is read."""
    if precision != "auto":
        return precision
    if rule == "release":
        return "fp32"
    if len(parts.settled):
        precision = parts.settled["precision"]
    if ranks.world == 1:
        return precision
    known: Any = apply_precision(model, precision).network.precision
    return ranks.gather(known)[0]

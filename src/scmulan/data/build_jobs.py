"""What a build does to each file: look at it, add up its genes, write its cells as shards."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scmulan._io.outputs import atomic_path, sha256
from scmulan.data.gene_selection import Moments
from scmulan.data.memory import word_codes
from scmulan.data.readers import (
    BLOCK_VALUES,
    blocks,
    convert_to_h5ad,
    find_converter,
    hash_input,
    matrix_of,
    open_study,
    stored_by_column,
)
from scmulan.data.shards import NotWhole, ShardWriter, fold
from scmulan.data.spec import StudySpec
from scmulan.errors import InputError
from scmulan.vocab.genes import GeneMatch, GeneTable, choose_names, match_genes
from scmulan.vocab.matrix import ExpressionMatrix
from scmulan.vocab.vocabulary import Vocabulary

# Rows of obs whose words are looked at together.
OBS_ROWS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """Look at a file: what it is, which words and donors its cells have. Files of other formats are imported."""

    record: Path
    """Where to write what was found."""
    spec: StudySpec
    """The file."""
    imported: Path
    """Where to write its cells if it is of another format."""
    cells: int = 1
    """For progress: a file."""

    def run(self) -> dict[str, Any]:
        """See :class:`Survey`."""
        foreign = find_converter(self.spec.file) is not None
        if self.spec.where and not foreign:
            raise InputError(f"{self.spec.file}: `where` chooses cells of SOMA experiments only; leave it out")
        if foreign and not self.imported.exists():
            convert_to_h5ad(self.spec.file, self.imported, self.spec.where)
        with open_study(self.spec, self.imported if foreign else None) as adata:
            matrix = matrix_of(adata, self.spec)
            words: dict[str, Counter[str]] = {}
            donors: Counter[str] = Counter()
            for first in range(0, adata.n_obs, OBS_ROWS):
                obs = adata.obs.iloc[first : first + OBS_ROWS]
                for family, values in self.spec.metadata(obs).items():
                    words.setdefault(str(family), Counter()).update(values)
                donors.update(self.spec.donors(obs))
            return {
                "cells": adata.n_obs,
                "genes": matrix.n_genes,
                "matrix": {"where": matrix.where, "state": matrix.matrix_kind, "reason": matrix.reason},
                "imported": foreign,
                "by_column": stored_by_column(matrix),
                "words": {family: dict(sorted(found.items())) for family, found in words.items()},
                "donors": sorted(donor for donor in donors if donor),
                "sha256": hash_input(self.spec.file),
            }


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Add up the genes of some cells of a file, for the choice of a vocabulary."""

    record: Path
    """Names the genes, and the file of their sums beside it."""
    spec: StudySpec
    """The file."""
    imported: Path | None
    """Its cells, where it is of another format."""
    first: int
    """Row of its first cell."""
    cells: int
    """Number of cells."""
    values: int = BLOCK_VALUES
    """Largest number of values of a block."""

    def run(self) -> dict[str, Any]:
        """See :class:`Measure`."""
        with open_study(self.spec, self.imported) as adata:
            matrix = matrix_of(adata, self.spec)
            names, _ = choose_names(matrix.var)
            symbols = GeneTable.load().resolve(names)
            genes = sorted({symbol for symbol in symbols if symbol is not None})
            place = {gene: i for i, gene in enumerate(genes)}
            columns = np.array([-1 if s is None else place[s] for s in symbols], dtype=np.int32)
            moments = Moments.of_none(len(genes))
            for _, block in blocks(matrix, self.first, self.first + self.cells, values=self.values):
                lengths, gene, value, total, _ = fold(block, columns, len(genes), logged=matrix.matrix_kind == "log1p")
                indptr = np.r_[0, np.cumsum(lengths)]
                folded = sp.csr_matrix((value, gene, indptr), shape=(len(lengths), len(genes)))
                moments.add(folded, total, matrix.matrix_kind)
        sums = self.record.with_suffix(".npz")
        with atomic_path(sums) as temporary:
            np.savez(temporary, first=moments.first, second=moments.second, seen=moments.seen)
        return {"cells": moments.cells, "genes": genes, "sums": sums.name}

    def moments(self) -> tuple[list[str], Moments]:
        """Genes and sums of a task that is done."""
        record = json.loads(self.record.read_text(encoding="utf-8"))
        with np.load(self.record.with_name(record["sums"])) as sums:
            return record["genes"], Moments(record["cells"], sums["first"], sums["second"], sums["seen"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """Write some cells of a file as shards: one, or all of a file that is stored by column."""

    record: Path
    """What was written."""
    spec: StudySpec
    """The file."""
    imported: Path | None
    """Its cells, where it is of another format."""
    folder: Path
    """Of the corpus."""
    study: int
    """Place of the study in the corpus."""
    number: int
    """Of the first shard."""
    first: int
    """Row of the first cell."""
    cells: int
    """Number of cells."""
    shard_cells: int
    """Largest number of cells in a shard."""
    donors: dict[str, int]
    """Code of each donor."""
    values: int = BLOCK_VALUES
    """Largest number of values of a block."""

    def run(self) -> dict[str, Any]:
        """See :class:`Write`."""
        vocabulary = Vocabulary.load(self.folder / "vocabulary.json")
        with open_study(self.spec, self.imported) as adata:
            matrix = matrix_of(adata, self.spec)
            match = match_genes(matrix.var, vocabulary.genes, warn_below=0, source=str(self.spec.file))
            logged = matrix.matrix_kind == "log1p"
            try:
                shards = self._write(adata, matrix, match, vocabulary, "log1p" if logged else "counts")
            except NotWhole:  # found only by reading, as a few fractions may be anywhere
                shards = self._write(adata, matrix, match, vocabulary, "amounts")
        return {"shards": shards, "genes": _account(match, vocabulary)}

    def _write(
        self, adata: ad.AnnData, matrix: ExpressionMatrix, match: GeneMatch, vocabulary: Vocabulary, encoding: str
    ) -> list[dict[str, Any]]:
        parts = blocks(matrix, self.first, self.first + self.cells, values=self.values)
        shards: list[dict[str, Any]] = []
        rest: tuple[int, sp.csr_matrix] | None = None
        for first in range(self.first, self.first + self.cells, self.shard_cells):
            last = min(first + self.shard_cells, self.first + self.cells)
            name = f"shards/{self.number + len(shards):06d}.safetensors"
            path = self.folder / name
            covered, row = 0.0, first
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                writer = ShardWriter(file, last - first, encoding)
                while row < last:
                    start, block = rest or next(parts)
                    rest = (last, block[last - start :]) if start + block.shape[0] > last else None
                    block = block[: last - start]
                    lengths, gene, value, total, inside = fold(
                        block, match.columns, len(vocabulary.genes), logged=encoding == "log1p"
                    )
                    obs = adata.obs.iloc[row : row + len(lengths)]
                    words = {f: w.to_numpy(dtype=object) for f, w in self.spec.metadata(obs).items()}
                    donor = np.array([self.donors.get(d, -1) for d in self.spec.donors(obs)], dtype=np.int32)
                    writer.add(
                        lengths,
                        gene,
                        value,
                        total=total,
                        donor=donor,
                        metadata=word_codes(len(obs), vocabulary, words),
                    )
                    covered += float((inside / np.maximum(total, 1e-9)).sum())
                    row += len(lengths)
                words_written = writer.finish({"study": self.spec.name, "first": str(first)})
            shards.append(
                {
                    "file": name,
                    "study": self.study,
                    "first": first,
                    "encoding": encoding,
                    "cells": last - first,
                    "words": words_written,
                    "rounded": writer.rounded,
                    "covered": covered,
                    "sha256": sha256(path),
                    "bytes": path.stat().st_size,
                }
            )
        return shards


def _account(match: GeneMatch, vocabulary: Vocabulary) -> dict[str, Any]:
    """What became of a file's genes."""
    report = match.report()
    keys = ("names_from", "id_type", "input_genes", "matched_columns", "outside_vocabulary", "fraction_of_vocabulary")
    lists = ("missing", "renamed", "unknown", "ambiguous", "duplicates")
    place = {gene: i for i, gene in enumerate(vocabulary.genes)}
    return {
        **{key: report[key] for key in keys},
        "found": len(match.found),
        **{key: report[key] for key in lists},
        "measured": [place[gene] for gene in match.found],
    }

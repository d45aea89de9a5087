"""Evaluate generation: generated cells beside other real cells (the ceiling) and independent genes (the baseline)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._io.adata import read_column
from scmulan._progress import SILENT, Progress
from scmulan._text import format_table, shorten
from scmulan.errors import InputError, VocabularyError
from scmulan.evaluate.cell_sets import CellSet, Similarity, compare, shuffle_genes
from scmulan.evaluate.inputs import (
    as_model,
    file_names,
    model_name,
    open_labelled,
    require_files,
    trained_on,
    with_source,
)
from scmulan.evaluate.labels import LabelMap, as_label_map, canonical
from scmulan.model.loading import LoadedModel
from scmulan.tl._blockwise import CellReader
from scmulan.tl._generate import generate
from scmulan.vocab.vocabulary import Family, Vocabulary, family_of_field

__all__ = ["FileGeneration", "GenerationEvaluation", "evaluate_generation"]

MIN_CELLS = 10  # per type and set
MAX_BASELINE_RATIO = 5  # cells that the baseline learns from, as a multiple of those in a set
GENERATED, CEILING, BASELINE = "written", "other real cells", "independent genes"
ROWS = (
    ("genes per cell", "words_mean"),
    ("  its sd within a type", "words_sd"),
    ("  over that of real cells", "words_ratio"),
    ("mean bin per gene: r", "mean_pearson"),
    ("  rank correlation", "mean_spearman"),
    ("  absolute difference", "mean_difference"),
    ("detection per gene: r", "detection_pearson"),
    ("  rank correlation", "detection_spearman"),
    ("  absolute difference", "detection_difference"),
    ("co-expression: r", "coexpression"),
    ("type by 10 real neighbours", "type_accuracy"),
    ("type of real ones by these", "type_accuracy_reverse"),
    ("told apart (0.5 is best)", "told_apart"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileGeneration:
    """Generated and real cells of one file's types."""

    name: str
    """Short name of the file."""
    trained_on: bool
    """Whether the model's card names this file as training data."""
    genes: int
    """Genes that both the file and the model have; only these were generated and compared."""
    types: dict[str, int]
    """Cells of each type, in each set."""
    prompts: dict[str, list[dict[str, Any]]]
    """Type → its prompts, with the number of cells generated for each (``n``)."""
    left_out: dict[str, str]
    """Types that were not compared, and why."""
    unlabelled: int
    """Cells without label, left out."""
    complete: float
    """Fraction of generated cells that ended by themselves."""
    real_words_mean: float
    """Genes per cell of the real cells that all sets are compared with."""
    real_words_sd: float
    """Its standard deviation within a type."""
    results: dict[str, Similarity]
    """``written`` (generated), ``other real cells`` (the ceiling) and ``independent genes`` (the baseline), each
    compared with these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationEvaluation:
    """Generated cells beside real ones."""

    model: str
    """Name of the model."""
    weights_hash: str
    """sha256 of its weights."""
    labels: str
    """Column of the cell types."""
    parameters: dict[str, Any]
    """Parameters of the generation."""
    files: list[FileGeneration]
    """Results, per file."""

    def to_json(self) -> dict[str, Any]:
        """Return the contents as plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Return the figures as text, a column per set of cells."""
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return "\n\n".join([f"Cells written by model {self.model} ({settings})", *map(_file_table, self.files)])


def _file_table(file: FileGeneration) -> str:
    head = f"{file.name}: {sum(file.types.values()):,} cells per set, {len(file.types)} types, {file.genes:,} genes"
    if file.trained_on:
        head += "\n  This file is among the model's training data."
    columns = [asdict(similarity) for similarity in file.results.values()]
    real = {"words_mean": file.real_words_mean, "words_sd": file.real_words_sd}
    rows = [[label, real.get(key), *(column[key] for column in columns)] for label, key in ROWS]
    by_type = [
        [shorten(t), n, *(column["words_ratio_by_type"][t] for column in columns)] for t, n in file.types.items()
    ]
    notes = [f"written cells that ended by themselves: {file.complete:.1%}"]
    notes += [f"left out: {t} ({why})" for t, why in file.left_out.items()]
    return "\n\n".join(
        [
            f"{head}\n{format_table(['compared with real cells', 'real', *file.results], rows)}",
            f"Genes per cell over those of real cells\n{format_table(['type', 'cells', *file.results], by_type)}",
            "\n".join(notes),
        ]
    )


def evaluate_generation(
    model: LoadedModel | str | Path,
    data: Sequence[str | Path],
    *,
    labels: str,
    fields: Mapping[str, str] | None = None,
    mapping: str | Path | LabelMap | None = None,
    n: int = 50,
    rule: Literal["default", "release"] = "default",
    values: Literal["sample", "mean"] = "sample",
    temperature: float = 1.0,
    max_words: int = 1_550,
    min_genes: int = 20,
    seed: int = 0,
    progress: Progress = SILENT,
) -> GenerationEvaluation:
    """Generate cells for the metadata of real ones, and compare.

    Of each type, the real cells are divided: some are the reference; as many others show how similar real cells are to
    each other; from all others the baseline learns how often each gene has which level, and draws each gene by itself.

    Parameters
    ----------
    model
        From :func:`scmulan.load`, or its path or name.
    data
        Labelled h5ad files.
    labels
        Column of ``obs`` with the cell types; cells without are left out.
    fields
        Column of ``obs`` → field of the prompt, such as ``{"assay": "technology"}``. Default: the columns whose names
        say what they are (``organ``, ``tissue``, ``sex``, ``tech``, ``coarse``, …). The cell type is always in the
        prompt.
    mapping
        What the labels mean, see :func:`scmulan.evaluate.labels.read_label_map`.
    n
        Maximum number of cells per type and set: of a rarer type, half of its cells.
    rule, values, temperature, max_words
        As for :func:`scmulan.tl.generate`.
    min_genes
        Minimum number of the model's genes that a file must have.
    seed
        Seed of the division of the real cells, the baseline and the generated cells.
    progress
        Shows what is being done.

    Returns
    -------
    GenerationEvaluation

    Raises
    ------
    InputError
        If a file cannot be used, or no type of it has enough cells and a word in the model's vocabulary.
    """
    require_files(data)
    loaded = as_model(model)
    settings = {"rule": rule, "values": values, "temperature": temperature, "max_words": max_words}
    options = _Options(
        labels=labels, fields=fields, label_map=as_label_map(mapping), n=n, min_genes=min_genes, seed=seed,
        settings=settings,
    )  # fmt: skip
    files = []
    for path, name in zip(data, file_names(data), strict=True):
        with with_source(path):
            files.append(_evaluate_file(loaded, path, name, options, progress))
    return GenerationEvaluation(
        model=model_name(loaded),
        weights_hash=loaded.weights_hash,
        labels=labels,
        parameters={"n": n, "seed": seed, **settings},
        files=files,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """Arguments of :func:`evaluate_generation` that hold for every file."""

    labels: str
    fields: Mapping[str, str] | None
    label_map: LabelMap
    n: int
    min_genes: int
    seed: int
    settings: dict[str, Any]  # of scmulan.tl.generate


def _evaluate_file(
    model: LoadedModel, path: str | Path, name: str, options: _Options, progress: Progress
) -> FileGeneration:
    adata, source = open_labelled(path), str(path)
    raw = read_column(adata.obs, options.labels, source)
    options.label_map.check(raw, source)
    types = np.array([options.label_map.term(label) for label in raw], dtype=object)
    division = _divide(types, _prompt_words(adata.obs, types, model.vocabulary, options, source), options)
    if not division.reference:
        why = "; ".join(f"{t}: {reason}" for t, reason in division.left_out.items())
        raise InputError(f"{source}: no cell type can be compared ({why or f'column {options.labels!r} is empty'})")
    real = _read_levels(model, adata, division, options.min_genes)

    def real_cells(rows: dict[str, np.ndarray]) -> CellSet:
        chosen = np.concatenate(list(rows.values()))
        return CellSet(level=real.level[np.searchsorted(real.rows, chosen)], types=types[chosen])

    reference = real_cells(division.reference)
    n = {t: len(rows) for t, rows in division.reference.items()}
    generated, complete = _generate(model, division, real, options, lambda text: progress.log(f"{name}: {text}"))
    sets = {
        GENERATED: generated,
        CEILING: real_cells(division.other),
        BASELINE: shuffle_genes(real_cells(division.rest), n, np.random.default_rng([options.seed, 1])),
    }
    progress.log(f"{name}: comparing")
    return FileGeneration(
        name=name,
        trained_on=trained_on(model, path),
        genes=len(real.genes),
        types=n,
        prompts={t: [{**words, "n": count} for words, count in prompts] for t, prompts in division.prompts.items()},
        left_out=division.left_out,
        unlabelled=int((types == "").sum()),
        complete=complete,
        real_words_mean=float(reference.n_genes.mean()),
        real_words_sd=float(np.mean([reference.n_genes[reference.types == t].std() for t in n])),
        results={key: compare(cells, reference) for key, cells in sets.items()},
    )


def _prompt_words(
    obs: pd.DataFrame, types: np.ndarray, vocabulary: Vocabulary, options: _Options, source: str
) -> pd.DataFrame:
    """Return the word of each prompt field (columns) that the model knows for each cell; empty where it knows none."""
    if options.fields is None:
        columns = {family: str(c) for c in obs.columns if c != options.labels and (family := _family_of_column(str(c)))}
    else:
        columns = {family_of_field(field): column for column, field in options.fields.items()}
    texts = {family: read_column(obs, column, source) for family, column in columns.items()}
    texts[Family.FINE] = types
    texts.setdefault(Family.COARSE, np.full(len(obs), "", dtype=object))
    words = {}
    for family, text in texts.items():
        word_of = {t: _find_word(vocabulary, family, t) for t in set(text)}
        words[str(family)] = [word_of[t] for t in text]
    return pd.DataFrame(words)


def _family_of_column(column: str) -> Family | None:
    if column.strip().lower() == "coarse":
        return Family.COARSE
    try:
        family = family_of_field(column)
    except VocabularyError:
        return None
    # Any column of fine types but the one asked for may be in another spelling, or another person's opinion.
    return None if family is Family.FINE else family


def _find_word(vocabulary: Vocabulary, family: Family, text: str) -> str:
    """Return the word of a family that a text means, or an empty string."""
    by_name = {word.casefold(): word for word in vocabulary.names(family)}
    if found := by_name.get(text.casefold()):
        return found
    if family in (Family.FINE, Family.COARSE) and text:
        meaning = canonical(text)
        return next((word for word in vocabulary.names(family) if canonical(word) == meaning), "")
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Division:
    """Real cells of each type as rows of the file, divided into sets, and the prompts of the cells to generate."""

    reference: dict[str, np.ndarray]
    other: dict[str, np.ndarray]
    rest: dict[str, np.ndarray]  # those of `other` and more
    prompts: dict[str, list[tuple[dict[str, str], int]]]  # words, number of cells
    left_out: dict[str, str]  # type → why


def _divide(types: np.ndarray, words: pd.DataFrame, options: _Options) -> _Division:
    rng = np.random.default_rng(options.seed)
    division = _Division(reference={}, other={}, rest={}, prompts={}, left_out={})
    for name in sorted(set(types) - {""}):
        rows = rng.permutation(np.flatnonzero(types == name))
        n = min(options.n, len(rows) // 2)
        if words.loc[rows, [str(Family.FINE), str(Family.COARSE)]].eq("").all(axis=None):
            division.left_out[name] = f"{len(rows):,} cells; the model has no word for it"
        elif n < MIN_CELLS:
            division.left_out[name] = f"{len(rows):,} cells, {2 * MIN_CELLS} needed"
        else:
            division.reference[name], division.other[name] = rows[:n], rows[n : 2 * n]
            division.rest[name] = rows[n : n + MAX_BASELINE_RATIO * n]
            prompts = words.loc[division.reference[name]].value_counts(sort=False)
            division.prompts[name] = [
                ({f: word for f, word in zip(words.columns, key, strict=True) if word}, int(count))
                for key, count in prompts.items()
            ]
    return division


@dataclass(frozen=True, kw_only=True, slots=True)
class _RealCells:
    """Levels of the real cells that are used."""

    rows: np.ndarray  # of the file, ascending
    level: sp.csr_matrix  # [rows, genes]
    genes: np.ndarray  # gene indices of the vocabulary that the file has
    panel: Sequence[str]  # their names


def _read_levels(model: LoadedModel, adata: ad.AnnData, division: _Division, min_genes: int) -> _RealCells:
    rows = np.unique(np.concatenate([*division.reference.values(), *division.rest.values()]))
    reader = CellReader(adata[rows].to_memory(), model, min_genes=min_genes)
    genes = np.unique(reader.match.columns[reader.match.columns >= 0])
    blocks = [
        sp.csr_matrix((tokens.level, tokens.gene, tokens.indptr), shape=(len(tokens), len(model.vocabulary.genes)))
        for _, tokens in reader.blocks()
    ]
    level = sp.csr_matrix(sp.vstack(blocks, format="csr")[:, genes])
    return _RealCells(rows=rows, level=level, genes=genes, panel=reader.match.found)


def _generate(
    model: LoadedModel, division: _Division, real: _RealCells, options: _Options, log: Callable[[str], None]
) -> tuple[CellSet, float]:
    """Generate cells for the prompts; return them and the fraction that ended by itself."""
    levels: list[sp.csr_matrix] = []
    types: list[str] = []
    complete = []
    for name, prompts in division.prompts.items():
        log(f"writing {sum(count for _, count in prompts):,} cells: {name}")
        for words, count in prompts:
            # Cells of one seed draw the same numbers under any prompt: each prompt gets its own seed.
            seed = int(np.random.SeedSequence([options.seed, len(levels)]).generate_state(1)[0])
            cells = generate(model, words, n=count, seed=seed, genes=real.panel, **options.settings)
            level = sp.csr_matrix(cells.layers["level"])[:, real.genes]
            level.eliminate_zeros()  # the release's rule may write a gene with level 0: it is not expressed
            levels.append(level)
            types += [name] * count
            complete.append(cells.obs["complete"].to_numpy())
    generated = CellSet(level=sp.vstack(levels, format="csr"), types=np.array(types, dtype=object))
    return generated, float(np.concatenate(complete).mean())

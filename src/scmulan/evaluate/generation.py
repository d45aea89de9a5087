"""Whether written cells are like real ones: beside another half of the real cells, and beside independent genes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._io.adata import read_column
from scmulan._text import grid, shorten
from scmulan.errors import InputError, VocabularyError
from scmulan.evaluate.cell_sets import CellSet, Likeness, compare, resample
from scmulan.evaluate.cells import (
    as_model,
    file_names,
    model_name,
    named,
    need_files,
    open_labelled,
    trained_on,
)
from scmulan.evaluate.labels import LabelMap, canonical, read_label_map
from scmulan.model.loading import LoadedModel
from scmulan.tl._blockwise import CellReader
from scmulan.tl._generate import generate
from scmulan.vocab.vocabulary import Family, Vocabulary, family_of_field

__all__ = ["FileGeneration", "GenerationEvaluation", "evaluate_generation"]

FEWEST = 10  # cells per type and set
MOST_REST = 5  # cells that the baseline learns from, as a multiple of those in a set
WRITTEN, CEILING, BASELINE = "written", "other real cells", "independent genes"
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
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileGeneration:
    """Written and real cells of one file's types."""

    name: str
    """Short name of the file."""
    trained_on: bool
    """Whether the model's card names this file as training data."""
    genes: int
    """Genes that both the file and the model have; only these were written and compared."""
    types: dict[str, int]
    """Cells of each type, in each set."""
    prompts: dict[str, list[dict[str, Any]]]
    """Type → its prompts, with the number of cells written for each (``n``)."""
    left_out: dict[str, str]
    """Types that were not compared, and why."""
    unlabelled: int
    """Cells without label, left out."""
    complete: float
    """Share of written cells that ended by themselves."""
    real_words_mean: float
    """Genes per cell of the real cells that all sets are compared with."""
    real_words_sd: float
    """Its standard deviation within a type."""
    results: dict[str, Likeness]
    """``written``, ``other real cells`` (the ceiling) and ``independent genes`` (the baseline) beside these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationEvaluation:
    """Written cells beside real ones."""

    model: str
    """Name of the model."""
    weights_hash: str
    """sha256 of its weights."""
    labels: str
    """Column of the cell types."""
    parameters: dict[str, Any]
    """How cells were written."""
    files: list[FileGeneration]
    """What was found, per file."""

    def to_json(self) -> dict[str, Any]:
        """Contents as plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Figures as text, a column per set of cells."""
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return "\n\n".join([f"Cells written by model {self.model} ({settings})", *map(_file_table, self.files)])


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
    progress: Progress = lambda text: None,
) -> GenerationEvaluation:
    """Write cells for the metadata of real ones, and compare.

    Of each type, the real cells are divided: some are the reference; as many others show how alike real cells are;
    from all others the baseline learns how often each gene has which bin, and draws each gene by itself.

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
        say what they are (``organ``, ``tissue``, ``sex``, ``tech``, ``coarse``, …). The cell type is always said.
    mapping
        What the labels mean, see :func:`scmulan.evaluate.labels.read_label_map`.
    n
        Most cells per type and set: of a rarer type, half of its cells.
    rule, values, temperature, max_words
        As for :func:`scmulan.tl.generate`.
    min_genes
        Fewest genes of the model that a file must have.
    seed
        Of the division of the real cells, the baseline and the written cells.
    progress
        Called with a line of text now and then.

    Returns
    -------
    GenerationEvaluation

    Raises
    ------
    InputError
        If a file cannot be used, or no type of it has enough cells and a word in the model's vocabulary.
    """
    need_files(data)
    loaded = as_model(model)
    table = LabelMap() if mapping is None else mapping if isinstance(mapping, LabelMap) else read_label_map(mapping)
    settings = {"rule": rule, "values": values, "temperature": temperature, "max_words": max_words}
    files = []
    for path, name in zip(data, file_names(data), strict=True):
        adata = open_labelled(path)
        with named(path):
            plan = _plan(adata, loaded.vocabulary, labels, fields, table, n, np.random.default_rng(seed), str(path))
            files.append(_evaluate(loaded, adata, plan, name, path, settings, min_genes, seed, progress))
    return GenerationEvaluation(
        model=model_name(loaded),
        weights_hash=loaded.weights_hash,
        labels=labels,
        parameters={"n": n, "seed": seed, **settings},
        files=files,
    )


@dataclass(slots=True)
class _Plan:
    """Which real cells are used, and what is asked for."""

    types: np.ndarray  # of every cell
    reference: dict[str, np.ndarray]  # type → rows
    other: dict[str, np.ndarray]
    rest: dict[str, np.ndarray]  # those of `other` and more
    prompts: dict[str, list[tuple[dict[str, str], int]]]
    left_out: dict[str, str]


def _plan(
    adata: ad.AnnData,
    vocabulary: Vocabulary,
    labels: str,
    fields: Mapping[str, str] | None,
    table: LabelMap,
    n: int,
    rng: np.random.Generator,
    source: str,
) -> _Plan:
    raw = read_column(adata.obs, labels, source)
    table.check(raw, source)
    types = np.array([table.term(label) for label in raw], dtype=object)
    words = _prompt_words(adata.obs, types, vocabulary, labels, fields, source)
    plan = _Plan(types, {}, {}, {}, {}, {})
    for name in sorted(set(types) - {""}):
        rows = rng.permutation(np.flatnonzero(types == name))
        m = min(n, len(rows) // 2)
        if words.loc[rows, [str(Family.FINE), str(Family.COARSE)]].eq("").all(axis=None):
            plan.left_out[name] = f"{len(rows):,} cells; the model has no word for it"
        elif m < FEWEST:
            plan.left_out[name] = f"{len(rows):,} cells, {2 * FEWEST} needed"
        else:
            plan.reference[name], plan.other[name] = rows[:m], rows[m : 2 * m]
            plan.rest[name] = rows[m : m + MOST_REST * m]
            asked = words.loc[plan.reference[name]].value_counts(sort=False)
            plan.prompts[name] = [
                ({f: w for f, w in zip(words.columns, key, strict=True) if w}, int(count))
                for key, count in asked.items()
            ]
    if not plan.reference:
        why = "; ".join(f"{name}: {reason}" for name, reason in plan.left_out.items()) or f"column {labels!r} is empty"
        raise InputError(f"{source}: no cell type can be compared ({why})")
    return plan


def _prompt_words(
    obs: pd.DataFrame,
    types: np.ndarray,
    vocabulary: Vocabulary,
    labels: str,
    fields: Mapping[str, str] | None,
    source: str,
) -> pd.DataFrame:
    """Word of each family that the model knows, per cell; empty where it knows none. Columns are prompt fields."""
    if fields is None:
        columns = {family: str(c) for c in obs.columns if c != labels and (family := _family_of_column(str(c)))}
    else:
        columns = {family_of_field(field): column for column, field in fields.items()}
    texts = {family: read_column(obs, column, source) for family, column in columns.items()}
    texts[Family.FINE] = types
    texts.setdefault(Family.COARSE, np.full(len(obs), "", dtype=object))
    out = {}
    for family, text in texts.items():
        known = {t: _word(vocabulary, family, t) for t in set(text)}
        out[str(family)] = [known[t] for t in text]
    return pd.DataFrame(out)


def _family_of_column(column: str) -> Family | None:
    if column.strip().lower() == "coarse":
        return Family.COARSE
    try:
        family = family_of_field(column)
    except VocabularyError:
        return None
    # Any column of fine types but the one asked for may be in another spelling, or another person's opinion.
    return None if family is Family.FINE else family


def _word(vocabulary: Vocabulary, family: Family, text: str) -> str:
    """Word of a family that a text means, or an empty string."""
    by_name = {word.casefold(): word for word in vocabulary.names(family)}
    if found := by_name.get(text.casefold()):
        return found
    if family in (Family.FINE, Family.COARSE) and text:
        meaning = canonical(text)
        return next((word for word in vocabulary.names(family) if canonical(word) == meaning), "")
    return ""


def _evaluate(
    model: LoadedModel,
    adata: ad.AnnData,
    plan: _Plan,
    name: str,
    path: str | Path,
    settings: dict[str, Any],
    min_genes: int,
    seed: int,
    progress: Progress,
) -> FileGeneration:
    rows = np.unique(np.concatenate([*plan.reference.values(), *plan.rest.values()]))
    reader = CellReader(adata[rows].to_memory(), model, min_genes=min_genes)
    genes = np.unique(reader.match.columns[reader.match.columns >= 0])
    parts = [
        sp.csr_matrix((w.level, w.gene, w.indptr), shape=(len(w), len(model.vocabulary.genes)))
        for _, w in reader.blocks()
    ]
    real = sp.csr_matrix(sp.vstack(parts, format="csr")[:, genes])

    def pick(chosen: dict[str, np.ndarray]) -> CellSet:
        cells = np.concatenate(list(chosen.values()))
        return CellSet(level=real[np.searchsorted(rows, cells)], types=plan.types[cells])

    reference = pick(plan.reference)
    number = {t: len(cells) for t, cells in plan.reference.items()}
    written, complete = _write(
        model, plan, reader.match.found, genes, settings, seed, lambda t: progress(f"{name}: {t}")
    )
    sets = {
        WRITTEN: written,
        CEILING: pick(plan.other),
        BASELINE: resample(pick(plan.rest), number, np.random.default_rng([seed, 1])),
    }
    progress(f"{name}: comparing")
    within = [reference.words[reference.types == t].std() for t in number]
    return FileGeneration(
        name=name,
        trained_on=trained_on(model, path),
        genes=len(genes),
        types=number,
        prompts={t: [{**words, "n": count} for words, count in asked] for t, asked in plan.prompts.items()},
        left_out=plan.left_out,
        unlabelled=int((plan.types == "").sum()),
        complete=complete,
        real_words_mean=float(reference.words.mean()),
        real_words_sd=float(np.mean(within)),
        results={key: compare(cells, reference) for key, cells in sets.items()},
    )


def _write(
    model: LoadedModel,
    plan: _Plan,
    panel: Sequence[str],
    genes: np.ndarray,
    settings: dict[str, Any],
    seed: int,
    progress: Progress,
) -> tuple[CellSet, float]:
    parts, types, complete = [], [], []
    stream = 0
    for name, asked in plan.prompts.items():
        progress(f"writing {sum(count for _, count in asked):,} cells: {name}")
        for words, count in asked:
            # Cells of one seed draw the same numbers under any prompt: each prompt gets its own.
            own = int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])
            cells = generate(model, words, n=count, seed=own, genes=panel, **settings)
            level = sp.csr_matrix(cells.layers["level"])[:, genes]
            level.eliminate_zeros()  # the release's rule may give a gene bin 0: it is said, and not expressed
            parts.append(level)
            types += [name] * count
            complete.append(cells.obs["complete"].to_numpy())
            stream += 1
    written = CellSet(level=sp.vstack(parts, format="csr"), types=np.array(types, dtype=object))
    return written, float(np.concatenate(complete).mean())


def _file_table(file: FileGeneration) -> str:
    head = f"{file.name}: {sum(file.types.values()):,} cells per set, {len(file.types)} types, {file.genes:,} genes"
    if file.trained_on:
        head += "\n  This file is among the model's training data."
    columns = [asdict(likeness) for likeness in file.results.values()]
    real = {"words_mean": file.real_words_mean, "words_sd": file.real_words_sd}
    rows = [[label, real.get(key), *(column[key] for column in columns)] for label, key in ROWS]
    by_type = [
        [shorten(t), n, *(column["words_ratio_by_type"][t] for column in columns)] for t, n in file.types.items()
    ]
    notes = [f"written cells that ended by themselves: {file.complete:.1%}"]
    notes += [f"left out: {t} ({why})" for t, why in file.left_out.items()]
    return "\n\n".join(
        [
            f"{head}\n{grid(['compared with real cells', 'real', *file.results], rows)}",
            f"Genes per cell over those of real cells\n{grid(['type', 'cells', *file.results], by_type)}",
            "\n".join(notes),
        ]
    )

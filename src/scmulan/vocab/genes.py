"""Match the gene names of an input with the genes of a vocabulary, and report what was found and what was not."""

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from scmulan.errors import GeneError
from scmulan.vocab.gene_table import Foreign, GeneTable, Resolution, foreign_species

__all__ = [
    "CoverageWarning",
    "GeneMatch",
    "GeneTable",
    "Resolution",
    "choose_names",
    "match_genes",
]

MAX_EXAMPLES = 20
"""Names of each kind in a report."""
MIN_FOREIGN_FRACTION = 0.05
"""Fraction of an input's names that must be another species' for a warning."""
_ENSEMBL = re.compile(r"ENSG\d{11}(\.\d+)?(_PAR_Y)?", re.IGNORECASE)

Names: TypeAlias = Sequence[str] | pd.Index | np.ndarray | pd.DataFrame
"""Gene names, or a ``var`` table that has them in its index or a column."""


class CoverageWarning(UserWarning):
    """The input measured so few of the vocabulary's genes, or so many of another species, that results suffer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneMatch:
    """Match between the columns of an input and the genes of a vocabulary."""

    columns: np.ndarray
    """int32, one per input column: index into the vocabulary's genes, or -1."""
    vocabulary_size: int
    """Number of genes in the vocabulary."""
    found: list[str]
    """Vocabulary genes that the input has, in vocabulary order."""
    missing: list[str]
    """Vocabulary genes that the input lacks, in vocabulary order."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Input symbol to vocabulary gene, where they are written differently (Ensembl ids are not listed)."""
    outside: list[str] = field(default_factory=list)
    """Input names of human genes that the vocabulary does not have."""
    unknown: list[str] = field(default_factory=list)
    """Input names that are neither vocabulary genes nor known human genes."""
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Input names that several genes share, to the approved symbols they could mean; left unmatched."""
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    """Vocabulary gene to the input names of its columns, where it has several; their values are summed."""
    id_type: str = "symbol"
    """How the input names its genes: ``symbol``, ``ensembl`` or ``mixed``."""
    where: str = "index"
    """Where the names were found: ``index`` or the name of a column of ``var``."""

    @property
    def _where_text(self) -> str:
        return "var_names" if self.where == "index" else f"var[{self.where!r}]"

    @property
    def fraction_of_vocabulary(self) -> float:
        """Fraction of the vocabulary's genes that the input has."""
        return len(self.found) / self.vocabulary_size if self.vocabulary_size else 0.0

    def report(self, umi_fraction: float | None = None) -> dict[str, Any]:
        """Return counts and first examples, ready for JSON.

        Parameters
        ----------
        umi_fraction : float, optional
            Fraction of the input's UMIs in matched columns.
        """
        return {
            "names_from": self.where,
            "id_type": self.id_type,
            "input_genes": len(self.columns),
            "matched_columns": int((self.columns >= 0).sum()),
            "outside_vocabulary": len(self.outside),
            "vocabulary_genes": self.vocabulary_size,
            "fraction_of_vocabulary": round(self.fraction_of_vocabulary, 4),
            "umi_share": None if umi_fraction is None else round(float(umi_fraction), 4),
            "found": _excerpt(self.found),
            "missing": _excerpt(self.missing),
            "renamed": _excerpt(self.renamed),
            "unknown": _excerpt(self.unknown),
            "ambiguous": _excerpt({name: list(symbols) for name, symbols in self.ambiguous.items()}),
            "duplicates": _excerpt(self.duplicates),
        }

    def summary(self, umi_fraction: float | None = None) -> str:
        """Return one or two lines for people."""
        kind = {"symbol": "symbols", "ensembl": "Ensembl ids", "mixed": "symbols and Ensembl ids"}[self.id_type]
        text = (
            f"{len(self.found):,} of {self.vocabulary_size:,} vocabulary genes found "
            f"({self.fraction_of_vocabulary:.0%}) among {len(self.columns):,} {kind} in {self._where_text}"
        )
        if umi_fraction is not None:
            text += f"; they hold {umi_fraction:.1%} of the UMIs"
        notes = [
            f"{label} {len(values):,}"
            for values, label in (
                (self.renamed, "under another name"),
                (self.duplicates, "in several columns (summed)"),
                (self.ambiguous, "ambiguous and left out"),
                (self.unknown, "unknown"),
            )
            if values
        ]
        return f"{text}.\n{', '.join(notes).capitalize()}." if notes else f"{text}."


def _excerpt(values: list[str] | dict[str, Any]) -> dict[str, Any]:
    some = list(values)[:MAX_EXAMPLES]
    if isinstance(values, dict):
        # Text, not a dictionary: a gene's name with a slash in it is no key that h5ad could store.
        meant = ((name, values[name]) for name in some)
        some = [f"{name} → {other if isinstance(other, str) else ', '.join(other)}" for name, other in meant]
    return {"count": len(values), "examples": some}


_UNKNOWN = Resolution(None, "unknown")


class _Matcher:
    """Look up a vocabulary's genes by every name that the gene table knows for them."""

    def __init__(self, genes: Sequence[str], table: GeneTable) -> None:
        self.table = table
        self.exact: dict[str, int] = {}
        self.by_symbol: dict[str, int] = {}
        self.hyphened: dict[str, int] = {}
        for index, (gene, symbol) in enumerate(zip(genes, table.resolve(genes), strict=True)):
            self.exact.setdefault(gene, index)
            if symbol is None:
                # Names of clones (``RP11-34P13.7``) are in no table; R still turns their hyphens into dots.
                self.hyphened.setdefault(gene.replace(".", "-"), index)
            elif symbol == gene or symbol not in self.by_symbol:
                self.by_symbol[symbol] = index

    def __call__(self, name: str) -> tuple[int, Resolution | None]:
        """Return the index of the vocabulary gene or -1, and the resolution of a name that needed the table."""
        if (index := self.exact.get(name)) is not None:
            return index, None
        resolution = self.table.explain(name)
        if resolution.how in ("case", "punctuation") and name.islower():
            # A gene name typed by a person may be in lower case; a column named so is a gene of zebrafish or frog.
            return -1, _UNKNOWN
        if resolution.symbol is not None:
            return self.by_symbol.get(resolution.symbol, -1), resolution
        if resolution.how == "unknown" and "." in name:
            return self.hyphened.get(name.replace(".", "-"), -1), resolution
        return -1, resolution

    def indices(self, names: Iterable[str]) -> Iterator[int | None]:
        """Yield the index of the vocabulary gene, or None, for each name."""
        for name in names:
            index = self(name)[0]
            yield None if index < 0 else index


def choose_names(var: pd.DataFrame, vocabulary_genes: Sequence[str] | None = None) -> tuple[list[str], str]:
    """Choose the index or column of a ``var`` table that holds the names of its genes.

    Parameters
    ----------
    var : pandas.DataFrame, shape (n_genes, n_columns)
        Table of genes: their names may stand in the index or in any column of text (``gene_symbols``, ``feature_name``,
        ``gene_ids``, …).
    vocabulary_genes : sequence of str, optional
        Count matches with these genes; otherwise with all human genes.

    Returns
    -------
    names : list of str, length n_genes
        The names that match most different genes; the index where nothing does better. A missing name is ``""``.
    where : str
        ``"index"`` or the name of the column.
    """
    table = GeneTable.load()
    if vocabulary_genes is None:
        return _best_names(var, table.resolve)
    return _best_names(var, _Matcher(vocabulary_genes, table).indices)


def _best_names(var: pd.DataFrame, look_up: Callable[[list[str]], Iterable[object]]) -> tuple[list[str], str]:
    best, where = _as_text(var.index), "index"
    max_count = len(set(look_up(best)) - {None})
    for column, values in var.items():
        if isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(values.dtype):
            names = _as_text(values)
            count = len(set(look_up(list(dict.fromkeys(names)))) - {None})
            if count > max_count:
                best, where, max_count = names, str(column), count
    return best, where


def _as_text(values: pd.Index | pd.Series) -> list[str]:
    missing = np.asarray(values.isna())
    return ["" if absent else str(value) for value, absent in zip(values, missing, strict=True)]


def match_genes(
    names: Names,
    vocabulary_genes: Sequence[str],
    *,
    min_genes: int = 20,
    warn_below: float = 0.5,
    source: str = "the input",
) -> GeneMatch:
    """Match the genes of an input with the genes of a vocabulary.

    A name that is a vocabulary gene is that gene. Any other goes through the approved symbol, on both sides: the
    vocabulary may hold symbols that were renamed since. See `GeneTable.resolve` for the names understood.

    Parameters
    ----------
    names : sequence of str, or pandas.DataFrame
        Gene names, one per column of the expression matrix; of a ``var`` table the index or column that matches best.
    vocabulary_genes : sequence of str
        Genes of the vocabulary, in its order.
    min_genes : int
        Refuse the input if fewer vocabulary genes are found; at most half of the vocabulary is required. 0 refuses only
        the names of another species.
    warn_below : float
        Warn (`CoverageWarning`) if a smaller fraction of the vocabulary's genes is found, as in targeted panels and
        matrices cut to variable genes.
    source : str
        What to call the input in errors and warnings, such as its file name.

    Returns
    -------
    GeneMatch
        With ``columns``, int32 of shape (n_names,): index into ``vocabulary_genes``, or -1.

    Raises
    ------
    GeneError
        Too few genes found, or the names are those of another species.
    """
    table = GeneTable.load()
    matcher = _Matcher(vocabulary_genes, table)
    where = "index"
    if isinstance(names, pd.DataFrame):
        names, where = _best_names(names, matcher.indices)
    else:
        names = _as_text(pd.Index(names, dtype=object))
    columns = np.full(len(names), -1, dtype=np.int32)
    columns_of: defaultdict[int, list[str]] = defaultdict(list)
    renamed: dict[str, str] = {}
    outside: list[str] = []
    unknown: list[str] = []
    ambiguous: dict[str, tuple[str, ...]] = {}
    for column, name in enumerate(names):
        index, resolution = matcher(name)
        columns[column] = index
        if index >= 0:
            columns_of[index].append(name)
            if resolution is not None and resolution.how != "ensembl":
                renamed[name] = vocabulary_genes[index]
        elif resolution is not None and resolution.how == "ambiguous":
            ambiguous[name] = resolution.candidates
        elif resolution is not None and resolution.symbol is None:
            unknown.append(name)
        else:
            outside.append(name)
    match = GeneMatch(
        columns=columns,
        vocabulary_size=len(vocabulary_genes),
        found=[vocabulary_genes[index] for index in sorted(columns_of)],
        missing=[gene for index, gene in enumerate(vocabulary_genes) if index not in columns_of],
        renamed=renamed,
        outside=outside,
        unknown=unknown,
        ambiguous=ambiguous,
        duplicates={vocabulary_genes[i]: found for i, found in sorted(columns_of.items()) if len(found) > 1},
        id_type=_id_type([name for found in columns_of.values() for name in found] or names),
        where=where,
    )
    foreign = foreign_species(unknown, table)
    _refuse(match, names, foreign, min_genes, source)
    if foreign is not None and foreign.count > MIN_FOREIGN_FRACTION * len(names):
        warnings.warn(
            f"{source}: {foreign.count:,} of {len(names):,} names are {foreign.species} genes, as "
            f"{', '.join(foreign.examples)}; they are left out, and the cells are read as human.",
            CoverageWarning,
            stacklevel=2,
        )
    if match.fraction_of_vocabulary < warn_below:
        warnings.warn(
            f"{source}: {match.summary().splitlines()[0]} Results are less certain with so few genes; "
            "give all measured genes if the file was cut to some of them.",
            CoverageWarning,
            stacklevel=2,
        )
    return match


def _id_type(names: Sequence[str]) -> str:
    fraction = sum(_ENSEMBL.fullmatch(name) is not None for name in names) / max(len(names), 1)
    return "ensembl" if fraction > 0.99 else "symbol" if fraction < 0.01 else "mixed"


def _refuse(match: GeneMatch, names: Sequence[str], foreign: Foreign | None, min_genes: int, source: str) -> None:
    """Raise a GeneError if the input is of another species or has too few of the vocabulary's genes."""
    human = int((match.columns >= 0).sum()) + len(match.outside)
    if foreign is not None and foreign.count > human:
        raise GeneError(
            f"{source} looks like {foreign.species} genes; scmulan's vocabularies are human: map orthologs first "
            f"({foreign.count:,} such names, as {', '.join(foreign.examples)}; {human:,} human ones{foreign.hint})"
        )
    needed = min(min_genes, -(-match.vocabulary_size // 2))
    if len(match.found) >= needed:
        return
    problem = f"{source}: {len(match.found):,} of the model's {match.vocabulary_size:,} genes found, {needed:,} needed"
    if not names:
        raise GeneError(f"{problem}; it has no genes at all")
    examples = ", ".join(list(dict.fromkeys(names))[:3])
    if sum(name.isdigit() for name in names) > len(names) / 2:
        raise GeneError(
            f"{problem}; its names in {match._where_text} are numbers ({examples}: Entrez ids or a lost index): "
            "put human gene symbols or Ensembl ids into var_names or a column of var"
        )
    raise GeneError(
        f"{problem}; its {len(names):,} names in {match._where_text} begin {examples}: expected human gene symbols or "
        "Ensembl ids in var_names or a column of var, and all measured genes rather than a selection"
    )

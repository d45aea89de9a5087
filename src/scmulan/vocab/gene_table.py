"""Gene names: from any name a human gene has or had to its approved symbol, and names of other species.

HGNC gives approved, previous and alias symbols, GENCODE the Ensembl ids; ``tools/build_resources.py`` joins them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from scmulan.resources import read_text

__all__ = ["GeneTable", "How", "Resolution"]

How = Literal["approved", "previous", "alias", "ensembl", "case", "punctuation", "suffix", "ambiguous", "unknown"]

# The id may carry a version and the mark of the Y copy, and may be joined to a symbol: ``HLA-A_ENSG00000206503``.
_ENSEMBL = re.compile(r"(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?", re.IGNORECASE)
# What scanpy (``-1``) and R (``.1``) append to the second column of the same name.
_MADE_UNIQUE = re.compile(r"(.+)[-.]([1-9]\d?)")

_Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Meaning of one gene name."""

    symbol: str | None
    """Approved symbol, or None."""
    how: How
    """Kind of name by which the gene was recognised, or why it was not."""
    candidates: tuple[str, ...] = ()
    """Approved symbols of an ambiguous name."""


_UNKNOWN = Resolution(None, "unknown")


class GeneTable:
    """Approved symbols of human genes, and the other names that lead to them.

    Parameters
    ----------
    text : str
        Tab-separated table with a header: symbol, Ensembl ids, previous symbols, aliases (each joined by ``|``) and
        locus type.
    """

    def __init__(self, text: str) -> None:
        self.locus_types: dict[str, str] = {}
        self._ensembl: dict[str, str] = {}
        previous: defaultdict[str, list[str]] = defaultdict(list)
        aliases: defaultdict[str, list[str]] = defaultdict(list)
        for line in text.split("\n")[1:]:
            if not line:
                continue
            symbol, ensembl, old, other, locus_type = line.split("\t")
            self.locus_types[symbol] = locus_type
            if ensembl:
                for name in ensembl.split("|"):
                    self._ensembl[name] = symbol
            if old:
                for name in old.split("|"):
                    previous[name].append(symbol)
            if other:
                for name in other.split("|"):
                    aliases[name].append(symbol)
        self._previous: _Names = {name: tuple(symbols) for name, symbols in previous.items()}
        self._aliases: _Names = {name: tuple(symbols) for name, symbols in aliases.items()}

    @staticmethod
    @cache
    def load() -> "GeneTable":
        """Return the packaged table, read once per process."""
        return GeneTable(read_text("genes.tsv.gz"))

    @property
    def symbols(self) -> list[str]:
        """Approved symbols, in alphabetical order."""
        return list(self.locus_types)

    def resolve(self, names: Iterable[str]) -> list[str | None]:
        """Translate names into approved symbols.

        Parameters
        ----------
        names : iterable of str
            Approved, previous or alias symbols, or Ensembl gene ids with or without version. An approved symbol wins
            over a previous one and that over an alias. Also understood, where the name as it stands means nothing:
            another case (all upper or all lower: ``Cd3e`` is a mouse gene, not a spelling of ``CD3E``), dots for
            hyphens (R's ``HLA.DRA``), a symbol joined to its Ensembl id, and what made a duplicated name unique
            (``MATR3-1``).

        Returns
        -------
        list of str or None
            One per name; None for an unknown or ambiguous name (`explain` tells which).
        """
        approved = self.locus_types
        return [name if name in approved else self.explain(name).symbol for name in names]

    def explain(self, name: str) -> Resolution:
        """Resolve one name, and tell by which kind of name."""
        name = name.strip()
        exact = self._exact(name)
        if exact.how != "unknown":
            return exact
        if found := _ENSEMBL.search(name):
            return self._from_ensembl(name, found)
        if (recased := self._recased(name)).how != "unknown":
            return recased
        if "." in name:
            hyphened = name.replace(".", "-")
            for result in (self._exact(hyphened), self._recased(hyphened)):
                if result.how != "unknown":
                    return Resolution(result.symbol, "punctuation", result.candidates) if result.symbol else result
        return self._without_suffix(name)

    def _exact(self, name: str) -> Resolution:
        if name in self.locus_types:
            return Resolution(name, "approved")
        for names, how in self._other_names:
            if symbols := names.get(name):
                return Resolution(symbols[0], how) if len(symbols) == 1 else Resolution(None, "ambiguous", symbols)
        return _UNKNOWN

    @property
    def _other_names(self) -> tuple[tuple[Mapping[str, tuple[str, ...]], How], ...]:
        return (self._previous, "previous"), (self._aliases, "alias")

    def _from_ensembl(self, name: str, found: re.Match[str]) -> Resolution:
        if symbol := self._ensembl.get(found[1].upper()):
            return Resolution(symbol, "ensembl")
        # A retired id joined to a symbol: the symbol may still be known.
        return self._exact((name[: found.start()] + name[found.end() :]).strip("_|:-. "))

    def _recased(self, name: str) -> Resolution:
        if not (name.isupper() or name.islower()):
            return _UNKNOWN
        symbols = self._by_case.get(name.casefold(), ())
        if len(symbols) > 1:
            return Resolution(None, "ambiguous", symbols)
        return Resolution(symbols[0], "case") if symbols else _UNKNOWN

    @cached_property
    def _by_case(self) -> _Names:
        folded: _Names = {}
        for names in ({symbol: (symbol,) for symbol in self.locus_types}, self._previous, self._aliases):
            level: dict[str, set[str]] = defaultdict(set)
            for name, symbols in names.items():
                level[name.casefold()].update(symbols)
            folded = {name: tuple(sorted(symbols)) for name, symbols in level.items()} | folded
        return folded

    def _without_suffix(self, name: str) -> Resolution:
        if not (match := _MADE_UNIQUE.fullmatch(name)):
            return _UNKNOWN
        for base in dict.fromkeys((match[1], match[1].replace(".", "-"))):
            result = self._exact(base)
            # Aliases stay out: the copies of 7SK or U3 (``7SK.2``) are genes of their own.
            if result.how in ("approved", "previous"):
                return Resolution(result.symbol, "suffix")
        return _UNKNOWN


_ENSEMBL_SPECIES = {
    "BTA": "cow",
    "CAF": "dog",
    "CJA": "marmoset",
    "DAR": "zebrafish",
    "FCA": "cat",
    "GAL": "chicken",
    "GGO": "gorilla",
    "MFA": "crab-eating macaque",
    "MIC": "mouse lemur",
    "MMU": "rhesus macaque",
    "MUS": "mouse",
    "OAR": "sheep",
    "OCU": "rabbit",
    "PTR": "chimpanzee",
    "RNO": "rat",
    "SSC": "pig",
    "XET": "frog",
}
_LOWER_CASE = "zebrafish or frog"
_ZEBRAFISH_CLONES = ("si:", "zgc:")
_ENSEMBL_ANY_SPECIES = re.compile(r"ENS([A-Z]{3})[A-Z]?G\d{11}")
# Mouse and rat write their symbols with a capital first letter; mitochondrial ones begin with ``mt-``.
_RODENT = re.compile(r"(?:mt-)?[A-Z][A-Za-z0-9.-]*[a-z][A-Za-z0-9.-]*")


@dataclass(frozen=True, slots=True)
class Foreign:
    """Gene names of another species among the names of an input."""

    species: str
    """Name of the species."""
    count: int
    """Number of names."""
    examples: tuple[str, ...]
    """First three names."""

    @property
    def hint(self) -> str:
        """End of an error message: what else the names could be."""
        return "; if they are human, write them in capitals" if self.species == _LOWER_CASE else ""


def foreign_species(names: Iterable[str], table: GeneTable) -> Foreign | None:
    """Return the species other than human to which most names point, or None if none points to any.

    Ensembl ids tell the species by their prefix. A symbol counts if it is human in capitals only: ``Cd3e`` for mouse,
    ``cd4`` for zebrafish or frog.
    """
    seen: defaultdict[str, list[str]] = defaultdict(list)
    approved = table.locus_types
    for name in names:
        if found := _ENSEMBL_ANY_SPECIES.match(name):
            seen[_ENSEMBL_SPECIES.get(found[1], "another species'")].append(name)
        elif name.startswith(_ZEBRAFISH_CLONES):
            seen[_LOWER_CASE].append(name)
        elif name not in approved and name.upper() in approved:
            if name.islower():
                seen[_LOWER_CASE].append(name)
            elif _RODENT.fullmatch(name):
                seen["mouse"].append(name)
    if not seen:
        return None
    species = max(seen, key=lambda name: len(seen[name]))
    return Foreign(species, len(seen[species]), tuple(seen[species][:3]))

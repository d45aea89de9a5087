"""Recognise gene names that are not human, so that an error can say so."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from scmulan.language.gene_table import GeneTable

__all__ = ["Foreign", "foreign_species"]

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
_ENSEMBL = re.compile(r"ENS([A-Z]{3})[A-Z]?G\d{11}")
# Mouse and rat write their symbols with a capital first letter; mitochondrial ones begin with ``mt-``.
_RODENT = re.compile(r"(?:mt-)?[A-Z][A-Za-z0-9.-]*[a-z][A-Za-z0-9.-]*")


@dataclass(frozen=True, slots=True)
class Foreign:
    """Names that are another species' gene names."""

    species: str
    """What the species is called."""
    count: int
    """How many of the names are its."""
    examples: tuple[str, ...]
    """The first three."""

    @property
    def hint(self) -> str:
        """What else the names could be, to follow in an error."""
        return "; if they are human, write them in capitals" if self.species == _LOWER_CASE else ""


def foreign_species(names: Iterable[str], table: GeneTable) -> Foreign | None:
    """Return the species other than human to which most names point, or None if none points to any.

    Ensembl ids tell the species by their prefix. A symbol counts if it is human in capitals only: ``Cd3e`` for mouse,
    ``cd4`` for zebrafish or frog.
    """
    seen: defaultdict[str, list[str]] = defaultdict(list)
    approved = table.locus_types
    for name in names:
        if found := _ENSEMBL.match(name):
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

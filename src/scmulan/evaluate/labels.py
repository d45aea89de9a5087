"""Labels of users' files: read, mapped to the Cell Ontology, and grouped into lineages or other groups."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from scmulan.errors import InputError
from scmulan.resources import read_text
from scmulan.vocab.ontology import Ontology

__all__ = [
    "LINEAGES",
    "OTHER",
    "LabelMap",
    "as_label_map",
    "canonical",
    "lineage_of",
    "read_label_map",
]

# Roots of each lineage, in the order in which they are tried: dendritic cells are mononuclear phagocytes too, and some
# monocytes count as precursors in the ontology.
LINEAGES = {
    "T": ("CL:0000084",),  # T cell
    "B": ("CL:0000945",),  # lymphocyte of B lineage: B cells, plasmablasts, plasma cells
    "NK": ("CL:0000623",),  # natural killer cell
    "dendritic": ("CL:0000451",),  # dendritic cell, those of human among them
    "monocyte": ("CL:0000576", "CL:0000113"),  # monocyte; macrophages and other mononuclear phagocytes
    "progenitor": ("CL:0008001",),  # hematopoietic precursor cell
}
OTHER = "other"


@cache
def lineage_of(label: str) -> str:
    """Return the lineage of a blood or immune cell type.

    Parameters
    ----------
    label
        Name, short name or Cell Ontology id.

    Returns
    -------
    str
        ``"T"``, ``"B"`` (plasma cells too), ``"NK"``, ``"monocyte"`` (macrophages and mononuclear phagocytes that are
        not dendritic too), ``"dendritic"``, ``"progenitor"`` (hematopoietic), or ``"other"``: any other type, one
        that is too coarse to tell (``"myeloid cell"``), or a label that the ontology does not know.
    """
    ontology = Ontology.load()
    identifier = ontology.find(label)
    if identifier is None:
        return OTHER
    above = ontology.ancestors(identifier, include_self=True)
    return next((lineage for lineage, roots in LINEAGES.items() if above.intersection(roots)), OTHER)


def canonical(label: str) -> str:
    """Return the Cell Ontology's name of a cell type, or the label itself where the ontology does not know it."""
    ontology = Ontology.load()
    identifier = ontology.find(label)
    return label if identifier is None else ontology.name(identifier)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMap:
    """Meaning of the labels of a file."""

    terms: dict[str, str] = field(default_factory=dict)
    """Label → the cell type that it means, a CL id or a name; ``""`` leaves its cells out."""
    groups: dict[str, str] = field(default_factory=dict)
    """Label → the group that is scored beside the type, such as its lineage; several labels may share one."""
    source: str = ""
    """File that the map was read from."""

    def term(self, label: str) -> str:
        """Return the cell type of a label in the ontology's spelling; a label that the map lacks stands for itself."""
        return canonical(self.terms.get(label, label)) if label else ""

    def true_group(self, label: str) -> str:
        """Return the group of a true label: the one in the map, otherwise that of its cell type."""
        return self.groups.get(label) or self.group_of(self.term(label))

    def group_of(self, term: str) -> str:
        """Return the group of any cell type, such as a predicted one.

        A map whose groups are lineages uses :func:`lineage_of`. Any other map is searched for the type itself, then for
        the nearest ancestor in the ontology; a type without either is ``"other"``.
        """
        if set(self.groups.values()) <= {*LINEAGES, OTHER}:
            return lineage_of(term)
        if term in self.groups:
            return self.groups[term]
        ontology = Ontology.load()
        found = ontology.find(term)
        if found is None:
            return OTHER
        rows = {ontology.find(self.terms.get(label, label)): group for label, group in self.groups.items()}
        above = [(ontology.distance(found, i), group) for i, group in rows.items() if i and ontology.is_a(found, i)]
        return min(above)[1] if above else OTHER

    def check(self, labels: Iterable[str], source: str) -> None:
        """Raise InputError if no row of the map is about one of the labels."""
        present = sorted(set(labels) - {""})
        mapped = {*self.terms, *self.groups}
        if mapped and present and not mapped.intersection(present):
            raise InputError(
                f"{self.source}: none of its labels ({_some(mapped)}) is among those of {source} ({_some(present)}); "
                "expected one row per label, in the spelling of the file"
            )


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > len(shown) else "")


def as_label_map(mapping: str | Path | LabelMap | None) -> LabelMap:
    """Return a map, read if it was given by path or name, or the empty map for None."""
    if mapping is None:
        return LabelMap()
    return mapping if isinstance(mapping, LabelMap) else read_label_map(mapping)


def read_label_map(name_or_path: str | Path) -> LabelMap:
    """Read a table of what labels mean.

    Parameters
    ----------
    name_or_path
        Tab-separated file with a header. The column ``label`` (or the first) holds the labels of the file; ``cl_id``,
        ``term`` or ``cell_type`` what each means; ``lineage`` or ``group`` the group that it is scored in beside its
        type. A packaged table is given by its name: ``pbmc68k_lineages``.

    Raises
    ------
    InputError
        If there is no such file, or it has no label, or a label twice, or neither of the other columns.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{path}: not text in UTF-8; expected a tab-separated table with a header") from None
    elif str(name_or_path) == "pbmc68k_lineages":
        text = read_text("pbmc68k_lineages.tsv")
    else:
        raise InputError(f"{path}: no such mapping table; expected a tab-separated file or 'pbmc68k_lineages'")
    return _parse(text, str(name_or_path))


def _parse(text: str, source: str) -> LabelMap:
    rows = [[entry.strip() for entry in line.split("\t")] for line in text.splitlines() if line.strip()]
    header = [name.lower().replace(" ", "_") for name in rows[0]] if rows else []

    def column(*names: str) -> int | None:
        return next((header.index(name) for name in names if name in header), None)

    label = column("label") or 0
    term, group = column("cl_id", "term", "cell_type"), column("lineage", "group")
    if term is None and group is None:
        raise InputError(
            f"{source}: its header is {', '.join(header) or 'missing'}; expected tab-separated columns label, "
            "and cl_id (or term, cell_type) or lineage (or group)"
        )
    terms: dict[str, str] = {}
    groups: dict[str, str] = {}
    seen: set[str] = set()
    for number, row in enumerate(rows[1:], start=2):
        row += [""] * (len(header) - len(row))
        if not row[label]:
            raise InputError(f"{source}: row {number} has no label")
        if row[label] in seen:
            raise InputError(f"{source}: label {row[label]!r} is there twice (row {number}); keep one of the rows")
        seen.add(row[label])
        if group is not None and row[group]:
            groups[row[label]] = row[group]
        # An empty term leaves the cells out, unless there is a group to be scored in.
        if term is not None and (row[term] or row[label] not in groups):
            terms[row[label]] = row[term]
    return LabelMap(terms=terms, groups=groups, source=source)

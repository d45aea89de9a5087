"""Cell Ontology: ids of cell-type labels, and the is_a relations between types.

Labels agree by the ontology, not by their spelling: a prediction that is finer than a coarse true label is no mistake.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from scmulan.resources import read_text

__all__ = ["Ontology"]

_ID = re.compile(r"CL[:_](\d{7})", re.IGNORECASE)
# ``CD4+`` and ``CD4-`` are written as words, ``CD4-positive`` keeps its own, all other marks only separate words.
_PLUS = re.compile(r"(?<=[^\W_])\+")
_MINUS = re.compile(r"(?<=[^\W_])[-−–](?=[\s/,);]|$)")
_WORD = re.compile(r"[^\W_]+")
# Only an abbreviation of the words before it: ``B cell (malignant)`` is not a B cell like others.
_ABBREVIATION = re.compile(r"\s*\([A-Z0-9]{2,6}\)")


def _words(label: str) -> str:
    """Normalise a label: lower case, words in the singular, no punctuation."""
    label = _MINUS.sub(" negative ", _PLUS.sub(" positive ", label.casefold()))
    return " ".join(_singular(word) for word in _WORD.findall(label))


def _singular(word: str) -> str:
    word = word.replace("haem", "hem")
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]


class Ontology:
    """Cell types, their names, and the is_a relations between them.

    Parameters
    ----------
    text : str
        Tab-separated table with a header: CL id, name, exact synonyms, direct parents (each joined by ``|``),
        deprecated (``1`` or empty), id that replaces a deprecated one.
    short_names : str, default ""
        Tab-separated table with a header: short name as used in the field, CL id, CL name. It wins over the ontology's
        own synonyms.
    """

    def __init__(self, text: str, short_names: str = "") -> None:
        self._names: dict[str, str] = {}
        self._parents: dict[str, tuple[str, ...]] = {}
        self._replaced: dict[str, str] = {}
        children: defaultdict[str, list[str]] = defaultdict(list)
        names: dict[str, set[str]] = defaultdict(set)
        synonyms: dict[str, set[str]] = defaultdict(set)
        for identifier, name, other, parents, deprecated, successor in _rows(text):
            if deprecated:
                self._replaced[identifier] = successor
                continue
            self._names[identifier] = name
            self._parents[identifier] = tuple(parents.split("|")) if parents else ()
            for parent in self._parents[identifier]:
                children[parent].append(identifier)
            names[_words(name)].add(identifier)
            for synonym in other.split("|") if other else ():
                synonyms[_words(synonym)].add(identifier)
        self._children = {parent: tuple(ids) for parent, ids in children.items()}
        short = {_words(row[0]): {row[1]} for row in _rows(short_names)}
        # A key that means several types is no name of any: the lower levels must not decide for it either.
        found = synonyms | short | names
        self._ids = {key: next(iter(ids)) for key, ids in found.items() if len(ids) == 1}

    @staticmethod
    @cache
    def load() -> "Ontology":
        """Return the packaged Cell Ontology, read once per process."""
        return Ontology(read_text("ontology.tsv.gz"), read_text("ontology_shortnames.tsv"))

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._names

    def find(self, label: str) -> str | None:
        """Return the CL id that a label means, or None.

        Parameters
        ----------
        label : str
            A CL id (``CL:0000084`` or ``CL_0000084``; a deprecated one gives its replacement), a name or exact synonym
            of the ontology, or a short name of the field (``CD4+ T cells``, ``NK``, ``Treg``). Case, hyphens, plural,
            British spelling, a final "cell" and an abbreviation in parentheses do not matter.
        """
        if match := _ID.fullmatch(label.strip()):
            return self._current(f"CL:{match[1]}")
        for written in dict.fromkeys((label, _ABBREVIATION.sub("", label))):
            key = _words(written)
            # Two or three letters alone name a cluster more often than a cell type (``D1``); NK and the like are in the
            # table of short names.
            longer = f"{key} cell" if len(key) > 3 else key
            for spelling in (key, key.removesuffix(" cell"), longer):
                if identifier := self._ids.get(spelling):
                    return identifier
        return None

    def _current(self, identifier: str) -> str | None:
        while identifier in self._replaced:
            identifier = self._replaced[identifier]
        return identifier if identifier in self._names else None

    def name(self, identifier: str) -> str:
        """Return the name of a CL id.

        Raises
        ------
        KeyError
            The ontology has no such id.
        """
        return self._names[identifier]

    def parents(self, identifier: str) -> tuple[str, ...]:
        """Return the direct parents of a type."""
        return self._parents[identifier]

    def ancestors(self, identifier: str, include_self: bool = False) -> set[str]:
        """Return all types above a type."""
        return set(self._climb(identifier)) - (set() if include_self else {identifier})

    def descendants(self, identifier: str, include_self: bool = False) -> set[str]:
        """Return all types below a type."""
        self.name(identifier)
        found, front = {identifier}, [identifier]
        while front:
            front = [child for node in front for child in self._children.get(node, ()) if child not in found]
            found.update(front)
        return found - (set() if include_self else {identifier})

    def _climb(self, identifier: str) -> dict[str, int]:
        """Return the number of is_a steps from a type to itself and each of its ancestors."""
        self.name(identifier)
        steps, front, distance = {identifier: 0}, [identifier], 0
        while front:
            distance += 1
            front = [parent for node in front for parent in self._parents[node] if parent not in steps]
            steps.update(dict.fromkeys(front, distance))
        return steps

    def is_a(self, identifier: str, other: str) -> bool:
        """Return whether a type is another one, or below it."""
        return other in self._climb(identifier)

    def closest_common_ancestor(self, identifiers: Iterable[str]) -> str | None:
        """Return the most specific type that is, or is above, all of some types; None if there is none.

        It is the one with the fewest descendants; then the smallest id.
        """
        lines = [self._climb(identifier) for identifier in identifiers]
        if not lines:
            return None
        common = set.intersection(*(set(line) for line in lines))
        # A type has fewer descendants than its ancestors, so that no common ancestor is below this one.
        return min(common, key=lambda node: (len(self.descendants(node)), node), default=None)

    def distance(self, identifier: str, other: str) -> int | None:
        """Return the smallest number of is_a steps from one type up to a common ancestor and down to the other."""
        one, two = self._climb(identifier), self._climb(other)
        return min((one[node] + two[node] for node in one.keys() & two.keys()), default=None)

    def agrees(self, predicted: str, truth: str) -> bool:
        """Return whether a predicted label is right, for a true label that may be coarser.

        Parameters
        ----------
        predicted, truth : str
            Labels as `find` takes them. A label that the ontology does not know agrees with itself only.
        """
        return bool(self.label_matrix([truth, predicted])[0, 1])

    def label_matrix(self, labels: Sequence[str]) -> np.ndarray:
        """Return which labels are right where which are true.

        Parameters
        ----------
        labels : sequence of str, length n
            Labels as `find` takes them. One that the ontology does not know satisfies only itself.

        Returns
        -------
        numpy.ndarray, bool, shape (n, n)
            ``[i, j]``: label j is label i or below it, so that predicting j is right where i is true.
        """
        ids = [self.find(label) for label in labels]
        lines = [set() if identifier is None else set(self._climb(identifier)) for identifier in ids]
        return np.array(
            [
                [truth == label or identifier in line for label, line in zip(labels, lines, strict=True)]
                for truth, identifier in zip(labels, ids, strict=True)
            ],
            dtype=bool,
        ).reshape(len(labels), len(labels))


def _rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.split("\n")[1:] if line]

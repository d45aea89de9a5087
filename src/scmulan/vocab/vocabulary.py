"""Vocabulary: tokens, their families and their ids.

A vocabulary is an ordered list of tokens; a token's index is its id, as in the published model, whose 2,222 tokens are
one of the vocabularies read here. Two tokens may share a name if their families differ (a coarse and a fine "B cell"),
and one token may be in two families (the published list has such). Texts for biologists, errors among them, call
tokens words.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import numpy as np

from scmulan.errors import VocabularyError
from scmulan.resources import read_text

FORMAT = "scmulan-vocabulary/1"


class Family(StrEnum):
    """Kind of a token."""

    END = "end"
    GENE = "gene"
    ORGAN = "organ"
    REGION = "region"
    AGE = "age"
    SEX = "sex"
    STATUS = "status"
    TECHNOLOGY = "technology"
    COARSE = "coarse_type"
    FINE = "fine_type"
    PROMPT = "prompt"


METADATA = (
    Family.ORGAN,
    Family.REGION,
    Family.AGE,
    Family.SEX,
    Family.STATUS,
    Family.TECHNOLOGY,
    Family.COARSE,
    Family.FINE,
)

# Other names of a family in prompts and obs columns.
FIELD_NAMES = {
    "cell_type": Family.FINE,
    "celltype": Family.FINE,
    "cell_type_coarse": Family.COARSE,
    "tech": Family.TECHNOLOGY,
    "assay": Family.TECHNOLOGY,
    "tissue": Family.ORGAN,
    "disease": Family.STATUS,
    "gender": Family.SEX,
}

TASK_NAMES = ("generate", "annotate", "locate")


def family_of_field(field: str) -> Family:
    """Return the family of a metadata field such as ``cell_type``, ``organ`` or ``tech``.

    Raises
    ------
    VocabularyError
        If there is no such field.
    """
    key = field.strip().lower()
    if key in FIELD_NAMES:
        return FIELD_NAMES[key]
    if key in METADATA:
        return Family(key)
    known = ["cell_type", "cell_type_coarse", *(f for f in METADATA if f not in (Family.COARSE, Family.FINE))]
    raise VocabularyError(f"unknown metadata field {field!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ordered tokens with their families.

    Parameters
    ----------
    tokens
        Names in id order.
    families
        Ids of each family, ascending. Every token is in at least one family.
    prompts
        Id of the prompt token of each task (``generate``, ``annotate``, ``locate``).

    Raises
    ------
    VocabularyError
        If a token has no family, a family has a name twice or an id that does not exist, there is not exactly one end
        token, or the prompt of a task is no prompt token.
    """

    tokens: tuple[str, ...]
    families: Mapping[Family, tuple[int, ...]]
    prompts: Mapping[str, int]

    def __post_init__(self) -> None:
        has_family = np.zeros(len(self.tokens), dtype=bool)
        for family in Family:
            ids = np.asarray(self.families.get(family, ()), dtype=np.int64)
            if ids.size and (ids.min() < 0 or ids.max() >= len(self.tokens)):
                raise VocabularyError(f"family {family} names id {ids.max()}, but there are {len(self.tokens)} words")
            names = [self.tokens[i] for i in ids]
            if len(set(names)) != len(names):
                twice = next(n for n in names if names.count(n) > 1)
                raise VocabularyError(f"family {family} has the word {twice!r} twice")
            has_family[ids] = True
        if not has_family.all():
            raise VocabularyError(f"word {self.tokens[int(np.argmin(has_family))]!r} belongs to no family")
        if len(self.families.get(Family.END, ())) != 1:
            raise VocabularyError("a vocabulary needs exactly one end word")
        for task, token in self.prompts.items():
            if token not in self.families.get(Family.PROMPT, ()):
                raise VocabularyError(f"the prompt of task {task!r} is id {token}, which is no prompt word")

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def ids(self, family: Family) -> np.ndarray:
        """Return the ids of a family: int64, ascending."""
        return np.asarray(self.families.get(family, ()), dtype=np.int64)

    def names(self, family: Family) -> list[str]:
        """Return the names of a family in id order."""
        return [self.tokens[i] for i in self.families.get(family, ())]

    @property
    def genes(self) -> list[str]:
        """Genes in id order."""
        return self.names(Family.GENE)

    @property
    def end(self) -> int:
        """Id of the token that ends a sentence."""
        return int(self.families[Family.END][0])

    @cached_property
    def _by_name(self) -> dict[tuple[Family, str], int]:
        return {(family, self.tokens[i]): i for family, ids in self.families.items() for i in ids}

    @cached_property
    def is_gene(self) -> np.ndarray:
        """Bool ``[tokens]``: whether a token is a gene."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        mask[self.ids(Family.GENE)] = True
        return mask

    @cached_property
    def gene_index(self) -> np.ndarray:
        """int64 ``[tokens]``: index of a token among the genes, −1 where it is none."""
        index = np.full(len(self.tokens), -1, dtype=np.int64)
        ids = self.ids(Family.GENE)
        index[ids] = np.arange(len(ids))
        return index

    def find(self, family: Family, name: str) -> int | None:
        """Return the id of a token, or None if the family lacks it."""
        return self._by_name.get((family, name))

    def id(self, family: Family, name: str) -> int:
        """Return the id of a token; case does not matter.

        Raises
        ------
        VocabularyError
            If the family lacks the name; the nearest names are suggested.
        """
        found = self.find(family, name)
        if found is not None:
            return found
        names = self.names(family)
        folded = {n.casefold(): n for n in names}
        if name.casefold() in folded:
            return self._by_name[(family, folded[name.casefold()])]
        near = difflib.get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.5)
        near += [n for n in folded if name.casefold() in n and n not in near][:3]
        if not names:
            hint = f"this model has no words for {family}"
        elif near:
            hint = "did you mean " + ", ".join(repr(folded[n]) for n in near) + "?"
        else:
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            hint = f"it knows {len(names)}: {shown}"
        raise VocabularyError(f"this model has no {family.replace('_', ' ')} {name!r}; {hint}")

    def metadata_ids(self, metadata: Mapping[str, str]) -> list[int]:
        """Return the ids of metadata such as ``{"organ": "Blood", "cell_type": "B cell"}``, in their order.

        Raises
        ------
        VocabularyError
            If a field or name is unknown, or two fields are of one family.
        """
        families = [family_of_field(field) for field in metadata]
        twice = next((f for f in families if families.count(f) > 1), None)
        if twice is not None:
            raise VocabularyError(f"{twice.replace('_', ' ')} is given twice among {', '.join(metadata)}: give it once")
        return [self.id(family, str(name)) for family, name in zip(families, metadata.values(), strict=True)]

    @classmethod
    def build(
        cls,
        genes: Sequence[str],
        metadata: Mapping[Family, Iterable[str]],
        prompts: Sequence[str] = ("<generate>", "<annotate>", "<locate>"),
    ) -> "Vocabulary":
        """Make a vocabulary of end token, genes, metadata families and one prompt token per task, in that order.

        Parameters
        ----------
        genes
            Names of the genes.
        metadata
            Names of each family of ``METADATA``; those that are missing are empty.
        prompts
            Names of the prompt tokens, in the order of ``TASK_NAMES``.
        """
        tokens: list[str] = ["<E>"]
        families: dict[Family, tuple[int, ...]] = {Family.END: (0,)}
        for family, names in ((Family.GENE, genes), *((f, metadata.get(f, ())) for f in METADATA)):
            names = list(names)
            families[family] = tuple(range(len(tokens), len(tokens) + len(names)))
            tokens += names
        families[Family.PROMPT] = tuple(range(len(tokens), len(tokens) + len(prompts)))
        tokens += prompts
        return cls(tuple(tokens), families, dict(zip(TASK_NAMES, families[Family.PROMPT], strict=True)))

    @classmethod
    def published(cls) -> "Vocabulary":
        """Return the vocabulary of the published release: 2,222 tokens, of which 2,000 are genes.

        Its prompt tokens are ``<PCT>`` (annotate) and ``<SPToken1>`` (generate). Which of the other special tokens
        stood for organ and region is not published; ``<SPToken2>`` stands in for it here.
        """
        return cls.from_release(json.loads(read_text("vocabulary_release.json")))

    @classmethod
    def from_release(cls, raw: Mapping[str, list[str]]) -> "Vocabulary":
        """Make a vocabulary from the published lists (``tokens``, ``genes``, ``organs`` …)."""
        tokens = tuple(raw["tokens"])
        id_of = {token: i for i, token in enumerate(tokens)}
        lists = {
            Family.GENE: "genes",
            Family.ORGAN: "organs",
            Family.REGION: "regions",
            Family.AGE: "age_bins",
            Family.SEX: "sexes",
            Family.STATUS: "sample_statuses",
            Family.TECHNOLOGY: "sequencing_technologies",
            Family.COARSE: "coarse_cell_types",
            Family.FINE: "fine_cell_types",
        }
        families = {f: tuple(sorted(id_of[name] for name in raw[key])) for f, key in lists.items()}
        families[Family.END] = (id_of["<E>"],)
        families[Family.PROMPT] = tuple(i for i, token in enumerate(tokens) if token.startswith(("<PCT", "<SPToken")))
        prompts = {"generate": id_of["<SPToken1>"], "annotate": id_of["<PCT>"], "locate": id_of["<SPToken2>"]}
        return cls(tokens, families, prompts)

    def extend(self, family: Family, names: Iterable[str]) -> "Vocabulary":
        """Return a vocabulary with the names that ``family`` lacks appended at the end; old ids stay."""
        new = [n for n in dict.fromkeys(names) if self.find(family, n) is None]
        first = len(self.tokens)
        families = dict(self.families)
        families[family] = (*families.get(family, ()), *range(first, first + len(new)))
        return Vocabulary((*self.tokens, *new), families, self.prompts)

    def to_json(self) -> dict:
        """Return the contents as plain JSON types."""
        return {
            "format": FORMAT,
            "words": list(self.tokens),
            "families": {str(f): [int(i) for i in self.families[f]] for f in Family if f in self.families},
            "prompts": {task: int(i) for task, i in self.prompts.items()},
        }

    @classmethod
    def from_json(cls, raw: Mapping) -> "Vocabulary":
        """Make a vocabulary from parsed JSON: this package's format or the published lists."""
        if "tokens" in raw:
            return cls.from_release(raw)
        if raw.get("format") != FORMAT:
            raise VocabularyError(f"not a vocabulary: format is {raw.get('format')!r}, expected {FORMAT!r}")
        families = {Family(f): tuple(ids) for f, ids in raw["families"].items()}
        return cls(tuple(raw["words"]), families, dict(raw["prompts"]))

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read a vocabulary from a JSON file: this package's format or the published lists.

        Raises
        ------
        VocabularyError
            If it is not JSON, or no vocabulary.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise VocabularyError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from None
        return cls.from_json(raw)

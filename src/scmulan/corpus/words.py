"""The vocabulary of a corpus: given, given and extended, or new."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scmulan.corpus.plan import measures
from scmulan.corpus.select import GeneScores
from scmulan.corpus.spec import CorpusSpec
from scmulan.corpus.store import VOCABULARY
from scmulan.errors import VocabularyError
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.outputs import atomic_path

# Genes that 16 bits tell apart.
LARGEST = 2**16


def choose_vocabulary(
    spec: CorpusSpec,
    surveys: Sequence[dict[str, Any]],
    work: Path,
    run: Callable[[str, Sequence[Any]], Any],
    block_values: int,
) -> Vocabulary:
    """Words of the corpus, new or given; written into it."""
    path = work / "corpus" / VOCABULARY
    found: dict[Family, Counter[str]] = {family: Counter() for family in METADATA}
    for survey in surveys:
        for family, words in survey["words"].items():
            found[Family(family)].update({word: n for word, n in words.items() if word})
    if spec.vocabulary:
        vocabulary = Vocabulary.published() if spec.vocabulary == "published" else Vocabulary.load(spec.vocabulary)
        for family, words in found.items():
            new = sorted(word for word in words if vocabulary.find(family, word) is None)
            if new and spec.unknown == "refuse":
                _refuse(spec, surveys, family, new, vocabulary)
            if spec.unknown == "add":
                vocabulary = vocabulary.extend(family, new)
    else:
        scores = GeneScores()
        studies = measures(spec, surveys, work, block_values)
        run("genes", [part for parts in studies for part in parts])
        for parts in studies:
            genes, moments = parts[0].moments()
            for part in parts[1:]:
                moments.merge(part.moments()[1])
            scores.add_moments(genes, moments)
        vocabulary = Vocabulary.build(
            scores.best(spec.genes), {family: sorted(words) for family, words in found.items()}
        )
    if len(vocabulary.genes) > LARGEST:
        raise VocabularyError(f"{len(vocabulary.genes):,} genes, but shards can name {LARGEST:,}: choose fewer")
    with atomic_path(path) as temporary:
        vocabulary.save(temporary)
    return vocabulary


def _refuse(
    spec: CorpusSpec, surveys: Sequence[dict[str, Any]], family: Family, new: list[str], vocabulary: Vocabulary
) -> None:
    word = new[0]
    where = next(i for i, survey in enumerate(surveys) if word in survey["words"].get(str(family), {}))
    try:
        vocabulary.id(family, word)
    except VocabularyError as error:
        hint = str(error).partition("; ")[2]
    else:
        hint = "it differs in upper or lower case only"
    raise VocabularyError(
        f"{spec.studies[where].file}: {family} {word!r} is not in the vocabulary, nor are {len(new) - 1} others of "
        f"{family}; rename them in [rename.{family}], or say unknown = 'drop' or 'add' ({hint})"
    )

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.sentences import Sentences, decode, encode, gene_prompts
from scmulan.vocab.tasks import ANNOTATE, GENERATE, LOCATE, TASKS, draw_hints
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

GENES = 9


def vocabulary() -> Vocabulary:
    names = {f: [f"{f} {i}" for i in range(3)] for f in METADATA}
    return Vocabulary.build([f"G{i}" for i in range(GENES)], names)


@st.composite
def cells(draw):
    """Gene words and metadata of up to four cells; a cell may have no gene and no metadata."""
    v = vocabulary()
    sets = draw(st.lists(st.dictionaries(st.integers(0, GENES - 1), st.integers(1, 10)), min_size=1, max_size=4))
    metadata = [
        {f: int(v.ids(f)[draw(st.integers(0, 2))]) for f in METADATA if draw(st.booleans())} for _ in range(len(sets))
    ]
    indptr = np.concatenate([[0], np.cumsum([len(s) for s in sets])])
    gene = np.array([g for s in sets for g in sorted(s)], dtype=np.int32)
    level = np.array([s[g] for s in sets for g in sorted(s)], dtype=np.uint8)
    zeros = np.zeros(len(sets), dtype=np.float32)
    return GeneTokens(indptr, gene, level, zeros, zeros), metadata


@settings(deadline=None)
@given(cells(), st.sampled_from(sorted(TASKS)), st.integers(0, 99))
def test_decode_reads_what_encode_wrote(drawn, name, seed):
    words, metadata = drawn
    task, v = TASKS[name], vocabulary()
    sentences = encode(words, v, task, metadata, np.random.default_rng(seed))
    back = decode(sentences, v)
    assert np.array_equal(back.indptr, words.indptr)
    assert np.array_equal(back.gene, words.gene) and np.array_equal(back.level, words.level)
    told = {*task.given, *task.hinted, *task.asked}
    assert back.metadata == [{f: w for f, w in m.items() if f in told} for m in metadata]
    assert back.complete.all()
    for i in range(len(sentences)):
        entity, value = sentences[i]
        assert len(set(entity.tolist())) == len(entity)  # a word is never said twice
        assert entity[sentences.prompt[i] - 1] == v.prompts[name]
        assert ((value > 0) == v.is_gene[entity]).all()


@pytest.mark.parametrize(("task", "asked"), [(GENERATE, {Family.GENE}), (LOCATE, {Family.ORGAN, Family.REGION})])
def test_only_what_is_asked_can_be_said(task, asked):
    v = vocabulary()
    allowed = {i for f in asked for i in v.ids(f).tolist()} | {v.end}
    assert set(np.flatnonzero(task.sayable(v)).tolist()) == allowed


def test_hints_are_every_subset_of_what_is_known():
    v = vocabulary()
    known = {f: int(v.ids(f)[0]) for f in (Family.ORGAN, Family.SEX, Family.FINE)}
    rng = np.random.default_rng(0)
    seen = {frozenset(draw_hints(GENERATE, known, rng)) for _ in range(400)}
    assert len(seen) == 8  # all subsets of three, the empty one too
    assert all(s <= set(known.values()) for s in seen)
    assert {frozenset(draw_hints(ANNOTATE, known, rng)) for _ in range(50)} == {
        frozenset(),
        frozenset({known[Family.ORGAN]}),
    }


def test_prompts_give_genes_in_reverse_order_then_metadata_then_the_task():
    v = vocabulary()
    none = np.zeros(2, dtype=np.float32)
    words = GeneTokens(np.array([0, 2, 2]), np.array([1, 4], np.int32), np.array([3, 9], np.uint8), none, none)
    organ = int(v.ids(Family.ORGAN)[1])
    sentences = gene_prompts(words, v, ANNOTATE, [{Family.ORGAN: organ}, {}])
    assert sentences[0][0].tolist() == [5, 2, organ, v.prompts["annotate"]]
    assert sentences[0][1].tolist() == [9, 3, 0, 0]
    assert sentences[1][0].tolist() == [v.prompts["annotate"]]  # a cell without genes still has a prompt


def test_take_and_pad():
    s = Sentences.join([(np.array([1, 2, 3]), np.array([4, 0, 0]), 2), (np.array([5]), np.array([1]), 1)])
    swapped = s.take([1, 0, 1])
    assert [swapped[i][0].tolist() for i in range(3)] == [[5], [1, 2, 3], [5]]
    entity, value, lengths = swapped.padded()
    assert entity.tolist() == [[5, 0, 0], [1, 2, 3], [5, 0, 0]] and value[1].tolist() == [4, 0, 0]
    assert lengths.tolist() == [1, 3, 1]

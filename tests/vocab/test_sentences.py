"""Sentences are written, batched and read back without loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmulan.vocab.binning import GeneTokens
from scmulan.vocab.sentences import Sentences, decode, gene_prompts
from scmulan.vocab.tasks import ANNOTATE, GENERATE, LOCATE, TASKS
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

GENES = 9


def vocabulary() -> Vocabulary:
    names = {f: [f"{f} {i}" for i in range(3)] for f in METADATA}
    return Vocabulary.build([f"G{i}" for i in range(GENES)], names)


@st.composite
def cells(draw):
    """Gene tokens and metadata of up to four cells; a cell may have no gene and no metadata."""
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


def training_sentence(v, task, genes, levels, metadata, rng):
    """Entities, values and prompt length of one cell, all hints in the prompt; genes and hints in random order."""
    pairs = list(zip(v.ids(Family.GENE)[genes].tolist(), levels.tolist(), strict=True))
    hints = [(metadata[f], 0) for f in task.hints if f in metadata]
    if Family.GENE in task.prompt:
        prompt, target = [*hints, *pairs], [(metadata[f], 0) for f in task.target if f in metadata]
        prompt = [prompt[i] for i in rng.permutation(len(prompt))]
    else:
        prompt, target = hints, [pairs[i] for i in rng.permutation(len(pairs))]
    entity, value = zip(*prompt, (v.prompts[task.name], 0), *dict.fromkeys(target), (v.end, 0), strict=True)
    return np.array(entity), np.array(value), len(prompt) + 1


@settings(deadline=None)
@given(cells(), st.sampled_from(sorted(TASKS)), st.integers(0, 99))
def test_decode_reads_training_sentences(drawn, name, seed):
    tokens, metadata = drawn
    task, v, rng = TASKS[name], vocabulary(), np.random.default_rng(seed)
    parts = [slice(a, b) for a, b in zip(tokens.indptr[:-1], tokens.indptr[1:], strict=True)]
    sentences = Sentences.join(
        [
            training_sentence(v, task, tokens.gene[part], tokens.level[part], known, rng)
            for part, known in zip(parts, metadata, strict=True)
        ]
    )
    back = decode(sentences, v)
    assert np.array_equal(back.indptr, tokens.indptr)
    assert np.array_equal(back.gene, tokens.gene) and np.array_equal(back.level, tokens.level)
    families = {*task.prompt, *task.hints, *task.target}
    assert back.metadata == [{f: i for f, i in known.items() if f in families} for known in metadata]
    assert back.complete.all()
    for i in range(len(sentences)):
        entity, value = sentences[i]
        assert len(set(entity.tolist())) == len(entity)  # no token occurs twice
        assert entity[sentences.prompt[i] - 1] == v.prompts[name]
        assert ((value > 0) == v.is_gene[entity]).all()


@pytest.mark.parametrize(("task", "families"), [(GENERATE, {Family.GENE}), (LOCATE, {Family.ORGAN, Family.REGION})])
def test_only_target_families_and_the_end_are_allowed(task, families):
    v = vocabulary()
    allowed = {i for f in families for i in v.ids(f).tolist()} | {v.end}
    assert set(np.flatnonzero(task.allowed(v)).tolist()) == allowed


def test_prompts_hold_genes_in_reverse_order_then_metadata_then_the_task():
    v = vocabulary()
    none = np.zeros(2, dtype=np.float32)
    tokens = GeneTokens(np.array([0, 2, 2]), np.array([1, 4], np.int32), np.array([3, 9], np.uint8), none, none)
    organ = int(v.ids(Family.ORGAN)[1])
    sentences = gene_prompts(tokens, v, ANNOTATE, [{Family.ORGAN: organ}, {}])
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

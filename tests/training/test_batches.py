"""Batches are a pure function of (seed, step), and their sentences say what the task says."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from scmulan.language.sentence import Sentences
from scmulan.language.tasks import ANNOTATE, GENERATE, LOCATE, TASKS
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.training.batches import BatchConfig, Batches


def make(store, vocabulary, seed=0, satisfies=None, **settings):
    for limit in ("prompt_words", "target_words"):  # one limit for all batches, unless a test is about limits
        settings.setdefault(limit, 1000)
        settings.setdefault(f"{limit}_least", settings[limit])
    cells = settings.pop("cells", 4)
    wide = {"words": 10**6, "positions_total": 10**6}
    config = BatchConfig(**{"cells": cells, "generate_cells": cells, "pool": 4, "positions": 8, **wide, **settings})
    return Batches(store, vocabulary, config, seed, satisfies)


def tensors(batch):
    targets = {k: v for k, v in vars(batch.targets).items() if isinstance(v, torch.Tensor)}
    return {"entity": batch.entity, "value": batch.value, "positions": batch.positions, **targets}


def same(a, b):
    one, two = tensors(a), tensors(b)
    return (
        a.task == b.task
        and one.keys() == two.keys()
        and all(one[k].shape == two[k].shape and torch.equal(one[k], two[k]) for k in one)
    )


def read(batch):
    """(prompt words, words after the prompt, target words in order) of each sentence."""
    width = batch.entity.shape[1]
    start = batch.positions - batch.targets.row * width - batch.targets.said + 1
    out = []
    for i in range(len(batch.entity)):
        prompt = int(start[batch.targets.row == i][0])
        assert (start[batch.targets.row == i] == prompt).all()
        place = batch.targets.place[i]
        target = place.argsort()[(place < 0).sum() :].tolist()
        out.append((batch.entity[i, :prompt].tolist(), batch.entity[i, prompt:].tolist(), target))
    return out


def known(store, cell, *families):
    words = {f: int(store.metadata[cell, METADATA.index(f)]) for f in families}
    return {f: w for f, w in words.items() if w >= 0}


def test_a_batch_follows_from_seed_and_step_alone(store, vocabulary):
    relations = np.eye(len(vocabulary), dtype=bool)
    first = make(store, vocabulary, 3, relations)
    asked = [first.batch(step) for step in range(12)]
    assert all(same(first.batch(step), asked[step]) for step in (7, 0, 7))
    fresh = make(store, vocabulary, 3, relations)
    assert all(same(fresh.batch(step), asked[step]) for step in reversed(range(12)))
    assert not any(same(a, b) for a, b in itertools.pairwise(asked))
    other = make(store, vocabulary, 4, relations)
    assert not any(same(other.batch(step), asked[step]) for step in range(12))


def test_tasks_come_in_their_shares(store, vocabulary):
    shares = {"annotate": 0.5, "generate": 0.3, "locate": 0.2}
    batches = make(store, vocabulary, cells=1, pool=8, tasks=shares)
    tasks = [batches.batch(step).task for step in range(800)]
    for task, share in shares.items():
        assert abs(tasks.count(task) - 800 * share) < 4 * (800 * share * (1 - share)) ** 0.5
    only = make(store, vocabulary, tasks={"generate": 1.0})
    assert {only.batch(step).task for step in range(8)} == {"generate"}


def test_a_pool_is_sorted_by_length(store, vocabulary):
    """Every cell of a pool's batches is drawn for it, and batches of one task do not overlap in length."""
    lengths = np.diff(store.matrix.indptr)

    def words(pool):
        batches = make(store, vocabulary, tasks={"generate": 1.0}, pool=pool, cells=4, positions=0)
        found = [batches.batch(step).targets.place for step in range(8)]
        return [np.sort((place >= 0).sum(1).numpy() - 1) for place in found]

    sizes = sorted(words(8), key=lambda n: n[0])
    assert all(a[-1] <= b[0] for a, b in itertools.pairwise(sizes))
    alone = sorted(words(1), key=lambda n: n[0])
    assert not all(a[-1] <= b[0] for a, b in itertools.pairwise(alone))
    assert set(np.concatenate(sizes)) <= set(lengths)


@pytest.mark.parametrize("task", TASKS)
def test_sentences_say_what_the_task_says(store, vocabulary, task):
    task = TASKS[task]
    batches = make(store, vocabulary, prompt_words=12)
    hinted_sizes = set()
    for cell in np.flatnonzero(batches.weights[task.name]).repeat(4):
        batch = batches.make(task, np.array([cell]), np.random.default_rng(len(hinted_sizes) + cell))
        assert batch.task == task.name
        prompt, said, target = read(batch)[0]
        assert prompt[-1] == vocabulary.prompts[task.name]
        assert len(set(prompt)) == len(prompt)
        assert not set(prompt) & set(target)
        assert said == target  # the target is read in the order of its places
        own = {int(vocabulary.ids(Family.GENE)[g]) for g in store.matrix[cell].indices}
        genes = {w for w in prompt[:-1] if vocabulary.is_gene[w]}
        hints = set(prompt[:-1]) - genes
        assert hints <= set(known(store, cell, *task.hinted).values())
        hinted_sizes.add(len(hints))
        if task is GENERATE:
            assert not genes
            assert set(target) == own | {vocabulary.end}
        else:
            assert genes <= own
            assert 0 < len(genes) <= 12
            assert set(target) == {*known(store, cell, *task.asked).values(), vocabulary.end}
        assert target[-1] == vocabulary.end
    assert len(hinted_sizes) > 1


def test_values_are_the_bins_of_the_cell(store, vocabulary):
    batches = make(store, vocabulary, thin=0.0, panel=0.0)
    for cell in range(0, 60, 4):
        written = batches.make(GENERATE, np.array([cell]), np.random.default_rng(0)).targets.level[0]
        given = batches.make(TASKS["annotate" if cell < 40 else "generate"], np.array([cell]), np.random.default_rng(1))
        prompt, said, target = read(given)[0]
        assert written.max() == 10 and not written[~torch.from_numpy(vocabulary.is_gene)].any()
        for word, value in zip([*prompt, *said], given.value[0].tolist(), strict=True):
            assert value == written[word]
        if cell < 40:
            assert not given.targets.level[0, target].any()


def test_a_cut_target_still_holds_the_whole_cell(store, vocabulary):
    batches = make(store, vocabulary, target_words=5, positions=3)
    for cell in range(20):
        batch = batches.make(GENERATE, np.array([cell]), np.random.default_rng(cell))
        assert (batch.targets.said < 6).all()
        _, said, target = read(batch)[0]
        assert said == target[:5]
        assert len(target) == store.matrix[cell].nnz + 1


@pytest.mark.parametrize(("positions", "target_words"), [(4, 1000), (2, 1000), (0, 1000), (4, 10)])
def test_sampled_positions_estimate_the_mean_over_all_of_them(store, vocabulary, positions, target_words):
    batches = make(store, vocabulary, positions=positions, target_words=target_words)
    number = [7, 21, 3]
    read_words = [min(n, target_words) for n in number]
    lengths = np.array(read_words) + 2
    sentences = Sentences(np.concatenate(([0], np.cumsum(lengths))), np.zeros(0), np.zeros(0), np.full(3, 2))
    draws = 4000
    rng = np.random.default_rng(0)
    mean = [np.zeros(n) for n in number]
    for _ in range(draws):
        rows, said, weight = batches._positions(sentences, number, False, rng)
        for i in range(3):
            mine = rows == i
            assert weight[mine].sum() == pytest.approx(1 / 3)
            assert len(set(said[mine])) == mine.sum()
            if positions:
                assert mine.sum() == min(positions, read_words[i] + (read_words[i] < number[i]))
            mean[i][said[mine]] += 3 * weight[mine] / draws
    for n, r, m in zip(number, read_words, mean, strict=True):
        # A position after the words read (the next of a cut target) is the last one that can be asked.
        asked = n if r >= n else r + 1
        spread = (1 / max(positions - 1, 1) / asked / draws) ** 0.5
        assert np.abs(m[:asked] - 1 / asked).max() < 5 * spread
        assert not m[asked:].any()


def test_a_batch_has_as_many_cells_as_its_words_have_room_for(store, vocabulary):
    cells = np.arange(20)
    lengths = np.diff(store.matrix.indptr)[:20]
    for room in (200, 400, 10**6):
        batch = make(store, vocabulary, words=room).make(GENERATE, cells, np.random.default_rng(0))
        assert len(batch.entity) == min(20, max(4, room // lengths.max()))
        assert batch.targets.weight.sum() == pytest.approx(1.0)
        sizes = [len(target) - 1 for _, _, target in read(batch)]
        assert sorted(sizes) != sizes and not set(sizes) - set(lengths)  # any cells, not the first or shortest ones


def test_positions_of_a_batch_are_limited_in_all(store, vocabulary):
    cells = np.arange(20)
    for total, each in ((60, 4), (200, 10), (10**6, 12)):
        batches = make(store, vocabulary, positions=12, positions_total=total)
        rows = batches.make(GENERATE, cells, np.random.default_rng(0)).targets.row
        assert np.bincount(rows).tolist() == [each] * 20


def test_batches_of_cells_to_write_have_a_number_of_their_own(store, vocabulary):
    batches = make(store, vocabulary, cells=3)
    batches.config.generate_cells = 9
    for step in range(12):
        batch = batches.batch(step)
        assert len(batch.entity) == (9 if batch.task == "generate" else 3)


def test_limits_of_batches_vary_within_their_bounds(store, vocabulary):
    batches = make(store, vocabulary, prompt_words=30, prompt_words_least=5, target_words=30, target_words_least=5)
    cells = np.arange(8)
    prompts, targets = set(), set()
    for seed in range(60):
        batch = batches.make(LOCATE, cells, np.random.default_rng(seed))
        prompts.add(max(sum(vocabulary.is_gene[w] for w in prompt) for prompt, _, _ in read(batch)))
        batch = batches.make(GENERATE, cells, np.random.default_rng(seed))
        targets.add(int(batch.targets.said.max()))
    assert min(prompts) >= 5 and max(prompts) <= 30 and len(prompts) > 10
    assert min(targets) >= 3 and max(targets) <= 30 and len(targets) > 10


def test_labels_are_asked_for_at_every_position(store, vocabulary):
    batches = make(store, vocabulary, positions=1)
    for task in (ANNOTATE, LOCATE):
        usable = np.flatnonzero(batches.weights[task.name])
        batch = batches.make(task, usable, np.random.default_rng(0))
        for i, (_, _, target) in enumerate(read(batch)):
            mine = batch.targets.row == i
            assert sorted(batch.targets.said[mine].tolist()) == list(range(len(target)))
            assert batch.targets.weight[mine].sum() == pytest.approx(1 / len(usable))


def test_other_panels_and_depths_never_invent_a_gene(store, vocabulary):
    cells = np.arange(len(store))
    plain = make(store, vocabulary, panel=0.0, thin=0.0)._vary(cells, np.random.default_rng(0))
    for settings in ({"panel": 1.0, "thin": 0.0}, {"panel": 0.0, "thin": 1.0}, {"panel": 1.0, "thin": 1.0}):
        batches = make(store, vocabulary, **settings)
        fewer, other_level = 0, 0
        for seed in range(5):
            varied = batches._vary(cells, np.random.default_rng(seed))
            for cell in cells:
                one, two = (slice(w.indptr[cell], w.indptr[cell + 1]) for w in (plain, varied))
                before = dict(zip(plain.gene[one], plain.level[one], strict=True))
                after = dict(zip(varied.gene[two], varied.level[two], strict=True))
                assert after.keys() <= before.keys() and after
                fewer += len(after) < len(before)
                other_level += any(after[g] != before[g] for g in after)
        assert fewer > 20 and other_level > (40 if batches.config.thin else 0)
    logged = np.flatnonzero(store.logged)  # log1p values cannot be thinned
    thinned = make(store, vocabulary, panel=0.0, thin=1.0)._vary(logged, np.random.default_rng(0))
    assert thinned.lengths.tolist() == plain.lengths[logged].tolist()


def test_cells_without_labels_are_never_annotated(store, vocabulary):
    batches = make(store, vocabulary)
    unlabelled = (store.words(Family.FINE) < 0) & (store.words(Family.COARSE) < 0)
    assert unlabelled.any()
    assert not batches.weights["annotate"][unlabelled].any()
    assert (batches.weights["generate"][unlabelled] > 0).all()
    types = np.concatenate([vocabulary.ids(f) for f in (Family.COARSE, Family.FINE)])
    for step in range(60):
        batch = batches.batch(step)
        if batch.task == "annotate":
            assert (batch.targets.place[:, types] >= 0).any(1).all()


def test_rare_types_and_small_studies_get_more_than_their_share(store, vocabulary):
    weights = make(store, vocabulary, study_power=0.0, label_power=0.0).weights["generate"]
    assert weights[store.study == 0].sum() == pytest.approx(0.5)
    label = np.where(store.words(Family.FINE) >= 0, store.words(Family.FINE), store.words(Family.COARSE))
    for study in (0, 1):
        sums = [weights[(store.study == study) & (label == w)].sum() for w in np.unique(label[store.study == study])]
        assert np.ptp(sums) < 1e-12
    plain = make(store, vocabulary, study_power=1.0, label_power=1.0).weights["generate"]
    assert np.ptp(plain) < 1e-12


def test_generation_may_say_what_the_study_measured(store, vocabulary):
    batches = make(store, vocabulary)
    cells = np.array([0, 50])
    batch = batches.make(GENERATE, cells, np.random.default_rng(0))
    genes = vocabulary.ids(Family.GENE)
    measured = {tuple(row) for row in batch.targets.allowed[:, genes].tolist()}
    assert measured == {tuple(row) for row in store.measured.tolist()}
    rest = ~vocabulary.is_gene
    rest[vocabulary.end] = False
    assert batch.targets.allowed[:, vocabulary.end].all() and not batch.targets.allowed[:, rest].any()
    assert batch.targets.allowed[batch.targets.place >= 0].all()


@pytest.mark.parametrize("task", [ANNOTATE, LOCATE])
def test_an_answer_about_labels_holds_labels(store, vocabulary, task):
    batches = make(store, vocabulary)
    batch = batches.make(task, np.flatnonzero(batches.weights[task.name]), np.random.default_rng(0))
    sayable = {int(i) for f in task.asked for i in vocabulary.ids(f)} | {vocabulary.end}
    for row in batch.targets.allowed:
        assert set(row.nonzero()[:, 0].tolist()) == sayable


def test_a_task_that_no_cell_can_serve_is_refused(store, vocabulary):
    nowhere = replace(store, metadata=np.full_like(store.metadata, -1))
    with pytest.raises(ValueError, match="annotate"):
        make(nowhere, vocabulary)
    assert make(nowhere, vocabulary, tasks={"generate": 1.0}).batch(0).task == "generate"


def test_a_word_of_two_families_is_said_once(store):
    """The published vocabulary has one word for the coarse and the fine "B cell"."""
    published = Vocabulary.published()
    both = published.id(Family.FINE, "B cell")
    assert both == published.id(Family.COARSE, "B cell")
    metadata = np.full_like(store.metadata, -1)
    metadata[:, [METADATA.index(Family.COARSE), METADATA.index(Family.FINE)]] = both
    genes = store.matrix.copy()
    genes.resize(len(store), len(published.genes))
    measured = np.zeros((2, len(published.genes)), dtype=bool)
    cells = replace(store, matrix=genes, metadata=metadata, measured=measured)
    batches = make(cells, published, tasks={"annotate": 0.5, "generate": 0.5})
    for seed in range(5):
        for task in (ANNOTATE, GENERATE):
            batch = batches.make(task, np.arange(5), np.random.default_rng(seed))
            for prompt, said, target in read(batch):
                assert len(set(prompt)) == len(prompt)
                if task is ANNOTATE:
                    assert said[:2] == target == [both, published.end]

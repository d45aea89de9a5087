"""Batches are a pure function of (seed, step), and their sentences say what the task says."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scmulan.data.memory import build_store, build_vocabulary, read_studies
from scmulan.data.spec import read_spec
from scmulan.data.store import Selection
from scmulan.errors import RecipeError
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.losses import objective_loss
from scmulan.train.sentence_kernels import downsample
from scmulan.vocab.binning import tokenize
from scmulan.vocab.tasks import ANNOTATE, GENERATE, LOCATE, TASKS
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


def make(store, vocabulary, seed=0, satisfies=None, **settings):
    for genes in ("prompt_genes", "target_genes"):  # one limit for all batches, unless a test is about limits
        settings.setdefault(f"max_{genes}", 1000)
        settings.setdefault(f"min_{genes}", settings[f"max_{genes}"])
    cells = settings.pop("cells", 4)
    wide = {"tokens": 10**6, "max_positions": 10**6}
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
    start = batch.positions - batch.targets.row * width - batch.targets.index + 1
    out = []
    for i in range(len(batch.entity)):
        prompt = int(start[batch.targets.row == i][0])
        assert (start[batch.targets.row == i] == prompt).all()
        place = batch.targets.order[i]
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
    """A pool's batches of one task do not overlap in length, and are of cells drawn for it."""

    def words(pool):
        batches = make(store, vocabulary, tasks={"generate": 1.0}, pool=pool, min_target_genes=5)
        return [np.sort([len(entity) for _, entity, *_ in sentences(batches.batch(step))]) for step in range(8)]

    sizes = sorted(words(8), key=lambda n: (n[0], n[-1]))
    assert all(a[-1] <= b[0] for a, b in itertools.pairwise(sizes))
    alone = sorted(words(1), key=lambda n: (n[0], n[-1]))
    assert not all(a[-1] <= b[0] for a, b in itertools.pairwise(alone))


@pytest.mark.parametrize("task", TASKS)
def test_sentences_say_what_the_task_says(store, vocabulary, task):
    task = TASKS[task]
    batches = make(store, vocabulary, max_prompt_genes=12)
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
        assert hints <= set(known(store, cell, *task.hints).values())
        hinted_sizes.add(len(hints))
        if task is GENERATE:
            assert not genes
            assert set(target) == own | {vocabulary.end}
        else:
            assert genes <= own
            assert 0 < len(genes) <= 12
            assert set(target) == {*known(store, cell, *task.target).values(), vocabulary.end}
        assert target[-1] == vocabulary.end
    assert len(hinted_sizes) > 1


def test_values_are_the_bins_of_the_cell(store, vocabulary):
    batches = make(store, vocabulary, downsample=0.0, panel=0.0)
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
    batches = make(store, vocabulary, max_target_genes=5, positions=3)
    for cell in range(20):
        batch = batches.make(GENERATE, np.array([cell]), np.random.default_rng(cell))
        assert (batch.targets.index < 6).all()
        _, said, target = read(batch)[0]
        assert said == target[:5]
        assert len(target) == store.matrix[cell].nnz + 1


@pytest.mark.parametrize(("sampled", "max_target_genes"), [(4, 1000), (2, 1000), (0, 1000), (4, 10)])
def test_sampled_positions_estimate_the_mean_over_all_of_them(store, vocabulary, sampled, max_target_genes):
    rows = 4000
    for genes in (6, 20, 2):
        cell = sp.csr_matrix((np.arange(60)[:, None] == 0) & (np.arange(60) < genes), dtype=np.float32)
        batches = make(replace(store, matrix=cell), vocabulary, positions=sampled, max_target_genes=max_target_genes)
        targets = batches.make(GENERATE, np.zeros(rows, dtype=np.int64), np.random.default_rng(genes)).targets
        number = genes + 1  # the end is a target, too
        reachable = min(number, max_target_genes + 1)  # the position after the tokens read is one, too
        row, index, weight = (x.numpy() for x in (targets.row, targets.index, targets.weight))
        assert np.bincount(row, weight) * rows == pytest.approx(np.ones(rows), rel=1e-5)
        assert len(set(zip(row, index, strict=True))) == len(row)
        assert (np.bincount(row) == (min(sampled, reachable) if sampled else reachable)).all()
        mean = np.bincount(index, weight, minlength=number)
        spread = (1 / max(sampled - 1, 1) / reachable / rows) ** 0.5
        assert np.abs(mean[:reachable] - 1 / reachable).max() < 5 * spread
        assert not mean[reachable:].any()


@pytest.mark.parametrize("order", ["weighted", "epoch"])
def test_a_batch_has_as_many_cells_as_its_words_have_room_for(store, vocabulary, order):
    sizes = set()
    for room in (200, 400, 10**6):
        batches = make(store, vocabulary, tokens=room, cells=12, pool=8, order=order, min_target_genes=4)
        for step in range(16):
            batch = batches.batch(step)
            longest = batch.entity.shape[1]
            fits = min(12, max(4, room // longest))
            if order == "weighted":
                assert len(batch.entity) == fits
            else:  # all cells have to be somewhere
                assert 1 <= len(batch.entity) <= 1.5 * fits
            assert batch.targets.weight.sum() == pytest.approx(1.0)
            sizes.add(len(batch.entity))
    assert len(sizes) > 3


def test_positions_of_a_batch_are_limited_in_all(store, vocabulary):
    cells = np.arange(20)
    for total, each in ((60, 4), (200, 10), (10**6, 12)):
        batches = make(store, vocabulary, positions=12, max_positions=total)
        rows = batches.make(GENERATE, cells, np.random.default_rng(0)).targets.row
        assert np.bincount(rows).tolist() == [each] * 20


def test_batches_of_cells_to_write_have_a_number_of_their_own(store, vocabulary):
    batches = make(store, vocabulary, cells=3, generate_cells=9)
    for step in range(12):
        batch = batches.batch(step)
        assert len(batch.entity) == (9 if batch.task == "generate" else 3)


def test_limits_of_batches_vary_within_their_bounds(store, vocabulary):
    batches = make(store, vocabulary, max_prompt_genes=30, min_prompt_genes=5, max_target_genes=30, min_target_genes=5)
    cells = np.arange(8)
    prompts, targets = set(), set()
    for seed in range(60):
        batch = batches.make(LOCATE, cells, np.random.default_rng(seed))
        prompts.add(max(sum(vocabulary.is_gene[w] for w in prompt) for prompt, _, _ in read(batch)))
        batch = batches.make(GENERATE, cells, np.random.default_rng(seed))
        targets.add(int(batch.targets.index.max()))
    assert min(prompts) >= 5 and max(prompts) <= 30 and len(prompts) > 10
    assert min(targets) >= 3 and max(targets) <= 30 and len(targets) > 10


def test_labels_are_asked_for_at_every_position(store, vocabulary):
    batches = make(store, vocabulary, positions=1)
    for task in (ANNOTATE, LOCATE):
        usable = np.flatnonzero(batches.weights[task.name])
        batch = batches.make(task, usable, np.random.default_rng(0))
        for i, (_, _, target) in enumerate(read(batch)):
            mine = batch.targets.row == i
            assert sorted(batch.targets.index[mine].tolist()) == list(range(len(target)))
            assert batch.targets.weight[mine].sum() == pytest.approx(1 / len(usable))


def test_other_panels_and_depths_never_invent_a_gene(store, vocabulary):
    cells = np.flatnonzero(make(store, vocabulary).weights["annotate"])

    def prompts(seed, **changed):
        changed = {"panel": 0.0, "downsample": 0.0, **changed}
        batch = make(store, vocabulary, **changed).make(ANNOTATE, cells, np.random.default_rng(seed))
        rows = zip(batch.entity.tolist(), batch.value.tolist(), strict=True)
        return [{w: v for w, v in zip(*row, strict=True) if v > 0} for row in rows]

    plain = prompts(0)
    assert [len(p) for p in plain] == store.lengths[cells].tolist()
    for changed in ({"panel": 1.0}, {"downsample": 1.0}, {"panel": 1.0, "downsample": 1.0}):
        fewer, other_level = 0, 0
        for seed in range(5):
            for before, after in zip(plain, prompts(seed, **changed), strict=True):
                assert after.keys() <= before.keys()
                assert len(after) >= min(len(before), 20)
                fewer += len(after) < len(before)
                other_level += any(after[g] != before[g] for g in after)
        assert fewer > 20 and other_level > (40 if "downsample" in changed else 0)
    logged = np.flatnonzero(store.logged[cells])  # log1p values cannot be thinned
    thinned = prompts(0, downsample=1.0)
    assert all(thinned[i] == plain[i] for i in logged)


def test_counts_are_thinned_as_sampling_would(store, vocabulary):
    """Each gene's counts are a binomial share of its own, also where the share follows from what must be left."""
    counts = np.array([1.0, 1, 2, 5, 40, 900])
    draws = 2000
    for least, share in ((0, 0.3), (0, 0.8), (4, 0.02)):
        sums, shares = np.zeros(len(counts)), []
        for draw in range(draws):
            key = np.random.SeedSequence([least, draw]).generate_state(1, np.uint64)[0]
            genes, amounts = np.arange(len(counts)), counts.copy()
            _, n, left = downsample(key, genes, amounts, len(counts), least, share, np.empty(len(counts)))
            assert n >= least and left >= share and (amounts[:n] >= 1).all()
            assert (amounts[:n] <= counts[genes[:n]]).all() and len(set(genes[:n])) == n
            sums[genes[:n]] += amounts[:n]
            shares.append(left)
        if least == 0:
            assert set(shares) == {share}
            spread = np.sqrt(counts * share * (1 - share) / draws)
            assert (np.abs(sums / draws - counts * share) < 5 * spread).all()
        else:
            assert sums[4] / draws == pytest.approx(40 * np.mean(shares), rel=0.05)
            assert np.mean(shares) > 0.1


def test_a_thinner_cell_has_the_bins_of_its_depth(store, vocabulary):
    """Of counts so large that a share of them is nearly exact, bins do not change: the total is thinned as well."""
    large = store.matrix.copy()
    large.data = np.where(large.data > 0, large.data * 1e6, 0).astype(np.float32)
    many = replace(store, matrix=large, total=store.total * 1e6, logged=np.zeros(len(store), dtype=bool))
    cells = np.arange(40)
    made = [
        make(many, vocabulary, downsample=thin, panel=0.0).make(ANNOTATE, cells, np.random.default_rng(0))
        for thin in (0, 1)
    ]
    bins = [
        [dict(zip(*row, strict=True)) for row in zip(b.entity.tolist(), b.value.tolist(), strict=True)] for b in made
    ]
    same_bin = [plain[word] == thin[word] for plain, thin in zip(*bins, strict=True) for word in thin if thin[word]]
    assert len(same_bin) > 500 and np.mean(same_bin) > 0.97


def test_cells_without_labels_are_never_annotated(store, vocabulary):
    batches = make(store, vocabulary)
    unlabelled = (store.tokens(Family.FINE) < 0) & (store.tokens(Family.COARSE) < 0)
    assert unlabelled.any()
    assert not batches.weights["annotate"][unlabelled].any()
    assert (batches.weights["generate"][unlabelled] > 0).all()
    types = np.concatenate([vocabulary.ids(f) for f in (Family.COARSE, Family.FINE)])
    for step in range(60):
        batch = batches.batch(step)
        if batch.task == "annotate":
            assert (batch.targets.order[:, types] >= 0).any(1).all()


def test_rare_types_and_small_studies_get_more_than_their_share(store, vocabulary):
    weights = make(store, vocabulary, study_power=0.0, label_power=0.0).weights["generate"]
    assert weights[store.study == 0].sum() == pytest.approx(0.5)
    label = np.where(store.tokens(Family.FINE) >= 0, store.tokens(Family.FINE), store.tokens(Family.COARSE))
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
    assert batch.targets.allowed[batch.targets.order >= 0].all()


@pytest.mark.parametrize("task", [ANNOTATE, LOCATE])
def test_an_answer_about_labels_holds_labels(store, vocabulary, task):
    batches = make(store, vocabulary)
    batch = batches.make(task, np.flatnonzero(batches.weights[task.name]), np.random.default_rng(0))
    sayable = {int(i) for f in task.target for i in vocabulary.ids(f)} | {vocabulary.end}
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


def sentences(batch):
    """What a batch says of each cell, without padding."""
    width = batch.entity.shape[1]
    out = []
    for i, cell in enumerate(batch.cells):
        mine = batch.targets.row == i
        used = int(((batch.entity[i] > 0) | (torch.arange(width) == 0)).nonzero().max()) + 1
        out.append(
            (
                int(cell),
                batch.entity[i, :used].tolist(),
                batch.value[i, :used].tolist(),
                (batch.positions[mine] - i * width).tolist(),
                batch.targets.index[mine].tolist(),
                batch.targets.weight[mine].tolist(),
                batch.targets.order[i].tolist(),
                batch.targets.level[i].tolist(),
                batch.targets.allowed[i].tolist(),
            )
        )
    return out


@pytest.mark.parametrize("order", ["weighted", "epoch"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_that_one_would_have(store, vocabulary, network, order, world):
    batches = make(store, vocabulary, cells=6, order=order)
    for step in range(6):
        whole = batches.batch(step)
        parts = [batches.batch(step, rank, world) for rank in range(world)]
        together = [None] * len(whole.cells)
        for rank, part in enumerate(parts):
            together[rank::world] = sentences(part)
            assert (part.all_cells, part.all_tokens) == (len(whole.cells), whole.tokens)
        assert together == sentences(whole)
        assert sum(part.tokens for part in parts) == whole.tokens == whole.all_tokens
        assert not any(same(a, b) for a, b in itertools.combinations(parts, 2))

        def loss(batch):
            hidden = network(batch.entity, batch.value)
            picked = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
            entity, value = objective_loss(network, picked, batch.targets, objective="next_word", value_weight=1.0)
            return (entity + value).item()

        with torch.no_grad():
            assert sum(map(loss, parts)) == pytest.approx(loss(whole), rel=1e-5)


def test_more_ranks_than_cells_are_refused(store, vocabulary):
    batches = make(store, vocabulary, cells=4)
    with pytest.raises(RecipeError, match="min_cells"):
        batches.batch(0, rank=5, world=6)


def test_what_is_made_ahead_is_what_would_be_made(store, vocabulary):
    plain, ahead = (make(store, vocabulary, prefetch=n) for n in (0, 3))
    for step in (0, 1, 2, 3, 9, 10, 2, 3, 4):
        assert same(plain.batch(step), ahead.batch(step))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from([8, 16, 32, 64]), st.sampled_from([1, 4, 8]), st.integers(2, 9))
def test_an_epoch_reads_every_cell_once(store, vocabulary, seed, window, block, cells):
    batches = make(store, vocabulary, seed, order="epoch", window=window, block=block, cells=cells, prefetch=0)
    tasks = []
    for epoch in range(2):
        read_cells = []
        for step in range(batches.epoch_steps):
            batch = batches.batch(epoch * batches.epoch_steps + step)
            assert len(batch.cells) > 0
            read_cells += batch.cells.tolist()
            tasks.append((epoch, batch.task, tuple(batch.cells)))
        assert sorted(read_cells) == list(range(len(store)))
    chosen = [{c: task for e, task, cells in tasks if e == epoch for c in cells} for epoch in range(2)]
    assert chosen[0] != chosen[1]
    for name in batches.config.tasks:
        asked = [f for f in TASKS[name].target if f is not Family.GENE]
        served = [c for task in chosen for c, n in task.items() if n == name]
        assert all(known(store, c, *asked) for c in served if asked)


def test_cells_without_words_are_left_out_of_an_epoch(store, vocabulary):
    matrix = store.matrix.tolil()
    matrix[[3, 17]] = 0
    some = replace(store, matrix=matrix.tocsr())
    for order in ("epoch", "weighted"):
        batches = make(some, vocabulary, order=order, cells=8)
        steps = batches.epoch_steps or 40
        seen = np.concatenate([batches.batch(step).cells for step in range(steps)])
        assert not {3, 17} & set(seen.tolist())
        assert order == "weighted" or sorted(seen) == [c for c in range(60) if c not in (3, 17)]


def test_a_task_has_its_share_of_an_epoch(store, vocabulary):
    shares = {"generate": 0.7, "annotate": 0.3}
    batches = make(store, vocabulary, order="epoch", tasks=shares, prefetch=0)
    number = dict.fromkeys(shares, 0)
    for step in range(20 * batches.epoch_steps):
        batch = batches.batch(step)
        number[batch.task] += len(batch.cells)
    labelled = (store.tokens(Family.FINE) >= 0).mean()
    assert number["annotate"] / (20 * len(store)) == pytest.approx(0.3 * labelled, abs=0.04)


def test_cells_need_not_be_in_memory(store, vocabulary):
    class Elsewhere(Selection):
        """The same cells, read only through the protocol."""

    elsewhere = Elsewhere(store, np.arange(len(store)))
    for order in ("weighted", "epoch"):
        one, two = (make(cells, vocabulary, order=order) for cells in (store, elsewhere))
        assert all(same(one.batch(step), two.batch(step)) for step in range(6))


def test_organs_can_be_balanced(store, vocabulary):
    organ = store.tokens(Family.ORGAN)
    for power, expected in ((0.0, 0.5), (1.0, None)):
        weights = make(store, vocabulary, study_power=1.0, label_power=1.0, organ_power=power).weights["generate"]
        share = weights[organ >= 0].sum()
        assert share == pytest.approx((organ >= 0).mean() if expected is None else expected)


def test_an_unknown_order_is_refused(store, vocabulary):
    with pytest.raises(RecipeError, match=r"batches\.order is 'random'"):
        make(store, vocabulary, order="random")


@pytest.fixture(scope="module")
def real(shared):
    """Real cells of four studies, counts and log1p, in 2,000 genes."""
    files = ["kang2018_pbmc_labelled", "xin2016_pancreas", "wu2021_breast_tumour", "crc_colon"]
    data = {
        "folder": str(shared / "data" / "train"),
        "columns": {"organ": "organ", "coarse_type": "coarse", "fine_type": "label"},
        "study": [{"file": f"{name}.h5ad"} for name in files],
    }
    studies = read_studies(read_spec(data, shared))
    words = build_vocabulary(studies, 2000)
    return build_store(studies, words), words


@pytest.mark.parametrize("order", ["weighted", "epoch"])
def test_little_is_padding(real, order):
    """Panels, depths and limits vary, and yet the length of a batch is that of its sentences."""
    store, words = real
    many = Selection(store, np.random.default_rng(0).integers(len(store), size=40_000))
    batches = Batches(many, words, BatchConfig(order=order), 0)
    made = [batches.batch(step) for step in range(64)]
    assert {batch.task for batch in made} == set(TASKS)
    assert 1 - sum(b.tokens for b in made) / sum(b.entity.numel() for b in made) <= 0.03
    assert sum(b.tokens for b in made) >= 0.99 * sum(b.all_tokens for b in made)
    assert all(b.entity.numel() <= (1.1 if order == "epoch" else 1) * 8192 for b in made)


def test_bins_are_those_of_the_tokenizer(store, vocabulary):
    cells = np.arange(len(store))
    batch = make(store, vocabulary).make(GENERATE, cells, np.random.default_rng(0))
    columns = np.arange(store.matrix.shape[1], dtype=np.int32)
    words = tokenize(store.rows(cells), columns, len(columns), matrix_kind=store.logged, total=store.total)
    genes = vocabulary.ids(Family.GENE)
    row = np.repeat(cells, words.lengths)
    assert np.array_equal(batch.targets.level.numpy()[row, genes[words.gene]], words.level)
    assert (batch.targets.level > 0).sum() == len(words.gene)

"""Write training sentences row by row, in one compiled pass.

Each row has a random stream of its own (:mod:`scmulan._rng`, keyed by the batch and the row), so a rank that writes
only its rows writes the same as one that writes all. How many genes a row reads is planned before its cell is looked
at; panels and depth vary only as far as they leave that many, so lengths are known while batches are put together.
"""

from typing import NamedTuple

import numpy as np

from scmulan._numba import compiled
from scmulan._rng import GOLDEN, binomial, uniform
from scmulan.vocab.binning import LEVELS, TARGET_SUM, level_of

ALL_GENES, RANDOM_PANEL = -1, -2
"""Values of ``panel`` that are no study: all genes are kept, or a random fraction of them."""


class CellRows(NamedTuple):
    """Expression of n cells, in compressed rows of a cells × genes matrix."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    total: np.ndarray
    """float64 ``[n]``: counts of each cell, of all its genes."""
    logged: np.ndarray
    """Bool ``[n]``: values are log1p of counts per 10,000, not counts."""


class Genes(NamedTuple):
    """The genes of the vocabulary."""

    token: np.ndarray
    """int32 ``[genes]``: token of each."""
    measured: np.ndarray
    """Bool ``[studies, genes]``."""


class RowPlan(NamedTuple):
    """Plan of each row, see :class:`scmulan.train.sentence_plan.PlannedSentences`."""

    key: np.ndarray
    """uint64 ``[n]``: random stream."""
    max_genes: np.ndarray
    count_fraction: np.ndarray
    panel: np.ndarray
    panel_fraction: np.ndarray
    n_hints: np.ndarray


class Labels(NamedTuple):
    """Metadata tokens of each cell, shuffled in place."""

    hints: np.ndarray
    """int32 ``[n, max_known]``: known tokens that may come before the genes, then −1."""
    n_hints: np.ndarray
    targets: np.ndarray
    """int32 ``[n, max_known]``: known tokens that the task asks for, then −1."""
    n_targets: np.ndarray


class TaskTokens(NamedTuple):
    """Task, special tokens and limits that all rows of a batch share."""

    genes_in_prompt: bool
    """Genes stand in the prompt and labels in the target; otherwise genes are the target."""
    prompt: int
    """Prompt token."""
    end: int
    """End token."""
    positions: int
    """Target positions of a generated cell at which the loss is computed; 0 for all."""


class SentenceArrays(NamedTuple):
    """Arrays that are filled; n rows of at most T tokens, V tokens in the vocabulary, P loss positions a row."""

    entity: np.ndarray
    """int64 ``[n, T]``: tokens; zero at first."""
    value: np.ndarray
    """int64 ``[n, T]``: level of each token; zero at first."""
    prompt_length: np.ndarray
    """int64 ``[n]``: tokens up to the prompt token, included."""
    length: np.ndarray
    """int64 ``[n]``: tokens of the row."""
    order: np.ndarray
    """int16 ``[n, V]``: index of each token in the target; −1 at first."""
    level: np.ndarray
    """uint8 ``[n, V]``: level of each target token; zero at first."""
    n_positions: np.ndarray
    """int64 ``[n]``: loss positions."""
    target_index: np.ndarray
    """int64 ``[n, P]``: index in the target of the token that is next at each loss position."""
    weight: np.ndarray
    """float64 ``[n, P]``: weights of the loss positions, whose sum is one."""


@compiled()
def write_sentences(expression, genes, plan, labels, task, out):
    """Write one sentence per row: hints, genes, prompt token, target tokens, end token.

    Parameters
    ----------
    expression : CellRows
    genes : Genes
    plan : RowPlan
    labels : Labels
        Changed in place.
    task : TaskTokens
    out : SentenceArrays
        Filled in place.
    """
    longest = 1
    for row in range(len(plan.key)):
        longest = max(longest, expression.indptr[row + 1] - expression.indptr[row])
    gene = np.empty(longest, dtype=np.int64)
    amount = np.empty(longest, dtype=np.float64)
    level = np.empty(longest, dtype=np.int64)
    first_kept = np.empty(longest, dtype=np.float64)
    scratch = np.empty(longest + 64, dtype=np.int64)
    for row in range(len(plan.key)):
        state = plan.key[row]
        logged = expression.logged[row]
        max_genes = plan.max_genes[row]

        # The cell's genes, as another study might have seen them.
        n = _read(expression, row, gene, amount)
        needed = min(max_genes, n)
        panel = plan.panel[row]
        if panel != ALL_GENES:
            measured = genes.measured[max(panel, 0)]
            if panel < 0:
                measured = measured[:0]
            state, n = _cut_to_panel(state, gene, amount, n, needed, measured, plan.panel_fraction[row])
        depth = expression.total[row]
        fraction = plan.count_fraction[row]
        if fraction < 1 and not logged:
            state, n, kept = downsample(state, gene, amount, n, needed, fraction, first_kept)
            depth *= kept
        n_used = min(needed, n) if task.genes_in_prompt else n
        state = _draw_pairs(state, gene, amount, 0, n_used, n)
        _bin(amount, n, n_used, depth, logged, level)

        # The prompt: a random subset of the known hints, anywhere among the genes.
        at = plan.n_hints[row]
        hints = labels.hints[row]
        state = _draw(state, hints, at, labels.n_hints[row])
        entity, value = out.entity[row], out.value[row]
        for j in range(at):
            entity[j] = hints[j]
        if task.genes_in_prompt:
            for j in range(n_used):
                entity[at] = genes.token[gene[j]]
                value[at] = level[j]
                at += 1
            if plan.n_hints[row] > 0:
                state = _draw_pairs(state, entity, value, 0, at, at)
        entity[at] = task.prompt
        at += 1
        out.prompt_length[row] = at

        # The target; where it is a cell, only its first genes are read.
        order = out.order[row]
        if task.genes_in_prompt:
            n_targets = labels.n_targets[row]
            targets = labels.targets[row]
            state = _draw(state, targets, n_targets, n_targets)
            for j in range(n_targets):
                entity[at] = targets[j]
                order[targets[j]] = j
                at += 1
        else:
            n_targets = n
            for j in range(n):
                token = genes.token[gene[j]]
                order[token] = j
                out.level[row, token] = level[j]
                if j < max_genes:
                    entity[at] = token
                    value[at] = level[j]
                    at += 1
        order[task.end] = n_targets
        if task.genes_in_prompt or max_genes > n:
            entity[at] = task.end
            at += 1
        out.length[row] = at
        state, out.n_positions[row] = _choose_positions(
            state,
            n_targets + 1,
            at - out.prompt_length[row],
            0 if task.genes_in_prompt else task.positions,
            scratch,
            out.target_index[row],
            out.weight[row],
        )


@compiled()
def _read(expression, row, gene, amount):
    """Copy the genes of a row that are above zero, and their values; return their number."""
    n = 0
    for k in range(expression.indptr[row], expression.indptr[row + 1]):
        if expression.data[k] > 0:
            gene[n] = expression.indices[k]
            amount[n] = float(expression.data[k])
            n += 1
    return n


@compiled()
def _cut_to_panel(state, gene, amount, n, needed, measured, fraction):
    """Move the genes of a panel to the front, and return their number: those measured, or a random fraction.

    Others follow at random where the panel has fewer than ``needed``. No ``measured`` means a random fraction.
    """
    kept = 0
    for j in range(n):
        if len(measured) > 0:
            keep = measured[gene[j]]
        else:
            state += GOLDEN
            keep = uniform(state) < fraction
        if keep:
            gene[j], gene[kept] = gene[kept], gene[j]
            amount[j], amount[kept] = amount[kept], amount[j]
            kept += 1
    if kept < needed:
        state = _draw_pairs(state, gene, amount, kept, needed - kept, n)
        kept = needed
    return state, kept


@compiled()
def downsample(state, gene, counts, n, needed, fraction, first_kept):
    """Down-sample counts to a fraction, or to a larger one where fewer than ``needed`` genes would be left.

    Parameters
    ----------
    state : uint64
        Of the row's random stream.
    gene, counts : int64, float64 ``[≥ n]``
        The cell's genes; those left are moved to the front, with the counts left.
    n, needed : int
        Genes of the cell, and how many must be left.
    fraction : float
        Probability of each count to be kept.
    first_kept : float64 ``[≥ n]``
        Scratch.

    Returns
    -------
    state, n_left, fraction
        The state after the draws, genes left, and the fraction that was kept.

    Notes
    -----
    Each of a gene's counts has a uniform number and is kept where that is below the fraction. Only the smallest of them
    is drawn, which is the fraction from which on the gene is seen; the others are a binomial number given that. So the
    fraction that leaves ``needed`` genes is known before any count is drawn.
    """
    n_counted = 0
    n_left = 0
    for j in range(n):
        counts[j] = np.rint(counts[j])
        state += GOLDEN
        u = uniform(state)
        first_kept[j] = 2.0
        if counts[j] >= 1:
            first_kept[j] = u if counts[j] == 1 else -np.expm1(np.log1p(-u) / counts[j])
            n_counted += 1
            n_left += first_kept[j] < fraction
    if n_left < needed:
        if n_counted < needed:  # values below a half: not counts that could be down-sampled
            return state, n, 1.0
        fraction = np.partition(first_kept[:n], needed - 1)[needed - 1] * (1 + 1e-9) + 1e-12
    n_left = 0
    for j in range(n):
        if first_kept[j] < fraction:
            probability = min(1.0, (fraction - first_kept[j]) / (1.0 - first_kept[j]))
            state, others = binomial(state, int(counts[j]) - 1, probability)
            gene[n_left] = gene[j]
            counts[n_left] = 1.0 + others
            n_left += 1
    return state, n_left, min(fraction, 1.0)


@compiled()
def _bin(amount, n, n_used, depth, logged, level):
    """Fill in the levels of the first ``n_used`` of a cell's n genes, by equal steps up to its largest log1p value."""
    scale = TARGET_SUM / max(depth, 1e-9)
    top = 0.0
    for j in range(n):
        top = max(top, amount[j])
    top = float(np.float32(top if logged else np.log1p(top * scale)))
    step = top / LEVELS
    per_step = 1.0 / step if step > 0 else 0.0
    for j in range(n_used):
        x = float(np.float32(amount[j] if logged else np.log1p(amount[j] * scale)))
        level[j] = level_of(x, step, per_step, LEVELS)


@compiled()
def _choose_positions(state, n_targets, n_read, n_sampled, scratch, index, weight):
    """Choose the target positions at which the loss is computed; return the state and their number.

    All of a few labels; of a cell a sample, always with its end if that is in reach. The end then has the weight that
    it has in the mean over all positions, so the sample estimates that mean without bias.
    """
    reachable = min(n_targets, n_read + 1)
    if n_sampled == 0 or n_sampled >= reachable:
        for j in range(reachable):
            index[j] = j
            weight[j] = 1.0 / reachable
        return state, reachable
    with_end = reachable == n_targets
    n_drawn, among = (n_sampled - 1, reachable - 1) if with_end else (n_sampled, reachable)
    for j in range(among):
        scratch[j] = j
    state = _draw(state, scratch, n_drawn, among)
    for j in range(n_drawn):
        index[j] = scratch[j]
        weight[j] = (among / n_targets if with_end else 1.0) / n_drawn
    if with_end:
        index[n_drawn] = reachable - 1
        weight[n_drawn] = 1.0 / n_targets
    return state, n_sampled


@compiled()
def _draw(state, items, number, stop):
    """Move a random ``number`` of ``items[:stop]`` to the front, in random order (Fisher and Yates)."""
    for j in range(number):
        state += GOLDEN
        k = j + int(uniform(state) * (stop - j))
        items[j], items[k] = items[k], items[j]
    return state


@compiled()
def _draw_pairs(state, items, values, first, number, stop):
    """Move a random ``number`` of the pairs ``first:stop`` to ``first:first + number``, in random order."""
    for j in range(first, first + number):
        state += GOLDEN
        k = j + int(uniform(state) * (stop - j))
        items[j], items[k] = items[k], items[j]
        values[j], values[k] = values[k], values[j]
    return state

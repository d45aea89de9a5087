"""Sentences of training, written row by row in one compiled pass.

Each row has a random stream of its own (splitmix64 from a 64-bit key), so a rank that writes only its rows writes the
same as one that writes them all. How many words a row reads is decided before its cell is looked at; panels and depth
are varied only as far as they leave that many, so the length of a sentence is known while batches are put together.
"""

import numpy as np

from scmulan._numba import compiled
from scmulan._rng import GOLDEN, binomial, uniform
from scmulan.vocab.binning import LEVELS, TARGET_SUM, level_of

NO_PANEL, SHARE_PANEL = -1, -2


@compiled()
def _to_front(state, genes, amounts, first, number, stop):
    """Random ``number`` of the entries ``first:stop`` at its front, in random order."""
    for j in range(first, first + number):
        state += GOLDEN
        k = j + int(uniform(state) * (stop - j))
        genes[j], genes[k] = genes[k], genes[j]
        amounts[j], amounts[k] = amounts[k], amounts[j]
    return state


@compiled()
def _panel(state, genes, amounts, n, least, share, measured):
    """Entries of another panel at the front (with others, where it has fewer than ``least``); their number."""
    kept = 0
    for j in range(n):
        if len(measured) > 0:
            keep = measured[genes[j]]
        else:
            state += GOLDEN
            keep = uniform(state) < share
        if keep:
            genes[j], genes[kept] = genes[kept], genes[j]
            amounts[j], amounts[kept] = amounts[kept], amounts[j]
            kept += 1
    if kept < least:
        state = _to_front(state, genes, amounts, kept, least - kept, n)
        kept = least
    return state, kept


@compiled()
def _thin(state, genes, amounts, n, least, share, first_seen):
    """Down-sample counts by ``share``, or by more where fewer than ``least`` genes were left.

    Each of a gene's counts has a uniform number and is kept where that is below the share. The least of them says
    from which share on the gene is seen; the others are a binomial number given that. Returns genes and share left.
    """
    whole = 0
    survivors = 0
    for j in range(n):
        amounts[j] = np.rint(amounts[j])
        state += GOLDEN
        u = uniform(state)
        first_seen[j] = 2.0
        if amounts[j] >= 1:
            first_seen[j] = u if amounts[j] == 1 else -np.expm1(np.log1p(-u) / amounts[j])
            whole += 1
            survivors += first_seen[j] < share
    if survivors < least:
        if whole < least:  # amounts below a half: not counts that could be down-sampled
            return state, n, 1.0
        share = np.partition(first_seen[:n], least - 1)[least - 1] * (1 + 1e-9) + 1e-12
    kept = 0
    for j in range(n):
        if first_seen[j] < share:
            chance = min(1.0, (share - first_seen[j]) / (1.0 - first_seen[j]))
            state, others = binomial(state, int(amounts[j]) - 1, chance)
            genes[kept] = genes[j]
            amounts[kept] = 1.0 + others
            kept += 1
    return state, kept, min(share, 1.0)


@compiled()
def _positions(state, number, read, sampled, scratch, said, weight):
    """Targets at which the loss is taken: all of a few labels; of a cell a sample, always with its end if in reach.

    The end has its own share of the weight, so the sample estimates the mean over all positions without bias.
    """
    asked = min(number, read + 1)
    if sampled == 0 or sampled >= asked:
        for j in range(asked):
            said[j] = j
            weight[j] = 1.0 / asked
        return state, asked
    to_end = asked == number
    drawn, among = (sampled - 1, asked - 1) if to_end else (sampled, asked)
    for j in range(among):
        scratch[j] = j
    for j in range(drawn):
        state += GOLDEN
        k = j + int(uniform(state) * (among - j))
        scratch[j], scratch[k] = scratch[k], scratch[j]
        said[j] = scratch[j]
        weight[j] = (among / number if to_end else 1.0) / drawn
    if to_end:
        said[drawn] = asked - 1
        weight[drawn] = 1.0 / number
    return state, sampled


@compiled()
def write_rows(
    data,
    indices,
    indptr,
    total,
    logged,
    measured,
    gene_ids,
    keys,
    read,
    thin,
    panel,
    share,
    hints,
    hint_number,
    hint_size,
    asked,
    asked_number,
    given,
    prompt_word,
    end,
    sampled,
    entity,
    value,
    prompt,
    length,
    place,
    level,
    said,
    weight,
    positions,
):
    """Write one sentence per row; see :class:`scmulan.train.sentence_plan.Drawn` for what was decided before.

    Filled are ``entity``, ``value`` (``[rows, width]``, zero), ``prompt``, ``length``, ``place`` (−1), ``level`` (0)
    (``[rows, vocabulary]``), and ``said``, ``weight`` (``[rows, most positions]``) with the number of ``positions``.
    """
    longest = 1
    for row in range(len(keys)):
        longest = max(longest, indptr[row + 1] - indptr[row])
    genes = np.empty(longest, dtype=np.int64)
    amounts = np.empty(longest, dtype=np.float64)
    first_seen = np.empty(longest, dtype=np.float64)
    scratch = np.empty(longest + 64, dtype=np.int64)
    for row in range(len(keys)):
        state = keys[row]
        n = 0
        for k in range(indptr[row], indptr[row + 1]):
            if data[k] > 0:
                genes[n] = indices[k]
                amounts[n] = float(data[k])
                n += 1
        least = min(read[row], n)
        if panel[row] != NO_PANEL:
            other = measured[max(panel[row], 0)]
            state, n = _panel(state, genes, amounts, n, least, share[row], other if panel[row] >= 0 else other[:0])
        depth = total[row]
        if thin[row] < 1 and not logged[row]:
            state, n, left = _thin(state, genes, amounts, n, least, thin[row], first_seen)
            depth *= left
        state = _to_front(state, genes, amounts, 0, n if not given else min(least, n), n)
        scale = TARGET_SUM / max(depth, 1e-9)
        top = 0.0
        for j in range(n):
            top = max(top, amounts[j])
        top = float(np.float32(top if logged[row] else np.log1p(top * scale)))
        step = top / LEVELS
        per_step = 1.0 / step if step > 0 else 0.0

        at = 0
        size = hint_size[row]
        for j in range(size):  # a random subset of the known hints, in random order
            state += GOLDEN
            k = j + int(uniform(state) * (hint_number[row] - j))
            hints[row, j], hints[row, k] = hints[row, k], hints[row, j]
            entity[row, at] = hints[row, j]
            at += 1
        if given:
            for j in range(min(least, n)):
                x = float(np.float32(amounts[j] if logged[row] else np.log1p(amounts[j] * scale)))
                entity[row, at] = gene_ids[genes[j]]
                value[row, at] = level_of(x, step, per_step, LEVELS)
                at += 1
            for j in range(at if size > 0 else 0):  # hints anywhere among the genes
                state += GOLDEN
                k = j + int(uniform(state) * (at - j))
                entity[row, j], entity[row, k] = entity[row, k], entity[row, j]
                value[row, j], value[row, k] = value[row, k], value[row, j]
        entity[row, at] = prompt_word
        at += 1
        prompt[row] = at
        if given:
            targets = asked_number[row]
            for j in range(targets):
                state += GOLDEN
                k = j + int(uniform(state) * (targets - j))
                asked[row, j], asked[row, k] = asked[row, k], asked[row, j]
                word = asked[row, j]
                entity[row, at] = word
                place[row, word] = j
                at += 1
        else:
            targets = n
            for j in range(n):
                x = float(np.float32(amounts[j] if logged[row] else np.log1p(amounts[j] * scale)))
                bin_of = level_of(x, step, per_step, LEVELS)
                word = gene_ids[genes[j]]
                place[row, word] = j
                level[row, word] = bin_of
                if j < read[row]:
                    entity[row, at] = word
                    value[row, at] = bin_of
                    at += 1
        place[row, end] = targets
        if given or read[row] > n:
            entity[row, at] = end
            at += 1
        length[row] = at
        state, positions[row] = _positions(
            state, targets + 1, at - prompt[row], sampled if not given else 0, scratch, said[row], weight[row]
        )

"""Watching a run on cells that it does not train on: losses, labels, organs, and how long written cells are."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from scmulan._dist import Ranks
from scmulan.data.store import CellSource
from scmulan.model.network import Mulan
from scmulan.train.batches import Batch, BatchConfig, Batches
from scmulan.train.trainer import batch_loss
from scmulan.vocab.binning import log1p_normalised, tokenize
from scmulan.vocab.sentences import gene_prompts
from scmulan.vocab.tasks import ANNOTATE, LOCATE, TASKS, Task
from scmulan.vocab.vocabulary import Family, Vocabulary

LOSS_CELLS = 64
WRITTEN = 12


def last_hidden_states(
    model: Mulan,
    store: CellSource,
    vocabulary: Vocabulary,
    batch: int = 32,
    *,
    task: Task = ANNOTATE,
    among: np.ndarray | None = None,
    ranks: Ranks | None = None,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Hidden state at the end of each cell's prompt of a task: yields (cell numbers, ``[B, W]``).

    Parameters
    ----------
    among
        Cells to read, by number; all by default.
    ranks
        Processes that share the cells between them.
    """
    genes = len(vocabulary.genes)
    columns = np.arange(genes, dtype=np.int32)
    device = model.word.weight.device
    among = np.arange(len(store)) if among is None else among
    order = among[np.argsort(store.lengths[among], kind="stable")]
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    for start in range(rank * batch, len(order), world * batch):
        cells = order[start : start + batch]
        rows = store.rows(cells)
        number = np.diff(rows.indptr)
        normalised = log1p_normalised(rows.data, rows.indptr, store.total[cells])
        rows.data = np.where(np.repeat(store.logged[cells], number), rows.data, normalised)
        words = tokenize(rows, columns, genes, matrix_kind="log1p")
        entity, value, lengths = gene_prompts(words, vocabulary, task).padded()
        hidden = model(torch.from_numpy(entity).to(device), torch.from_numpy(value).to(device))
        yield cells, hidden[torch.arange(len(cells), device=device), torch.from_numpy(lengths - 1).to(device)]


def validate(
    model: Mulan,
    store: CellSource,
    vocabulary: Vocabulary,
    satisfies: np.ndarray,
    *,
    batches: BatchConfig | None = None,
    objective: Any = None,
    most: int = 4_000,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Score a network on held-out cells; all processes of a job share the work and get the same figures.

    Parameters
    ----------
    model
        Network with all of its weights.
    store, vocabulary
        Held-out cells and the words.
    satisfies
        Bool ``[V, V]``: ``[v, u]`` where saying u is right when v is the truth.
    batches, objective
        Sections of the recipe, for the losses; left out without them.
    most
        Cells scored, at most: every n-th.
    seed
        Of the cells and orders for the losses, the same at every check.
    ranks
        Processes.

    Returns
    -------
    dict
        Per study ``NAME.accuracy`` (the prediction is the label or a finer type), ``NAME.macro_recall`` and
        ``NAME.macro_f1`` over types that the vocabulary has; their means over studies; ``organ_accuracy``;
        ``TASK.entity`` and ``generate.value`` losses; ``genes_written``: genes of a written cell over those of the real
        one whose metadata was its prompt. What the cells cannot tell is left out.
    """
    ranks = ranks or Ranks()
    some = np.flatnonzero(store.lengths > 0)
    some = some[:: -(-len(some) // most)] if len(some) else some
    training = model.training
    model.eval()
    with torch.no_grad():
        out = _labels(model, store, vocabulary, satisfies, some, ranks)
        if batches is not None:
            out |= _losses(model, store, vocabulary, batches, objective, seed, ranks)
        out |= _written(model, store, vocabulary, objective, some, seed, ranks)
    model.train(training)
    return out


def _answers(
    model: Mulan, store: CellSource, vocabulary: Vocabulary, task: Task, family: Family, among: np.ndarray, ranks: Ranks
) -> np.ndarray:
    """Best word of a family for some cells, int64; for all of them in every process."""
    words = vocabulary.ids(family)
    predicted = torch.zeros(len(store), dtype=torch.int64)
    for cells, hidden in last_hidden_states(model, store, vocabulary, task=task, among=among, ranks=ranks):
        best = model.entity_logits(hidden)[:, torch.from_numpy(words).to(hidden.device)].argmax(1).cpu().numpy()
        predicted[torch.from_numpy(cells)] = torch.from_numpy(words[best])
    return ranks.sum_array(predicted).numpy()


def _labels(
    model: Mulan, store: CellSource, vocabulary: Vocabulary, satisfies: np.ndarray, some: np.ndarray, ranks: Ranks
) -> dict[str, float]:
    out: dict[str, float] = {}
    truth = store.tokens(Family.FINE)
    labelled = some[truth[some] >= 0]
    if len(labelled):
        predicted = _answers(model, store, vocabulary, ANNOTATE, Family.FINE, labelled, ranks)
        for number, name in enumerate(store.studies):
            inside = labelled[store.study[labelled] == number]
            if len(inside):
                scores = label_scores(truth[inside], predicted[inside], satisfies)
                out |= {f"{name}.{key}": score for key, score in scores.items()}
        for key in ("accuracy", "macro_recall", "macro_f1"):
            out[key] = float(np.mean([v for k, v in out.items() if k.endswith(f".{key}")]))
    organ = store.tokens(Family.ORGAN)
    placed = some[organ[some] >= 0]
    if len(placed) and len(vocabulary.ids(Family.ORGAN)) > 1:
        predicted = _answers(model, store, vocabulary, LOCATE, Family.ORGAN, placed, ranks)
        out["organ_accuracy"] = float((predicted[placed] == organ[placed]).mean())
    return out


def label_scores(truth: np.ndarray, predicted: np.ndarray, satisfies: np.ndarray) -> dict[str, float]:
    """Accuracy, and means over the true labels of recall and F1; a finer type than the label counts as right."""
    right = satisfies[truth, predicted]
    recall, f1 = [], []
    for label in np.unique(truth):
        mine = truth == label
        hits = right[mine].sum()
        wrongly = ((predicted == label) & ~right).sum()
        recall.append(hits / mine.sum())
        f1.append(2 * hits / (mine.sum() + hits + wrongly))
    return {
        "accuracy": float(right.mean()),
        "macro_recall": float(np.mean(recall)),
        "macro_f1": float(np.mean(f1)),
    }


def _losses(
    model: Mulan,
    store: CellSource,
    vocabulary: Vocabulary,
    config: BatchConfig,
    objective: Any,
    seed: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Losses of each task on sentences of held-out cells as they are: no panel, no thinning."""
    out: dict[str, float] = {}
    for number, name in enumerate(config.tasks):
        task = TASKS[name]
        usable = store.lengths > 0
        if Family.GENE not in task.target:
            usable &= np.any([store.tokens(f) >= 0 for f in task.target], axis=0)
        cells = np.flatnonzero(usable)
        if not len(cells):
            continue
        plain = replace(config, panel=0.0, downsample=0.0, tasks={name: 1.0}, min_prompt_genes=config.max_prompt_genes)
        rng = np.random.default_rng([seed, number])
        chosen = rng.permutation(cells)[:LOSS_CELLS]
        batch: Batch = Batches(store, vocabulary, plain, seed).make(task, chosen, rng)
        losses = [0.0, 0.0]
        if ranks.rank < len(batch.entity):
            part = batch.part(ranks.rank, ranks.world).to(model.word.weight.device)
            losses = [x.item() for x in batch_loss(model, part, objective)]
        entity, value = ranks.sum(*losses)
        out[f"{name}.entity"] = entity
        if name == "generate" and objective.name != "published":  # the published one is a mean over all pairs
            out["generate.value"] = value
    return out


def _written(
    model: Mulan,
    store: CellSource,
    vocabulary: Vocabulary,
    objective: Any,
    some: np.ndarray,
    seed: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Genes of written cells over those of the real cells that they were asked to be like."""
    if not len(some):
        return {}
    cells = np.random.default_rng([seed, 99]).permutation(some)[:WRITTEN]
    mine = cells[ranks.rank :: ranks.world]
    prompts = [[*np.unique(m[m >= 0]).tolist(), vocabulary.prompts["generate"]] for m in store.metadata[mine]]
    measured = store.measured[store.study[mine]]
    written = 0.0
    if len(mine):
        if objective is not None and objective.name == "published":
            written = expected_genes(model, vocabulary, prompts, measured).sum()
        else:
            most = 2 * int(store.lengths[cells].max()) + 10
            written = write_lengths(model, vocabulary, prompts, measured, most, (seed * 1000 + mine).tolist()).sum()
    written, real = ranks.sum(float(written), float(store.lengths[mine].sum()))
    return {"genes_written": round(written / real, 4)}


def _ends(model: Mulan, prompts: list[list[int]], cache: Any = None) -> torch.Tensor:
    """Hidden state at the end of each prompt of words without value."""
    device = model.word.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    entity = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
    hidden = model(entity, torch.zeros_like(entity), cache, lengths if cache is not None else None)
    return hidden[torch.arange(len(prompts), device=device), lengths - 1]


@torch.no_grad()
def expected_genes(model: Mulan, vocabulary: Vocabulary, prompts: list[list[int]], measured: np.ndarray) -> np.ndarray:
    """Genes expected after each prompt by logits that say of each word how likely it is still to come."""
    genes = vocabulary.ids(Family.GENE)
    chance = model.entity_logits(_ends(model, prompts)).float().cpu().numpy()[:, genes]
    return (measured / (1 + np.exp(-chance))).sum(1)


@torch.no_grad()
def write_lengths(
    model: Mulan,
    vocabulary: Vocabulary,
    prompts: list[list[int]],
    measured: np.ndarray,
    most: int,
    seeds: Sequence[int],
) -> np.ndarray:
    """Write cells word by word from the next-word likelihood, each with its seed; their genes, at most ``most``."""
    device = model.word.weight.device
    rows = len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    free = torch.zeros(rows, len(vocabulary), dtype=torch.bool)
    free[:, vocabulary.is_gene] = torch.from_numpy(measured)
    free[:, vocabulary.end] = True
    free = free.to(device)
    cache = model.new_cache(rows, max(map(len, prompts)) + most)
    hidden = _ends(model, prompts, cache)
    going = torch.ones(rows, dtype=torch.bool, device=device)
    count = torch.zeros(rows, dtype=torch.int64, device=device)
    for _ in range(most):
        weights = model.log_weights(model.entity_logits(hidden).float(), vocabulary.end).masked_fill(~free, -torch.inf)
        # The largest of logit + Gumbel noise is a draw from the softmax; each cell has noise of its own.
        noise = torch.stack([torch.rand(weights.shape[1], generator=g) for g in generators]).to(device)
        word = (weights - (-noise.clamp(min=1e-20).log()).log()).argmax(1, keepdim=True)
        going &= word[:, 0] != vocabulary.end
        if not going.any():
            break
        count += going
        free.scatter_(1, word, False)
        free[:, vocabulary.end] = True
        level = model.value_mean(hidden).gather(1, word).round().clamp(1, model.config.levels).long()
        hidden = model(word, level, cache)[:, 0]
    return count.cpu().numpy()

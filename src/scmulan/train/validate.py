"""Validation of a run on cells that it does not train on: losses, labels, organs, lengths of generated cells."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from scmulan._dist import Ranks
from scmulan.data.store import CellSource
from scmulan.model.network import Mulan
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.config import ObjectiveConfig
from scmulan.train.sentence_plan import eligible_tasks
from scmulan.train.trainer import batch_loss
from scmulan.vocab.binning import log1p_normalised, tokenize
from scmulan.vocab.sentences import gene_prompts
from scmulan.vocab.tasks import ANNOTATE, LOCATE, TASKS, Task
from scmulan.vocab.vocabulary import Family, Vocabulary

LOSS_CELLS = 64
"""Largest number of cells whose losses are computed, per task."""
GENERATED_CELLS = 12
_GENERATE = 99  # key of a random stream; those of the losses are the tasks' numbers


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
    """Compute the hidden state at the end of each cell's prompt of a task, for cells of similar length at a time.

    Parameters
    ----------
    model, store, vocabulary
        Network, cells and tokens.
    batch
        Cells read together.
    task
        One whose prompt is the genes.
    among
        Indices of the cells to read; all by default.
    ranks
        Processes that divide the cells among them.

    Yields
    ------
    cells, hidden
        Indices, int64 ``[B]``, and hidden states ``[B, W]``.
    """
    genes = len(vocabulary.genes)
    columns = np.arange(genes, dtype=np.int32)
    device = model.device
    among = np.arange(len(store)) if among is None else among
    order = among[np.argsort(store.lengths[among], kind="stable")]
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    for start in range(rank * batch, len(order), world * batch):
        cells = order[start : start + batch]
        rows = store.rows(cells)
        number = np.diff(rows.indptr)
        normalised = log1p_normalised(rows.data, rows.indptr, store.total[cells])
        rows.data = np.where(np.repeat(store.logged[cells], number), rows.data, normalised)
        tokens = tokenize(rows, columns, genes, matrix_kind="log1p")
        entity, value, lengths = gene_prompts(tokens, vocabulary, task).padded()
        hidden = model(torch.from_numpy(entity).to(device), torch.from_numpy(value).to(device))
        yield cells, hidden[torch.arange(len(cells), device=device), torch.from_numpy(lengths - 1).to(device)]


def validate(
    model: Mulan,
    store: CellSource,
    vocabulary: Vocabulary,
    satisfies: np.ndarray,
    *,
    batches: BatchConfig | None = None,
    objective: ObjectiveConfig | None = None,
    max_cells: int = 4_000,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Score a network on held-out cells; all processes of a job divide the work and get the same figures.

    Parameters
    ----------
    model
        Network with all of its weights.
    store, vocabulary
        Held-out cells and the tokens.
    satisfies
        Bool ``[V, V]``: ``[v, u]`` where predicting u is right when v is the truth.
    batches, objective
        Sections of the recipe, for the losses; no losses without them.
    max_cells
        Largest number of cells scored: every n-th.
    seed
        Of the cells and orders for the losses and of generated cells, the same at every check.
    ranks
        Processes.

    Returns
    -------
    dict
        Per study ``NAME.accuracy`` (the prediction is the label or a finer type), ``NAME.macro_recall`` and
        ``NAME.macro_f1`` over types that the vocabulary has; their means over studies; ``organ_accuracy``;
        ``TASK.entity`` and ``generate.value`` losses; ``genes_written``: genes of generated cells over those of the
        real ones whose metadata was their prompt. What the cells cannot tell is left out.
    """
    some = np.flatnonzero(store.lengths > 0)
    some = some[:: -(-len(some) // max_cells)] if len(some) else some
    validation = _Validation(model, store, vocabulary, some, seed, ranks or Ranks())
    training = model.training
    model.eval()
    with torch.no_grad():
        figures = validation.labels(satisfies) | validation.organs()
        if batches is not None and objective is not None:
            figures |= validation.losses(batches, objective)
        figures |= validation.generated(published=objective is not None and objective.name == "published")
    model.train(training)
    return figures


@dataclass(frozen=True)
class _Validation:
    """One check of a network. ``some``: indices of the cells that are scored."""

    model: Mulan
    store: CellSource
    vocabulary: Vocabulary
    some: np.ndarray
    seed: int
    ranks: Ranks

    def labels(self, satisfies: np.ndarray) -> dict[str, float]:
        figures: dict[str, float] = {}
        truth = self.store.tokens(Family.FINE)
        labelled = self.some[truth[self.some] >= 0]
        if not len(labelled):
            return {}
        predicted = self._predict(ANNOTATE, Family.FINE, labelled)
        for number, name in enumerate(self.store.studies):
            inside = labelled[self.store.study[labelled] == number]
            if len(inside):
                scores = label_scores(truth[inside], predicted[inside], satisfies)
                figures |= {f"{name}.{key}": score for key, score in scores.items()}
        for key in ("accuracy", "macro_recall", "macro_f1"):
            figures[key] = float(np.mean([v for k, v in figures.items() if k.endswith(f".{key}")]))
        return figures

    def organs(self) -> dict[str, float]:
        organ = self.store.tokens(Family.ORGAN)
        known = self.some[organ[self.some] >= 0]
        if not len(known) or len(self.vocabulary.ids(Family.ORGAN)) < 2:
            return {}
        predicted = self._predict(LOCATE, Family.ORGAN, known)
        return {"organ_accuracy": float((predicted[known] == organ[known]).mean())}

    def _predict(self, task: Task, family: Family, cells: np.ndarray) -> np.ndarray:
        """Predict the token of a family, int64 ``[all cells]``, filled in for some; the same in every process."""
        ids = self.vocabulary.ids(family)
        predicted = torch.zeros(len(self.store), dtype=torch.int64)
        for rows, hidden in last_hidden_states(
            self.model, self.store, self.vocabulary, task=task, among=cells, ranks=self.ranks
        ):
            logits = self.model.entity_logits(hidden)[:, torch.from_numpy(ids).to(hidden.device)]
            predicted[torch.from_numpy(rows)] = torch.from_numpy(ids[logits.argmax(1).cpu().numpy()])
        return self.ranks.sum_array(predicted).numpy()

    def losses(self, config: BatchConfig, objective: ObjectiveConfig) -> dict[str, float]:
        """Compute the losses of each task on sentences of cells as they are: all genes, all counts."""
        figures: dict[str, float] = {}
        ranks = self.ranks
        for number, name in enumerate(config.tasks):
            cells = np.flatnonzero(eligible_tasks(self.store, [name]))
            if not len(cells):
                continue
            plain = replace(
                config, panel=0.0, downsample=0.0, tasks={name: 1.0}, min_prompt_genes=config.max_prompt_genes
            )
            rng = np.random.default_rng([self.seed, number])
            chosen = rng.permutation(cells)[:LOSS_CELLS]
            batch = Batches(self.store, self.vocabulary, plain, self.seed).make(TASKS[name], chosen, rng)
            losses = [0.0, 0.0]
            if ranks.rank < len(batch.entity):
                part = batch.micro_batch(ranks.rank, ranks.world).to(self.model.device)
                losses = [x.item() for x in batch_loss(self.model, part, objective)]
            entity, value = ranks.sum(*losses)
            figures[f"{name}.entity"] = entity
            if name == "generate" and objective.name != "published":  # the published one is a mean over all pairs
                figures["generate.value"] = value
        return figures

    def generated(self, *, published: bool) -> dict[str, float]:
        """Compute the genes of generated cells over those of the real cells whose metadata was their prompt."""
        if not len(self.some):
            return {}
        store, vocabulary = self.store, self.vocabulary
        cells = np.random.default_rng([self.seed, _GENERATE]).permutation(self.some)[:GENERATED_CELLS]
        mine = cells[self.ranks.rank :: self.ranks.world]
        prompts = [[*np.unique(m[m >= 0]).tolist(), vocabulary.prompts["generate"]] for m in store.metadata[mine]]
        measured = store.measured[store.study[mine]]
        genes = 0.0
        if len(mine) and published:
            genes = expected_genes(self.model, vocabulary, prompts, measured).sum()
        elif len(mine):
            limit = 2 * int(store.lengths[cells].max()) + 10
            seeds = (self.seed * 1000 + mine).tolist()
            genes = generate_lengths(self.model, vocabulary, prompts, measured, limit, seeds).sum()
        genes, real = self.ranks.sum(float(genes), float(store.lengths[mine].sum()))
        return {"genes_written": round(genes / real, 4)}


def label_scores(truth: np.ndarray, predicted: np.ndarray, satisfies: np.ndarray) -> dict[str, float]:
    """Compute accuracy, and the means over labels of recall and F1; a finer type than the label counts as right."""
    right = satisfies[truth, predicted]
    recall, f1 = [], []
    for label in np.unique(truth):
        of_label = truth == label
        hits = right[of_label].sum()
        false = ((predicted == label) & ~right).sum()
        recall.append(hits / of_label.sum())
        f1.append(2 * hits / (of_label.sum() + hits + false))
    return {
        "accuracy": float(right.mean()),
        "macro_recall": float(np.mean(recall)),
        "macro_f1": float(np.mean(f1)),
    }


def _last_hidden(model: Mulan, prompts: list[list[int]], cache: Any = None) -> torch.Tensor:
    """Compute the hidden state at the end of each prompt of tokens without value."""
    device = model.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    entity = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
    hidden = model(entity, torch.zeros_like(entity), cache, lengths if cache is not None else None)
    return hidden[torch.arange(len(prompts), device=device), lengths - 1]


@torch.no_grad()
def expected_genes(model: Mulan, vocabulary: Vocabulary, prompts: list[list[int]], measured: np.ndarray) -> np.ndarray:
    """Compute the number of genes expected after each prompt, where logits are those of a token being still to come."""
    genes = vocabulary.ids(Family.GENE)
    logits = model.entity_logits(_last_hidden(model, prompts)).float().cpu().numpy()[:, genes]
    return (measured / (1 + np.exp(-logits))).sum(1)


@torch.no_grad()
def generate_lengths(
    model: Mulan,
    vocabulary: Vocabulary,
    prompts: list[list[int]],
    measured: np.ndarray,
    max_genes: int,
    seeds: Sequence[int],
) -> np.ndarray:
    """Generate cells token by token, each with its seed, and return their numbers of genes, at most ``max_genes``.

    A plain loop in plain PyTorch, for a handful of cells on any device: :mod:`scmulan.generate` is built for many.
    """
    device = model.device
    rows = len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    allowed = torch.zeros(rows, len(vocabulary), dtype=torch.bool)
    allowed[:, vocabulary.is_gene] = torch.from_numpy(measured)
    allowed[:, vocabulary.end] = True
    allowed = allowed.to(device)
    cache = model.new_cache(rows, max(map(len, prompts)) + max_genes)
    hidden = _last_hidden(model, prompts, cache)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    genes = torch.zeros(rows, dtype=torch.int64, device=device)
    for _ in range(max_genes):
        logits = model.entity_logits(hidden).float()
        weights = model.log_weights(logits, vocabulary.end).masked_fill(~allowed, -torch.inf)
        # Gumbel-max: the largest of log-weight + Gumbel noise is a draw; each cell has noise of its own.
        noise = torch.stack([torch.rand(weights.shape[1], generator=g) for g in generators]).to(device)
        token = (weights - (-noise.clamp(min=1e-20).log()).log()).argmax(1, keepdim=True)
        running &= token[:, 0] != vocabulary.end
        if not running.any():
            break
        genes += running
        allowed.scatter_(1, token, False)
        allowed[:, vocabulary.end] = True
        level = model.value_mean(hidden).gather(1, token).round().clamp(1, model.config.levels).long()
        hidden = model(token, level, cache)[:, 0]
    return genes.cpu().numpy()

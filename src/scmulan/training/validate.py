"""Watching a run on studies it does not train on: are labels and organs right?"""

from collections.abc import Iterator

import numpy as np
import torch

from scmulan.corpus.memory import CellStore
from scmulan.language.expression import tokenize
from scmulan.language.sentence import gene_prompts
from scmulan.language.tasks import ANNOTATE
from scmulan.language.vocabulary import Family, Vocabulary
from scmulan.model.transformer import Mulan


def last_states(model: Mulan, store: CellStore, vocabulary: Vocabulary, batch: int = 32) -> Iterator[tuple]:
    """Hidden state at the end of each cell's annotation prompt: yields (cell numbers, ``[B, W]``)."""
    genes = len(vocabulary.genes)
    columns = np.arange(genes, dtype=np.int32)
    order = np.argsort(store.lengths, kind="stable")
    for start in range(0, len(order), batch):
        cells = order[start : start + batch]
        rows = store.rows(cells)
        number = np.diff(rows.indptr)
        scale = np.repeat(1e4 / np.maximum(store.total[cells], 1e-9), number)
        rows.data = np.where(np.repeat(store.logged[cells], number), rows.data, np.log1p(rows.data * scale))
        words = tokenize(rows, columns, genes, state="log1p")
        entity, value, lengths = gene_prompts(words, vocabulary, ANNOTATE).padded()
        hidden = model(torch.from_numpy(entity), torch.from_numpy(value))
        yield cells, hidden[torch.arange(len(cells)), torch.from_numpy(lengths - 1)]


def validate(model: Mulan, store: CellStore, vocabulary: Vocabulary, satisfies: np.ndarray) -> dict[str, float]:
    """Annotation of labelled cells of other studies.

    Returns
    -------
    dict
        Per study ``NAME.accuracy`` (the prediction is the label or a finer type) and ``NAME.macro_recall`` over
        types that the vocabulary has, and their means ``accuracy``, ``macro_recall``.
    """
    fine = vocabulary.ids(Family.FINE)
    truth = store.words(Family.FINE)
    predicted = np.full(len(store), -1)
    model.eval()
    with torch.no_grad():
        for cells, hidden in last_states(model, store, vocabulary):
            predicted[cells] = fine[model.entity_logits(hidden)[:, fine].argmax(1).numpy()]
    model.train()
    out: dict[str, float] = {}
    for number, name in enumerate(store.studies):
        inside = np.flatnonzero((store.study == number) & (truth >= 0))
        right = satisfies[truth[inside], predicted[inside]]
        recalls = [right[truth[inside] == label].mean() for label in np.unique(truth[inside])]
        out[f"{name}.accuracy"] = float(right.mean())
        out[f"{name}.macro_recall"] = float(np.mean(recalls))
    for key in ("accuracy", "macro_recall"):
        out[key] = float(np.mean([v for k, v in out.items() if k.endswith(f".{key}")]))
    return out

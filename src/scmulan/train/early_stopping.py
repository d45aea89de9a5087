"""The best weights of a run, by how well they name cells that were held out."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmulan.data.memory import CellStore
from scmulan.model.network import Mulan
from scmulan.train.validate import last_hidden_states
from scmulan.vocab.vocabulary import Family, Vocabulary


class StopTraining(Exception):
    """Raised out of a run when further training is not worth it."""


def score(model: Mulan, store: CellStore, vocabulary: Vocabulary, relations: np.ndarray) -> dict[str, Any]:
    """How well a network names labelled cells, choosing among all fine types of the vocabulary.

    Parameters
    ----------
    model, vocabulary
        Network and its words.
    store
        Cells that all have a fine type.
    relations
        Bool ``[V, V]``: ``[v, u]`` where saying u is right when v is the truth.

    Returns
    -------
    dict
        ``accuracy``, ``macro_recall`` (mean over labels) and ``recall`` of each label.
    """
    fine = vocabulary.ids(Family.FINE)
    truth = store.tokens(Family.FINE)
    predicted = np.empty(len(store), dtype=np.int64)
    model.eval()
    with torch.no_grad():
        for cells, hidden in last_hidden_states(model, store, vocabulary):
            predicted[cells] = fine[model.entity_logits(hidden)[:, fine].argmax(1).numpy()]
    model.train()
    right = relations[truth, predicted]
    recall = {vocabulary.tokens[w]: round(float(right[truth == w].mean()), 4) for w in np.unique(truth)}
    return {
        "accuracy": round(float(right.mean()), 4),
        "macro_recall": round(float(np.mean(list(recall.values()))), 4),
        "recall": recall,
    }


class EarlyStopping:
    """Keeps the best weights so far beside the run's checkpoints, and ends a run that no longer improves.

    What is measured follows from the run's settings alone, so that checks come out as before when a killed run is
    continued: what is on disk stays true even where it is ahead of the newest checkpoint.

    Parameters
    ----------
    folder
        Run folder.
    measure
        Scores a network, see :func:`score`.
    patience
        Steps without anything better, after which :class:`StopTraining` is raised.
    progress
        Told each check in a line.
    """

    def __init__(
        self, folder: Path, measure: Callable[[Mulan], dict[str, Any]], patience: int, progress: Callable[[str], None]
    ) -> None:
        self.figures = folder / "best.json"
        self.weights_file = folder / "best.pt"
        self.measure = measure
        self.patience = patience
        self.progress = progress

    def start(self, model: Mulan) -> None:
        """Begin with a network before its first step."""
        found = self.measure(model)
        self._write({"best_step": 0, "before": _short(found), "validation": found}, model)
        self.progress(_line("before training", found, better=False))

    def check(self, model: Mulan, step: int) -> dict[str, float]:
        """Score the network of a step; keep it if it is the best.

        Raises
        ------
        StopTraining
            If nothing better was found for so long as patience lasts.
        """
        found, best = self.measure(model), self.report()
        better = _key(found) > _key(best["validation"])
        self.progress(_line(f"step {step:,}", found, better))
        if better:
            self._write({**best, "best_step": step, "validation": found}, model)
        elif step - best["best_step"] >= self.patience:
            raise StopTraining
        return _short(found)

    def report(self) -> dict[str, Any]:
        """``best_step``, its scores ``validation``, and those ``before`` training."""
        report: dict[str, Any] = json.loads(self.figures.read_text(encoding="utf-8"))
        return report

    def weights(self) -> dict[str, torch.Tensor]:
        """Read the best weights."""
        weights: dict[str, torch.Tensor] = torch.load(self.weights_file, weights_only=True, map_location="cpu")
        return weights

    def _write(self, report: dict[str, Any], model: Mulan) -> None:
        partial = self.weights_file.with_suffix(".partial")
        torch.save(model.state_dict(), partial)
        os.replace(partial, self.weights_file)
        # Last: a kill in between leaves old figures, and the check that wrote the weights is then repeated.
        partial.write_text(json.dumps(report), encoding="utf-8")
        os.replace(partial, self.figures)


def _key(scores: dict[str, Any]) -> float:
    return float(scores["accuracy"] + scores["macro_recall"])


def _short(scores: dict[str, Any]) -> dict[str, float]:
    return {name: scores[name] for name in ("accuracy", "macro_recall")}


def _line(when: str, scores: dict[str, Any], better: bool) -> str:
    text = f"{when}: accuracy {scores['accuracy']:.3f}, macro recall {scores['macro_recall']:.3f}"
    return text + " (best so far)" if better else text

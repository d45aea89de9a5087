"""Early stopping: keep the weights that name held-out cells best, and end a run that no longer improves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmulan._io.outputs import atomic_path
from scmulan._progress import SILENT, Progress
from scmulan.data.memory import CellStore
from scmulan.model.network import Mulan
from scmulan.train.checkpoint import write_text
from scmulan.train.validate import last_hidden_states
from scmulan.vocab.vocabulary import Family, Vocabulary


class StopTraining(Exception):
    """Raised out of a run when further training is not worth it."""


def score(model: Mulan, store: CellStore, vocabulary: Vocabulary, satisfies: np.ndarray) -> dict[str, Any]:
    """Score how well a network names labelled cells, choosing among all fine types of the vocabulary.

    Parameters
    ----------
    model, vocabulary
        Network and its tokens.
    store
        Cells that all have a fine type.
    satisfies
        Bool ``[V, V]``: ``[v, u]`` where predicting u is right when v is the truth.

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
    right = satisfies[truth, predicted]
    recall = {vocabulary.tokens[token]: round(float(right[truth == token].mean()), 4) for token in np.unique(truth)}
    return {
        "accuracy": round(float(right.mean()), 4),
        "macro_recall": round(float(np.mean(list(recall.values()))), 4),
        "recall": recall,
    }


class EarlyStopping:
    """Keeps the best weights so far beside the run's checkpoints, and ends a run that no longer improves.

    Parameters
    ----------
    folder
        Run folder.
    measure
        Scores a network, see :func:`score`.
    patience
        Steps without an improvement after which :class:`StopTraining` is raised.
    progress
        Shown each check in a line.

    Notes
    -----
    A score follows from the run's settings and the step alone, so checks come out as before when a killed run is
    continued: what is on disk stays true even where it is ahead of the newest checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        measure: Callable[[Mulan], dict[str, Any]],
        patience: int,
        progress: Progress = SILENT,
    ) -> None:
        self.report_file = folder / "best.json"
        self.weights_file = folder / "best.pt"
        self.measure = measure
        self.patience = patience
        self.progress = progress

    def start(self, model: Mulan) -> None:
        """Begin with a network before its first step."""
        scores = self.measure(model)
        self._write({"best_step": 0, "before": _means(scores), "validation": scores}, model)
        self.progress.log(_line("before training", scores, best=False))

    def check(self, model: Mulan, steps_done: int) -> dict[str, float]:
        """Score the network after so many steps; keep it if it is the best.

        Raises
        ------
        StopTraining
            If nothing better was found for ``patience`` steps.
        """
        scores, report = self.measure(model), self.report()
        better = _criterion(scores) > _criterion(report["validation"])
        self.progress.log(_line(f"step {steps_done:,}", scores, best=better))
        if better:
            self._write({**report, "best_step": steps_done, "validation": scores}, model)
        elif steps_done - report["best_step"] >= self.patience:
            raise StopTraining
        return _means(scores)

    def report(self) -> dict[str, Any]:
        """Read ``best_step``, its scores ``validation``, and those ``before`` training."""
        report: dict[str, Any] = json.loads(self.report_file.read_text(encoding="utf-8"))
        return report

    def weights(self) -> dict[str, torch.Tensor]:
        """Read the best weights."""
        weights: dict[str, torch.Tensor] = torch.load(self.weights_file, weights_only=True, map_location="cpu")
        return weights

    def _write(self, report: dict[str, Any], model: Mulan) -> None:
        with atomic_path(self.weights_file) as temporary:
            torch.save(model.state_dict(), temporary)
        # Last: a kill in between leaves the old report, and the check that wrote the weights is then repeated.
        write_text(self.report_file, json.dumps(report))


def _criterion(scores: dict[str, Any]) -> float:
    return float(scores["accuracy"] + scores["macro_recall"])


def _means(scores: dict[str, Any]) -> dict[str, float]:
    return {name: scores[name] for name in ("accuracy", "macro_recall")}


def _line(when: str, scores: dict[str, Any], best: bool) -> str:
    text = f"{when}: accuracy {scores['accuracy']:.3f}, macro recall {scores['macro_recall']:.3f}"
    return text + " (best so far)" if best else text

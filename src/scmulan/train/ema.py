"""Exponential moving average of the weights: steadier than those of any one step while the learning rate is high."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scmulan.model.network import Mulan
from scmulan.train.parallel import local


class WeightAverage:
    """Exponential moving average of a network's weights (Polyak and Juditsky 1992).

    Parameters
    ----------
    model
        The network. Where its weights are sharded over processes, each averages its part.
    decay
        Fraction of the average that a step leaves; 0.999 averages over about the last thousand steps. It is less while
        the run is young, so that the weights at its start are soon forgotten.
    """

    def __init__(self, model: Mulan, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the average by name, to keep in a checkpoint."""
        return {f"average.{name}": weight for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Take in the weights after so many steps."""
        decay = min(self.decay, steps_done / (steps_done + 9))
        for name, weight in self.model.named_parameters():
            local(self.weights[name]).lerp_(local(weight), 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the network the average while the context is open, to validate it: no step, no checkpoint inside."""
        with torch.no_grad():
            own = {name: local(weight).clone() for name, weight in self.model.named_parameters()}
        try:
            self._set({name: local(weight) for name, weight in self.weights.items()})
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            local(weight).copy_(weights[name])

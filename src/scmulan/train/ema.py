"""A running average of the weights: steadier than the weights of any one step while the rate is still high."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scmulan.model.network import Mulan


class WeightAverage:
    """Exponential moving average of a network's weights (Polyak and Juditsky 1992).

    Parameters
    ----------
    model
        The network; of weights that are spread over processes, each process averages its share.
    keep
        Share of the average that a step leaves; 0.999 averages over about the last thousand steps. Less while the run
        is young: the weights that it began with are soon forgotten.
    """

    def __init__(self, model: Mulan, keep: float) -> None:
        self.model = model
        self.keep = keep
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average by name, to keep in a checkpoint."""
        return {f"average.{name}": weight for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after so many steps."""
        keep = min(self.keep, step / (step + 9))
        for name, weight in self.model.named_parameters():
            _here(self.weights[name]).lerp_(_here(weight), 1 - keep)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the network the average for a while, in which it is looked at only: no step, no checkpoint."""
        with torch.no_grad():
            own = {name: _here(weight).clone() for name, weight in self.model.named_parameters()}
        try:
            self._set({name: _here(weight) for name, weight in self.weights.items()})
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            _here(weight).copy_(weights[name])


def _here(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    held: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return held

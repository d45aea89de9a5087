"""Data parallelism of training: DDP, ``fully_shard``, activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from scmulan._dist import Ranks
from scmulan.model.network import Mulan


def recompute_blocks(model: Mulan) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again there."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def parallelise(step: nn.Module, model: Mulan, ranks: Ranks, strategy: Literal["ddp", "fsdp"]) -> nn.Module:
    """Wrap a step's forward pass so that all processes work on it; gradients are means over the processes.

    Parameters
    ----------
    step
        Module whose forward pass gives the losses; it holds ``model``.
    model
        The network, on this process' device.
    ranks
        The processes.
    strategy
        ``"ddp"``: every process holds all weights; ``"fsdp"``: a part of each (``fully_shard``).

    Returns
    -------
    torch.nn.Module
        To be called in place of ``step``.
    """
    if ranks.world == 1:
        return step
    if strategy == "fsdp":
        # Each block's weights are gathered as it is needed; heads and embeddings stay gathered through the step.
        for block in model.blocks:
            fully_shard(block)
        fully_shard(step)
        return step
    # Labels have no value, so the value head has no gradient at all in two of the three tasks.
    return DistributedDataParallel(step, find_unused_parameters=True)


@contextmanager
def synchronised(step: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients only in the last of the parts that make up a step."""
    if isinstance(step, FSDPModule):
        step.set_requires_gradient_sync(last)
        yield
    elif isinstance(step, DistributedDataParallel) and not last:
        with step.no_sync():
            yield
    else:
        yield


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    held: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather all of a tensor of which this process may hold a part; all processes have to call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_network(model: Mulan) -> Mulan:
    """Return the network itself, or a copy with all of the weights where each process holds a part of them."""
    if not isinstance(next(iter(model.blocks)), FSDPModule):
        return model
    with torch.device("meta"):
        copy = Mulan(model.config)
    copy.load_state_dict({name: whole(weight).detach() for name, weight in model.state_dict().items()}, assign=True)
    return copy

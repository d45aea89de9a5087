"""``scmulan.load``: a model by path or name, ready to use."""

import os
from pathlib import Path

import torch

from scmulan.errors import ModelError
from scmulan.model.checkpoint import LoadedModel, load_model, resolve_model


def load(name_or_path: str | Path = "mini", *, device: str = "auto") -> LoadedModel:
    """Load a model; nothing is downloaded.

    Parameters
    ----------
    name_or_path
        Folder of a model, or the name of one that comes with the package (``"mini"``). A local folder wins.
    device
        ``"auto"`` (CUDA, then MPS, then CPU), or a torch device such as ``"cpu"`` or ``"cuda:1"``.

    Returns
    -------
    LoadedModel
        Network (evaluation mode), vocabulary, training card and weights hash.

    Raises
    ------
    ModelError
        If there is no such model, a file of it is missing or altered, or the device does not exist.
    """
    return load_model(resolve_model(name_or_path), device=choose_device(device))


def choose_device(device: str) -> str:
    """Device to compute on; ``"auto"`` takes the first of CUDA, MPS and CPU that is there.

    Under ``torchrun`` each process of a machine takes a GPU of its own.
    """
    if device == "auto":
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            return f"cuda:{local % torch.cuda.device_count()}" if local else "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ModelError(f"device {device!r} is not usable here: expected 'auto', 'cpu', 'cuda' or 'mps'") from None
    return device

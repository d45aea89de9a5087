"""Models on disk: save a network into a model folder, load one from it.

Weights are safetensors, everything else is JSON: nothing that is read here can run code. Torch is imported when
weights are touched, not before, so that models can be listed and described without it.

``scmulan.load``: a model by path or name, ready to use.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmulan.errors import ModelError, OutputError
from scmulan.model.folder import (
    FORMAT,
    WEIGHTS,
    existing,
    new_folder,
    packaged_models,
    read_card,
    read_config,
    read_hashes,
    read_vocabulary,
    resolve_model,
    verify_hashes,
    write_hashes,
    write_json,
)
from scmulan.vocab.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

    from scmulan.model.network import Mulan, MulanConfig

__all__ = [
    "LoadedModel",
    "load_model",
    "packaged_models",
    "read_card",
    "read_config",
    "read_vocabulary",
    "resolve_model",
    "save_model",
    "verify_hashes",
    "write_model",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A network with everything that its folder says about it."""

    network: "Mulan"
    """The decoder, in evaluation mode."""
    config: "MulanConfig"
    """Shape of the network."""
    vocabulary: Vocabulary
    """Its words."""
    card: dict[str, Any]
    """Training card: what the model knows, what it was made from, and how."""
    folder: Path
    """Where it was read from."""
    weights_hash: str
    """sha256 of the weights file."""


def save_model(
    folder: str | Path,
    model: "Mulan",
    vocabulary: Vocabulary,
    card: Mapping[str, Any],
    *,
    dtype: "torch.dtype | None" = None,
    force: bool = False,
) -> Path:
    """Write a model folder.

    Parameters
    ----------
    folder
        Where to; it appears only when complete.
    model
        Network whose weights are written.
    vocabulary
        Its words; as many as the network has.
    card
        Training card, plain JSON types.
    dtype
        Type to store floating-point weights in (``torch.float16`` halves the folder); as they are by default.
    force
        Replace an existing model folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OutputError
        If the folder exists (without ``force``) or cannot be written.
    """
    return write_model(folder, model.config, vocabulary, card, model.state_dict(), dtype=dtype, force=force)


def write_model(
    folder: str | Path,
    config: "MulanConfig",
    vocabulary: Vocabulary,
    card: Mapping[str, Any],
    weights: "Mapping[str, torch.Tensor]",
    *,
    dtype: "torch.dtype | None" = None,
    force: bool = False,
) -> Path:
    """Write a model folder from named weights (see :func:`save_model`), which need not be in memory (mmap)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _same_size(Path(folder), config, vocabulary)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        tensor = weight.detach().to(device="cpu", dtype=dtype).contiguous()
        # safetensors refuses two names for the same memory (tied weights): each gets its own.
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    with new_folder(folder, force=force) as temporary:
        write_json(temporary, "config.json", {"format": FORMAT, **config.to_json()})
        write_json(temporary, "vocabulary.json", vocabulary.to_json())
        write_json(temporary, "card.json", card)
        try:
            save_file(tensors, temporary / WEIGHTS)
        except SafetensorError as error:
            raise OutputError(f"{folder}: cannot be written ({error})") from None
        # safetensors makes the file private to its owner; a model folder is as readable as its other files.
        os.chmod(temporary / WEIGHTS, (temporary / "card.json").stat().st_mode & 0o777)
        write_hashes(temporary)
    return Path(folder).expanduser()


def load_model(
    folder: str | Path,
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    verify: bool = True,
) -> LoadedModel:
    """Read a model folder.

    Parameters
    ----------
    folder
        Path of a model folder, or the name of a model that ships with scmulan.
    device
        Where the weights go.
    dtype
        Type of the weights in memory; float32 by default, whatever they are stored as.
    verify
        Compare the files with their stored sha256 first.

    Raises
    ------
    ModelError
        If a file is missing, altered, unreadable, or does not fit the others; the message names it.
    """
    import torch

    from scmulan.model.network import Mulan, MulanConfig

    folder = resolve_model(folder)
    raw = read_config(folder)  # first: a folder that is no model at all is told so
    hashes = verify_hashes(folder) if verify else read_hashes(folder)
    try:
        config = MulanConfig.from_json(raw)
    except (ModelError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None
    vocabulary = read_vocabulary(folder)
    _same_size(folder, config, vocabulary)
    with torch.device("meta"):
        network = Mulan(config).to(dtype or torch.float32)
    _read_weights(existing(folder, WEIGHTS), network, device)
    return LoadedModel(
        network=network.eval(),
        config=config,
        vocabulary=vocabulary,
        card=read_card(folder),
        folder=folder,
        weights_hash=hashes[WEIGHTS],
    )


def _same_size(folder: Path, config: "MulanConfig", vocabulary: Vocabulary) -> None:
    if len(vocabulary) != config.vocabulary:
        raise ModelError(
            f"{folder / 'vocabulary.json'}: {len(vocabulary)} words, but config.json says {config.vocabulary}"
        )


def _read_weights(path: Path, network: "Mulan", device: "str | torch.device") -> None:
    """Fill a network that is on the meta device, one tensor at a time, after all shapes were compared."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_shapes(str(path), network, found)
            network.to_empty(device=device)
            with torch.no_grad():
                for name, parameter in network.state_dict().items():
                    parameter.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not readable as safetensors, perhaps cut off ({error})") from None


def check_shapes(source: str, network: "Mulan", found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of weights with those of a network.

    Parameters
    ----------
    source
        What holds the weights, for the message.
    network
        Network that they are for (the meta device is enough).
    found
        Shape of each weight.

    Raises
    ------
    ModelError
        Naming the first weight that is missing, has another shape, or is unknown.
    """
    wanted = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    for name, shape in wanted.items():
        if name not in found:
            raise ModelError(f"{source}: weight {name} is missing, expected one of shape {_shown(shape)}")
        if found[name] != shape:
            raise ModelError(f"{source}: weight {name} has shape {_shown(found[name])}, expected {_shown(shape)}")
    for name in found:
        if name not in wanted:
            raise ModelError(f"{source}: weight {name} is none of this network's ({len(wanted)} expected)")


def _shown(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


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
    import torch

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

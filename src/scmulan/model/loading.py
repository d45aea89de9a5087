"""Load a network from a model folder, and save one into it.

Weights are safetensors, everything else is JSON: nothing that is read here can run code. Torch is imported when
weights are touched, not before, so that models can be listed and described without it.
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
    existing_file,
    read_card,
    read_config,
    read_hashes,
    read_vocabulary,
    resolve_model,
    verify_hashes,
    write_hashes,
    write_json,
    writing_folder,
)
from scmulan.vocab.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

    from scmulan.model.network import Mulan, MulanConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A network with the contents of its model folder."""

    network: "Mulan"
    """The decoder, in evaluation mode."""
    config: "MulanConfig"
    """Shape of the network."""
    vocabulary: Vocabulary
    """Its tokens."""
    card: dict[str, Any]
    """Training card: what the model knows, what it was made from, and how."""
    folder: Path
    """The model folder."""
    weights_hash: str
    """sha256 of the weights file."""

    @property
    def name(self) -> str:
        """Name on the card, else that of the folder."""
        return str(self.card.get("name", self.folder.name))

    @property
    def objective(self) -> str:
        """Objective of the training: that of the publication if the card says nothing."""
        return str(self.card.get("objective", "published"))


def load(name_or_path: str | Path = "mini", *, device: str = "auto") -> LoadedModel:
    """Load a model, ready to use; nothing is downloaded.

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
    folder = resolve_model(name_or_path)  # a model that does not exist is told before a device that does not
    return load_model(folder, device=choose_device(device))


def choose_device(device: str) -> str:
    """Return the device to compute on; ``"auto"`` takes the first of CUDA, MPS and CPU that is there.

    Under ``torchrun`` each process of a machine takes a GPU of its own.

    Raises
    ------
    ModelError
        If the device does not exist or cannot be used.
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
        Device of the weights.
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
    _check_vocabulary_size(folder, config, vocabulary)
    with torch.device("meta"):
        network = Mulan(config).to(dtype or torch.float32)
    _read_weights(existing_file(folder, WEIGHTS), network, device)
    return LoadedModel(
        network=network.eval(),
        config=config,
        vocabulary=vocabulary,
        card=read_card(folder),
        folder=folder,
        weights_hash=hashes[WEIGHTS],
    )


def _read_weights(path: Path, network: "Mulan", device: "str | torch.device") -> None:
    """Fill a network that is on the meta device, one tensor at a time, after comparing all shapes."""
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
        Name of what holds the weights, for the message.
    network
        Network that they shall fill (the meta device is enough).
    found
        Shape of each weight.

    Raises
    ------
    ModelError
        If a weight is missing, has another shape, or is unknown; the message names the first one.
    """
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"{source}: weight {name} is missing, expected one of shape {_shape_text(shape)}")
        if found[name] != shape:
            raise ModelError(
                f"{source}: weight {name} has shape {_shape_text(found[name])}, expected {_shape_text(shape)}"
            )
    for name in found:
        if name not in expected:
            raise ModelError(f"{source}: weight {name} is none of this network's ({len(expected)} expected)")


def _shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


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
        Path of the folder, which appears only when complete.
    model
        Network whose weights are written.
    vocabulary
        Its tokens; as many as the network has.
    card
        Training card, plain JSON types.
    dtype
        Type to store the weights in (``torch.float16`` halves the folder); as they are by default.
    force
        Replace an existing model folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ModelError
        If the vocabulary has another number of tokens than the network.
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
    """Write a model folder from named weights, which need not be in memory (mmap).

    Parameters
    ----------
    config
        Shape of the network.
    weights
        Tensors by name.
    folder, vocabulary, card, dtype, force
        As in :func:`save_model`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ModelError
        If the vocabulary has another number of tokens than the network.
    OutputError
        If the folder exists (without ``force``) or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _check_vocabulary_size(Path(folder), config, vocabulary)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        tensor = weight.detach().to(device="cpu", dtype=dtype).contiguous()
        # safetensors refuses two names for the same memory (tied weights): each gets its own.
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    with writing_folder(folder, force=force) as temporary:
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


def _check_vocabulary_size(folder: Path, config: "MulanConfig", vocabulary: Vocabulary) -> None:
    if len(vocabulary) != config.vocabulary:
        raise ModelError(
            f"{folder / 'vocabulary.json'}: {len(vocabulary)} words, but config.json says {config.vocabulary}"
        )

"""Import a checkpoint in the layout of the published scMulan release as a model folder.

The layout is a ``torch.save`` of ``{"model_args": {…}, "model": {name: tensor}}``. It is opened with
``weights_only=True`` and nothing else: a pickle that wants to run code is refused before it does.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmulan._io.outputs import sha256
from scmulan.errors import ModelError
from scmulan.model.loading import check_shapes, write_model
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.vocabulary import Vocabulary

# Prefixes that torch.compile and DDP put before every name.
WRAPPER_PREFIXES = ("_orig_mod.", "module.")

# The release's names and ours: modules, modules of a block, entries of ``model_args``.
NAMES = {
    "transformer.wte": "word",
    "transformer.wee": "level",
    "transformer.ln_f": "norm",
    "lm_head": "entity_head",
    "epx_head": "value_head",
}
BLOCK_NAMES = {
    "ln_1": "norm_1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "norm_2",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
SETTINGS = {
    "vocab_size": "vocabulary",
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
    "expression_level": "levels",
    "bias": "bias",
}


def import_release(ckpt_path: str | Path, out_folder: str | Path, *, force: bool = False) -> Path:
    """Write a published checkpoint as a model folder.

    The weights are mapped from the file and written straight on, so memory stays near the checkpoint's own size.

    Parameters
    ----------
    ckpt_path
        The release's ``.pt`` file.
    out_folder
        Model folder to write.
    force
        Replace an existing model folder.

    Returns
    -------
    Path
        The model folder.

    Raises
    ------
    ModelError
        If the file is no such checkpoint, wants to run code, or does not fit the published vocabulary.
    OutputError
        If the folder exists (without ``force``) or cannot be written.
    """
    path = Path(ckpt_path)
    model_args, stored = _model_args_and_weights(path, read_checkpoint(path))
    config = _config(path, model_args)
    vocabulary = Vocabulary.published()
    if config.vocabulary != len(vocabulary):
        raise ModelError(
            f"{path}: made for {config.vocabulary} words, expected the published vocabulary's {len(vocabulary)}"
        )
    weights = _weights(path, config, stored)
    return write_model(out_folder, config, vocabulary, _card(path, config), weights, force=force)


def read_checkpoint(path: Path) -> Any:
    """Read a ``torch.save`` file, tensors mapped into memory; no code of the file runs."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file, expected a published scMulan checkpoint (.pt)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused just below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wants:
            raise ModelError(
                f"{path}: refused, loading it would run code ({wants[1]}); nothing was run. "
                "Expected a checkpoint of tensors and plain values only"
            ) from None
    except Exception:  # noqa: BLE001 - any bytes may be in the file, and torch's advice about them is not ours
        pass
    raise ModelError(
        f"{path}: damaged, or no torch checkpoint; nothing in it was run. Expected a published scMulan checkpoint (.pt)"
    )


def _model_args_and_weights(path: Path, content: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    parts = []
    for key in ("model_args", "model"):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            found = (
                f"keys {', '.join(map(str, list(content)[:5]))}"
                if isinstance(content, Mapping)
                else f"a {type(content).__name__}"
            )
            raise ModelError(
                f"{path}: no {key!r} in this checkpoint (found {found}), expected 'model_args' and 'model'"
            )
        parts.append(content[key])
    return parts[0], parts[1]


def _config(path: Path, model_args: Mapping[str, Any]) -> MulanConfig:
    """Translate the release's ``model_args``."""
    values: dict[str, Any] = {}
    for theirs, ours in SETTINGS.items():
        if theirs not in model_args:
            raise ModelError(f"{path}: model_args lacks {theirs!r}, expected {', '.join(SETTINGS)}")
        value = model_args[theirs]
        kind, description = (bool, "true or false") if theirs == "bias" else (int, "a whole number")
        if type(value) is not kind:
            raise ModelError(f"{path}: model_args has {theirs} = {value!r}, expected {description}")
        values[ours] = value
    if model_args.get("ele", 1) != 1:
        raise ModelError(f"{path}: model_args has ele = {model_args['ele']!r}, expected 1 (words with values)")
    try:
        return MulanConfig(**values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _weights(path: Path, config: MulanConfig, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights under our names, compared with the network that ``model_args`` describes."""
    weights: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if not isinstance(tensor, Tensor):
            continue
        name = _our_name(path, str(key))
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ModelError(f"{path}: {key} is {tensor.dtype}, expected dense floating-point weights")
        weights[name] = tensor.float() if tensor.dtype == torch.float64 else tensor
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.layers:  # before a network of that depth is made
        raise ModelError(f"{path}: model_args has n_layer = {config.layers}, but there are weights of {len(blocks)}")
    with torch.device("meta"):
        network = Mulan(config)
    check_shapes(str(path), network, {name: tuple(t.shape) for name, t in weights.items()})
    return weights


def _our_name(path: Path, key: str) -> str:
    """Translate the name of a weight."""
    bare = key
    while bare.startswith(WRAPPER_PREFIXES):
        bare = bare.removeprefix(WRAPPER_PREFIXES[0]).removeprefix(WRAPPER_PREFIXES[1])
    stem, _, kind = bare.rpartition(".")
    block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem)
    if block and block[2] in BLOCK_NAMES:
        return f"blocks.{int(block[1])}.{BLOCK_NAMES[block[2]]}.{kind}"
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    raise ModelError(f"{path}: weight {key!r} is none of the published network's")


def _card(path: Path, config: MulanConfig) -> dict[str, Any]:
    """Return the training card of an imported release."""
    return {
        "name": "scMulan release",
        "summary": "Weights in the layout of the published scMulan release, with its 2,222 words (2,000 genes).",
        "source": "the authors' release, https://github.com/SuperBianC/scMulan, if the file came from there",
        "licence": "MIT (the release's)",
        "citation": "Bian et al., scMulan: a multitask generative pre-trained language model, RECOMB 2024",
        "imported": {"file": path.name, "sha256": sha256(path), "shape": config.to_json()},
        "objective": "published",
        "rules": {"annotation": "release", "generation": "release", "embedding": "release"},
        "knows": "organs, regions, ages, sexes, sample statuses, technologies, coarse and fine types of the vocabulary",
        "unknown": [
            "the cells it was trained on (the release does not include them), hence what it has seen before",
            "seeds, schedule and length of its training",
            "which special word asks for organ and region (<SPToken2> stands in for it)",
            "whether the file is the authors' own: nothing published says what its sha256 should be",
        ],
    }

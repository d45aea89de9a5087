"""What a model folder says about itself, without torch and without reading its weights into memory."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scmulan.errors import ModelError
from scmulan.language.vocabulary import METADATA, Family
from scmulan.model.folder import WEIGHTS, read_card, read_config, read_hashes, read_vocabulary, resolve_model


def describe_model(name_or_path: str | Path) -> dict[str, Any]:
    """Describe a model in plain types.

    Parameters
    ----------
    name_or_path
        Path of a model folder, or the name of a packaged model.

    Returns
    -------
    dict
        ``name``, ``folder``, ``description``, ``parameters``, ``mebibytes``, ``stored_as`` (types of the weights),
        ``weights_hash``, ``config``, ``objective``, ``genes`` (number), ``words`` (metadata words of each family) and
        ``card``. The files are not compared with their hashes: ``scmulan model verify`` does that.

    Raises
    ------
    ModelError
        If there is no such model, or a file of it is missing or unreadable.
    """
    folder = resolve_model(name_or_path)
    config, card, vocabulary = read_config(folder), read_card(folder), read_vocabulary(folder)
    parameters, kinds = _weights(folder / WEIGHTS)
    return {
        "name": str(card.get("name", folder.name)),
        "folder": str(folder),
        "description": str(card.get("description") or card.get("summary") or ""),
        "parameters": parameters,
        "mebibytes": round(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 2**20, 2),
        "stored_as": kinds,
        "weights_hash": read_hashes(folder)[WEIGHTS],
        "config": config,
        "objective": str(card.get("objective", "published")),
        "genes": len(vocabulary.ids(Family.GENE)),
        "words": {str(family): vocabulary.names(family) for family in METADATA},
        "card": card,
    }


def _weights(path: Path) -> tuple[int, list[str]]:
    """Count the weights and name their types, from the head of the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = [file.get_slice(name) for name in file.keys()]
            return sum(math.prod(s.get_shape()) for s in slices), sorted({s.get_dtype() for s in slices})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not readable as safetensors, perhaps cut off ({error})") from None

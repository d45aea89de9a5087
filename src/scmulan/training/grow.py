"""New words for a network that exists: every table with one row per word gets more rows."""

from dataclasses import replace

import numpy as np
import torch

from scmulan.language.ontology import Ontology
from scmulan.language.vocabulary import METADATA, Family, Vocabulary
from scmulan.model.transformer import Mulan

NOISE = 0.1


def grow(network: Mulan, old: Vocabulary, new: Vocabulary, seed: int) -> Mulan:
    """Copy a network (float32, on the CPU) and give it rows for the words that were added to its vocabulary.

    Parameters
    ----------
    network
        Network of ``old``; it is not changed.
    old, new
        Vocabulary before and after :meth:`Vocabulary.extend`; the ids of old words stay.
    seed
        Of the noise that tells new words of the same origin apart.

    Returns
    -------
    Mulan
        Old words keep their rows. A new word starts as the mean of its :func:`relatives`, plus noise of a tenth of
        the table's spread.
    """
    models = [relatives(old, *_family_and_name(new, word)) for word in range(len(old), len(new))]
    grown = Mulan(replace(network.config, vocabulary=len(new)))
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    with torch.no_grad():
        for name, weight in grown.state_dict().items():
            before = state[name].to(device="cpu", dtype=torch.float32)
            if before.shape == weight.shape:
                weight.copy_(before)
                continue
            weight[: len(old)] = before
            for row, like in enumerate(models, start=len(old)):
                rows = before[torch.from_numpy(like)]
                noise = torch.randn(weight.shape[1:], generator=generator)
                weight[row] = rows.mean(0) + NOISE * before.std(0) * noise
    return grown


def _family_and_name(vocabulary: Vocabulary, word: int) -> tuple[Family, str]:
    return next(f for f in METADATA if word in vocabulary.families.get(f, ())), vocabulary.words[word]


def relatives(vocabulary: Vocabulary, family: Family, name: str) -> np.ndarray:
    """Words that a new word of a family is most like.

    Of cell types those that mean the same type of the Cell Ontology, otherwise the closest that the type is a kind
    of, otherwise those that are kinds of it; else the whole family; of a family without words all metadata words.

    Returns
    -------
    numpy.ndarray
        int64 word ids, at least one.
    """
    ids = vocabulary.ids(family)
    if family in (Family.COARSE, Family.FINE):
        ontology = Ontology.load()
        wanted = ontology.find(name)
        types = {int(i): ontology.find(vocabulary.words[i]) for i in ids} if wanted else {}
        known = {i: t for i, t in types.items() if t}
        for group in (
            {i: 0 for i, t in known.items() if t == wanted},
            {i: ontology.distance(wanted, t) for i, t in known.items() if wanted and ontology.is_a(wanted, t)},
            {i: 0 for i, t in known.items() if wanted and ontology.is_a(t, wanted)},
        ):
            if group:
                least = min(d for d in group.values() if d is not None)
                return np.array([i for i, d in group.items() if d == least], dtype=np.int64)
    if not len(ids):
        ids = np.unique(np.concatenate([vocabulary.ids(f) for f in METADATA]))
    return ids if len(ids) else np.arange(len(vocabulary), dtype=np.int64)

"""A small vocabulary, a small network, and training cells whose types say different genes."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scmulan.data.memory import CellStore
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

FINE = ["CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "B cell", "monocyte"]
COARSE = ["T cell", "T cell", "B cell", "myeloid cell"]
GENES = 60


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order: results can be compared to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    metadata = {
        Family.ORGAN: ["Blood", "Brain"],
        Family.REGION: ["cortex"],
        Family.SEX: ["female", "male"],
        Family.COARSE: sorted(set(COARSE)),
        Family.FINE: [*FINE, "T cell"],
    }
    return Vocabulary.build([f"G{i:02d}" for i in range(GENES)], metadata)


@pytest.fixture(scope="session")
def store(vocabulary) -> CellStore:
    """Sixty cells of two studies: counts of all genes with labels, log1p of forty genes where every third has none.

    A cell of type t has many counts of the genes t, t + 4, t + 8, …
    """
    rng = np.random.default_rng(5)
    cells = 60
    kind = rng.integers(0, 4, cells)
    study = (np.arange(cells) >= 40).astype(np.int64)
    mean = np.where(np.arange(GENES) % 4 == kind[:, None], 6.0, 0.4)
    counts = rng.poisson(mean).astype(np.float32)
    measured = np.ones((2, GENES), dtype=bool)
    measured[1, 40:] = False
    counts[study == 1, 40:] = 0
    total = counts.sum(1).astype(np.float32) + 50
    logged = study == 1
    values = np.where(logged[:, None], np.log1p(counts * (1e4 / total)[:, None]), counts).astype(np.float32)
    metadata = np.full((cells, len(METADATA)), -1, dtype=np.int32)

    def say(family, words, rows):
        for row, word in zip(rows, words, strict=True):
            metadata[row, METADATA.index(family)] = vocabulary.id(family, word)

    labelled = [i for i in range(cells) if study[i] == 0 or i % 3]
    say(Family.FINE, [FINE[kind[i]] for i in labelled], labelled)
    say(Family.COARSE, [COARSE[kind[i]] for i in labelled if i % 5], [i for i in labelled if i % 5])
    blood = [i for i in range(cells) if study[i] == 0]
    say(Family.ORGAN, ["Blood"] * len(blood), blood)
    say(Family.SEX, ["female" if i % 2 else "male" for i in blood], blood)
    return CellStore(sp.csr_matrix(values), total, logged, study, ["one", "two"], measured, metadata)


@pytest.fixture
def network(vocabulary) -> Mulan:
    config = MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=32, set_state=True, value_spread=True)
    return Mulan(config).initialise(0)

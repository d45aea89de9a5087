import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scmulan.data.memory import CellStore, take
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.init import init_from_counts
from scmulan.vocab.binning import tokenize
from scmulan.vocab.sentences import gene_prompts
from scmulan.vocab.tasks import ANNOTATE
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

GENES = 40


@pytest.fixture(scope="module")
def cells():
    """Two types of 60 cells: type A has genes 0–9 and 20–39 often, type B genes 10–19 and 20–39."""
    vocabulary = Vocabulary.build([f"G{i}" for i in range(GENES)], {Family.FINE: ["A", "B"], Family.ORGAN: ["Blood"]})
    rng = np.random.default_rng(0)
    chance = np.full((2, GENES), 0.02)
    chance[:, 20:] = 0.5
    chance[0, :10] = chance[1, 10:20] = 0.8
    kind = np.repeat([0, 1], 60)
    x = (rng.random((120, GENES)) < chance[kind]) * rng.integers(1, 6, (120, GENES))
    metadata = np.full((120, len(METADATA)), -1, dtype=np.int32)
    metadata[:, METADATA.index(Family.FINE)] = vocabulary.ids(Family.FINE)[kind]
    metadata[:, METADATA.index(Family.ORGAN)] = vocabulary.ids(Family.ORGAN)[0]
    matrix = sp.csr_matrix(x.astype(np.float32))
    total = np.asarray(matrix.sum(1)).ravel()
    zeros = np.zeros(120, dtype=np.int64)
    store = CellStore(matrix, total, zeros.astype(bool), zeros, ["s"], np.ones((1, GENES), bool), metadata)
    config = MulanConfig(
        vocabulary=len(vocabulary), layers=1, heads=2, width=16, set_state=True, value_spread=True, word_bias=True,
        bounded_genes=True,
    )  # fmt: skip
    network = Mulan(config).initialise(0)
    init_from_counts(network, store, vocabulary, 0)
    return vocabulary, store, network.eval(), kind


@torch.inference_mode()
def test_a_type_in_the_prompt_speaks_for_its_genes(cells):
    vocabulary, _, network, _ = cells
    genes = vocabulary.ids(Family.GENE)
    weights = []
    for name in ("A", "B"):
        prompt = torch.tensor([[vocabulary.id(Family.FINE, name), vocabulary.prompts["generate"]]])
        logits = network.entity_logits(network(prompt, torch.zeros_like(prompt))[0, -1])
        weights.append(network.log_weights(logits, vocabulary.end)[genes].exp())
    a, b = weights
    assert a[:10].mean() > 3 * b[:10].mean() and b[10:20].mean() > 3 * a[10:20].mean()


@torch.inference_mode()
def test_genes_speak_for_their_type(cells):
    vocabulary, store, network, kind = cells
    words = tokenize(store.matrix, np.arange(GENES, dtype=np.int32), GENES, matrix_kind="counts")
    entity, value, lengths = gene_prompts(words, vocabulary, ANNOTATE).padded()
    hidden = network(torch.from_numpy(entity), torch.from_numpy(value))[
        torch.arange(120), torch.from_numpy(lengths - 1)
    ]
    named = network.entity_logits(hidden)[:, vocabulary.ids(Family.FINE)].argmax(1).numpy()
    assert (named == kind).mean() > 0.95


def test_bias_is_the_log_odds_of_detection(cells):
    vocabulary, store, network, _ = cells
    seen = np.asarray((store.matrix > 0).sum(0)).ravel()
    share = (seen + 0.5) / 121
    expected = torch.from_numpy(np.log(share / (1 - share))).float()
    assert torch.allclose(network.entity_bias[vocabulary.ids(Family.GENE)], expected, atol=1e-5)


def test_a_network_without_these_parts_is_left_as_it_is(cells):
    vocabulary, store, _, _ = cells
    plain = Mulan(MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=16)).initialise(0)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    init_from_counts(plain, store, vocabulary, 0)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


def test_one_kind_of_cells_gives_the_bias_alone(cells):
    vocabulary, store, network, kind = cells
    alone = Mulan(network.config).initialise(1)
    before = alone.entity_head.weight.clone()
    some = take(store, np.flatnonzero(kind == 0))
    init_from_counts(alone, some, vocabulary, 0)
    assert torch.equal(alone.entity_head.weight, before)
    bias = alone.entity_bias[vocabulary.ids(Family.GENE)]
    assert bias[:10].min() > bias[10:20].max()

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scmulan.generate.blocks import BlockConfig, decode_in_blocks, solve_shift
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.vocabulary import Family, Vocabulary


@pytest.fixture(scope="module")
def model():
    """Random model of 40 genes with bounded genes."""
    vocabulary = Vocabulary.build([f"G{i}" for i in range(40)], {Family.ORGAN: ["Blood"]})
    config = MulanConfig(
        vocabulary=len(vocabulary), layers=2, heads=2, width=16, set_state=True, value_spread=True, bounded_genes=True
    )
    network = Mulan(config).initialise(0).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return SimpleNamespace(network=network, vocabulary=vocabulary)


def prompt(model):
    return np.array([model.vocabulary.id(Family.ORGAN, "Blood"), model.vocabulary.prompts["generate"]])


def decode(model, n, *, seed, genes=None, **config):
    return decode_in_blocks(model, prompt(model), n, config=BlockConfig(**config), seed=seed, genes=genes)


def probabilities(model):
    entity = torch.from_numpy(prompt(model))[None]
    with torch.inference_mode():
        logits = model.network.entity_logits(model.network(entity, torch.zeros_like(entity))[0, -1])
    return logits.sigmoid()[model.vocabulary.ids(Family.GENE)].numpy()


def drawn_genes(model, cells):
    genes = [model.vocabulary.gene_index[cells[i][0][2:-1]] for i in range(len(cells))]
    return np.stack([np.bincount(g, minlength=40) for g in genes])


def test_cells_hold_each_gene_once_and_end(model):
    cells = decode(model, 9, seed=0, blocks=4, gene_count_spread=0.3)
    for i in range(9):
        entity, value = cells[i]
        assert entity[-1] == model.vocabulary.end and value[-1] == 0
        assert model.vocabulary.is_gene[entity[2:-1]].all() and (value[2:-1] >= 1).all() and (value[2:-1] <= 10).all()
    assert drawn_genes(model, cells).max() == 1


def test_one_block_draws_each_gene_with_its_probability(model):
    n = 1500
    cells = drawn_genes(model, decode(model, n, seed=1, blocks=1, batch_size=500))
    expected = probabilities(model)
    assert np.abs(cells.mean(0) - expected).max() < 5 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("blocks", [1, 5])
def test_number_of_genes_is_what_was_expected_times_the_factor(model, blocks):
    for factor in (0.5, 1.2):
        cells = drawn_genes(model, decode(model, 300, seed=2, blocks=blocks, gene_count_factor=factor, batch_size=300))
        assert cells.sum(1).mean() == pytest.approx(factor * probabilities(model).sum(), rel=0.05)


def test_same_seed_same_cells_whatever_the_batch(model):
    whole = decode(model, 6, seed=3, blocks=3, gene_count_spread=0.4, batch_size=6)
    split = decode(model, 4, seed=3, blocks=3, gene_count_spread=0.4, batch_size=3)
    for i in range(4):
        assert np.array_equal(whole[i][0], split[i][0]) and np.array_equal(whole[i][1], split[i][1])


def test_later_blocks_read_what_earlier_ones_drew(model):
    """The odds of the second block are those of the network on the whole sentence so far, without a cache."""
    cells = decode(model, 1, seed=4, blocks=2)
    seen = []
    network = model.network
    whole = network.forward

    def spy(entity, value, cache=None, new=None):
        hidden = whole(entity, value, cache, new)
        if cache is not None and entity.shape[0] == 1 and new is not None:
            seen.append((entity[0, : new[0]].tolist(), value[0, : new[0]].tolist(), hidden[0, new[0] - 1]))
        return hidden

    network.forward = spy
    try:
        again = decode(model, 1, seed=4, blocks=2)
    finally:
        network.forward = whole
    assert np.array_equal(again[0][0], cells[0][0]) and len(seen) == 2
    tokens, values, hidden = seen[0]
    entity = torch.tensor([[*prompt(model).tolist(), *tokens]])
    value = torch.tensor([[0, 0, *values]])
    with torch.inference_mode():
        assert torch.allclose(network(entity, value)[0, -1], hidden, atol=1e-5)


def test_panel_and_largest_number_of_genes_are_kept(model):
    panel = np.zeros(len(model.vocabulary), dtype=bool)
    panel[model.vocabulary.ids(Family.GENE)[:15]] = True
    cells = decode(model, 20, seed=5, blocks=3, genes=panel, gene_count_factor=3.0, max_tokens=10)
    counts = drawn_genes(model, cells)
    assert counts[:, 15:].sum() == 0 and counts.sum(1).max() <= 10


def test_shift_reaches_the_number_wanted():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    logits[:, :4] = -torch.inf
    wanted = torch.tensor([1.0, 5.0, 13.0, 20.0, 25.0])
    found = (logits + solve_shift(logits, wanted)[:, None]).sigmoid().sum(1)
    assert torch.allclose(found, wanted, atol=1e-3)

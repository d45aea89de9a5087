import numpy as np
import torch

from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.gene_count import CellGroups, fit_gene_counts
from scmulan.vocab.vocabulary import Family


def test_factors_make_the_expected_number_of_genes_that_of_the_cells(vocabulary, store):
    config = MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=32, set_state=True, bounded_genes=True)
    network = Mulan(config).initialise(0).eval()
    depth = fit_gene_counts(network, CellGroups.of(store, len(vocabulary)), vocabulary)
    number = np.diff(store.matrix.indptr)
    genes = vocabulary.ids(Family.GENE)
    fine = store.tokens(Family.FINE)
    # All metadata words that most B cells of the first study have make up their prompt.
    cells = np.flatnonzero((store.study == 0) & (fine == vocabulary.id(Family.FINE, "B cell")))
    words = [w for w in np.unique(store.metadata[cells]) if w >= 0 and (store.metadata[cells] == w).any(1).mean() > 0.5]
    entity = torch.tensor([[*words, vocabulary.prompts["generate"]]])
    with torch.inference_mode():
        logits = network.entity_logits(network(entity, torch.zeros_like(entity))[0, -1])[genes]
    expected = float(logits.sigmoid().numpy()[store.measured[0]].sum())
    by_word = {name: value for names in depth["words"].values() for name, value in names.items()}
    factor = np.exp(depth["base"] + sum(by_word[vocabulary.tokens[w]] for w in words))
    assert abs(factor * expected / number[cells].mean() - 1) < 0.15
    assert 0 < depth["spread"] < 1


def test_no_depth_without_bounded_genes(vocabulary, store, network):
    assert fit_gene_counts(network, CellGroups.of(store, len(vocabulary)), vocabulary) is None

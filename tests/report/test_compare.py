"""Comparison of generated cells with the real cells of their type."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmulan._keys import CELL_TYPE, COARSE, ONTOLOGY_ID, PROBABILITY, STATUS
from scmulan.errors import InputError
from scmulan.report.compare import compare, count_prompts
from scmulan.report.results import read_results
from scmulan.vocab.matrix import choose_matrix
from scmulan.vocab.vocabulary import Vocabulary

GENES = Vocabulary.published().genes[:120]


def real_cells(labels: list[str], seed: int = 0) -> ad.AnnData:
    """Annotated cells whose types differ in half of their genes."""
    rng = np.random.default_rng(seed)
    names = sorted(set(labels))
    profiles = {name: np.random.default_rng(i).gamma(0.5, 2.0, len(GENES)) for i, name in enumerate(names)}
    x = np.stack([rng.poisson(profiles[name]) for name in labels]).astype(np.float32)
    x[x.sum(1) == 0, 0] = 1
    obs = pd.DataFrame(index=[f"c{i}" for i in range(len(labels))])
    obs[CELL_TYPE] = pd.Categorical(labels)
    obs[COARSE] = pd.Categorical(["lymphocyte"] * len(labels))
    obs[PROBABILITY] = np.float32(0.9)
    obs[STATUS] = pd.Categorical(["confident"] * len(labels))
    obs[ONTOLOGY_ID] = ""
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=pd.Index(GENES)))


def generated_cells(source: ad.AnnData, prompt: dict[str, str]) -> ad.AnnData:
    """Cells as generate returns them, with the values of real ones."""
    counts = source.X.toarray()
    x = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    obs = pd.DataFrame({f"prompt_{k}": pd.Categorical([v] * len(x)) for k, v in prompt.items()}, index=source.obs_names)
    obs["complete"] = True
    return ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs, var=source.var)


def compared(real: ad.AnnData, generated: ad.AnnData) -> list:
    return compare(real, read_results(real), generated, choose_matrix(real))


@pytest.fixture
def real() -> ad.AnnData:
    return real_cells(["B cell"] * 30 + ["T cell"] * 25 + ["plasma cell"] * 22 + ["monocyte"] * 3)


def test_real_cells_correlate_with_themselves(real):
    (found,) = compared(real, generated_cells(real[:30], {"organ": "Blood", "fine_type": "B cell"}))
    assert found.prompt == {"organ": "Blood", "cell type": "B cell"}
    assert found.real_cells == 30 and found.compared == (30, 30) and found.genes == 120
    assert found.correlation.mean == pytest.approx(1) and found.correlation.detected == pytest.approx(1)
    np.testing.assert_array_equal(found.generated.n_genes, found.real.n_genes)
    np.testing.assert_array_equal(found.real.n_genes, (real.X[:30] > 0).sum(1).A1)
    assert found.others.mean < found.halves.mean < 1
    near, own, chance = found.neighbours
    assert near >= own > 0.9 and chance == pytest.approx(30 / 80)
    assert [(found.group == name).sum() for name in ("generated", "real", "other")] == [30, 30, 50]


def test_other_type_does_not_correlate(real):
    (found,) = compared(real, generated_cells(real[30:55], {"fine_type": "B cell"}))
    assert found.correlation.mean < 0.5
    assert found.neighbours[0] < 0.2 < found.neighbours[1]


def test_finer_types_are_the_type_too(real):
    (found,) = compared(real, generated_cells(real[:30], {"fine_type": "lymphocyte of B lineage"}))
    assert found.real_types == ["B cell", "plasma cell"] and found.real_cells == 52


def test_coarse_prompts_ask_for_coarse_types(real):
    real.obs[COARSE] = pd.Categorical(["lymphocyte"] * 77 + ["myeloid leukocyte"] * 3)
    (found,) = compared(real, generated_cells(real[77:], {"coarse_type": "myeloid leukocyte"}))
    assert found.prompt == {"coarse cell type": "myeloid leukocyte"}
    assert found.real_types == ["monocyte"] and found.real_cells == 3
    assert found.halves is None


def test_empty_cells_are_nobodys_type(real):
    real.obs[STATUS] = pd.Categorical(["empty"] * 10 + ["confident"] * 70)
    (found,) = compared(real, generated_cells(real[:30], {"fine_type": "B cell"}))
    assert found.real_cells == 20
    (found,) = compared(real, generated_cells(real[:30], {"organ": "Blood"}))
    assert found.requested_type is None and found.real_cells == 70 and found.others is None


def test_type_that_is_missing(real):
    (found,) = compared(real, generated_cells(real[:30], {"fine_type": "hepatocyte"}))
    assert found.real is None and found.correlation is None and found.neighbours is None
    assert found.real_cells == 0 and len(found.generated.n_genes) == 30


def test_genes_that_only_one_side_has_do_not_count(real):
    generated = generated_cells(real[:30], {"fine_type": "B cell"})
    more = ad.AnnData(
        sp.csr_matrix(np.full((30, 5), 9, dtype=np.float32)),
        obs=generated.obs,
        var=pd.DataFrame(index=Vocabulary.published().genes[200:205]),
    )
    both = ad.concat([more, generated], axis=1, merge="first")
    both.obs = generated.obs
    (found,) = compared(real, both)
    assert found.genes == 120
    assert found.correlation.mean == pytest.approx(1)
    assert found.mean_generated_genes == pytest.approx(found.generated.n_genes.mean() + 5)


def test_order_of_genes_does_not_matter(real):
    generated = generated_cells(real[:30], {"fine_type": "B cell"})
    (found,) = compared(real, generated[:, np.random.default_rng(1).permutation(120)].copy())
    assert found.correlation.mean == pytest.approx(1)


def test_each_prompt_has_its_comparison(real):
    generated = ad.concat(
        [generated_cells(real[30:55], {"fine_type": "T cell"}), generated_cells(real[:30], {"fine_type": "B cell"})],
        index_unique="-",
    )
    found = compared(real, generated)
    assert count_prompts(generated) == 2
    assert [(c.requested_type, c.generated_cells) for c in found] == [("B cell", 30), ("T cell", 25)]
    assert all(c.correlation.mean == pytest.approx(1) for c in found)


def test_cells_that_were_cut_off_are_counted(real):
    generated = generated_cells(real[:30], {"fine_type": "B cell"})
    generated.obs["complete"] = [False] * 4 + [True] * 26
    assert compared(real, generated)[0].incomplete == 4


def test_no_generated_cells(real):
    with pytest.raises(InputError, match="no cells"):
        compared(real, generated_cells(real[:30], {})[:0])

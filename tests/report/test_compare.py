"""Generated cells are compared with the right real cells, in the same way for both."""

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


def written_cells(source: ad.AnnData, prompt: dict[str, str]) -> ad.AnnData:
    """Cells as the generator leaves them, with the values of real ones."""
    counts = source.X.toarray()
    x = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    obs = pd.DataFrame({f"prompt_{k}": pd.Categorical([v] * len(x)) for k, v in prompt.items()}, index=source.obs_names)
    obs["complete"] = True
    return ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs, var=source.var)


def compared(real: ad.AnnData, written: ad.AnnData) -> list:
    return compare(real, read_results(real), written, choose_matrix(real))


@pytest.fixture
def real() -> ad.AnnData:
    return real_cells(["B cell"] * 30 + ["T cell"] * 25 + ["plasma cell"] * 22 + ["monocyte"] * 3)


def test_real_cells_agree_with_themselves(real):
    (found,) = compared(real, written_cells(real[:30], {"organ": "Blood", "fine_type": "B cell"}))
    assert found.prompt == {"organ": "Blood", "cell type": "B cell"}
    assert found.real_cells == 30 and found.compared == (30, 30) and found.genes == 120
    assert found.agreement.mean == pytest.approx(1) and found.agreement.detected == pytest.approx(1)
    np.testing.assert_array_equal(found.generated.words, found.real.words)
    np.testing.assert_array_equal(found.real.words, (real.X[:30] > 0).sum(1).A1)
    assert found.others.mean < found.halves.mean < 1
    near, own, chance = found.neighbours
    assert near >= own > 0.9 and chance == pytest.approx(30 / 80)
    assert [(found.kind == name).sum() for name in ("generated", "real", "other")] == [30, 30, 50]


def test_other_type_does_not_agree(real):
    (found,) = compared(real, written_cells(real[30:55], {"fine_type": "B cell"}))
    assert found.agreement.mean < 0.5
    assert found.neighbours[0] < 0.2 < found.neighbours[1]


def test_finer_types_are_the_type_too(real):
    (found,) = compared(real, written_cells(real[:30], {"fine_type": "lymphocyte of B lineage"}))
    assert found.real_types == ["B cell", "plasma cell"] and found.real_cells == 52


def test_coarse_prompts_ask_for_coarse_types(real):
    real.obs[COARSE] = pd.Categorical(["lymphocyte"] * 77 + ["myeloid leukocyte"] * 3)
    (found,) = compared(real, written_cells(real[77:], {"coarse_type": "myeloid leukocyte"}))
    assert found.prompt == {"coarse cell type": "myeloid leukocyte"}
    assert found.real_types == ["monocyte"] and found.real_cells == 3
    assert found.halves is None


def test_empty_cells_are_nobodys_type(real):
    real.obs[STATUS] = pd.Categorical(["empty"] * 10 + ["confident"] * 70)
    (found,) = compared(real, written_cells(real[:30], {"fine_type": "B cell"}))
    assert found.real_cells == 20
    (found,) = compared(real, written_cells(real[:30], {"organ": "Blood"}))
    assert found.wanted is None and found.real_cells == 70 and found.others is None


def test_type_that_is_not_there(real):
    (found,) = compared(real, written_cells(real[:30], {"fine_type": "hepatocyte"}))
    assert found.real is None and found.agreement is None and found.neighbours is None
    assert found.real_cells == 0 and len(found.generated.words) == 30


def test_genes_that_only_one_side_has_do_not_count(real):
    written = written_cells(real[:30], {"fine_type": "B cell"})
    more = ad.AnnData(
        sp.csr_matrix(np.full((30, 5), 9, dtype=np.float32)),
        obs=written.obs,
        var=pd.DataFrame(index=Vocabulary.published().genes[200:205]),
    )
    both = ad.concat([more, written], axis=1, merge="first")
    both.obs = written.obs
    (found,) = compared(real, both)
    assert found.genes == 120
    assert found.agreement.mean == pytest.approx(1)
    assert found.words_in_all == pytest.approx(found.generated.words.mean() + 5)


def test_order_of_genes_does_not_matter(real):
    written = written_cells(real[:30], {"fine_type": "B cell"})
    (found,) = compared(real, written[:, np.random.default_rng(1).permutation(120)].copy())
    assert found.agreement.mean == pytest.approx(1)


def test_each_prompt_has_its_comparison(real):
    written = ad.concat(
        [written_cells(real[30:55], {"fine_type": "T cell"}), written_cells(real[:30], {"fine_type": "B cell"})],
        index_unique="-",
    )
    found = compared(real, written)
    assert count_prompts(written) == 2
    assert [(c.wanted, c.generated_cells) for c in found] == [("B cell", 30), ("T cell", 25)]
    assert all(c.agreement.mean == pytest.approx(1) for c in found)


def test_cells_that_were_cut_off_are_counted(real):
    written = written_cells(real[:30], {"fine_type": "B cell"})
    written.obs["complete"] = [False] * 4 + [True] * 26
    assert compared(real, written)[0].incomplete == 4


def test_no_generated_cells(real):
    with pytest.raises(InputError, match="no cells"):
        compared(real, written_cells(real[:30], {})[:0])

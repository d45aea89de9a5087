"""Comparison of sets of cells, and cells of independent genes."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import pearsonr, spearmanr
from sklearn.neighbors import KNeighborsClassifier

from scmulan.evaluate.cell_sets import CellSet, compare, shuffle_genes


def structured(seed: int, n: int = 60, shift: float = 0.0) -> CellSet:
    """Two types with genes of their own; within a type one factor moves half of the genes together."""
    rng = np.random.default_rng(seed)
    parts, types = [], []
    for number, name in enumerate("ab"):
        factor = rng.normal(size=(n, 1))
        x = rng.normal(size=(n, 40)) + shift
        x[:, number * 10 : number * 10 + 10] += 4
        x[:, 20:] += 3 * factor
        parts.append(np.clip(np.round(x + 2), 0, 10))
        types += [name] * n
    return CellSet(level=sp.csr_matrix(np.vstack(parts).astype(np.uint8)), types=np.array(types, dtype=object))


@pytest.fixture(scope="module")
def reference() -> CellSet:
    return structured(0)


def test_a_set_is_similar_to_itself(reference):
    found = compare(reference, reference)
    assert found.words_ratio == 1 and set(found.words_ratio_by_type.values()) == {1}
    for value in (found.mean_pearson, found.mean_spearman, found.detection_pearson, found.coexpression):
        assert value == pytest.approx(1)
    assert found.mean_difference == found.detection_difference == 0


def test_figures_are_those_of_their_definitions(reference):
    other = structured(1, n=50, shift=0.3)
    found = compare(other, reference)
    assert found.words_mean == pytest.approx((other.level > 0).sum(1).mean())
    assert found.words_ratio == pytest.approx((other.level > 0).sum(1).mean() / (reference.level > 0).sum(1).mean())
    pairs = [(other.of(name), reference.of(name)) for name in "ab"]
    a = [(x.mean(0), y.mean(0)) for x, y in pairs]
    d = [((x > 0).mean(0), (y > 0).mean(0)) for x, y in pairs]
    assert found.mean_pearson == pytest.approx(np.mean([pearsonr(x, y)[0] for x, y in a]))
    assert found.mean_spearman == pytest.approx(np.mean([spearmanr(x, y)[0] for x, y in a]))
    assert found.detection_pearson == pytest.approx(np.mean([pearsonr(x, y)[0] for x, y in d]))
    assert found.detection_spearman == pytest.approx(np.mean([spearmanr(x, y)[0] for x, y in d]))
    assert found.mean_difference == pytest.approx(np.mean([np.abs(x - y).mean() for x, y in a]))
    assert found.detection_difference == pytest.approx(np.mean([np.abs(x - y).mean() for x, y in d]))
    assert found.words_sd == pytest.approx(np.mean([(x > 0).sum(1).std() for x, _ in pairs]))
    knn = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(reference.level.toarray(), reference.types)
    assert found.type_accuracy == pytest.approx(knn.score(other.level.toarray(), other.types), abs=0.03)


def test_other_real_cells_are_close_and_independent_genes_lack_structure(reference):
    other = structured(2)
    independent = shuffle_genes(structured(3), {"a": 60, "b": 60}, np.random.default_rng(0))
    real, shuffled = compare(other, reference), compare(independent, reference)
    assert shuffled.mean_pearson == pytest.approx(real.mean_pearson, abs=0.05)
    assert shuffled.words_ratio == pytest.approx(1, abs=0.1)
    assert real.coexpression > 0.8 > 0.3 > shuffled.coexpression
    assert shuffled.words_sd < 0.7 * real.words_sd
    assert real.told_apart < 0.62 and shuffled.told_apart > 0.7


def test_the_wrong_type_is_seen(reference):
    other = structured(2)
    swapped = CellSet(level=other.level, types=np.where(other.types == "a", "b", "a").astype(object))
    assert compare(other, reference).type_accuracy > 0.9
    found = compare(swapped, reference)
    assert found.type_accuracy < 0.1 and found.type_accuracy_reverse < 0.1


def test_sparser_cells_are_told_apart(reference):
    level = structured(2).level.toarray()
    level[np.random.default_rng(0).random(level.shape) < 0.7] = 0
    found = compare(CellSet(level=sp.csr_matrix(level), types=reference.types), reference)
    assert found.words_ratio == pytest.approx(0.3, abs=0.03)
    assert found.told_apart > 0.95


def test_empty_cells_are_compared_too(reference):
    level = sp.csr_matrix(reference.level.shape, dtype=np.uint8)
    found = compare(CellSet(level=level, types=reference.types), reference)
    assert found.words_ratio == 0 and found.mean_pearson is None and found.coexpression is None


def test_shuffling_keeps_the_marginals_and_nothing_else():
    real = structured(5, n=400)
    shuffled = shuffle_genes(real, {"a": 4000}, np.random.default_rng(1))
    assert shuffled.level.shape == (4000, 40) and set(shuffled.types) == {"a"}
    a, b = real.of("a"), shuffled.of("a")
    for level in range(11):
        assert np.abs((a == level).mean(0) - (b == level).mean(0)).max() < 0.05
    off = ~np.eye(40, dtype=bool)
    assert np.abs(np.corrcoef(a.T)[off]).max() > 0.7 > 0.1 > np.abs(np.corrcoef(b.T)[off]).max()
    again = shuffle_genes(real, {"a": 4000}, np.random.default_rng(1))
    assert (shuffled.level != again.level).nnz == 0

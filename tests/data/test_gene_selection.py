"""Choosing the genes of a vocabulary."""

import numpy as np
import pytest
import scipy.sparse as sp

from scmulan.data.gene_selection import GeneScores, Moments

GENES = [f"G{i:03d}" for i in range(200)]


def study(seed, variable, steady=(), cells=300):
    """Counts where each gene has one rate in all cells, but ``variable`` ones in half of the cells only."""
    rng = np.random.default_rng(seed)
    rate = np.tile(rng.uniform(0.5, 2.0, len(GENES)), (cells, 1))
    on = rng.random(cells) < 0.5
    for gene in variable:
        rate[:, GENES.index(gene)] *= np.where(on, 1.95, 0.05)
    counts = rng.poisson(rate).astype(np.float32)
    counts[:, [GENES.index(gene) for gene in steady]] = 1
    return sp.csr_matrix(counts), counts.sum(1)


def test_a_gene_that_varies_in_two_studies_is_preferred_to_one_that_varies_in_one():
    scores = GeneScores()
    for seed, variable, steady in ((0, ["G010", "G020"], ["G030"]), (1, ["G010", "G030"], ["G020"])):
        matrix, total = study(seed, variable, steady)
        scores.add(GENES, matrix, total, "counts")
    assert scores.best(1) == ["G010"]
    assert scores.scores["G010"] == pytest.approx(2.0, abs=0.1)
    for once in ("G020", "G030"):
        assert scores.scores[once] == pytest.approx(1.0, abs=0.1)


def test_a_gene_of_one_study_counts_once():
    scores = GeneScores()
    matrix, total = study(0, ["G010"])
    scores.add(GENES, matrix, total, "counts")
    scores.add(GENES[100:], matrix[:, 100:], total, "counts")
    assert max(scores.scores[g] for g in GENES[:100]) <= 1.0
    assert scores.scores["G150"] > 0


def test_counts_and_their_log1p_values_rank_alike():
    matrix, total = study(3, ["G010", "G020", "G030"])
    logged = matrix.copy()
    logged.data = np.log1p(logged.data * np.repeat(1e4 / total, np.diff(matrix.indptr))).astype(np.float32)
    found = []
    for x, matrix_kind in ((matrix, "counts"), (logged, "log1p")):
        scores = GeneScores()
        scores.add(GENES, x, total, matrix_kind)
        found.append(scores.scores)
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_depth_does_not_make_a_gene_variable():
    """Cells ten times as deep say every gene ten times as often: normalised, none of them varies more."""
    rng = np.random.default_rng(4)
    counts = rng.poisson(np.full((300, len(GENES)), 3.0) * np.where(np.arange(300) % 2, 10, 1)[:, None])
    counts[::2, 7] = 0
    scores = GeneScores()
    scores.add(GENES, sp.csr_matrix(counts.astype(np.float32)), counts.sum(1), "counts")
    assert scores.best(1) == ["G007"]


def test_a_gene_that_hardly_shows_up_is_worth_little():
    matrix, _ = study(5, ["G010"])
    counts = matrix.toarray()
    counts[:, 50] = 0
    counts[0, 50] = 200  # one cell of three hundred: huge variance for its mean
    scores = GeneScores()
    scores.add(GENES, sp.csr_matrix(counts), counts.sum(1), "counts")
    assert scores.best(1) == ["G010"]
    assert scores.scores["G050"] < 0.1


def test_ties_and_empty_studies():
    scores = GeneScores()
    scores.add(["A", "B"], sp.csr_matrix((5, 2), dtype=np.float32), np.zeros(5), "counts")
    assert scores.best(3) == []
    scores.scores = {"B": 1.0, "A": 1.0, "C": 2.0}
    assert scores.best(2) == ["A", "C"]


def test_cells_may_come_in_blocks():
    whole, parts = GeneScores(), GeneScores()
    matrix, total = study(3, ["G010", "G020"])
    whole.add(GENES, matrix, total, "counts")
    moments = [Moments.of_none(len(GENES)) for _ in range(2)]
    for i, rows in enumerate((slice(0, 70), slice(70, 150), slice(150, 300))):
        moments[i % 2].add(matrix[rows], total[rows], "counts")
    moments[0].merge(moments[1])
    parts.add_moments(GENES, moments[0])
    assert parts.scores == pytest.approx(whole.scores)
    assert moments[0].cells == 300 and moments[0].seen.tolist() == (matrix.toarray() > 0).sum(0).tolist()

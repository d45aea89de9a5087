"""Scores, on small label vectors, beside scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from scmulan.evaluate.scores import calibrate, count_outcomes, is_correct, known_labels, score, to_label_granularity

TRUTH = np.array(list("aaaabbbccd"), dtype=object)
PREDICTED = np.array(list("aabxbbacce"), dtype=object)
CD4, CD8, T, B = "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "T cell", "B cell"
MONOCYTE, CD14 = "monocyte", "CD14-positive monocyte"


def test_scores_are_those_of_scikit_learn():
    found = score(TRUTH, PREDICTED, {"a", "b"})
    names = [t.name for t in found.types]
    assert names == ["a", "b", "c", "d"]
    reference = precision_recall_fscore_support(TRUTH, PREDICTED, labels=names, zero_division=0)
    for got, expected in zip(("precision", "recall", "f1", "n"), reference, strict=True):
        assert [getattr(t, got) for t in found.types] == pytest.approx(list(expected))
    assert found.accuracy == pytest.approx(accuracy_score(TRUTH, PREDICTED))
    assert found.macro_f1 == pytest.approx(f1_score(TRUTH, PREDICTED, labels=names, average="macro", zero_division=0))
    columns = found.confusion.predicted
    assert columns == ["a", "b", "c", "d", "e", "x"]
    expected = confusion_matrix(TRUTH, PREDICTED, labels=columns)[: len(names)]
    assert found.confusion.counts == expected.tolist()


def test_known_types_are_scored_apart():
    found = score(TRUTH, PREDICTED, {"a", "b"})
    inside = np.isin(TRUTH, ["a", "b"])
    assert found.n_known == 7
    assert found.accuracy_known == pytest.approx(accuracy_score(TRUTH[inside], PREDICTED[inside]))
    assert found.macro_f1_known == pytest.approx(f1_score(TRUTH, PREDICTED, labels=["a", "b"], average="macro"))
    assert [t.known for t in found.types] == [True, True, False, False]


def test_nothing_known_has_no_accuracy():
    found = score(TRUTH, PREDICTED, set())
    assert found.n_known == 0 and found.accuracy_known is None and found.macro_f1_known is None


def test_a_finer_prediction_is_correct_and_a_coarser_one_is_not():
    truth = np.array([T, CD4, T, B, "no type", "no type"], dtype=object)
    predicted = np.array([CD4, T, T, CD4, "no type", T], dtype=object)
    assert is_correct(truth, predicted).tolist() == [True, False, True, False, True, False]
    assert count_outcomes(truth, predicted) == {"exact": 2, "finer": 1, "coarser": 1, "other": 2}
    assert sum(count_outcomes(truth, predicted).values()) == len(truth)


def test_predictions_are_coarsened_to_the_granularity_of_the_labels():
    truth = np.array([T, B, CD4, B, B, MONOCYTE], dtype=object)
    predicted = np.array([CD4, CD8, T, CD14, "nonsense", CD14], dtype=object)
    # correct → the label; of another type → the nearest label that it is a kind of (CD8 T → T, CD14 → monocyte)
    assert to_label_granularity(truth, predicted).tolist() == [T, T, T, MONOCYTE, "nonsense", MONOCYTE]
    found = score(truth, to_label_granularity(truth, predicted), set())
    assert found.accuracy == pytest.approx(is_correct(truth, predicted).mean())


def test_a_label_that_is_there_is_not_made_coarser():
    truth = np.array([T, CD4, B], dtype=object)
    assert to_label_granularity(truth, np.array([T, CD4, CD4], dtype=object)).tolist() == [T, CD4, CD4]


def test_a_correct_answer_is_the_type_or_a_kind_of_it():
    truth = np.array([T, CD14, MONOCYTE, "no type", B], dtype=object)
    assert known_labels(truth, [CD4, MONOCYTE]) == {T, MONOCYTE}


def test_calibration_by_hand():
    probability = np.array([0.95, 0.95, 0.95, 0.55, 0.55, 0.0])
    correct = np.array([True, True, False, True, False, False])
    found = calibrate(correct, probability)
    assert found.mean_right == pytest.approx((0.95 * 2 + 0.55) / 3)
    assert found.mean_wrong == pytest.approx((0.95 + 0.55) / 3)
    # three cells at .95 of which 2/3 are correct, two at .55 of which 1/2, one at 0
    assert found.error == pytest.approx(0.5 * (0.95 - 2 / 3) + 2 / 6 * 0.05)
    assert [b["n"] for b in found.bins] == [1, 2, 3]
    assert found.bins[-1]["low"] == 0.9 and found.bins[-1]["high"] == 1.0


def test_the_bin_of_an_edge_is_the_lower_one():
    found = calibrate(np.array([True, True]), np.array([0.5, 0.51]))
    assert [(b["low"], b["high"]) for b in found.bins] == [(0.4, 0.5), (0.5, 0.6)]


def test_perfect_probabilities_have_no_error():
    rng = np.random.default_rng(0)
    probability = np.repeat([0.25, 0.75], 1000)
    correct = np.concatenate([np.arange(1000) < 250, np.arange(1000) < 750])
    order = rng.permutation(2000)
    assert calibrate(correct[order], probability[order]).error == pytest.approx(0)


def test_without_probabilities_there_is_no_calibration():
    assert calibrate(np.array([True]), np.array([np.nan])) is None
    assert calibrate(np.zeros(0, dtype=bool), np.zeros(0)) is None

"""Figures of a classifier, counted by hand."""

import math

import numpy as np
import pytest

from metrics import class_report, measure, softmax


def test_measure_by_hand():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(35, 8)).astype(np.float32)  # eight, so that top-5 says much
    labels = generator.integers(0, 8, 35)
    result = measure(logits, labels)

    correct = in_top5 = loss = 0
    confusion = [[0] * 8 for _ in range(8)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(8), key=lambda i: -row[i])
        correct += order[0] == label
        in_top5 += label in order[:5]
        loss += math.log(sum(map(math.exp, row))) - row[label]
        confusion[label][order[0]] += 1
    assert result["images"] == 35
    assert result["accuracy"] == correct / 35
    assert result["top5"] == in_top5 / 35
    assert result["loss"] == pytest.approx(loss / 35)
    assert result["losses"].mean() == pytest.approx(loss / 35)
    assert result["confusion"].tolist() == confusion
    assert result["predicted"].tolist() == logits.argmax(1).tolist()
    assert result["confidence"] == pytest.approx(softmax(logits).max(1))


def test_top5_of_five_classes_says_nothing():
    assert measure(np.eye(5, dtype=np.float32), np.arange(5))["top5"] is None


def test_softmax_of_large_and_small_logits():
    found = softmax(np.array([[1000.0, 1000.0, -1000.0], [0.0, math.log(2), math.log(5)]]))
    assert found == pytest.approx(np.array([[0.5, 0.5, 0], [1 / 8, 2 / 8, 5 / 8]]))


def test_a_loss_that_is_not_finite_stays_so():
    assert not math.isfinite(measure(np.array([[np.nan, 0.0]]), np.array([0]))["loss"])


def test_class_report_by_hand():
    report = class_report(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert report[0] == {
        "class": "a",
        "images": 4,
        "precision": 3 / 5,
        "recall": 3 / 4,
        "f1": pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4)),
    }
    assert (report[1]["precision"], report[1]["recall"]) == (4 / 5, 4 / 6)
    assert report[2] == {"class": "c", "images": 0, "precision": None, "recall": None, "f1": None}

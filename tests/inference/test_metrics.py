"""Figures of a classifier, counted by hand."""

import math

import numpy as np
import pytest

from shufflenet.inference.metrics import Tally, class_report, confusions, softmax


@pytest.mark.parametrize("batch_size", [35, 4, 1])
def test_a_tally_by_hand(batch_size):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(35, 8)).astype(np.float32)  # eight, so that top-5 says much
    labels = generator.integers(0, 8, 35)
    tally, losses, top5, confusion = Tally(8), [], 0, np.zeros((8, 8))
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(8), key=lambda i: -row[i])
        losses.append(math.log(sum(map(math.exp, row))) - row[label])
        top5 += label in order[:5]
        confusion[label, order[0]] += 1
    batches = [slice(first, first + batch_size) for first in range(0, 35, batch_size)]
    found = [tally.add(logits[batch], labels[batch]) for batch in batches]
    assert np.concatenate(found) == pytest.approx(losses)
    assert np.array_equal(tally.confusion, confusion)
    expected = {"accuracy": np.trace(confusion) / 35, "top5": top5 / 35}
    recalls = [confusion[label, label] / sum(labels == label) for label in set(labels.tolist())]
    expected["balanced_accuracy"] = pytest.approx(sum(recalls) / len(recalls))
    assert tally.images == 35
    assert tally.figures() == expected | {"loss": pytest.approx(np.mean(losses))}


def test_top5_of_five_classes_says_nothing_and_a_loss_that_is_not_finite_stays_so():
    tally = Tally(5)
    tally.add(np.array([[np.nan, 0, 0, 0, 0]]), np.array([0]))
    assert list(tally.figures()) == ["loss", "accuracy", "balanced_accuracy"]
    assert not math.isfinite(tally.figures()["loss"])


def test_balanced_accuracy_by_hand_leaves_out_a_class_without_images():
    tally = Tally(3)
    tally.add(np.eye(3)[[0] * 9 + [0, 0, 1, 1]], np.array([0] * 9 + [1, 1, 1, 1]))
    figures = tally.figures()
    assert figures["accuracy"] == pytest.approx(11 / 13)
    assert figures["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def test_softmax_and_class_report_by_hand():
    found = softmax(np.array([[1000.0, 1000.0, -1000.0], [0.0, math.log(2), math.log(5)]]))
    assert found == pytest.approx(np.array([[0.5, 0.5, 0], [1 / 8, 2 / 8, 5 / 8]]))
    a, b, c = class_report(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ["a", "b", "c"])
    f1 = pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert a == {"class": "a", "images": 4, "precision": 3 / 5, "recall": 3 / 4, "f1": f1}
    assert (b["precision"], b["recall"]) == (4 / 5, 4 / 6)
    assert c == {"class": "c", "images": 0, "precision": None, "recall": None, "f1": None}


def test_confusions_are_what_is_off_the_diagonal_most_images_first():
    found = confusions(np.array([[5, 1, 0], [3, 4, 1], [0, 0, 9]]), ["a", "b", "c"])
    rows = [tuple(row.values()) for row in found]
    assert rows == [("b", "a", 3), ("a", "b", 1), ("b", "c", 1)]
    assert list(found[0]) == ["class", "prediction", "images"]

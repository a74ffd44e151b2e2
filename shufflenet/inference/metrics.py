"""Figures of a classifier, from its answers."""

from collections.abc import Iterable, Sequence

import numpy as np

from shufflenet.common.messages import RunError
from shufflenet.reading.folders import BadImages
from shufflenet.reading.image import ImageError


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 (n, classes) of logits (n, classes)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


class Tally:
    """Counts the answers of a classifier, batch by batch: losses, and the confusion matrix, int64
    (classes, classes) by [truth, prediction]."""

    def __init__(self, classes: int) -> None:
        self.confusion = np.zeros((classes, classes), np.int64)
        self.loss_sum = 0.0
        self.top5_hits = 0

    def add(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Count answers, logits (n, classes), against class indices (n,); returns losses (n,)."""
        wide = logits.astype(np.float64)
        wide -= wide.max(1, keepdims=True)
        truth = wide[np.arange(len(labels)), labels]  # (n,)
        losses = np.log(np.exp(wide).sum(1)) - truth
        self.loss_sum += losses.sum()
        self.top5_hits += int(((wide > truth[:, None]).sum(1) < 5).sum())
        np.add.at(self.confusion, (labels, logits.argmax(1)), 1)
        return losses

    @property
    def images(self) -> int:
        """How many answers were counted."""
        return int(self.confusion.sum())

    def figures(self) -> dict[str, float]:
        """Mean cross entropy; accuracy, balanced accuracy (the mean recall of the classes that have
        images) and, of more than five classes, top-5 accuracy, 0 to 1. A metric of your own is a
        line here. RunError if no image could be read."""
        if not self.images:
            raise RunError("none of the images to measure on can be read")
        hits, images = self.confusion.diagonal(), self.confusion.sum(1)  # of each class
        figures = {
            "loss": float(self.loss_sum / self.images),
            "accuracy": float(hits.sum() / self.images),
            "balanced_accuracy": float((hits[images > 0] / images[images > 0]).mean()),
        }
        if len(self.confusion) > 5:
            figures["top5"] = self.top5_hits / self.images
        return figures


def sum_up(tallies: list[Tally]) -> Tally:
    """The figures of several parts as one; a part may be empty."""
    whole = Tally(max(len(tally.confusion) for tally in tallies))
    for tally in tallies:
        if tally.images:
            for name, value in vars(tally).items():
                setattr(whole, name, getattr(whole, name) + value)
    return whole


def measure(
    answers: Iterable[tuple[str, np.ndarray | ImageError]],
    labels: Sequence[int],
    classes: Sequence[str],
    bad: BadImages,
) -> tuple[Tally, list[dict]]:
    """Compare the answer for each image, of runtimes.stream, with the index of its class; returns
    the tally, and the mistakes, largest loss first."""
    tally, mistakes = Tally(len(classes)), []
    for label, (path, answer) in zip(labels, answers, strict=True):
        if isinstance(answer, ImageError):
            bad.add(answer)
            continue
        (loss,) = tally.add(answer[None], np.array([label]))
        if (guess := answer.argmax()) != label:
            row = {"path": path, "class": classes[label], "prediction": classes[guess]}
            row |= {"prob": float(softmax(answer[None]).max()), "prob_of_class": np.exp(-loss)}
            mistakes.append(row | {"loss": float(loss)})
    return tally, sorted(mistakes, key=lambda row: -row["loss"])


def class_report(confusion: np.ndarray, classes: list[str]) -> list[dict]:
    """Images, precision, recall and F1 of each class, None where they divide by zero, from counts
    (classes, classes), rows the truth, columns the prediction."""

    def ratio(a: int, b: int) -> float | None:
        return a / b if b else None

    rows = []
    counts = (confusion.diagonal(), confusion.sum(1), confusion.sum(0))
    for name, hits, actual, claimed in zip(classes, *(c.tolist() for c in counts), strict=True):
        row = {"class": name, "images": actual, "precision": ratio(hits, claimed)}
        rows.append(row | {"recall": ratio(hits, actual), "f1": ratio(2 * hits, actual + claimed)})
    return rows


def confusions(confusion: np.ndarray, classes: list[str]) -> list[dict]:
    """Rows of class, prediction and images for each pair that was confused, most images first."""
    wrong = confusion - np.diag(confusion.diagonal())
    pairs = sorted(np.argwhere(wrong).tolist(), key=lambda pair: -wrong[*pair])
    return [
        {"class": classes[truth], "prediction": classes[guess], "images": int(wrong[truth, guess])}
        for truth, guess in pairs
    ]

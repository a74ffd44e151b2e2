"""Figures of a classifier, from its answers. No torch: an exported network is measured without."""

import numpy as np

from cli import RunError


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 (n, classes) of logits (n, classes)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


class Tally:
    """Mean cross entropy, accuracy and confusion matrix, int64 (classes, classes) by
    [truth, prediction], of answers that come batch by batch."""

    def __init__(self, classes: int) -> None:
        self.confusion = np.zeros((classes, classes), np.int64)
        self._loss_sum = 0.0
        self._top5_hits = 0

    def note(self, log: dict) -> None:
        """Put into `log` what a run keeps of a validation."""
        figures = self.figures()
        log |= {"val_loss": figures["loss"], "val_accuracy": figures["accuracy"]}
        log["confusion"] = self.confusion

    def add(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Count answers, logits (n, classes), against class indices (n,); returns losses (n,)."""
        wide = logits.astype(np.float64)
        wide -= wide.max(1, keepdims=True)
        truth = wide[np.arange(len(labels)), labels]  # (n,)
        losses = np.log(np.exp(wide).sum(1)) - truth
        self._loss_sum += losses.sum()
        self._top5_hits += int(((wide > truth[:, None]).sum(1) < 5).sum())
        np.add.at(self.confusion, (labels, logits.argmax(1)), 1)
        return losses

    def figures(self) -> dict:
        """Mean loss; accuracy and top5, 0 to 1 (None for five classes or fewer); images. RunError
        if none could be read."""
        images = int(self.confusion.sum())
        if not images:
            raise RunError("none of the images to measure on can be read")
        return {
            "accuracy": float(self.confusion.trace() / images),
            "top5": self._top5_hits / images if len(self.confusion) > 5 else None,
            "loss": float(self._loss_sum / images),
            "images": images,
        }


def sum_up(tallies: list[Tally]) -> Tally:
    """The figures of several parts as one."""
    whole = Tally(len(tallies[0].confusion))
    for tally in tallies:
        whole.confusion += tally.confusion
        whole._loss_sum += tally._loss_sum
        whole._top5_hits += tally._top5_hits
    return whole


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

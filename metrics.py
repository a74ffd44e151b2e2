"""Figures of a classifier, from its answers. No torch: an exported network is measured without."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 (n, classes) of logits (n, classes)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def measure(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Compare answers with the truth.

    Args:
        logits: (n, classes).
        labels: (n,) class indices.

    Returns:
        {"loss": mean cross entropy, "accuracy": top-1, 0 to 1, "top5": likewise, None for five
        classes or fewer, "images": n, "confusion": int64 (classes, classes) [truth, prediction]},
        and for each picture, in order, "losses" (n,), "predicted" (n,) and "confidence" (n,), the
        probability of the prediction.
    """
    n, classes = logits.shape
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(n), labels]  # (n,)
    predicted = logits.argmax(1)
    top5 = None
    if classes > 5:
        best = np.argpartition(-wide, 4, axis=1)[:, :5]  # (n,5), in any order
        top5 = float((best == labels[:, None]).any(1).mean())
    pairs = np.bincount(labels * classes + predicted, minlength=classes**2)
    return {
        "loss": float(losses.mean()),
        "accuracy": float((predicted == labels).mean()),
        "top5": top5,
        "images": n,
        "confusion": pairs.reshape(classes, classes),
        "losses": losses,
        "predicted": predicted,
        "confidence": softmax(logits).max(1),
    }


def class_report(confusion: np.ndarray, classes: list[str]) -> list[dict]:
    """Precision, recall and F1 of each class, None where they divide by zero.

    Args:
        confusion: (classes, classes), rows the truth, columns the prediction.
        classes: their names.
    """

    def ratio(a: int, b: int) -> float | None:
        return a / b if b else None

    rows = []
    for index, name in enumerate(classes):
        hits = int(confusion[index, index])
        actual, claimed = int(confusion[index].sum()), int(confusion[:, index].sum())
        rows.append(
            {
                "class": name,
                "images": actual,
                "precision": ratio(hits, claimed),
                "recall": ratio(hits, actual),
                "f1": ratio(2 * hits, actual + claimed),
            }
        )
    return rows

"""Every picture the project draws; all but `show_pictures` without pyplot, so without a window."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from checkpoint import replacing
from cli import RunError, printable

MOST_NAMES = 200  # classes that a confusion matrix can name


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically; the suffix chooses PNG, JPEG, PDF or SVG."""
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower() or "png")


def draw_curves(history: Sequence[dict]) -> Figure:
    """Loss, accuracy and learning rate over the epochs.

    Args:
        history: one dict an epoch, as train.py writes them to metrics.csv.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for side, style in (("train", "--"), ("val", "-")):
            values = [row[f"{side}_{name}"] for row in history]
            axes.plot(epochs, values, style, marker="o", markersize=3, label=side)
        axes.set_title(name)
        axes.legend()
    best = max(history, key=lambda row: row["val_accuracy"])
    accuracy.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
    accuracy.set_title(f"accuracy (best {best['val_accuracy']:.3f} in epoch {best['epoch']})")
    rate.plot(epochs, [row["lr"] for row in history], marker="o", markersize=3, color="black")
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure


def draw_confusion_matrix(confusion, classes: Sequence[str], title: str) -> Figure:
    """Rows are the truth, columns the prediction; shades are the share of a row.

    Args:
        confusion: tensor (n, n) of counts.
        classes: n names.
    """
    n = len(classes)
    large = n > 20
    side = min(0.19 * n, 40) if large else 3 + 0.55 * n
    figure = Figure(figsize=(side + 1.5, side + 1), dpi=120, layout="constrained")
    axes = figure.subplots()
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()  # (n,n)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= MOST_NAMES:
        names, size = [short(name) for name in classes], 6 if large else 10
        turn = {"rotation": 90} if large else {"rotation": 45, "ha": "right"}
        axes.set_xticks(range(n), names, fontsize=size, **turn)
        axes.set_yticks(range(n), names, fontsize=size)
        place = {"ha": "center", "va": "center", "fontsize": 4.5 if large else 10}
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column].item(), color=colour, **place)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    axes.set_title(title)
    figure.colorbar(shown, ax=axes, label="share of the class", fraction=0.04)
    return figure


def draw_pictures(
    pictures: Sequence[tuple[Image.Image, str]], figure: Figure | None = None
) -> Figure:
    """Pictures in a grid, each under its caption of one or more lines.

    Args:
        pictures: (picture, caption) each.
        figure: an empty one to draw on.
    """
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    lines = max(caption.count("\n") + 1 for _, caption in pictures)
    # One picture gets a large panel, a grid smaller ones.
    side = 5 if columns == 1 else 3
    figure = figure or Figure()
    figure.set_size_inches(side * columns, (side + 0.22 * lines) * rows)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.axis("off")
    for panel, (image, caption) in zip(figure.axes, pictures, strict=False):
        image.thumbnail((640, 640))
        panel.imshow(image)
        panel.set_title(caption, fontsize=11 if columns == 1 else 9, parse_math=False)
    return figure


def show_pictures(pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """`draw_pictures` in a window; returns when it is closed.

    Raises:
        RunError: there is no display.
    """
    import matplotlib.pyplot as plt

    figure = plt.figure()
    if plt.get_backend().lower() == "agg":
        raise RunError("--show: there is no display here; use --save-plot FILE")
    draw_pictures(pictures, figure)
    plt.show()


def short(name: str) -> str:
    """A class name that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= 24 else name[:23] + "…"

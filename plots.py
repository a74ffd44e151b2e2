"""Every drawing of the project; all but `show_images` without pyplot, so without a window."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import ImageOps

from cli import RunError, notice, printable
from files import replacing
from image import load_rgb

# Matplotlib's own font, then those with Chinese letters that are installed.
CHINESE = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC")
INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(f for f in CHINESE if f in INSTALLED)]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically; the suffix chooses PNG, JPEG, PDF or SVG."""
    with warnings.catch_warnings(record=True) as caught, replacing(path) as file:
        warnings.simplefilter("always")
        figure.savefig(file, format=Path(path).suffix[1:].lower() or "png")
    if any("missing from font" in str(warning.message) for warning in caught):
        notice(f"{path} lacks letters: install a font that has them, such as Noto Sans CJK")


def draw_curves(history: Sequence[dict], best: dict) -> Figure:
    """Loss and accuracy over the epochs: the rows of metrics.csv, and "epoch" and "accuracy" of the
    best one; epoch 0 is `fc` alone, trained first."""
    trained = [row for row in history if row["epoch"]]
    epochs = [row["epoch"] for row in trained]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for side, style in (("train", "--"), ("val", "-")):
            values = [row[f"{side}_{name}"] for row in trained]
            axes.plot(epochs, values, style, marker="o", markersize=3, label=side)
        if history[0]["epoch"] == 0:
            axes.plot([0], [history[0][f"val_{name}"]], "k*", label="val, fc alone")
        axes.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_title(f"accuracy (best {best['accuracy']:.3f} in epoch {best['epoch']})")
    return figure


def draw_confusion_matrix(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Counts (n, n), rows the truth, columns the prediction; shades are the share of a row."""
    n = len(classes)
    large = n > 20
    side = min(0.19 * n, 20) if large else 3 + 0.55 * n
    # "compressed" is for axes that stay square; "constrained" cuts off their label.
    figure = Figure(figsize=(side + 1.5, side + 1), dpi=150, layout="compressed")
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)  # (n,n)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if n <= 200:  # more names could not be read
        names, size = [short(name) for name in classes], 6 if large else 10
        turn = {"rotation": 90} if large else {"rotation": 45, "ha": "right"}
        axes.set_xticks(range(n), names, fontsize=size, parse_math=False, **turn)
        axes.set_yticks(range(n), names, fontsize=size, parse_math=False)
    if not large:
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], color=colour, ha="center", va="center")
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    axes.set_title(title)
    figure.colorbar(shown, ax=axes, label="share of the class", fraction=0.02, pad=0.02)
    return figure


def draw_images(images: Sequence[tuple[str, str]], figure: Figure | None = None) -> Figure:
    """A grid of squares of (path, caption) each, on an empty figure or a new one."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    side, size = (5, 11) if columns == 1 else (3, 9)  # one image gets a large panel
    height = side + max(len(caption.splitlines()) for _, caption in images) * 1.4 * size / 72
    figure = figure or Figure()
    figure.set_size_inches(side * columns, height * rows)
    figure.set_layout_engine("constrained")
    for panel in figure.subplots(rows, columns, squeeze=False).flat:
        panel.axis("off")
    for panel, (path, caption) in zip(figure.axes, images, strict=False):
        panel.imshow(ImageOps.fit(load_rgb(path), (400, 400)))
        panel.set_title(caption, fontsize=size, parse_math=False)
    return figure


def show_images(images: Sequence[tuple[str, str]]) -> None:
    """`draw_images` in a window until it is closed; RunError if there is no display."""
    import matplotlib.pyplot as plt

    figure = plt.figure()
    if plt.get_backend().lower() == "agg":
        raise RunError("--show: use --save-plot FILE; there is no display here")
    draw_images(images, figure)
    plt.show()


def short(name: str, length: int = 24) -> str:
    """A name that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"

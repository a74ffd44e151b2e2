"""Every picture the project draws; all but `show_pictures` without pyplot, so without a window."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cli import RunError, notice, printable
from files import replacing

# Matplotlib's own font, then those with Chinese, Japanese and Korean letters that are installed.
FONTS = ["DejaVu Sans"]
FONTS += sorted(
    {font.name for font in font_manager.fontManager.ttflist}
    & {
        "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei",
        "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
        "Heiti TC", "Arial Unicode MS",
    }
)  # fmt: skip
matplotlib.rcParams["font.family"] = FONTS

MOST_NAMES = 200  # classes that a confusion matrix can name


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically; the suffix chooses PNG, JPEG, PDF or SVG."""
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower() or "png")


def draw_curves(history: Sequence[dict], best: dict) -> Figure:
    """Loss, accuracy and learning rate over the epochs.

    Args:
        history: one dict an epoch, as train.py writes them to metrics.csv.
        best: "epoch" and "accuracy" of the best one; epoch 0 is `fc` alone, trained first.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for side, style in (("train", "--"), ("val", "-")):
            values = [row[f"{side}_{name}"] for row in history]
            axes.plot(epochs, values, style, marker="o", markersize=3, label=side)
        axes.set_title(name)
    if best["epoch"] == 0:
        accuracy.plot([0], [best["accuracy"]], "k*", label="val, fc alone")
    loss.legend()
    accuracy.legend()
    accuracy.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
    accuracy.set_title(f"accuracy (best {best['accuracy']:.3f} in epoch {best['epoch']})")
    rate.plot(epochs, [row["lr"] for row in history], marker="o", markersize=3, color="black")
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure


def draw_confusion_matrix(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Rows are the truth, columns the prediction; shades are the share of a row.

    Args:
        confusion: (n, n) counts.
        classes: n names.
    """
    n = len(classes)
    large = n > 20
    side = min(0.19 * n, 36) if large else 3 + 0.55 * n
    # "compressed" is for axes that stay square; "constrained" cuts off their label.
    figure = Figure(figsize=(side + 1.5, side + 1), dpi=150, layout="compressed")
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)  # (n,n)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= MOST_NAMES:
        names, size = [short(name) for name in classes], 6 if large else 10
        turn = {"rotation": 90} if large else {"rotation": 45, "ha": "right"}
        axes.set_xticks(range(n), names, fontsize=size, parse_math=False, **turn)
        axes.set_yticks(range(n), names, fontsize=size, parse_math=False)
        place = {"ha": "center", "va": "center", "fontsize": 4.5 if large else 10}
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], color=colour, **place)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    axes.set_title(title)
    figure.colorbar(shown, ax=axes, label="share of the class", fraction=0.02, pad=0.02)
    return figure


def draw_bars(values: dict[str, float], title: str) -> Figure:
    """Horizontal bars, each with its name and its value."""
    figure = Figure(figsize=(8, 0.6 + 0.36 * len(values)), dpi=150, layout="constrained")
    axes = figure.subplots()
    ours = [name.startswith("ours") for name in values]
    bars = axes.barh(list(values), list(values.values()), color=[f"C{int(not o)}" for o in ours])
    axes.bar_label(bars, fmt="{:.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title)
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
    tallest = max(image.height / image.width for image, _ in pictures)
    # One picture gets a large panel, a grid smaller ones.
    side, size = (5, 11) if columns == 1 else (3, 9)
    height = side * min(tallest, 1.5) + lines * 1.4 * size / 72 + 0.15
    figure = figure or Figure()
    figure.set_size_inches(side * columns, height * rows)
    figure.set_layout_engine("constrained")
    for panel in figure.subplots(rows, columns, squeeze=False).flat:
        panel.axis("off")
    for panel, (image, caption) in zip(figure.axes, pictures, strict=False):
        image.thumbnail((640, 640))
        panel.imshow(image)
        panel.set_anchor("N")  # or a long caption is cut at the top
        panel.set_title(caption, fontsize=size, parse_math=False)
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


def short(name: str, length: int = 24) -> str:
    """A name that fits beside an axis, in letters that can be drawn."""
    name = printable(name)
    if not _letters().issuperset(map(ord, name)):
        notice(f"no font here can draw {name}: install one, such as Noto Sans CJK")
        name = "".join(c if ord(c) in _letters() else ascii(c)[1:-1] for c in name)
    return name if len(name) <= length else name[: length - 1] + "…"


@cache
def _letters() -> set[int]:
    """Code points that the fonts in use have a glyph for."""
    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in FONTS)
    return {code for font in fonts for code in font.get_charmap()}

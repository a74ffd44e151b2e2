"""Every drawing of the project; all but `show_images` without pyplot, so without a window."""

# ruff: noqa: E402
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

BACKEND = os.environ.pop("MPLBACKEND", None)  # a notebook's may not be installed here

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from shufflenet.common.files import replacing
from shufflenet.common.messages import RunError, notice, printable
from shufflenet.inference.metrics import confusions
from shufflenet.reading.image import load_crop

if BACKEND is not None:
    os.environ["MPLBACKEND"] = BACKEND
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by the colour-blind, too (Okabe and Ito)

# Matplotlib's own font, then those with Chinese letters that are installed.
CHINESE = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC")
INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
FAMILIES = ["DejaVu Sans", *(font for font in CHINESE if font in INSTALLED)]
FONTS = {"font.family": FAMILIES}  # while we draw: the process may be somebody else's
FONT_FILE = font_manager.findfont(FAMILIES[-1])  # Pillow takes all letters from one
LACKS = "lacks letters: install a font that has them, such as Noto Sans CJK"


@matplotlib.rc_context(FONTS)
def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically; the suffix chooses PNG, JPEG, PDF or SVG."""
    with warnings.catch_warnings(record=True) as caught, replacing(path) as file:
        warnings.simplefilter("always")
        figure.savefig(file, format=Path(path).suffix[1:].lower() or "png")
    if any("missing from font" in str(warning.message) for warning in caught):
        notice(f"{path} {LACKS}")


@matplotlib.rc_context(FONTS)
def draw_curves(history: Sequence[dict], best: dict) -> Figure:
    """Loss and accuracy over the epochs: the rows of metrics.csv, and "epoch" and "accuracy" of the
    best one; epoch 0 is `fc` alone, trained first."""
    trained = [row for row in history if row["epoch"]]
    epochs = [row["epoch"] for row in trained]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        shown = []
        for side, style in (("train", "--"), ("val", "-")):
            values = [row[f"{side}_{name}"] for row in trained]
            axes.plot(epochs, values, style, marker="o", markersize=3, label=side)
            shown += values
        if history[0]["epoch"] == 0:
            axes.plot([0], [history[0][f"val_{name}"]], "k*", label="val, at the start")
            shown.append(history[0][f"val_{name}"])
        if name == "loss" and max(shown) > 4 * np.median(shown):  # it would flatten the others
            axes.set_yscale("log")
        axes.axvline(best["epoch"], color="0.4", linestyle=":", label="best epoch")
        axes.set_xlabel("epoch")
        axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    axes.set_title(f"accuracy (best {best['accuracy']:.3f} in epoch {best['epoch']})")
    return figure


@matplotlib.rc_context(FONTS)
def draw_confusion_matrix(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Counts (n, n), rows the truth, columns the prediction; shades are the share of a row. Beside
    more than 40 classes, whose names could not be read, the largest confusions."""
    n = len(classes)
    large, cell = n > 40, 0.55 if n <= 20 else 0.4
    size = (16, 7) if large else (4.5 + cell * n, 4 + cell * n)
    # "compressed" is for axes that stay square; "constrained" cuts off their label.
    figure = Figure(figsize=size, dpi=150, layout="compressed")
    axes, *bars = figure.subplots(1, 1 + large, squeeze=False)[0]
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)  # (n,n)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="truth", title=title)
    figure.colorbar(shown, ax=axes, label="share of the class", fraction=0.02, pad=0.02)
    if large:
        rows = confusions(confusion, classes)[:20]
        names = [f"{short(row['class'])} as {short(row['prediction'])}" for row in rows]
        bars[0].barh(range(len(rows)), [row["images"] for row in rows], color=BLUE)
        bars[0].set_yticks(range(len(rows)), names, parse_math=False)
        bars[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        bars[0].invert_yaxis()
        bars[0].set(xlabel="images", title="largest confusions")
        axes.set(xticks=[], yticks=[])
        return figure
    names = [short(name) for name in classes]
    axes.set_xticks(range(n), names, parse_math=False, rotation=45, ha="right")
    axes.set_yticks(range(n), names, parse_math=False)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, confusion[row, column], color=colour, ha="center", va="center")
    return figure


def draw_sheet(cells: Sequence[tuple[np.ndarray, str]]) -> Image.Image:
    """Some images, uint8 (side, side, 3), with a caption each; by Pillow, which takes a twentieth
    of Matplotlib's time."""
    side, line, columns = 160, 20, min(8, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + line + 8)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT_FILE, 12)
    letters = font_manager.get_font(FONT_FILE).get_charmap()
    if any(ord(letter) not in letters for _, caption in cells for letter in printable(caption)):
        notice(f"the sheet of images {LACKS}")
    for number, (pixels, caption) in enumerate(cells):
        x, y = (number % columns) * (side + 8) + 4, (number // columns) * (side + line + 8) + 4
        sheet.paste(Image.fromarray(pixels).resize((side, side)), (x, y + line))
        caption = printable(caption)
        while draw.textlength(caption, font) > side:
            caption = caption[:-2] + "…"
        draw.text((x, y + 1), caption, "black", font)
    return sheet


class Panel(NamedTuple):
    """An image with what is said of it: the answer, whether that is right (None: nobody knows),
    lines in small print, and what Classifier.explain returns."""

    path: str
    answer: str
    right: bool | None
    details: list[str]
    heat: tuple[np.ndarray, np.ndarray] | None = None


@matplotlib.rc_context(FONTS)
def draw_images(panels: Sequence[Panel], figure: Figure | None = None) -> Figure:
    """A grid of squares, on an empty figure or a new one."""
    wide = 2 if panels[0].heat else 1
    side = 5 if len(panels) == 1 else 3  # inches; one image gets a large panel
    height = side + 0.5 + 0.15 * max(len(panel.details) for panel in panels)
    square = math.ceil(math.sqrt(len(panels) * height / (side * wide)))
    columns = min(max(4 // wide, square), len(panels))
    rows = -(-len(panels) // columns)
    figure = figure or Figure()
    figure.set_size_inches(side * columns * wide, height * rows)
    figure.set_layout_engine("constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        if panel.heat:
            axes.imshow(beside_heat(*panel.heat))
        else:
            axes.imshow(load_crop(panel.path, _square, 400, spare=1))
        axes.set(xticks=[], yticks=[])
        colour = {True: BLUE, False: ORANGE, None: "black"}[panel.right]
        axes.spines[:].set(color=colour, linewidth=0 if panel.right is None else 3)
        axes.set_title(panel.answer, fontsize=12, color=colour, weight="bold", parse_math=False)
        lines = "\n".join([*panel.details, short(Path(panel.path).name, 40)])
        axes.set_xlabel(lines, fontsize=8, parse_math=False)
    return figure


def _square(width: int, height: int) -> tuple[float, ...]:
    """The largest square in the centre."""
    left, top = max(0, width - height) / 2, max(0, height - width) / 2
    return left, top, width - left, height - top


def beside_heat(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 (side, 2 side, 3): an image, and beside it the same, bright where heat (h, w) is
    large and dark where it is at most 0."""
    side = len(pixels)
    heat = Image.fromarray(heat.clip(0) / max(heat.max(), 1e-9)).resize((side, side))  # bicubic
    share = np.asarray(heat).clip(0, 1)
    colours = matplotlib.colormaps["inferno"](share, bytes=True)[..., :3]
    return np.hstack([pixels, (0.35 * pixels + 0.65 * colours).astype(np.uint8)])


def show_images(panels: Sequence[Panel]) -> None:
    """`draw_images` in a window until it is closed; RunError if there is no display."""
    import matplotlib.pyplot as plt

    if BACKEND:
        with suppress(ValueError, ImportError):
            plt.switch_backend(BACKEND)
    figure = plt.figure()
    if plt.get_backend().lower() == "agg":
        raise RunError("--show: use --save-plot FILE; there is no display here")
    draw_images(panels, figure)
    plt.show()


def short(name: str, length: int = 24) -> str:
    """A name that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"

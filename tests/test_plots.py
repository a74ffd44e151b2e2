"""The pictures the project draws: whether they can be drawn; a person must look at them."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

import plots


def history(count):
    return [
        {
            "epoch": i + 1,
            "lr": 0.1,
            "train_loss": 1 / (i + 1),
            "train_accuracy": i / count,
            "val_loss": 1.0,
            "val_accuracy": 0.5,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves(tmp_path, epochs):
    plots.save_figure(plots.draw_curves(history(epochs)), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1300, 400)


@pytest.mark.parametrize("count", [2, 5, 102])
def test_confusion_matrix_names_every_class_and_overlaps_none(tmp_path, count):
    names = [f"class number {i}" for i in range(count)]
    figure = plots.draw_confusion_matrix(torch.eye(count, dtype=torch.long) * 7, names, "title")
    plots.save_figure(figure, tmp_path / "matrix.png")
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == names
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert [text.get_text() for text in axes.texts] == ["7"] * count
    assert all(size < 6000 for size in Image.open(tmp_path / "matrix.png").size)


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_pictures_with_captions_that_look_like_mathematics(tmp_path, count, suffix):
    pictures = [(Image.new("RGB", (90, 60)), "$x^2\n50 % \\frac")] * count
    plots.save_figure(plots.draw_pictures(pictures), tmp_path / f"p.{suffix}")
    assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


def test_short_names_fit_and_print():
    assert plots.short("daisy") == "daisy"
    assert plots.short("x" * 100) == "x" * 23 + "…"
    assert plots.short("a\nb") == r"a\nb"

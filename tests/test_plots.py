"""The images the project draws: whether they can be drawn; a person must look at them."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import plots


def history(count, first=1):
    return [
        {
            "epoch": i + first,
            "lr": 0.1,
            "train_loss": 1 / (i + 1),
            "train_accuracy": i / count,
            "val_loss": 1.0,
            "val_accuracy": 0.5,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize(("first", "epochs", "best"), [(1, 1, 1), (1, 30, 7), (0, 31, 0)])
def test_curves(tmp_path, first, epochs, best):
    figure = plots.draw_curves(history(epochs, first), {"epoch": best, "accuracy": 0.75})
    plots.save_figure(figure, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1000, 400)
    assert figure.axes[1].get_title() == f"accuracy (best 0.750 in epoch {best})"
    for axes in figure.axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["train", "val"] + ["val, fc alone"] * (first == 0)


@pytest.mark.parametrize("count", [2, 5, 102])
def test_confusion_matrix_names_every_class_and_overlaps_none(tmp_path, count):
    names = [f"class number {i}" for i in range(count)]
    names[0] = "$x^{$"  # a name, no formula
    confusion = np.eye(count, dtype=int) * 7
    confusion[0, 1] = 3
    figure = plots.draw_confusion_matrix(confusion, names, "title")
    plots.save_figure(figure, tmp_path / "matrix.png")
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == names
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    if count <= 20:  # in more cells figures could not be read
        assert [text.get_text() for text in axes.texts] == ["7", "3"] + ["7"] * (count - 1)
        assert axes.texts[1].get_position() == (1, 0)  # row 0 is the truth, column 1 the prediction
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("truth", "prediction")
    for label in (axes.yaxis.label, axes.xaxis.label):
        box = label.get_window_extent()
        assert min(box.extents) >= 0  # on the picture
        assert (box.max <= figure.bbox.max).all()


def test_confusion_matrix_of_a_thousand_classes_is_drawn_without_names(tmp_path):
    figure = plots.draw_confusion_matrix(
        np.ones((1000, 1000), int), [str(i) for i in range(1000)], "t"
    )
    plots.save_figure(figure, tmp_path / "matrix.png")
    assert not figure.axes[0].texts
    assert max(Image.open(tmp_path / "matrix.png").size) < 6000


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_images_with_captions_that_look_like_mathematics(tmp_path, count, suffix):
    images = [(Image.new("RGB", (90, 60)), "$x^2\n50 % \\frac")] * count
    plots.save_figure(plots.draw_images(images), tmp_path / f"p.{suffix}")
    assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


def test_short_names_fit_and_print():
    assert plots.short("daisy") == "daisy"
    assert plots.short("x" * 100) == "x" * 23 + "…"
    assert plots.short("a\nb") == r"a\nb"


def test_letters_that_no_font_has_are_one_notice(tmp_path, capsys):
    """Hieroglyphs, which hardly any font draws."""
    figure = plots.draw_confusion_matrix(
        np.eye(2, dtype=int), ["rose \U00013000", "\U00013001"], "title"
    )
    plots.save_figure(figure, tmp_path / "matrix.png")
    assert capsys.readouterr().err.count("lacks letters: install a font") == 1

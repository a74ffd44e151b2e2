"""The pictures the project draws: whether they can be drawn; a person must look at them."""

from itertools import pairwise

import numpy as np
import pytest
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


@pytest.mark.parametrize(("epochs", "best"), [(1, 1), (30, 7), (30, 0)])
def test_curves(tmp_path, epochs, best):
    figure = plots.draw_curves(history(epochs), {"epoch": best, "accuracy": 0.75})
    plots.save_figure(figure, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1300, 400)
    for axes in figure.axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
    accuracy = figure.axes[1]
    assert accuracy.get_title() == f"accuracy (best 0.750 in epoch {best})"
    names = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert names == ["train", "val"] + ["val, fc alone"] * (best == 0)


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
def test_pictures_with_captions_that_look_like_mathematics(tmp_path, count, suffix):
    pictures = [(Image.new("RGB", (90, 60)), "$x^2\n50 % \\frac")] * count
    plots.save_figure(plots.draw_pictures(pictures), tmp_path / f"p.{suffix}")
    assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


def test_names_in_letters_that_no_font_has_are_escaped_with_a_notice(capsys):
    """Private-use letters, which no font draws; Chinese is drawn where a font for it is found."""
    assert plots.short("rose \ue123") == "rose \\ue123"
    chinese = plots.short("郁金香")
    if chinese != "郁金香":
        assert chinese == "\\u90c1\\u91d1\\u9999"
        assert "no font here can draw" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_names_of_any_language_are_drawn_without_a_warning(tmp_path):
    names = ["郁金香", "薔薇", "роза", "τουλίπα", "وردة"]
    figure = plots.draw_confusion_matrix(np.eye(5, dtype=int), names, "title")
    plots.save_figure(figure, tmp_path / "matrix.png")


def test_short_names_fit_and_print():
    assert plots.short("daisy") == "daisy"
    assert plots.short("x" * 100) == "x" * 23 + "…"
    assert plots.short("a\nb") == r"a\nb"

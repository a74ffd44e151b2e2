"""The figures the project draws: whether they can be drawn; a person must look at them."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import plots

FIGURES = {"train_loss": 1.0, "train_accuracy": 0.4, "val_loss": 1.0, "val_accuracy": 0.5}


@pytest.mark.parametrize(("first", "last", "best"), [(1, 1, 1), (1, 30, 7), (0, 30, 0)])
def test_curves(tmp_path, first, last, best):
    history = [{"epoch": epoch} | FIGURES for epoch in range(first, last + 1)]
    figure = plots.draw_curves(history, {"epoch": best, "accuracy": 0.75})
    plots.save_figure(figure, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1000, 400)
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())
    accuracy = figure.axes[1]
    assert accuracy.get_title() == f"accuracy (best 0.750 in epoch {best})"
    names = ["train", "val", *["val, fc alone"] * (first == 0)]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == names
    assert list(accuracy.lines[0].get_xdata()) == list(range(1, last + 1))


@pytest.mark.parametrize("count", [2, 20, 40, 201])
def test_a_confusion_matrix_names_every_class_and_overlaps_none(tmp_path, count):
    names = [f"class number {i}" for i in range(count)]
    names[0] = "$x^{$"  # a name, no formula
    confusion = np.eye(count, dtype=int) * 7
    confusion[0, 1] = 3  # row 0 is the truth, column 1 the prediction
    figure = plots.draw_confusion_matrix(confusion, names, "title")
    plots.save_figure(figure, tmp_path / "matrix.png")
    assert max(Image.open(tmp_path / "matrix.png").size) < 4000
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        found = [label.get_text() for label in labels]
        assert (found == names) is (count <= 200)  # more could not be read
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    counts = ["7", "3", *"7" * (count - 1)] if count <= 20 else []
    assert [text.get_text() for text in axes.texts] == counts
    assert [text.get_position() for text in axes.texts[1:2]] == [(1, 0)] * (count <= 20)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("truth", "prediction")
    for label in (axes.yaxis.label, axes.xaxis.label):
        box = label.get_window_extent()
        assert min(box.extents) >= 0  # on the figure
        assert (box.max <= figure.bbox.max).all()


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_images_with_captions_that_look_like_mathematics(tmp_path, suffix):
    for count in (1, 3, 16) if suffix == "png" else (3,):
        Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
        images = [(tmp_path / "image.png", "$x^2\n50 % \\frac")] * count
        plots.save_figure(plots.draw_images(images), tmp_path / f"p.{suffix}")
        assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_told_of_once_and_names_are_short(tmp_path, capsys):
    for names, said in ((["роза", "\n"], 0), (["τουλίπα 𒀀", "𒀀" * 2], 1)):
        plots.save_figure(plots.draw_confusion_matrix(np.eye(2), names, "t"), tmp_path / "m.png")
        assert capsys.readouterr().err.count(f"{tmp_path}/m.png lacks letters: install a") == said
    assert plots.short("a\nb") == r"a\nb"
    assert plots.short("x" * 25) == "x" * 23 + "…"

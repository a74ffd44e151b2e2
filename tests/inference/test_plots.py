"""The figures the project draws: whether they can be drawn; a person must look at them."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from shufflenet.inference import plots

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
    names = ["train", "val", *["val, at the start"] * (first == 0), "best epoch"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert list(accuracy.lines[0].get_xdata()) == list(range(1, last + 1))


def test_one_outlier_does_not_flatten_the_loss():
    history = [{"epoch": epoch} | FIGURES for epoch in range(1, 9)]
    history[2]["val_loss"] = 271.3
    loss, accuracy = plots.draw_curves(history, {"epoch": 1, "accuracy": 0.5}).axes
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")


@pytest.mark.parametrize("count", [2, 20, 40, 41, 500])
def test_a_confusion_matrix_names_its_classes_or_the_largest_confusions(tmp_path, count):
    names = [f"class number {i}" for i in range(count)]
    names[0] = "$x^{$"  # a name, no formula
    confusion = np.eye(count, dtype=int) * 7
    confusion[0, 1] = 3  # row 0 is the truth, column 1 the prediction
    confusion[2:3, 0] = count > 40
    figure = plots.draw_confusion_matrix(confusion, names, "title")
    plots.save_figure(figure, tmp_path / "matrix.png")
    assert max(Image.open(tmp_path / "matrix.png").size) < 4000
    axes = figure.axes[0]
    if count <= 40:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            assert [label.get_text() for label in labels] == names
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    else:
        bars = figure.axes[1]
        said = [label.get_text() for label in bars.get_yticklabels()]
        assert said == ["$x^{$ as class number 1", "class number 2 as $x^{$"]
        assert [bar.get_width() for bar in bars.patches] == [3, 1]
    counts = ["7", "3", *"7" * (count - 1)] if count <= 40 else []
    assert [text.get_text() for text in axes.texts] == counts
    assert [text.get_position() for text in axes.texts[1:2]] == [(1, 0)] * (count <= 40)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("truth", "prediction")
    for label in (axes.yaxis.label, axes.xaxis.label):
        box = label.get_window_extent()
        assert min(box.extents) >= 0  # on the figure
        assert (box.max <= figure.bbox.max).all()


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_images_with_captions_that_look_like_mathematics(tmp_path, suffix):
    for count in (1, 3, 16) if suffix == "png" else (3,):
        Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
        panels = [
            plots.Panel(tmp_path / "image.png", "$x^2", right, ["50 % \\frac"])
            for right in (None, True, False) * 6
        ][:count]
        plots.save_figure(plots.draw_images(panels), tmp_path / f"p.{suffix}")
        assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_told_of_once_and_names_are_short(tmp_path, capsys):
    for names, said in ((["роза", "\n"], 0), (["τουλίπα 𒀀", "𒀀" * 2], 1)):
        plots.save_figure(plots.draw_confusion_matrix(np.eye(2), names, "t"), tmp_path / "m.png")
        assert capsys.readouterr().err.count(f"{tmp_path}/m.png lacks letters: install a") == said
    for name, said in (("роза", 0), ("𒀀", 1)):
        plots.draw_sheet([(np.zeros((8, 8, 3), np.uint8), name)])
        assert capsys.readouterr().err.count("the sheet of images lacks letters: install") == said
    assert plots.short("a\nb") == r"a\nb"
    assert plots.short("x" * 25) == "x" * 23 + "…"


def test_many_images_with_their_explanations_fit_a_page():
    pixels, heat = np.zeros((8, 8, 3), np.uint8), np.ones((2, 2))
    panels = [plots.Panel("a.jpg", "a", None, ["b"], (pixels, heat))] * 30
    width, height = plots.draw_images(panels).get_size_inches()
    assert 0.5 < width / height < 2


def test_drawing_changes_nothing_of_the_process(tmp_path):
    """Neither its fonts, nor does a backend that a notebook has and this environment has not."""
    code = "from shufflenet.inference import plots; import matplotlib; "
    code += "print(matplotlib.rcParams['font.family'], plots.FAMILIES[0])"
    for backend in ("", "nonsense", "module://matplotlib_inline.backend_inline"):
        environment = os.environ | {"MPLBACKEND": backend}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True
        )
        assert run.stdout == b"['sans-serif'] DejaVu Sans\n", run.stderr

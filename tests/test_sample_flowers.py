"""Tests of the drawn stand-in for the flower_photos data set."""

import random
from pathlib import Path

import pytest
import sample_flowers
from PIL import Image
from sample_flowers import draw_sample_flowers

CLASSES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


def contents(root: Path) -> dict[str, bytes]:
    """Return the bytes of every file under root by its path there."""
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_has_the_classes_counts_and_names_of_the_data_set(tmp_path):
    root = draw_sample_flowers(tmp_path / "deep" / "sample", per_class=2, size=48)
    assert root == tmp_path / "deep" / "sample"
    assert sorted(contents(root)) == [f"{c}/{c}_{i:03d}.jpg" for c in CLASSES for i in (0, 1)]
    assert [path.name for path in root.parent.iterdir()] == ["sample"]  # and nothing left beside it
    for path in root.rglob("*.jpg"):
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (48, 48))


def test_same_seed_same_bytes_whatever_the_global_random_state(tmp_path):
    random.seed(1)
    first = draw_sample_flowers(tmp_path / "first", per_class=2, seed=3, size=48)
    random.seed(2)
    second = draw_sample_flowers(tmp_path / "second", per_class=2, seed=3, size=48)
    assert contents(first) == contents(second)


def test_every_picture_and_every_seed_differs(tmp_path):
    first = draw_sample_flowers(tmp_path / "first", per_class=2, seed=0, size=48)
    second = draw_sample_flowers(tmp_path / "second", per_class=2, seed=1, size=48)
    pictures = [*contents(first).values(), *contents(second).values()]
    assert len(set(pictures)) == 20


def test_a_longer_set_starts_with_the_shorter_one(tmp_path):
    short = contents(draw_sample_flowers(tmp_path / "short", per_class=1, size=48))
    long = contents(draw_sample_flowers(tmp_path / "long", per_class=2, size=48))
    assert short.items() < long.items()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch, error):
    draw_picture = sample_flowers.draw_picture

    def fail_at_the_roses(name, rng, size):
        if name == "roses":
            raise error
        return draw_picture(name, rng, size)

    monkeypatch.setattr(sample_flowers, "draw_picture", fail_at_the_roses)
    with pytest.raises(error):
        draw_sample_flowers(tmp_path / "sample", per_class=1, size=48)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delattr(sample_flowers, "draw_picture")  # nothing is drawn at all
    root = tmp_path / "sample"
    root.mkdir()
    (root / "mine.txt").write_text("keep")
    assert draw_sample_flowers(root, per_class=1, size=48) == root
    assert contents(root) == {"mine.txt": b"keep"}


def test_a_set_that_another_process_finishes_meanwhile_is_kept(tmp_path, monkeypatch):
    root, draw_picture = tmp_path / "sample", sample_flowers.draw_picture

    def draw_slowly(name, rng, size):
        if name == "tulips":
            root.mkdir()
            (root / "theirs.txt").write_text("keep")
        return draw_picture(name, rng, size)

    monkeypatch.setattr(sample_flowers, "draw_picture", draw_slowly)
    assert draw_sample_flowers(root, per_class=1, size=48) == root
    assert contents(root) == {"theirs.txt": b"keep"}
    assert list(tmp_path.iterdir()) == [root]

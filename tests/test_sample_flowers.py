"""The drawn stand-in for the flower_photos data set."""

import random

import sample_flowers
from PIL import Image
from sample_flowers import draw_sample_flowers

CLASSES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


def draw(place, per_class=2, seed=0):
    """The bytes of every file by its place in a set that is drawn."""
    root = draw_sample_flowers(place, per_class, seed, size=48)
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_it_has_the_classes_and_layout_of_the_data_set_and_the_seed_decides(tmp_path):
    random.seed(1)
    first = draw(tmp_path / "deep" / "first")
    assert sorted(first) == [f"{c}/{c}_{i:03d}.jpg" for c in CLASSES for i in (0, 1)]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["first"]
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))
    random.seed(2)
    assert draw(tmp_path / "again") == first
    assert draw(tmp_path / "shorter", per_class=1).items() < first.items()
    images = [*first.values(), *draw(tmp_path / "other", seed=1).values()]
    assert len(set(images)) == 20  # all differ


def test_a_folder_that_exists_or_appears_meanwhile_is_left_alone(tmp_path, monkeypatch):
    root, draw_picture = tmp_path / "sample", sample_flowers.draw_picture

    def draw_slowly(name, rng, size):
        root.mkdir(exist_ok=True)  # as by another process
        (root / "theirs.txt").write_text("keep")
        return draw_picture(name, rng, size)

    monkeypatch.setattr(sample_flowers, "draw_picture", draw_slowly)
    assert draw(root) == {"theirs.txt": b"keep"}
    assert list(tmp_path.iterdir()) == [root]
    monkeypatch.delattr(sample_flowers, "draw_picture")  # nothing is drawn at all
    assert draw(root) == {"theirs.txt": b"keep"}

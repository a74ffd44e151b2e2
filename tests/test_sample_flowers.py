"""The drawn stand-in for the flower_photos data set."""

import random

import pytest
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


def test_it_appears_whole_or_not_at_all_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_flowers, "RINGS", {"daisy": sample_flowers.RINGS["daisy"], "no": 0})
    with pytest.raises(TypeError):  # after the daisies
        draw(tmp_path / "sample")
    assert not list(tmp_path.iterdir())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("keep")
    assert draw(tmp_path / "theirs") == {"notes.txt": b"keep"}

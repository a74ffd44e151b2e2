"""Class folders and their split, against the tutorial's rule; no file is opened as an image."""

import json
import os
import random

import pytest

from shufflenet.common.messages import RunError, UsageError
from shufflenet.reading.folders import (
    BadImages,
    all_images,
    find_images,
    find_parts,
    fingerprint,
    require_classes,
    split_images,
)
from shufflenet.reading.image import ImageError
from utils import read_split_data


def put(path, content=None):
    """Write a file, by default with content that no other file has; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ascii(path) if content is None else content)
    return str(path)


def fill(root, **counts):
    """Make a folder of images per class, so many each; return the root."""
    for name, count in counts.items():
        for i in range(count):
            put(root / name / f"{i:03d}.jpg")
    return root


def tutorial_split(root, val_rate, seed=0):
    """{class: paths} for training and validation, drawn as the tutorial does."""
    generator = random.Random(seed)
    train, val = {}, {}
    for name in sorted(os.listdir(root)):
        paths = sorted(os.path.join(root, name, file) for file in os.listdir(root / name))
        chosen = generator.sample(paths, int(len(paths) * val_rate))
        train[name] = [path for path in paths if path not in chosen]
        val[name] = [path for path in paths if path in chosen]
    return train, val


def split(root, val_rate, seed):
    train, val = split_images(find_parts(root), val_rate, seed)
    require_classes(train, val, root)
    return train, val


def joined(images):
    return [path for paths in images.values() for path in paths]


def test_classes_and_images_come_sorted_and_nested_images_are_found(tmp_path, capsys):
    names = {"Zinnia": ("b.PNG", "sub/deep/a.Jpeg"), "aster": ("1.jpg", "10.tiff", "2.webp")}
    expected = {name: [put(tmp_path / name / file) for file in names[name]] for name in names}
    assert list(find_images(tmp_path).items()) == list(expected.items())
    assert capsys.readouterr().err == ""


def test_what_is_skipped_is_said_in_one_line_of_each_kind(tmp_path, capsys):
    fill(tmp_path, rose=1, tulip=1)
    for name in ("a.txt", "b.TXT", "c.heic", "README", ".DS_Store", "._000.jpg", ".cache/b.jpg"):
        put(tmp_path / "rose" / name)
    for name in ("loose.jpg", "words/a.txt", ".thumbnails/a.jpg", "no\nimage/below/.hidden"):
        put(tmp_path / name)
    assert joined(find_images(tmp_path)) == [f"{tmp_path}/{c}/000.jpg" for c in ("rose", "tulip")]
    assert capsys.readouterr().err.splitlines() == [
        f"skipped {tmp_path}/no\\nimage: no image in it",
        f"skipped {tmp_path}/words: no image in it",
        f"skipped in {tmp_path}: 1 .heic, 3 .txt, 1 images in no class folder, 1 without a suffix",
    ]


def test_a_class_and_an_image_may_be_links_but_no_link_leads_back_up(tmp_path):
    rose = fill(tmp_path / "flowers", rose=2, daisy=2) / "rose"
    (rose / "up").symlink_to("..")
    (rose / "linked.jpg").symlink_to(rose / "000.jpg")
    (rose.parent / "twin").symlink_to("daisy")
    found = find_images(rose.parent)
    assert {name: len(paths) for name, paths in found.items()} == {"daisy": 2, "rose": 3, "twin": 2}


def test_the_fingerprint_is_of_names_and_parts_not_of_the_place(tmp_path):
    prints = []
    for root, rose, side in (("a", 2, "val"), ("b", 2, "test"), ("c", 3, "val")):
        fill(tmp_path / root / "train", daisy=2, rose=2)
        fill(tmp_path / root / side, daisy=2, rose=rose)
        prints.append(fingerprint(find_parts(tmp_path / root)))
    prints.append(fingerprint(find_parts(tmp_path / "a/train")))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_folder_of_data_sets_is_noticed(tmp_path, capsys):
    for name in ("cats", "dogs"):
        fill(tmp_path / name, small=1, large=1)
    assert list(find_images(tmp_path)) == ["cats", "dogs"]
    said = f"{tmp_path} holds folders of folders: if each is a data set, "
    assert capsys.readouterr().err.startswith(said)


def test_without_class_folders_the_layout_and_the_likely_folder_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"^{tmp_path} holds no class .*{tmp_path}/CLASS/IMAGE"):
        find_images(tmp_path)
    put(tmp_path / "loose.jpg")
    with pytest.raises(UsageError, match=f"is the folder above it meant, {tmp_path.parent}[?]$"):
        find_images(tmp_path)


@pytest.mark.parametrize(("val_rate", "seed"), [(0.2, 0), (0.5, 0), (0.07, 0), (0.3, 7)])
def test_the_images_that_the_tutorial_draws_are_drawn(tmp_path, val_rate, seed):
    fill(tmp_path, tulip=37, rose=20, daisy=100)
    put(tmp_path / "rose/UPPER.JPG")
    expected, before = tutorial_split(tmp_path, val_rate, seed), sorted(tmp_path.rglob("*"))
    assert split(tmp_path, val_rate, seed) == expected
    assert split(tmp_path, val_rate, seed + 1) != expected
    assert read_split_data(str(tmp_path), val_rate, seed)[::2] == (*map(joined, expected),)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    read_split_data(str(tmp_path), class_indices=tmp_path / "class_indices.json")
    assert json.loads((tmp_path / "class_indices.json").read_text()) == dict(
        zip("012", ["daisy", "rose", "tulip"], strict=True)
    )


def test_a_class_too_small_for_both_sides_is_an_error_that_names_it(tmp_path):
    fill(tmp_path, daisy=9)
    with pytest.raises(
        UsageError, match=f"^{tmp_path} has only one class; name {tmp_path}/daisy if"
    ):
        split(tmp_path, 0.2, 0)
    fill(tmp_path, rose=4)
    said = "class rose has no image for validation, of 4 in all; add images, or change --val"
    with pytest.raises(UsageError, match=said):
        split(tmp_path, 0.2, 0)


@pytest.mark.parametrize("second", ["Val", "valid", "validation", "test"])
def test_train_and_val_folders_are_taken_as_they_are(tmp_path, capsys, second):
    fill(tmp_path / "train", rose=3, daisy=2)
    fill(tmp_path / second, rose=1, daisy=5)
    train, val = split(tmp_path, 0.2, 0)
    parts = find_parts(tmp_path)
    assert [train, val] == parts == [find_images(tmp_path / side) for side in ("train", second)]
    assert all_images(parts) == {name: train[name] + val[name] for name in ("daisy", "rose")}
    assert read_split_data(str(tmp_path))[1::2] == ([0, 0, 1, 1, 1], [0] * 5 + [1])
    said = f"{tmp_path} holds no val/: test/ is taken for validation\n"
    assert set(capsys.readouterr().err.splitlines(True)) == ({said} if second == "test" else set())


def test_train_alone_is_an_error_and_of_val_and_test_val_is_taken(tmp_path):
    fill(tmp_path / "train", rose=2, daisy=2)
    with pytest.raises(UsageError, match="holds train/ alone: make a val/ .*, or name .*train"):
        split(tmp_path, 0.2, 0)
    for name in ("valid", "test"):
        fill(tmp_path / name, rose=2, daisy=2)
    assert split(tmp_path, 0.2, 0)[1] == find_images(tmp_path / "valid")


@pytest.mark.parametrize(("lacking", "said"), [("train", "training"), ("val", "validation")])
def test_a_class_that_train_or_val_lacks_is_an_error(tmp_path, lacking, said):
    for side in ("train", "val"):
        fill(tmp_path / side, rose=2, daisy=2, tulip=2 * (side != lacking))
    with pytest.raises(UsageError, match=f"class tulip has no image for {said}, of 2 in all"):
        split(tmp_path, 0.2, 0)


def test_classes_called_train_and_val_are_classes_where_images_lie_in_them(tmp_path):
    fill(tmp_path, train=10, val=10, plane=10)
    expected = tutorial_split(tmp_path, 0.2)
    for name in ("train", "val"):  # what a notebook leaves is no class
        (tmp_path / name / ".ipynb_checkpoints").mkdir()
    assert split(tmp_path, 0.2, 0) == expected


def test_bad_images_are_named_once_and_may_be_a_tenth(capsys):
    bad = BadImages(40)
    for reason in ("empty", "could not be read"):  # by the disk, then by the cache
        for number in range(4):
            bad.add(ImageError(f"{number}.jpg", reason))
    assert capsys.readouterr().err == "".join(f"skipped: {n}.jpg: empty\n" for n in range(4))
    with pytest.raises(RunError, match="^5 of 40 images cannot be .* than 10%: check the disk"):
        bad.note(["3.jpg", "4.jpg"])
    BadImages(3).add(ImageError("one", "may always be bad"))

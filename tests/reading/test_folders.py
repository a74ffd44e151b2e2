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
    image_hashes,
    refuse_unknown,
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
    return require_classes(split_images(find_parts(root), val_rate, seed), root)


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
        f"skipped in {tmp_path}: 1 .heic, 3 .txt, 1 images in no class folder, 5 of the system, "
        "1 without a suffix",
    ]


LEFT = ["@eaDir/000.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "__MACOSX/rose/._000.jpg"]
LEFT += [
    "Thumbs.db",
    ".Spotlight-V100/a.jpg",
    "lost+found/b.jpg",
    "System Volume Information/c.jpg",
]


@pytest.mark.parametrize("below", ["", "rose", "rose/deep/er", "train/rose"])
def test_what_systems_leave_is_skipped_at_every_level_and_counted(tmp_path, capsys, below):
    for part in ("train", "val") if below.startswith("train") else ("",):
        fill(tmp_path / part, rose=2, tulip=2)
    for name in LEFT:
        put(tmp_path / below / name)
    for images in find_parts(tmp_path).values():
        assert {name: len(paths) for name, paths in images.items()} == {"rose": 2, "tulip": 2}
    # Of the root the folder of a class list does not count loose files that are no images.
    assert f"{len(LEFT) - (below == '')} of the system" in capsys.readouterr().err


def test_names_are_compared_in_one_form_of_unicode(tmp_path):
    prints = []
    for part, name in (("train", "cafe\u0301"), ("val", "caf\u00e9")):
        fill(tmp_path / part, **{name: 2, "cafz": 2})
        put(tmp_path / part / name / f"{name}.jpg", "x")
        prints.append(fingerprint(find_parts(tmp_path / part), tmp_path / part))
    train, val = split(tmp_path, 0.2, 0)
    assert list(train) == list(val) == ["cafz", "caf\u00e9"]
    assert image_hashes([train["caf\u00e9"][-1]]) == image_hashes([val["caf\u00e9"][-1]])


def test_links_are_followed_at_every_level_but_not_round_in_circles(tmp_path, capsys):
    rose = fill(tmp_path / "flowers", rose=2, daisy=2) / "rose"
    more = fill(tmp_path / "elsewhere", more=3) / "more"
    (rose / "up").symlink_to("..")
    (rose / "self").symlink_to(rose)
    (rose / "more").symlink_to(more)
    (more / "back").symlink_to(more)
    (rose / "linked.jpg").symlink_to(rose / "000.jpg")
    (rose.parent / "twin").symlink_to("daisy")
    found = find_images(rose.parent)
    assert {name: len(paths) for name, paths in found.items()} == {"daisy": 2, "rose": 6, "twin": 2}
    assert "3 links to a folder that is searched anyway" in capsys.readouterr().err


def test_the_fingerprint_is_of_places_and_sizes_below_the_root(tmp_path):
    prints = []
    for root in "abcd":
        fill(tmp_path / root / "train", daisy=2, rose=2)
        fill(tmp_path / root / "val", daisy=2, rose=2)
        for path in (tmp_path / root).rglob("*.jpg"):
            path.write_text(path.name)
    (tmp_path / "c/val/rose/000.jpg").write_text("another size")
    (tmp_path / "d/val/rose").rename(tmp_path / "d/val/roses")
    prints = [fingerprint(find_parts(tmp_path / root), tmp_path / root) for root in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_images_are_known_by_name_and_size_wherever_they_lie(tmp_path):
    here, there = put(tmp_path / "a/1.jpg", "12"), put(tmp_path / "b/c/1.jpg", "34")
    others = [put(tmp_path / "a/2.jpg", "12"), put(tmp_path / "d/1.jpg", "123")]
    assert image_hashes([here]) == image_hashes([there, here])
    assert set(image_hashes([here])).isdisjoint(image_hashes(others))
    assert all(0 <= value < 1 << 64 for value in image_hashes(others))
    assert len(image_hashes(others)) == 2


def test_a_folder_of_data_sets_is_noticed_and_parts_of_other_names_are_refused(tmp_path, capsys):
    fill(tmp_path / "cats", small=1, large=1)
    fill(tmp_path / "dogs", old=1, young=1)
    assert list(find_images(tmp_path)) == ["cats", "dogs"]
    said = f"{tmp_path} holds folders of folders: if each is a data set, "
    assert capsys.readouterr().err.startswith(said)
    for name in ("fold1", "fold2"):
        fill(tmp_path / "folds" / name, cat=1, dog=1)
    with pytest.raises(
        UsageError, match="fold1, fold2 hold the same folders, cat, dog: call parts"
    ):
        find_parts(tmp_path / "folds")


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


def test_of_a_small_class_one_image_is_drawn_and_a_single_one_is_trained_on(tmp_path, capsys):
    fill(tmp_path, daisy=9)
    with pytest.raises(UsageError, match=f"^{tmp_path} has only one class, daisy; --data-path na"):
        split(tmp_path, 0.2, 0)
    fill(tmp_path, rose=3, tulip=1)
    train, val = split(tmp_path, 0.2, 0)
    assert {name: len(paths) for name, paths in train.items()} == {
        "daisy": 8,
        "rose": 2,
        "tulip": 1,
    }
    assert {name: len(paths) for name, paths in val.items()} == {"daisy": 1, "rose": 1}
    assert capsys.readouterr().err.splitlines() == [
        "no image to validate: tulip",
        "classes have 1 to 8 images to train, and 2 only one to validate: accuracy says little of "
        "small ones",
    ]


def test_parts_are_recognised_as_they_are_unpacked(tmp_path):
    """As Kaggle's archives are: a folder in a folder of the same name, a word before the part."""
    fill(tmp_path / "seg_train/seg_train", rose=3, daisy=2)
    fill(tmp_path / "seg_test/seg_test", rose=1, daisy=5)
    put(tmp_path / "seg_pred/seg_pred/1.jpg")
    assert list(find_parts(tmp_path)) == ["train", "test", "val"]
    for name in ("bullet train", "test tube", "bus"):  # classes
        fill(tmp_path / "things", **{name: 2})
    assert list(find_parts(tmp_path / "things")) == ["all"]


def test_what_lies_beside_parts_is_named_and_parts_below_classes_are_refused(tmp_path, capsys):
    for part in ("train", "val", "extra"):
        fill(tmp_path / part, rose=2, daisy=2)
    assert list(find_parts(tmp_path)) == ["train", "val"]
    assert f"skipped beside the parts of {tmp_path}: extra\n" in capsys.readouterr().err
    fill(tmp_path / "inside" / "rose", Train=2, Test=2)
    fill(tmp_path / "inside" / "daisy", train=2, test=2, more=1)
    with pytest.raises(UsageError, match="inside: classes hold parts, test, train: put train/ and"):
        find_parts(tmp_path / "inside")


def test_of_one_class_the_folder_that_is_meant_is_named_and_one_image_each_is_an_error(tmp_path):
    fill(tmp_path / "up/Data/train", rose=2, daisy=2)
    with pytest.raises(UsageError, match=f"only one class, Data; .* perhaps {tmp_path}/up/Data$"):
        split(tmp_path / "up", 0.2, 0)
    fill(tmp_path / "single", rose=1, daisy=1)
    with pytest.raises(UsageError, match="no class has two images, so none is left to validate"):
        split(tmp_path / "single", 0.2, 0)


def test_neither_the_order_of_a_folder_nor_a_link_to_itself_matters(tmp_path):
    rose = fill(tmp_path / "flowers", rose=1, daisy=1) / "rose"
    put(rose / "b/1.jpg")
    (rose / "a").symlink_to("b")
    (rose.parent / "loop").symlink_to("loop")
    assert find_images(rose.parent)["rose"] == [str(rose / "000.jpg"), str(rose / "b/1.jpg")]


NAMES = [("train", "Val"), ("TRAINING", "valid"), ("Train", "validation"), ("train", "dev")]
NAMES += [("train2017", "val2017"), ("train_set", "Validation Set"), ("训练集", "验证集")]


@pytest.mark.parametrize(("first", "second"), NAMES)
def test_parts_are_taken_as_they_are_whatever_they_are_called(tmp_path, capsys, first, second):
    fill(tmp_path / first, rose=3, daisy=2)
    fill(tmp_path / second, rose=1, daisy=5)
    parts = find_parts(tmp_path)
    assert parts == {"train": find_images(tmp_path / first), "val": find_images(tmp_path / second)}
    train, val = split(tmp_path, 0.2, 0)
    assert [train, val] == [*parts.values()]
    assert all_images(parts) == {name: train[name] + val[name] for name in ("daisy", "rose")}
    assert read_split_data(str(tmp_path))[1::2] == ([0, 0, 1, 1, 1], [0] * 5 + [1])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["test", "Testing", "test1"])
def test_test_is_a_part_of_its_own_and_validates_where_there_is_no_val(tmp_path, capsys, name):
    for part in ("train", "valid", name):
        fill(tmp_path / part, rose=2, daisy=2)
    parts = find_parts(tmp_path)
    assert list(parts) == ["train", "val", "test"]
    assert parts["val"] == find_images(tmp_path / "valid")
    for path in (tmp_path / "valid").rglob("*.jpg"):
        path.unlink()
    (tmp_path / "valid/rose").rmdir(), (tmp_path / "valid/daisy").rmdir()
    (tmp_path / "valid").rmdir()
    capsys.readouterr()
    assert split(tmp_path, 0.2, 0)[1] == find_images(tmp_path / name)
    said = f"{tmp_path} holds no val/: test/ is taken for validation\n"
    assert capsys.readouterr().err == said
    assert sum(map(len, all_images(find_parts(tmp_path)).values())) == 8  # each once


def test_train_alone_is_an_error(tmp_path):
    fill(tmp_path / "train", rose=2, daisy=2)
    with pytest.raises(UsageError, match="holds train/ alone: add val/ with class folders, or"):
        split(tmp_path, 0.2, 0)


FLAT = [
    (["train", "test1"], "train"),
    (["train", "val"], "val"),
    (["Training", "valid"], "Training"),
]


@pytest.mark.parametrize(("names", "flat"), FLAT)
def test_folders_that_look_like_parts_but_hold_no_class_folders_are_refused(tmp_path, names, flat):
    for name in names:
        fill(tmp_path / name, cat=2, dog=2)
    for number, path in enumerate((tmp_path / flat).rglob("*.jpg")):
        path.rename(tmp_path / flat / f"cat.{number}.jpg")
    for folder in ("cat", "dog"):
        (tmp_path / flat / folder).rmdir()
    said = (
        f"{tmp_path}/{flat} holds 4 images in no class folder: sort them as .*/{flat}/CLASS/IMAGE"
    )
    with pytest.raises(UsageError, match=said):
        find_parts(tmp_path)


def test_unsorted_images_to_test_are_no_part_and_two_of_a_kind_are_an_error(tmp_path, capsys):
    for name in ("train", "val", "test/unsorted"):
        fill(tmp_path / name, rose=2, daisy=2)
    for number, path in enumerate((tmp_path / "test").rglob("*.jpg")):
        path.rename(tmp_path / "test" / f"{number}.jpg")
    for name in ("unsorted/rose", "unsorted/daisy", "unsorted"):
        (tmp_path / "test" / name).rmdir()
    assert list(find_parts(tmp_path)) == ["train", "val"]
    assert "test holds 4 images in no class folder" in capsys.readouterr().err
    fill(tmp_path / "training", rose=2, daisy=2)
    with pytest.raises(UsageError, match="/train and .*/training are both named as train: rename"):
        find_parts(tmp_path)


def test_classes_that_training_lacks_are_all_named_with_the_likely_cause(tmp_path, capsys):
    fill(tmp_path / "train", rose=2, daisy=2, tulip=2, **{"sun flower": 1})
    fill(tmp_path / "val", Rose=3, daisy=1, sunflower=2, lily=1)
    with pytest.raises(UsageError, match="3 of 4 classes are unknown, Rose, lily, sunflower: ren"):
        split(tmp_path, 0.2, 0)
    assert capsys.readouterr().err.splitlines() == [
        "unknown class Rose, 3 images; it looks like rose",
        "unknown class lily, 1 images",
        "unknown class sunflower, 2 images; it looks like sun flower",
    ]
    with pytest.raises(UsageError, match="its images are not sorted into a folder per class"):
        refuse_unknown({"images": ["a", "b"]}, ["rose", "daisy", "tulip"], "val")


def test_a_class_may_be_called_as_a_part(tmp_path):
    fill(tmp_path, train=10, bus=10, plane=10)
    fill(tmp_path / "train", steam=5)  # with images of its own below it
    assert list(find_parts(tmp_path)) == ["all"]
    train, val = split(tmp_path, 0.2, 0)
    assert {name: len(paths) for name, paths in train.items()} == {
        "bus": 8,
        "plane": 8,
        "train": 12,
    }
    assert sum(map(len, val.values())) == 7


def test_bad_images_are_named_once_and_may_be_a_tenth(capsys):
    bad = BadImages(40)
    for _ in range(2):
        for number in range(4):
            bad.add(ImageError(f"{number}.jpg", "cut off" if number else "no image, but empty"))
    assert capsys.readouterr().err.count("skipped: ") == 4
    said = "^5 of 40 images cannot be read, more than 10%; most often: cut off$"
    with pytest.raises(RunError, match=said):
        bad.add(ImageError("4.jpg", "cut off"))
    assert capsys.readouterr().err.splitlines() == [
        "skipped: 4.jpg: cut off",
        "4 images: cut off",
        "1 images: no image, but empty",
    ]
    with pytest.raises(RunError, match="^5 of 40"):  # of another process, which said why
        BadImages(40).note([f"{number}.jpg" for number in range(5)])
    BadImages(3).add(ImageError("one", "may always be bad"))

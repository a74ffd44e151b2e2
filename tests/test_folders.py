"""Class folders and their split, against the tutorial's rule.

The files hold a few bytes, not pictures: finding and splitting them opens none as a picture.
"""

import hashlib
import os
import random
from pathlib import Path

import pytest

from cli import UsageError
from folders import find_pictures, pictures_of, split_pictures
from utils import read_split_data

PHOTOS = Path(__file__).parents[2] / "shared/data/flower_photos"


def put(path: Path, content: str | None = None) -> str:
    """Write a file, by default with content that no other file has; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(path) if content is None else content)
    return str(path)


def fill(root: Path, **counts: int) -> Path:
    """Make a folder of pictures per class, so many each; return the root."""
    for name, count in counts.items():
        for i in range(count):
            put(root / name / f"{i:03d}.jpg")
    return root


def tutorial_split(root: Path, val_rate: float, seed: int = 0) -> tuple[dict, dict]:
    """Return {class: paths} for training and validation, drawn as the tutorial does."""
    generator = random.Random(seed)
    train, val = {}, {}
    for name in sorted(os.listdir(root)):
        paths = sorted(os.path.join(root, name, file) for file in os.listdir(root / name))
        chosen = generator.sample(paths, int(len(paths) * val_rate))
        train[name] = [path for path in paths if path not in chosen]
        val[name] = [path for path in paths if path in chosen]
    return train, val


def listing(root: Path) -> set[Path]:
    """Return everything below a folder."""
    return set(root.rglob("*"))


def one_line(text: str) -> bool:
    """Return whether a notice is one line."""
    return text.count("\n") == 1 and text.endswith("\n")


def test_classes_and_pictures_come_sorted_and_nested_pictures_are_found(tmp_path, capsys):
    expected = {
        "Zinnia": [put(tmp_path / "Zinnia/b.PNG"), put(tmp_path / "Zinnia/sub/deep/a.Jpeg")],
        "aster": [put(tmp_path / f"aster/{name}") for name in ("1.jpg", "10.tiff", "2.webp")],
    }
    found = find_pictures(tmp_path)
    assert list(found.items()) == list(expected.items())
    assert capsys.readouterr().err == ""


def test_hidden_and_empty_folders_are_skipped_with_a_notice(tmp_path, capsys):
    fill(tmp_path, rose=1)
    put(tmp_path / ".thumbnails/a.jpg")
    (tmp_path / "empty/below").mkdir(parents=True)
    put(tmp_path / "words/a.txt")
    put(tmp_path / "rose/.cache/b.jpg")
    assert list(find_pictures(tmp_path)) == ["rose"]
    assert len(find_pictures(tmp_path)["rose"]) == 1
    notices = capsys.readouterr().err.splitlines()
    assert f"skipped {tmp_path}/.thumbnails: a hidden folder" in notices
    assert f"skipped {tmp_path}/empty: no picture in it" in notices
    assert f"skipped {tmp_path}/words: no picture in it" in notices


def test_other_suffixes_are_counted_in_one_notice_and_hidden_files_pass_silently(tmp_path, capsys):
    fill(tmp_path, rose=1, tulip=1)
    for name in ("a.txt", "b.TXT", "c.heic", "README", ".DS_Store", "._000.jpg"):
        put(tmp_path / "rose" / name)
    put(tmp_path / "tulip/d.txt")
    assert sum(len(paths) for paths in find_pictures(tmp_path).values()) == 2
    notice = capsys.readouterr().err
    assert one_line(notice)
    assert notice.endswith(": 1 .heic, 3 .txt, 1 without a suffix\n")


def test_symlink_loops_end_and_linked_folders_are_followed(tmp_path):
    first = put(tmp_path / "flowers/rose/a/1.jpg")
    put(tmp_path / "elsewhere/2.jpg")
    rose = Path(first).parents[1]
    (rose / "again").symlink_to(rose)
    (rose / "a/other").symlink_to(rose / "b")
    (rose / "b").mkdir()
    (rose / "b/other").symlink_to(rose / "a")
    (rose / "linked").symlink_to(tmp_path / "elsewhere")
    (rose / "nowhere").symlink_to(tmp_path / "missing")
    (rose / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    os.mkfifo(rose / "pipe.jpg")
    found = find_pictures(tmp_path / "flowers")["rose"]
    assert found == [first, f"{rose}/linked/2.jpg"]


def test_a_link_back_up_brings_no_other_class_in(tmp_path):
    fill(tmp_path / "flowers", rose=2, daisy=2)
    for name, target in (("up", ".."), ("far", "../.."), ("self", "."), ("abs", str(tmp_path))):
        (tmp_path / "flowers/rose" / name).symlink_to(target)
    (tmp_path / "flowers/linked").symlink_to("daisy")
    found = find_pictures(tmp_path / "flowers")
    assert {name: len(paths) for name, paths in found.items()} == {
        "daisy": 2,
        "linked": 2,
        "rose": 2,
    }
    assert find_pictures(f"{tmp_path}/flowers/rose/..").keys() == found.keys()


def test_without_class_folders_the_expected_layout_is_named(tmp_path):
    put(tmp_path / "loose.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"{tmp_path}: no class folders.*{tmp_path}/CLASS/PICTURE"):
        find_pictures(tmp_path)


def test_a_root_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        find_pictures(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        split_pictures(tmp_path / "missing", 0.2, 0)
    with pytest.raises(NotADirectoryError, match="file"):
        find_pictures(put(tmp_path / "file"))


def test_a_folder_below_that_cannot_be_listed_is_an_error_not_a_gap(tmp_path, monkeypatch):
    fill(tmp_path, rose=1)
    monkeypatch.chdir(tmp_path / "rose")
    for _ in range(20):  # its whole path is longer than the system accepts
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with pytest.raises(OSError, match="too long"):
        find_pictures(tmp_path)


@pytest.mark.parametrize("val_rate", [0.2, 0.5, 0.07])
def test_seed_0_draws_the_pictures_that_the_tutorial_draws(tmp_path, val_rate):
    fill(tmp_path, tulip=37, rose=20, daisy=100)
    put(tmp_path / "rose/UPPER.JPG")
    expected = tutorial_split(tmp_path, val_rate)
    assert split_pictures(tmp_path, val_rate, 0) == expected
    assert split_pictures(str(tmp_path), val_rate, 0) == expected


def test_photographs_are_split_as_the_tutorial_splits_them_but_for_duplicates(tmp_path):
    fill(tmp_path, daisy=9, rose=10)
    for root in [tmp_path] + [PHOTOS] * PHOTOS.is_dir():
        train, val = tutorial_split(root, 0.2)
        content = {
            path: hashlib.md5(Path(path).read_bytes()).digest()
            for paths in [*train.values(), *val.values()]
            for path in paths
        }
        trained = {content[path] for paths in train.values() for path in paths}
        expected = {name: [p for p in val[name] if content[p] not in trained] for name in val}
        assert split_pictures(root, 0.2, 0)[1] == expected


def test_the_split_repeats_with_its_seed_and_changes_with_another(tmp_path):
    fill(tmp_path, daisy=30, rose=30)
    first = split_pictures(tmp_path, 0.3, 7)
    assert split_pictures(tmp_path, 0.3, 7) == first
    assert split_pictures(tmp_path, 0.3, 8) != first
    assert first == tutorial_split(tmp_path, 0.3, seed=7)


def test_nothing_is_written(tmp_path, monkeypatch):
    fill(tmp_path / "flowers", daisy=5, rose=5)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = listing(tmp_path)
    read_split_data("../flowers")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("val_rate", [0, 1, -0.2, 1.5, float("nan")])
def test_a_val_rate_outside_0_to_1_is_an_error(tmp_path, val_rate):
    with pytest.raises(UsageError, match=f"val_rate is {val_rate}"):
        split_pictures(fill(tmp_path, daisy=5, rose=5), val_rate, 0)


def test_a_single_class_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="the only class is daisy"):
        split_pictures(fill(tmp_path, daisy=9), 0.2, 0)


def test_a_class_too_small_for_both_sides_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match="class rose has no picture for validation, of 1 in all"):
        split_pictures(fill(tmp_path, daisy=9, rose=1), 0.2, 0)


def test_a_class_of_nothing_but_copies_cannot_be_split(tmp_path):
    fill(tmp_path, daisy=9)
    for i in range(9):
        put(tmp_path / f"rose/{i}.jpg", "the same")
    with pytest.raises(UsageError, match="class rose has no picture for validation, of 9 in all"):
        split_pictures(tmp_path, 0.2, 0)


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        ("daisy/copy.jpg", "in one class"),
        ("daisy/below/copy.jpg", "in one class"),
        ("rose/copy.jpg", "IN 2 CLASSES"),
    ],
)
def test_exact_copies_stay_together_and_a_notice_names_them(tmp_path, capsys, copy, said):
    fill(tmp_path, daisy=6, rose=6)
    pair = {put(tmp_path / "daisy/000.jpg", "the same"), put(tmp_path / copy, "the same")}
    everything = {path for paths in find_pictures(tmp_path).values() for path in paths}
    parted = 0
    for seed in range(20):
        train, val = (
            {path for paths in side.values() for path in paths}
            for side in split_pictures(tmp_path, 0.4, seed)
        )
        assert pair <= train or pair <= val
        assert train | val == everything
        assert not train & val
        notice = capsys.readouterr().err
        assert one_line(notice)
        assert said in notice
        assert all(path in notice for path in pair)

        generator = random.Random(seed)  # where the plain draw parts the pair, it goes to training
        drawn = {
            path
            for paths in find_pictures(tmp_path).values()
            for path in generator.sample(paths, int(len(paths) * 0.4))
        }
        if len(pair & drawn) == 1:
            parted += 1
            assert pair <= train
            assert val == drawn - pair
        else:
            assert val == drawn
    assert parted  # or this test shows nothing


def test_files_of_one_size_with_other_content_are_no_copies(tmp_path, capsys):
    for name in ("daisy", "rose"):
        for i in range(8):
            put(tmp_path / name / f"first{i}.jpg", f"{name:5}{i}" + "x" * 9000)
            put(tmp_path / name / f"last{i}.jpg", "x" * 9000 + f"{name:5}{i}")
    assert split_pictures(tmp_path, 0.3, 0) == tutorial_split(tmp_path, 0.3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("second", ["val", "test"])
def test_train_and_val_folders_are_taken_as_they_are(tmp_path, capsys, second):
    fill(tmp_path / "train", rose=3, daisy=2)
    fill(tmp_path / second, rose=1, daisy=5)
    train, val = split_pictures(tmp_path, 0.2, 0)
    assert list(train) == list(val) == ["daisy", "rose"]
    assert train["rose"] == [f"{tmp_path}/train/rose/00{i}.jpg" for i in range(3)]
    assert val["daisy"] == [f"{tmp_path}/{second}/daisy/00{i}.jpg" for i in range(5)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [("Train", "Val"), ("train", "valid"), ("TRAIN", "validation")])
def test_other_spellings_of_train_and_val_are_known(tmp_path, names):
    for name in names:
        fill(tmp_path / name, rose=2, daisy=2)
    train, val = split_pictures(tmp_path, 0.2, 0)
    assert train == find_pictures(tmp_path / names[0])
    assert val == find_pictures(tmp_path / names[1])


def test_of_val_and_test_val_is_taken_and_a_notice_says_so(tmp_path, capsys):
    for name in ("train", "valid", "test"):
        fill(tmp_path / name, rose=2, daisy=2)
    assert split_pictures(tmp_path, 0.2, 0)[1] == find_pictures(tmp_path / "valid")
    assert "validation is valid/; test/ is not used" in capsys.readouterr().err


def test_train_alone_is_an_error_that_says_what_is_missing(tmp_path):
    fill(tmp_path / "train", rose=2, daisy=2)
    with pytest.raises(UsageError, match="holds train/ but no val/ or test/ beside it"):
        split_pictures(tmp_path, 0.2, 0)


def test_a_picture_in_both_train_and_val_is_noticed_and_stays(tmp_path, capsys):
    fill(tmp_path / "train", rose=3, daisy=3)
    fill(tmp_path / "val", rose=3, daisy=3)
    shared = [put(tmp_path / side / "rose/copy.jpg", "the same") for side in ("train", "val")]
    for name in ("a", "b"):  # twice on one side only: nothing to say
        put(tmp_path / f"train/daisy/{name}.jpg", "another")
    train, val = split_pictures(tmp_path, 0.2, 0)
    assert shared[0] in train["rose"]
    assert shared[1] in val["rose"]
    notice = capsys.readouterr().err
    assert one_line(notice)
    assert "in training and in validation" in notice
    assert "accuracy: 1; the first: " in notice
    assert ", ".join(shared) in notice


@pytest.mark.parametrize(("lacking", "said"), [("train", "training"), ("val", "validation")])
def test_a_class_that_train_or_val_lacks_is_an_error(tmp_path, lacking, said):
    for side in ("train", "val"):
        fill(tmp_path / side, rose=2, daisy=2)
        if side != lacking:
            fill(tmp_path / side, tulip=2)
    with pytest.raises(UsageError, match=f"class tulip has no picture for {said}, of 2 in all"):
        split_pictures(tmp_path, 0.2, 0)


def test_classes_called_train_and_val_are_classes_where_pictures_lie_in_them(tmp_path):
    fill(tmp_path, train=10, val=10, plane=10)
    expected = tutorial_split(tmp_path, 0.2)
    assert list(find_pictures(tmp_path)) == ["plane", "train", "val"]
    assert split_pictures(tmp_path, 0.2, 0) == expected
    for name in ("train", "val"):  # what a file manager or a notebook leaves is no class
        (tmp_path / name / ".ipynb_checkpoints").mkdir()
    assert split_pictures(tmp_path, 0.2, 0) == expected


def test_any_name_that_the_disk_takes_works_and_keeps_each_notice_on_one_line(tmp_path, capsys):
    names = ["two words", 'it\'s "quoted"', "new\nline", "向日葵", "é", "\x1b[2J", "x" * 200]
    names.append(os.fsdecode(b"\xff not UTF-8"))
    for name in names:
        for i in range(5):
            put(tmp_path / name / f"{name[:190]}{i}.jpg", f"{names.index(name)} {i}")
        put(tmp_path / name / "copy.jpg", f"{names.index(name)} 0")
    assert list(find_pictures(tmp_path)) == sorted(names)
    train, val = split_pictures(tmp_path, 0.4, 0)
    for name in names:
        assert len(train[name] + val[name]) == 6
        assert all(os.path.isfile(path) for path in train[name] + val[name])
    notices = capsys.readouterr().err
    assert len(notices.splitlines()) == 6  # five copies, and how many there are
    assert notices.endswith("8 pictures in all stand there more than once\n")
    assert notices.replace("\n", "").isprintable()


def test_pictures_of_gives_either_side_or_all(tmp_path):
    fill(tmp_path, rose=10, daisy=5)
    train, val = tutorial_split(tmp_path, 0.2, seed=3)
    assert pictures_of(tmp_path, "train", 0.2, 3) == train
    assert pictures_of(tmp_path, "val", 0.2, 3) == val
    assert pictures_of(tmp_path, "all", 0.2, 3) == find_pictures(tmp_path)


def test_pictures_of_knows_train_and_val_folders(tmp_path):
    fill(tmp_path / "train", rose=2, daisy=1)
    fill(tmp_path / "val", rose=1, daisy=1)
    train, val = find_pictures(tmp_path / "train"), find_pictures(tmp_path / "val")
    assert pictures_of(tmp_path, "train", 0.2, 0) == train
    assert pictures_of(tmp_path, "val", 0.2, 0) == val
    everything = pictures_of(tmp_path, "all", 0.2, 0)
    assert list(everything) == ["daisy", "rose"]
    assert everything["rose"] == train["rose"] + val["rose"]


def test_all_needs_no_second_class_nor_pictures_on_both_sides(tmp_path):
    fill(tmp_path, rose=1)
    assert pictures_of(tmp_path, "all", 0.2, 0) == {"rose": [f"{tmp_path}/rose/000.jpg"]}


def test_read_split_data_keeps_the_form_of_the_tutorial(tmp_path):
    fill(tmp_path, rose=10, daisy=5, tulip=20)
    train, val = tutorial_split(tmp_path, 0.2)
    train_paths, train_classes, val_paths, val_classes = read_split_data(str(tmp_path))
    assert train_paths == train["daisy"] + train["rose"] + train["tulip"]
    assert val_paths == val["daisy"] + val["rose"] + val["tulip"]
    assert train_classes == [0] * 4 + [1] * 8 + [2] * 16
    assert val_classes == [0] * 1 + [1] * 2 + [2] * 4


def test_read_split_data_counts_classes_the_same_way_on_both_sides(tmp_path):
    fill(tmp_path / "train", rose=3, daisy=2)
    fill(tmp_path / "val", rose=1, daisy=2)
    _, train_classes, _, val_classes = read_split_data(str(tmp_path))
    assert train_classes == [0, 0, 1, 1, 1]
    assert val_classes == [0, 0, 1]

"""A folder of images: its classes, and their split into training and validation.

    ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE

No torch: an exported network is measured without.
"""

import hashlib
import os
import random
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from cli import FLOWER_PHOTOS, RunError, UsageError, notice, require_data
from image import SUFFIXES, ImageError

MOST_BAD = 0.1  # share of the images that may be skipped before the disk must be damaged

Images = dict[str, list[str]]  # class name -> paths


def prepare_data(data_path: str) -> Path:
    """The folder that a --data-path means; flower_photos is downloaded if absent."""
    require_data(data_path)
    if data_path == FLOWER_PHOTOS:
        from flower_photos import download_flower_photos

        download_flower_photos(data_path)
    return Path(data_path)


def find_images(root: str | Path) -> Images:
    """List the images of every class, {class name: sorted paths} in sorted order of the names.

    Images may lie deeper; links are followed, each folder once. Hidden files and folders are
    skipped; with a notice, folders without an image, images outside the class folders, and other
    files. UsageError if no folder holds an image, OSError if one cannot be listed.
    """
    images, others, loose = {}, Counter(), 0
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not entry.is_dir():
            loose += os.path.splitext(entry.name)[1].lower() in SUFFIXES
        elif not entry.name.startswith("."):
            if found := images_below(entry.path, others):
                images[entry.name] = found
            else:
                notice(f"skipped {entry.path}: no image in it")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notice(f"skipped files that are no images by their suffix: {kinds}")
    if not images:
        hint = f"name the folder above it, {Path(root).absolute().parent}: " if loose else ""
        layout = f"expected {root}/CLASS/IMAGE with a suffix of {' '.join(sorted(SUFFIXES))}"
        raise UsageError(f"{hint}{root} holds no class folders with images; {layout}")
    if loose:
        notice(f"skipped images of {root} that lie in no class folder: {loose}")
    return images


def images_below(folder: str, others: Counter) -> list[str]:
    """Images in a folder and in those below it; `others` counts the remaining suffixes."""

    def stop(error: OSError) -> None:
        raise error

    found, seen = [], {os.path.dirname(os.path.realpath(folder))}  # a link may point back up
    for here, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        new = os.path.realpath(here) not in seen
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if new and not name.startswith("."):
                if suffix in SUFFIXES:
                    found.append(os.path.join(here, name))
                else:
                    others[suffix or "without a suffix"] += 1
    return sorted(found)


def split_images(root: str | Path, val_rate: float, seed: int) -> tuple[Images, Images]:
    """Split into a training and a validation part, {class: paths} each; nothing is written.

    `root` holds either one folder per class, of which `int(n * val_rate)` images a class go to
    validation, drawn from the seed; or `train/` and `val/` (or `valid/`, `validation/`, `test/`),
    taken as they are. Images that are the same to the byte stay together: where the draw parts
    them, all of them go to training. UsageError for a class without images on one side.
    """
    if not 0 < val_rate < 1:
        raise UsageError(f"val_rate is {val_rate}, must be between 0 and 1")
    folders = _train_and_val(Path(root))
    if folders:
        train, val = (find_images(folder) for folder in folders)
        _notice_shared(train, val)
    else:
        train, val = _draw(find_images(root), val_rate, seed)
    if len(train) < 2:
        deeper = Path(root, *train)
        raise UsageError(f"name {deeper} if the classes lie in it: {root} has no other class")
    for name in sorted(train.keys() | val.keys()):
        counts = [len(side.get(name, [])) for side in (train, val)]
        if 0 in counts:
            side = ("training", "validation")[counts.index(0)]
            rate = "" if folders else f", or change --val-rate (now {val_rate})"
            has = f"class {name} has no image for {side}, of {sum(counts)} in all"
            raise UsageError(f"{root}: {has}; add images{rate}")
    return train, val


def images_of(root: str | Path, split: str, val_rate: float, seed: int) -> Images:
    """The "train" or "val" part of `split_images`, or with "all" every image below `root`."""
    if split != "all":
        return split_images(root, val_rate, seed)[split == "val"]
    parts = [find_images(folder) for folder in _train_and_val(Path(root)) or [root]]
    names = sorted(set().union(*parts))
    return {name: [path for part in parts for path in part.get(name, [])] for name in names}


def _train_and_val(root: Path) -> tuple[Path, Path] | None:
    """The folders train/ and val/ of a root; None where its folders are classes, of which one may
    be called "train": then images, not folders, lie in it."""
    names = ("train", "val", "valid", "validation", "test")
    sides = [root / name for name in names if _has_folders(root / name)]
    if not sides or sides[0].name != "train":
        return None
    if len(sides) == 1:
        raise UsageError(f"{root}: holds train/ but no val/ or test/ beside it; make one")
    if len(sides) > 2:
        others = ", ".join(f"{side.name}/" for side in sides[2:])
        notice(f"{root}: validation is {sides[1].name}/; {others} is not used")
    return sides[0], sides[1]


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(
        entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(path)
    )


def _draw(images: Images, val_rate: float, seed: int) -> tuple[Images, Images]:
    generator = random.Random(seed)  # one for all classes: the tutorial's split at seed 0
    drawn = set()
    for paths in images.values():
        drawn.update(generator.sample(paths, int(len(paths) * val_rate)))
    class_of = {path: name for name, paths in images.items() for path in paths}
    groups = _same_bytes(list(class_of))
    if groups:
        notice(f"images that are there more than once, kept on one side: {len(groups)}")
    conflicts = [same for same in groups if len({class_of[path] for path in same}) > 1]
    if conflicts:
        first = ", ".join(conflicts[0])
        notice(f"THE SAME IMAGE IN TWO CLASSES: {len(conflicts)}; the first: {first}")
    for same in groups:
        if not drawn.issuperset(same):
            drawn.difference_update(same)
    train = {name: [p for p in paths if p not in drawn] for name, paths in images.items()}
    val = {name: [p for p in paths if p in drawn] for name, paths in images.items()}
    return train, val


def _notice_shared(train: Images, val: Images) -> None:
    """Say which validation images are training images too, to the byte."""
    known, others = ({p for paths in side.values() for p in paths} for side in (train, val))
    shared = [p for p in _same_bytes([*known, *others]) if known & set(p) and others & set(p)]
    if shared:
        first = ", ".join(shared[0])
        notice(f"images on both sides, which flatters accuracy: {len(shared)}; the first: {first}")


def _same_bytes(paths: list[str]) -> list[list[str]]:
    """Groups of two or more files with equal content, sorted."""
    groups = [paths]
    # Few files share a size, so hardly any is read.
    for key in (os.path.getsize, lambda path: hashlib.sha256(Path(path).read_bytes()).digest()):
        by_key = defaultdict(list)
        for number, group in enumerate(groups):
            for path in group:
                with suppress(OSError):  # reading it as an image will say so
                    by_key[number, key(path)].append(path)
        groups = [group for group in by_key.values() if len(group) > 1]
    return sorted(sorted(group) for group in groups)


def with_labels(images: Images, classes: list[str]) -> tuple[list[str], list[int]]:
    """{class: paths} to paths and, for each, the index of its class in `classes`."""
    index = {name: i for i, name in enumerate(classes)}
    paths = [path for found in images.values() for path in found]
    return paths, [index[name] for name, found in images.items() for _ in found]


class BadImages:
    """Images that cannot be read, of `total`: named once each, skipped while they are few."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen: set[str] = set()

    def add(self, error: ImageError) -> None:
        """Note one; raises RunError when they are no longer few."""
        if str(error) not in self.seen:
            self.seen.add(str(error))
            notice(f"skipped: {error}")
        if len(self.seen) > max(1, MOST_BAD * self.total):
            counts = f"{len(self.seen)} of {self.total} images cannot be read"
            raise RunError(f"check the disk, or the copy: {counts}, more than {MOST_BAD:.0%}")

"""A folder of images: its classes, and their split into training and validation.

ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE
"""

import hashlib
import os
import random
from collections import Counter
from pathlib import Path

from shufflenet.common.messages import RunError, UsageError, notice, progress
from shufflenet.reading.image import SUFFIXES, ImageError

MOST_BAD = 0.1  # share of the images that may be skipped before the disk must be damaged

Images = dict[str, list[str]]  # class name -> paths


def find_images(root: str | Path) -> Images:
    """List the images of every class, {class name: sorted paths} in sorted order of the names.

    Images may lie deeper. Hidden files and folders are skipped; with a notice, folders without an
    image, images outside the class folders, and other files. UsageError if no folder holds an
    image, OSError if one cannot be listed.
    """
    images, skipped, loose = {}, Counter(), 0
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in progress(entries, f"listing {root}"):
        if not entry.is_dir():
            loose += os.path.splitext(entry.name)[1].lower() in SUFFIXES
        elif not entry.name.startswith("."):
            if found := images_below(entry.path, skipped):
                images[entry.name] = found
            else:
                notice(f"skipped {entry.path}: no image in it")
    if loose:
        skipped["images in no class folder"] = loose
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        notice(f"skipped in {root}: {kinds}")
    if not images:
        layout = f"expected {root}/CLASS/IMAGE with a suffix of {' '.join(sorted(SUFFIXES))}"
        hint = f"; is the folder above it meant, {Path(root).absolute().parent}?" if loose else ""
        raise UsageError(f"{root} holds no class folders with images: {layout}{hint}")
    if all(os.path.dirname(paths[0]) != os.path.join(root, name) for name, paths in images.items()):
        deeper = Path(root, next(iter(images)))
        notice(
            f"{root} holds folders of folders: if each is a data set, name one, such as {deeper}"
        )
    return images


def images_below(folder: str, others: Counter) -> list[str]:
    """Images in a folder and in those below it; `others` counts files with other suffixes."""

    def stop(error: OSError) -> None:
        raise error

    found = []
    for here, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                found.append(os.path.join(here, name))
            elif not name.startswith("."):
                others[suffix or "without a suffix"] += 1
    return sorted(found)


def find_parts(root: str | Path) -> list[Images]:
    """The images of `train/` and of `val/` (or `valid/`, `validation/`, `test/`) where a root has
    these; else those of its class folders, as the only part."""
    parts = []
    folders = {path.name.lower(): path for path in Path(root).iterdir()}
    for name in ("train", "val", "valid", "validation", "test"):
        # Where images, not folders, lie in it, it is a class of that name.
        if name in folders and any(path.is_dir() for path in folders[name].glob("[!.]*")):
            parts.append(folders[name])
    if not parts or parts[0].name.lower() != "train":
        return [find_images(root)]
    if len(parts) == 1:
        todo = f"make a val/ of class folders beside it, or name {parts[0]} to draw a part of it"
        raise UsageError(f"{root} holds train/ alone: {todo}")
    if parts[1].name.lower() == "test":
        notice(f"{root} holds no val/: test/ is taken for validation")
    return [find_images(part) for part in parts[:2]]


def all_images(parts: list[Images]) -> Images:
    """The parts of a data set as one."""
    names = sorted(set().union(*parts))
    return {name: [path for part in parts for path in part.get(name, [])] for name in names}


def fingerprint(parts: list[Images]) -> str:
    """A hash of the names of classes and images: the same wherever the data set lies."""
    names = [
        (number, name, sorted(map(os.path.basename, paths)))
        for number, part in enumerate(parts)
        for name, paths in part.items()
    ]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]


def split_images(parts: list[Images], val_rate: float, seed: int) -> tuple[Images, Images]:
    """Training and validation images of `find_parts`: `train/` and `val/` as they are; of one
    folder per class `int(n * val_rate)` images a class go to validation, drawn from the seed."""
    if len(parts) == 2:
        return parts[0], parts[1]
    generator = random.Random(seed)  # one for all classes: the tutorial's split at seed 0
    drawn = set()
    for paths in parts[0].values():
        drawn.update(generator.sample(paths, int(len(paths) * val_rate)))
    train = {name: [p for p in paths if p not in drawn] for name, paths in parts[0].items()}
    val = {name: [p for p in paths if p in drawn] for name, paths in parts[0].items()}
    return train, val


def require_classes(train: Images, val: Images, root: str | Path) -> None:
    """Raise UsageError unless there are two classes, and images of each on both sides."""
    if len(train) < 2:
        deeper = Path(root, *train)
        raise UsageError(f"{root} has only one class; name {deeper} if the classes lie in it")
    for name in sorted(train.keys() | val.keys()):
        counts = [len(images.get(name, [])) for images in (train, val)]
        if 0 in counts:
            purpose = ("training", "validation")[counts.index(0)]
            has = f"class {name} has no image for {purpose}, of {sum(counts)} in all"
            raise UsageError(f"{root}: {has}; add images, or change --val-rate")


def with_labels(images: Images, classes: list[str]) -> tuple[list[str], list[int]]:
    """{class: paths} to paths and, for each, the index of its class in `classes`."""
    index = {name: i for i, name in enumerate(classes)}
    paths = [path for found in images.values() for path in found]
    return paths, [index[name] for name, found in images.items() for _ in found]


def refuse_unknown(images: Images, classes: list[str], root: str | Path) -> None:
    """Raise UsageError if there is a class that the network does not know."""
    if unknown := sorted(images.keys() - set(classes)):
        raise UsageError(
            f"{root}: the network knows no class {unknown[0]}; rename or remove that folder"
        )


class BadImages:
    """The unreadable ones of `total` images: each is named once; they are skipped while few."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen: set[str] = set()

    def add(self, error: ImageError) -> None:
        """Note one; raises RunError when they are no longer few."""
        if error.path not in self.seen:
            notice(f"skipped: {error}", everywhere=True)
        self.note([error.path])

    def note(self, paths: list[str]) -> None:
        """Note those that another process, or an earlier run, has tried to read."""
        self.seen.update(paths)
        if len(self.seen) > max(1, MOST_BAD * self.total):
            counts = f"{len(self.seen)} of {self.total} images cannot be read"
            raise RunError(f"{counts}, more than {MOST_BAD:.0%}: check the disk, or the copy")

"""A folder of pictures: its classes, and their split into training and validation.

    ROOT/CLASS/PICTURE, or ROOT/train/CLASS/PICTURE and ROOT/val/CLASS/PICTURE

Standard library only, but for the list of suffixes: an exported network is measured without torch.
"""

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from cli import FLOWER_PHOTOS, SAMPLE, RunError, UsageError, notice
from image import SUFFIXES, ImageError, check_header

MOST_NOTICES = 5  # of duplicates, one by one
MOST_BAD = 0.1  # share of the pictures that may be passed over before it is a failure of the disk

Pictures = dict[str, list[str]]  # class name -> paths


def prepare_data(data_path: str) -> str:
    """The folder that a --data-path means: "sample" is drawn, flower_photos downloaded."""
    if data_path == SAMPLE:
        from sample_flowers import draw_sample_flowers

        return str(draw_sample_flowers("data/sample"))
    if data_path == FLOWER_PHOTOS:
        from flower_photos import download_flower_photos

        return str(download_flower_photos(FLOWER_PHOTOS))
    return data_path


def find_pictures(root: str | Path) -> Pictures:
    """List the pictures of every class.

    Passed over with a notice: hidden folders, folders without a picture, pictures outside the
    class folders, files that are no pictures by their suffix. Passed over: hidden files. Pictures
    may lie in folders below the class folder; links are followed, each folder once.

    Returns:
        {class name: sorted paths}, in sorted order of the names.

    Raises:
        UsageError: no folder of `root` holds a picture.
        OSError: a folder cannot be listed.
    """
    pictures, others, loose = {}, Counter(), 0
    for name in sorted(os.listdir(root)):
        folder = os.path.join(root, name)
        if not os.path.isdir(folder):
            loose += os.path.splitext(name)[1].lower() in SUFFIXES
            continue
        if name.startswith("."):
            notice(f"skipped {folder}: a hidden folder")
        elif found := pictures_below(folder, others):
            pictures[name] = found
        else:
            notice(f"skipped {folder}: no picture in it")
    if loose:
        notice(f"skipped pictures of {root} that lie in no class folder: {loose}")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notice(f"skipped files that are no pictures by their suffix: {kinds}")
    if not pictures:
        raise UsageError(
            f"{root}: no class folders with pictures in it; expected {root}/CLASS/PICTURE with a "
            f"suffix of {' '.join(sorted(SUFFIXES))}"
        )
    return pictures


def pictures_below(folder: str, others: Counter) -> list[str]:
    """Pictures in a folder and in those below it; `others` counts the remaining suffixes."""

    def stop(error: OSError) -> None:
        raise error

    # Folders seen are not entered again, nor are those above: a link may point back up.
    above = {*Path(os.path.abspath(folder)).parents, *Path(folder).resolve().parents}
    found, seen = [], {_identity(parent) for parent in above} - {_identity(folder)}
    for here, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        if _identity(here) in seen:
            folders.clear()
            continue
        seen.add(_identity(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                place = os.path.join(here, name)
                if os.path.isfile(place):
                    found.append(place)
                else:
                    others["links that lead nowhere, pipes and the like"] += 1
            else:
                others[suffix or "without a suffix"] += 1
    return sorted(found)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def split_pictures(root: str | Path, val_rate: float, seed: int) -> tuple[Pictures, Pictures]:
    """Split into a training and a validation part, {class: paths} each.

    `root` holds either one folder per class, of which `int(n * val_rate)` pictures a class go to
    validation, drawn from the seed; or `train/` and `val/` (or `valid/`, `validation/`, `test/`),
    taken as they are.
    Pictures that are the same to the byte stay together: where the draw parts them, all of them
    go to training. Nothing is written.

    Raises:
        UsageError: no pictures, a single class, or a class without pictures on one side.
    """
    if not 0 < val_rate < 1:
        raise UsageError(f"val_rate is {val_rate}, must be between 0 and 1")
    folders = _train_and_val_folders(Path(root))
    if folders:
        train, val = (find_pictures(folder) for folder in folders)
        _notice_shared(train, val)
    else:
        train, val = _draw(find_pictures(root), val_rate, seed)

    if len(train) < 2:
        raise UsageError(f"{root}: the only class is {', '.join(train)}; there must be two or more")
    for name in sorted(train.keys() | val.keys()):
        for side, pictures in (("training", train), ("validation", val)):
            if not pictures.get(name):
                count = len(train.get(name, [])) + len(val.get(name, []))
                raise UsageError(
                    f"{root}: class {name} has no picture for {side}, of {count} in all; add "
                    f"pictures{'' if folders else f', or change --val-rate (now {val_rate})'}"
                )
    return train, val


def pictures_of(root: str | Path, split: str, val_rate: float, seed: int) -> Pictures:
    """The "train" or "val" part of `split_pictures`, or with "all" every picture below `root`."""
    if split != "all":
        return split_pictures(root, val_rate, seed)[split == "val"]
    parts = [find_pictures(folder) for folder in _train_and_val_folders(Path(root)) or [root]]
    return {
        name: [path for part in parts for path in part.get(name, [])]
        for name in sorted(set().union(*parts))
    }


def _train_and_val_folders(root: Path) -> tuple[Path, Path] | None:
    # A class may be called "train": then pictures, not folders, lie in it.
    sides = {child.name.lower(): child for child in sorted(root.iterdir()) if _has_folders(child)}
    others = [name for name in ("val", "valid", "validation", "test") if name in sides]
    if "train" not in sides:
        return None
    if not others:
        if sum(child.is_dir() and child.name[0] != "." for child in root.iterdir()) > 1:
            return None
        raise UsageError(f"{root}: holds {sides['train'].name}/ but no val/ or test/ beside it")
    if len(others) > 1:
        notice(f"{root}: validation is {others[0]}/; {', '.join(others[1:])}/ is not used")
    return sides["train"], sides[others[0]]


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(
        child.is_dir() and not child.name.startswith(".") for child in path.iterdir()
    )


def _draw(pictures: Pictures, val_rate: float, seed: int) -> tuple[Pictures, Pictures]:
    generator = random.Random(seed)  # one for all classes: the tutorial's split at seed 0
    drawn = {
        path
        for paths in pictures.values()
        for path in generator.sample(paths, int(len(paths) * val_rate))
    }
    class_of = {path: name for name, paths in pictures.items() for path in paths}
    groups = _same_bytes(list(class_of))
    for same in groups[:MOST_NOTICES]:
        classes = {class_of[path] for path in same}
        where = "in one class" if len(classes) == 1 else f"IN {len(classes)} CLASSES"
        notice(f"the same picture {len(same)} times {where}, kept together: {', '.join(same)}")
    if len(groups) > MOST_NOTICES:
        notice(f"{len(groups)} pictures in all stand there more than once")
    for same in groups:
        if not drawn.issuperset(same):
            drawn.difference_update(same)
    train = {name: [p for p in paths if p not in drawn] for name, paths in pictures.items()}
    val = {name: [p for p in paths if p in drawn] for name, paths in pictures.items()}
    return train, val


def _notice_shared(train: Pictures, val: Pictures) -> None:
    """Say which validation pictures are training pictures too, to the byte."""
    known = {path for paths in train.values() for path in paths}
    others = {path for paths in val.values() for path in paths}
    shared = [p for p in _same_bytes([*known, *others]) if known & set(p) and others & set(p)]
    if shared:
        notice(
            f"pictures that are both in training and in validation, which flatters the accuracy: "
            f"{len(shared)}; the first: {', '.join(shared[0])}"
        )


def _same_bytes(paths: list[str]) -> list[list[str]]:
    """Groups of two or more files with equal content, sorted.

    Few files share a size, fewer their first bytes, so hardly any is read whole.
    """
    groups = [paths]
    for key in (_size, _start, _digest):
        parts = []
        for group in groups:
            by_key = defaultdict(list)
            for path in group:
                with suppress(OSError):  # gone meanwhile: reading it will say so
                    by_key[key(path)].append(path)
            parts += [part for part in by_key.values() if len(part) > 1]
        groups = parts
    return sorted(sorted(group) for group in groups)


def _size(path: str) -> int:
    return os.stat(path).st_size


def _start(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def fingerprint(root: str | Path, paths: list[str]) -> str:
    """Changes with the order, names and sizes of the pictures, not with the place of the folder."""
    digest = hashlib.sha256()
    place = cache(lambda folder: os.path.relpath(folder, root))
    for path in paths:
        folder, name = os.path.split(path)
        with suppress(OSError):  # gone meanwhile
            digest.update(os.fsencode(f"{place(folder)}/{name}\0{_size(path)}\0"))
    return digest.hexdigest()


def with_labels(pictures: Pictures, classes: list[str]) -> tuple[list[str], list[int]]:
    """{class: paths} to paths and, for each, the index of its class in `classes`."""
    index = {name: i for i, name in enumerate(classes)}
    paths = [path for found in pictures.values() for path in found]
    labels = [index[name] for name, found in pictures.items() for _ in found]
    return paths, labels


class BadPictures:
    """Pictures that cannot be read: named once each, passed over while they are few.

    Args:
        total: how many pictures there are, good and bad.
        skip: False makes the first one an error.
    """

    def __init__(self, total: int, skip: bool) -> None:
        self.total = total
        self.skip = skip
        self.seen: set[str] = set()

    def add(self, error: ImageError) -> None:
        """Note one.

        Raises:
            ImageError: none may be passed over.
            RunError: they are no longer few.
        """
        if not self.skip:
            raise error
        if str(error) not in self.seen:
            self.seen.add(str(error))
            notice(f"skipped: {error}")
        if len(self.seen) > max(1, MOST_BAD * self.total):
            raise RunError(
                f"{len(self.seen)} of {self.total} pictures cannot be read, more than "
                f"{MOST_BAD:.0%}: is the disk or the copy damaged?"
            )

    def scan(self, paths: Sequence[str], labels: Sequence[int]) -> tuple[list[str], list[int]]:
        """Look at the first bytes of every picture; returns those that can be read, so far."""

        def look(path: str) -> ImageError | None:
            try:
                return check_header(path)
            except ImageError as error:
                return error

        kept = []
        with ThreadPoolExecutor() as pool:
            for pair, error in zip(
                zip(paths, labels, strict=True), pool.map(look, paths), strict=True
            ):
                if error:
                    self.add(error)
                else:
                    kept.append(pair)
        return [path for path, _ in kept], [label for _, label in kept]

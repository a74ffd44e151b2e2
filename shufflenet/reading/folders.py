"""A folder of images: its classes, its parts, and their split into training and validation.

ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE
"""

import difflib
import hashlib
import itertools
import os
import random
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

from shufflenet.common.messages import RunError, UsageError, listed, notice, progress
from shufflenet.reading.image import SUFFIXES, ImageError

MOST_BAD = 0.1  # share of the images that may be skipped before something must be wrong
MOST_HASHES = 100_000  # of the images that a network was trained on
# What people call the parts of a data set, beside numbers and words such as "set".
PART_NAMES = {
    "train": ("train", "training", "训练"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation", "验证"),
    "test": ("test", "testing", "测试"),
}
# What systems leave in folders: hidden files, thumbnails, recycle bins.
SYSTEM = re.compile(
    r"\.|@_*[a-z]|#recycle|#snapshot|\$recycle|recycler$|__macosx$|__pycache__$|lost\+found$"
    r"|found\.\d|system volume information$|network trash folder$|temporary items$"
    r"|thumbs\.db$|ehthumbs|desktop\.ini$|icon\r",
    re.IGNORECASE,
)

Images = dict[str, list[str]]  # class name -> paths
Part = tuple[list[str], list[int]]  # paths, and the index of the class of each
Parts = dict[str, Images]  # "train", "val", "test"; or "all" of a root that is not divided


def find_images(root: str | Path) -> Images:
    """List the images of every class, {class name: sorted paths} in sorted order of the names.

    Images may lie deeper, also behind links. With a notice are skipped what systems leave in
    folders, folders without an image, images outside the class folders, and other files.
    UsageError if no folder holds an image, or each holds folders of the same names; OSError if one
    cannot be listed.
    """
    images, skipped, loose = {}, Counter(), 0
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in progress(entries, f"listing {root}"):
        if not os.path.isdir(entry.path):  # entry.is_dir raises for a link to itself
            loose += os.path.splitext(entry.name)[1].lower() in SUFFIXES
        elif SYSTEM.match(entry.name):
            skipped["of the system"] += 1
        elif found := images_below(entry.path, skipped):
            name = nfc(entry.name)
            images[name] = sorted(images.get(name, []) + found, key=_posix)
        else:
            notice(f"skipped {entry.path}: no image in it")
    if loose:
        skipped["images in no class folder"] = loose
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        notice(f"skipped in {root}: {kinds}")
    if not images:
        layout = f"expected {root}/CLASS/IMAGE, images by their suffix, such as .jpg"
        hint = f"; is the folder above it meant, {Path(root).absolute().parent}?" if loose else ""
        raise UsageError(f"{root} holds no class folders with images: {layout}{hint}")
    _look_deeper(root, images)
    return dict(sorted(images.items()))


def _look_deeper(root: str | Path, images: Images) -> None:
    """Where no class folder holds an image itself: UsageError if all hold folders of the same
    names, as parts do that find_parts does not know; else a notice."""
    below = []  # of each class, the names of the folders that its images lie in; "" for none
    for paths in images.values():
        folders = {os.path.dirname(path) for path in paths}
        places = [_posix(os.path.relpath(folder, root)) for folder in folders]
        below.append({place.partition("/")[2].partition("/")[0] for place in places})
    for names in below:
        parts = [name for name in sorted(names) if _part_of(name)[0]]
        if len({_part_of(name) for name in parts}) > 1:
            todo = "put train/ and val/ above the classes"
            raise UsageError(f"{root}: classes hold parts, {listed(parts)}: {todo}")
    if any("" in names for names in below):
        return
    first, *others = images
    alike = others and all(names == below[0] for names in below)
    if alike and len(below[0]) == 1:  # such as CLASS/images of tiny-imagenet
        return
    if alike:
        found = f"{listed(list(images))} hold the same folders, {listed(sorted(below[0]))}"
        todo = "call parts train/ and val/; put images of a class directly into its folder"
        raise UsageError(f"{root}: {found}: {todo}")
    todo = f"if each is a data set, name one, such as {Path(root, first)}"
    notice(f"{root} holds folders of folders: {todo}")


def images_below(folder: str, others: Counter) -> list[str]:
    """Images in a folder and in those below it, links included; `others` counts what is skipped."""

    def stop(error: OSError) -> None:
        raise error

    found, top = [], Path(os.path.realpath(folder))
    seen = {str(top), *map(str, top.parents)}  # a link to one of them would lead round in circles
    for here, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        entered = []
        # Links last: which of two ways to a folder is taken depends on names alone.
        for name in sorted(folders, key=lambda n: (os.path.islink(os.path.join(here, n)), n)):
            real = os.path.realpath(os.path.join(here, name))
            if SYSTEM.match(name):
                others["of the system"] += 1
            elif real in seen:
                others["links to a folder that is searched anyway"] += 1
            else:
                entered.append(name)
                seen.add(real)
        folders[:] = entered
        found += [os.path.join(here, name) for name in files if is_image(name, others)]
    return sorted(found, key=_posix)


def is_image(path: str, others: Counter) -> bool:
    """Whether a file is an image by its suffix; else it is counted among the `others`."""
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    if SYSTEM.match(name):
        others["of the system"] += 1
    elif suffix not in SUFFIXES:
        others[suffix or "without a suffix"] += 1
    return suffix in SUFFIXES and not SYSTEM.match(name)


def _posix(path: str) -> str:
    return path.replace(os.sep, "/")  # the same order under Windows


def nfc(name: str) -> str:
    """A name in the form of Unicode in which all are compared: macOS takes letters apart."""
    return unicodedata.normalize("NFC", name)


def find_parts(root: str | Path) -> Parts:
    """The images of `train/`, `val/` and `test/`, or what people call them, where a root has these;
    else those of its class folders, as one part called "all".

    Parts are the only folders of the root, or training and one more; else they are classes of such
    a name. What lies beside parts is named. UsageError if there are two of a kind, or images in
    them that no class folder holds.
    """
    groups, others = {}, []  # by the words beside that of the part: "seg_train", "seg_test"
    for folder in _folders_in(Path(root)):
        part, *beside = _part_of(folder.name)
        if part:
            groups.setdefault(tuple(beside), {}).setdefault(part, []).append(folder)
        else:
            others.append(folder.name)
    whole = [group for group in groups.values() if "train" in group and len(group) > 1]
    if not others and not whole and len(groups) == 1:
        whole = [*groups.values()]
    if not whole:
        return {"all": find_images(root)}
    named = whole[0]
    if others:
        notice(f"skipped beside the parts of {root}: {listed(others)}")
    parts = {}
    for part in sorted(named, key=[*PART_NAMES].index):
        folder, *more = named[part]
        if more:
            raise UsageError(f"{folder} and {more[0]} are both named as {part}: rename or move one")
        while len(inner := _folders_in(folder)) == 1 and _part_of(inner[0].name)[0] == part:
            (folder,) = inner  # as archives are unpacked
        spare = part == "test" and parts.keys() == {"train", "val"}
        if _folders_in(folder):
            try:
                parts[part] = find_images(folder)
            except UsageError as error:
                if not spare:
                    raise
                notice(f"skipped: {error}")
            continue
        flat = f"{folder} holds {len(images_below(folder, Counter()))} images in no class folder"
        if not spare:
            todo = f"sort them as {folder}/CLASS/IMAGE"
            todo += f", or name {named['train'][0]} to draw validation from it" * ("train" in parts)
            raise UsageError(f"{flat}: {todo}")
        notice(f"skipped: {flat}")
    if "test" in parts and "val" not in parts and "train" in parts:
        notice(f"{root} holds no val/: test/ is taken for validation")
        parts["val"] = parts["test"]
    return parts


def _folders_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not SYSTEM.match(p.name))


def _part_of(name: str) -> tuple[str | None, ...]:
    """What part of a data set a folder is by its name, such as "Train", "val2017", "Testing Set",
    and the words beside that; (None,) if it is none."""
    words = [
        re.sub("(set|data|images|集)$", "", word) for word in re.split(r"[\W\d_]+", name.lower())
    ]
    for part, names in PART_NAMES.items():
        if any(word in names for word in words):
            return part, *(word for word in words if word and word not in names)
    return (None,)


def all_images(parts: Parts) -> Images:
    """The parts of a data set as one."""
    names = sorted(set().union(*parts.values()))
    return {
        name: list(dict.fromkeys(path for part in parts.values() for path in part.get(name, [])))
        for name in names
    }


def fingerprint(parts: Parts, root: str | Path) -> str:
    """A hash of the places of images in a root, and of their sizes: the same wherever it lies."""
    folders, places = {}, []
    for part, images in parts.items():
        for path in itertools.chain(*images.values()):
            folder, name = os.path.split(path)
            if folder not in folders:
                folders[folder] = _posix(os.path.relpath(folder, root))
            places.append((part, nfc(folders[folder]), nfc(name), _size(path)))
    return hashlib.sha256(repr(sorted(places)).encode()).hexdigest()[:16]


def image_hashes(paths: list[str]) -> list[int]:
    """64 bits of the name and the size of each image, sorted, of `MOST_HASHES` at most: by them a
    network's training images are known wherever they lie."""
    hashes = set()
    for path in paths:
        about = f"{nfc(os.path.basename(path))} {_size(path)}"
        hashes.add(int.from_bytes(hashlib.blake2b(os.fsencode(about), digest_size=8).digest()))
    return sorted(hashes)[:MOST_HASHES]


def _size(path: str) -> int:
    with suppress(OSError):  # gone, or a link to nothing: reading it will say so
        return os.path.getsize(path)
    return 0


def split_images(parts: Parts, val_rate: float, seed: int) -> Parts:
    """The parts of `find_parts` as they are; of one folder per class `int(n * val_rate)` images a
    class, but at least one of two, go to "val", drawn from the seed, and the others to "train"."""
    if "all" not in parts:
        return parts
    generator = random.Random(seed)  # one for all classes: the tutorial's split at seed 0
    train, val = {}, {}
    for name, paths in parts["all"].items():
        drawn = set(generator.sample(paths, int(len(paths) * val_rate)))
        if not drawn and len(paths) > 1:  # of a small class; the others' draws stay
            drawn = {random.Random(seed).choice(paths)}
        train[name] = [path for path in paths if path not in drawn]
        if drawn:
            val[name] = [path for path in paths if path in drawn]
    return {"train": train, "val": val}


def require_classes(parts: Parts, root: str | Path) -> tuple[Images, Images]:
    """The images to train and to validate on; UsageError unless there are two classes, and images
    of each to train on. Classes that are too small to be validated are named."""
    if missing := {"train", "val"} - parts.keys():
        found = " and ".join(f"{part}/" for part in parts)
        todo = f"add {min(missing)}/ with class folders, or name a folder of class folders"
        raise UsageError(f"{root} holds {found} alone: {todo}")
    train, val = parts["train"], parts["val"]
    if len(train) < 2:
        ((name, paths),) = train.items()
        deeper = os.path.dirname(os.path.dirname(paths[0]))
        if _part_of(os.path.basename(deeper))[0]:
            deeper = os.path.dirname(deeper)
        todo = "--data-path names the folder above the class folders"
        if os.path.basename(deeper) and not os.path.samefile(deeper, root):
            todo += f", perhaps {deeper}"
        raise UsageError(f"{root} has only one class, {name}; {todo}")
    if not val:
        raise UsageError(f"{root}: no class has two images, so none is left to validate; add some")
    refuse_unknown(val, list(train), f"{root}, validation")
    if missing := train.keys() - val.keys():
        notice(f"no image to validate: {listed(sorted(missing))}")
    sizes = sorted(map(len, train.values()))
    single = sum(len(paths) == 1 for paths in val.values())
    if sizes[-1] >= 5 * sizes[0] or 2 * single > len(val):
        range_ = f"classes have {sizes[0]} to {sizes[-1]} images to train"
        notice(f"{range_}, and {single} only one to validate: accuracy says little of small ones")
    return train, val


def with_labels(images: Images, classes: list[str]) -> Part:
    """{class: paths} to paths and, for each, the index of its class in `classes`."""
    index = {name: i for i, name in enumerate(classes)}
    paths = [path for found in images.values() for path in found]
    return paths, [index[name] for name, found in images.items() for _ in found]


def refuse_unknown(images: Images, classes: list[str], where: str) -> None:
    """Raise UsageError if there are classes that are not among those known; all are named, with
    their images and the known class that they may mean."""
    unknown = sorted(images.keys() - set(classes))
    if not unknown:
        return
    letters = {_letters(name): name for name in classes}
    for number, name in enumerate(unknown):
        # Each is compared with all classes, which takes time.
        alike = number < 20 and difflib.get_close_matches(_letters(name), letters, 1, 0.75)
        looks = f"; it looks like {letters[alike[0]]}" if alike else ""
        notice(f"unknown class {name}, {len(images[name])} images{looks}")
    cause = "rename or remove these folders"
    if len(images) == 1 and len(classes) > 1 and not alike:
        cause = "its images are not sorted into a folder per class"
    counts = f"{len(unknown)} of {len(images)} classes are unknown, {listed(unknown)}"
    raise UsageError(f"{where}: {counts}: {cause}")


def _letters(name: str) -> str:
    """What is left of a name without case, accents, spaces and signs."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", name).casefold()))


WORDNET = re.compile(r"n\d{8}")  # the name of a class folder of ImageNet


def names_of_folders(images: Images, classes: list[str]) -> list[str]:
    """The classes of a network as the folders call them: those of ImageNet, which are in the order
    of its classes, have WordNet's names."""
    imagenet = len(images) == len(classes) == 1000 and all(map(WORDNET.fullmatch, images))
    return list(images) if imagenet else classes


class BadImages:
    """The unreadable ones of `total` images: each is named once; they are skipped while few."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen: set[str] = set()
        self.reasons: Counter = Counter()

    def add(self, error: ImageError) -> None:
        """Note one; raises RunError when they are no longer few, with the reasons."""
        if error.path not in self.seen:
            notice(f"skipped: {error}", everywhere=True)
            self.reasons[error.reason] += 1
        self.note([error.path])

    def note(self, paths: list[str]) -> None:
        """Note those that another process has tried to read."""
        self.seen.update(paths)
        if len(self.seen) > max(1, MOST_BAD * self.total):
            for reason, count in self.reasons.most_common():
                notice(f"{count} images: {reason}", everywhere=True)
            most = "".join(f"; most often: {r}" for r, _ in self.reasons.most_common(1))
            counts = f"{len(self.seen)} of {self.total} images cannot be read"
            raise RunError(f"{counts}, more than {MOST_BAD:.0%}{most}")

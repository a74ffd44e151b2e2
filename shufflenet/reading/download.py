"""Data sets that are downloaded where they are absent.

A data set of your own is a function that fills a folder, and a line of `DATASETS`. The folder lies
in a scratch folder, and that in the place where the data set will be.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from shufflenet.common.messages import RunError, UsageError, notice, progress

FLOWERS_URL = (
    "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
)
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"  # of 229 MB


def prepare_data(data_path: str) -> Path:
    """The folder that a --data-path means, downloaded if it is one of `DATASETS` and absent or
    empty. UsageError if it is no folder, or cannot be made."""
    require_data(data_path)
    target = Path(data_path)
    make = DATASETS.get(target.as_posix())
    if make and not _is_filled(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".", dir=target.parent)
        except OSError as error:
            todo = "name a folder of images with --data-path"
            raise UsageError(f"{target} cannot be made ({error.strerror}): {todo}") from None
        with scratch:
            # Half a data set never has its name.
            (folder := Path(scratch.name, target.name)).mkdir()
            make(folder)
            try:
                if target.exists():  # and is empty: Windows would not replace it
                    target.rmdir()
                os.rename(folder, target)
            except OSError:
                if not _is_filled(target):  # by another start, at the same time
                    raise
    return target


def _is_filled(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def require_data(data_path: str) -> None:
    """Raise UsageError unless the folder exists or is downloaded if absent."""
    if Path(data_path).as_posix() not in DATASETS and not os.path.isdir(data_path):
        raise UsageError(f"--data-path {data_path}: no such folder; name that of the images")


def download_flower_photos(folder: Path, url=FLOWERS_URL, sha256=FLOWERS_SHA256) -> None:
    """3,670 photographs of flowers in five classes, CC BY 2.0; LICENSE.txt in the archive credits
    each photographer. RunError for no connection or other bytes, with what to fetch by hand."""
    from torch.hub import download_url_to_file

    scratch, place = folder.parents[:2]
    archive = by_hand = place / f"{folder.name}.tgz"
    if not by_hand.exists():
        archive = scratch / by_hand.name
        notice(f"{place / folder.name} is not there: downloading {url} (229 MB)")
        try:
            download_url_to_file(url, str(archive), sha256)
        except Exception as error:  # no network, or other bytes
            raise _by_hand(url, by_hand, error) from None
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RunError(f"{archive}: its sha256 is {found}, not {sha256}; delete it, fetch it again")
    shutil.unpack_archive(archive, folder)
    (inner,) = (path for path in folder.iterdir() if path.is_dir())
    for path in [*inner.iterdir()]:
        path.rename(folder / path.name)
    inner.rmdir()


def download_cifar10(folder: Path) -> None:
    """60,000 images of 32x32 pixels in ten classes (Krizhevsky, "Learning Multiple Layers of
    Features from Tiny Images", 2009), downloaded and checked by torchvision, written as
    train/CLASS/00000.png and so on, and test/. RunError as for flower_photos."""
    from torchvision.datasets import CIFAR10

    scratch, place = folder.parents[:2]
    archive = place / CIFAR10.filename
    if archive.exists():
        shutil.copy(archive, scratch)
    notice(f"{place / folder.name} is not there: it is made of {archive}, from {CIFAR10.url}")
    try:
        with redirect_stdout(sys.stderr):  # only results belong on stdout
            CIFAR10(scratch, download=True)
    except Exception as error:  # no network, or other bytes
        raise _by_hand(CIFAR10.url, archive, error) from None
    for part in ("train", "test"):
        images = CIFAR10(scratch, train=part == "train")
        for name in images.classes:
            (folder / part / name).mkdir(parents=True)
        for number, (image, label) in enumerate(progress(images, f"writing {part}", len(images))):
            image.save(folder / part / images.classes[label] / f"{number:05d}.png")


def _by_hand(url: str, archive: Path, error: Exception) -> RunError:
    reason = getattr(error, "reason", error)
    todo = f"fetch it and put it at {archive}, or name another --data-path"
    return RunError(f"{url} cannot be had ({reason}): {todo}")


DATASETS = {  # --data-path, if it is absent -> what makes it
    "data/flower_photos": download_flower_photos,
    "data/cifar10": download_cifar10,
}

"""Data sets that are downloaded where they are absent.

A data set of your own is a function that fills a folder, and a line of `DATASETS`.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from shufflenet.common.messages import RunError, UsageError, notice, progress

FLOWERS_URL = (
    "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
)
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"  # of 229 MB


def prepare_data(data_path: str) -> Path:
    """The folder that a --data-path means, downloaded if it is one of `DATASETS` and absent or
    empty. UsageError if it is no folder."""
    require_data(data_path)
    target = Path(data_path)
    make = DATASETS.get(target.as_posix())
    if make and not (target.exists() and any(target.iterdir())):
        target.parent.mkdir(parents=True, exist_ok=True)
        make(target)
    return target


def require_data(data_path: str) -> None:
    """Raise UsageError unless the folder exists or is downloaded if absent."""
    if Path(data_path).as_posix() not in DATASETS and not os.path.isdir(data_path):
        raise UsageError(f"--data-path {data_path}: no such folder; name that of the images")


def download_flower_photos(target: Path, url=FLOWERS_URL, sha256=FLOWERS_SHA256) -> None:
    """3,670 photographs of flowers in five classes, CC BY 2.0; LICENSE.txt in the archive credits
    each photographer. RunError for no connection or other bytes, with what to fetch by hand."""
    from torch.hub import download_url_to_file

    archive = target.parent / f"{target.name}.tgz"
    if not archive.exists():
        notice(f"{target} is not there: downloading {url} (229 MB)")
        try:
            download_url_to_file(url, str(archive), sha256)
        except Exception as error:  # no network, or other bytes
            raise _by_hand(url, archive, error) from None
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RunError(f"{archive}: its sha256 is {found}, not {sha256}; delete it, fetch it again")
    with _becoming(target) as scratch:
        shutil.unpack_archive(archive, scratch)
        (folder,) = (path for path in scratch.iterdir() if path.is_dir())
        for path in [*folder.iterdir()]:
            path.rename(scratch / path.name)
        folder.rmdir()
    archive.unlink()


def download_cifar10(target: Path) -> None:
    """60,000 images of 32x32 pixels in ten classes (Krizhevsky, "Learning Multiple Layers of
    Features from Tiny Images", 2009), downloaded and checked by torchvision, written as
    train/CLASS/00000.png and so on, and test/. RunError as for flower_photos."""
    from torchvision.datasets import CIFAR10

    place = target.parent
    archive, unpacked = place / CIFAR10.filename, place / CIFAR10.base_folder
    keep = [path for path in (archive, unpacked) if path.exists()]  # are not ours
    notice(f"{target} is not there: it is made of {archive}, from {CIFAR10.url} (170 MB)")
    try:
        with redirect_stdout(sys.stderr):  # only results belong on stdout
            CIFAR10(place, download=True)
    except Exception as error:  # no network, or other bytes
        raise _by_hand(CIFAR10.url, archive, error) from None
    with _becoming(target) as scratch:
        for part in ("train", "test"):
            images = CIFAR10(place, train=part == "train")
            for name in images.classes:
                (scratch / part / name).mkdir(parents=True)
            numbered = enumerate(progress(images, f"writing {part}", len(images)))
            for number, (image, label) in numbered:
                image.save(scratch / part / images.classes[label] / f"{number:05d}.png")
    if unpacked not in keep:
        shutil.rmtree(unpacked)
    if archive not in keep:
        archive.unlink(missing_ok=True)


def _by_hand(url: str, archive: Path, error: Exception) -> RunError:
    reason = getattr(error, "reason", error)
    todo = f"fetch it and put it at {archive}, or name another --data-path"
    return RunError(f"{url} cannot be had ({reason}): {todo}")


@contextmanager
def _becoming(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends well: half a data set never has its
    name."""
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as scratch:
        (folder := Path(scratch, target.name)).mkdir()
        yield folder
        if target.exists():  # and is empty: Windows would not replace it
            target.rmdir()
        os.rename(folder, target)


DATASETS = {  # --data-path, if it is absent -> what makes it
    "data/flower_photos": download_flower_photos,
    "data/cifar10": download_cifar10,
}

"""CIFAR-10: 60,000 images of 32x32 pixels in ten classes (Krizhevsky, "Learning Multiple Layers of
Features from Tiny Images", 2009)."""

import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cli import RunError, notice, progress


def download_cifar10(target: str | Path) -> Path:
    """Download and check the archive by torchvision, and write its images as class folders:
    `target`/train/CLASS/00000.png and so on, and `target`/test.

    `target` appears only when all is written, and is left alone where it is not empty. RunError
    for no connection or other bytes; the message says what to fetch by hand.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        return target
    from torchvision.datasets import CIFAR10

    place = target.parent
    archive, unpacked = place / CIFAR10.filename, place / CIFAR10.base_folder
    keep = [path for path in (archive, unpacked) if path.exists()]  # are not ours
    notice(f"{target} is not there: it is made of {archive}, from {CIFAR10.url} (170 MB)")
    try:
        with redirect_stdout(sys.stderr):  # only results belong on stdout
            CIFAR10(place, download=True)
    except Exception as error:  # no network, or other bytes
        reason = getattr(error, "reason", error)
        raise RunError(
            f"fetch {CIFAR10.url} and put it at {archive}, or name another --data-path ({reason})"
        ) from None
    scratch = place / f".{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    for part in ("train", "test"):
        images = CIFAR10(place, train=part == "train")
        for name in images.classes:
            (scratch / part / name).mkdir(parents=True)
        for number, (image, label) in enumerate(progress(images, f"writing {part}", len(images))):
            image.save(scratch / part / images.classes[label] / f"{number:05d}.png")
    if target.exists():  # and is empty: Windows would not replace it
        target.rmdir()
    os.rename(scratch, target)
    if unpacked not in keep:
        shutil.rmtree(unpacked)
    if archive not in keep:
        archive.unlink(missing_ok=True)
    return target

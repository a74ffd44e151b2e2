"""Files that are there whole or not at all, and folders that one run has to itself."""

import csv
import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from shufflenet.common.messages import UsageError, json_text, notice

WINDOWS = os.name == "nt"
# Names of images and classes come from the file system, where they may be any bytes.
UTF8 = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextmanager
def replacing(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` in one step when the block ends well and all of it
    is on the disk; until then, and if it fails, `path` stays as it was."""
    path = Path(path).resolve()  # a link stays a link
    # Of machines that share a disk two may have a process of the same number.
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else UTF8)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """On Windows a file that another program has open cannot be replaced; scanners soon let go."""
    tries = 20 if WINDOWS else 1
    while True:
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            tries -= 1
            if not tries:
                raise
            time.sleep(0.1)


@contextmanager
def if_possible() -> Iterator[None]:
    """Go on without the file that the block writes: no run ends because a table is open."""
    try:
        yield
    except PermissionError as error:
        notice(f"{error.filename} stays as it was: {error.strerror}; close it where it is open")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself while the process lives; UsageError if another has it, or nothing
    can be written there."""
    try:
        lock = open(folder / ".lock", "a+b")  # noqa: SIM115
    except OSError as error:
        todo = "copy the run to a folder that can be written, or begin in another --output-dir"
        raise UsageError(f"{folder}: {error.strerror}; {todo}") from None
    with lock as file:
        try:
            if WINDOWS:
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                todo = "wait for it, or name another --output-dir"
                raise UsageError(f"a run writes to {folder}: {todo}") from None
            notice(f"{folder} cannot be locked ({error.strerror}): start no second run there")
        for left in folder.glob(".*.tmp"):  # by a run that was killed in a write
            left.unlink(missing_ok=True)
        yield


_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"<svg": "an SVG drawing",
    b"<?xml": "XML",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"pk\3\4": "a zip archive",
    b"rar!": "a rar archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x1a\x45\xdf\xa3": "a video",
    b"\0\0\1\xba": "a video",
    b"\x93numpy": "a NumPy array",
    b"\x89hdf": "an HDF5 file",
}


def kind_of(head: bytes) -> str:
    """What a file is that is not what was expected, by its first 512 bytes."""
    if not head.strip(b"\0"):
        return "empty" if not head else "a file of zeros, as of a copy that failed"
    if head[4:8] == b"ftyp":
        brands = head[8:40]
        if b"avif" in brands or b"avis" in brands:
            return "an AVIF image, which this Pillow cannot read or which is damaged"
        if re.search(b"hei[cxms]|hev[cx]|mif1|msf1", brands):
            return "a HEIC photograph; convert it to JPEG"
        return "a raw photograph; convert it to JPEG" if b"crx " in brands else "a video"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "a video"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if re.search(rb"<!doctype html|<html|<head", text):
        return "a web page"
    for beginning, kind in _BEGINNINGS.items():
        if text.startswith(beginning) or head.startswith(beginning):
            return kind
    control = sum(byte < 32 and byte not in b"\t\n\f\r" for byte in head)
    return "of an unknown kind, or damaged" if control else "text"


def save_json(value: object, path: str | Path) -> None:
    """Write indented JSON."""
    with replacing(path, "w") as file:
        file.write(json_text(value, indent=2) + "\n")


def save_rows(rows: list[dict], path: str | Path) -> None:
    """Write CSV with a header, a line per dict, whose keys may differ; no rows, an empty file."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        if rows:
            writer.writeheader()
        writer.writerows(rows)

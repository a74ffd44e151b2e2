"""The flower_photos data set: 3,670 photographs in five classes.

They are licensed CC BY 2.0; LICENSE.txt in the archive credits each photographer.
"""

import gzip
import hashlib
import http.client
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from cli import RunError, notice

URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
SIZE = 228_813_984  # bytes
SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"

TRIES = 4
PAUSE = 1  # seconds between them
TIMEOUT = 30  # seconds without a byte
UNUSABLE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError)
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def download_flower_photos(
    target: str | Path, url: str = URL, size: int = SIZE, sha256: str = SHA256
) -> Path:
    """Download, check and unpack the archive, so that `target`/daisy and so on exist.

    A connection that breaks is tried again and goes on where it stopped, also in a later call.
    `target` appears only when all is unpacked.

    Args:
        target: the folder to make; its parent also holds the unfinished download. Returned at
            once where it exists and is not empty.
        url: a gzipped tar archive with all its files below one folder.
        size: bytes of the archive.
        sha256: of the archive, in hexadecimal.

    Raises:
        RunError: no connection, or not the expected bytes; the message says what to fetch by hand.
        OSError: the disk is full or not writable.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f"{target.name}.tgz.part"
    notice(f"{target} is not there: downloading {url} ({size / 1e6:.0f} MB)")
    by_hand = (
        f"fetch {url} by other means and unpack it so that {target}/daisy exists, "
        "or use --data-path sample or a folder of yours"
    )
    for attempt in range(1, TRIES + 1):
        try:
            _fetch(url, part, size)
            break
        except BROKEN as error:
            reason = getattr(error, "reason", None) or error
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused:
                part.unlink(missing_ok=True)  # or a part that is not of this file would stay
            if refused or attempt == TRIES:
                raise RunError(f"cannot download {url} ({reason}); {by_hand}") from None
            notice(f"the download stopped ({reason}); try {attempt + 1} of {TRIES}")
            time.sleep(PAUSE)

    found_size = part.stat().st_size
    with open(part, "rb") as file:
        found_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if (found_size, found_sha256) != (size, sha256):
        part.unlink()
        raise RunError(
            f"{url} gave {found_size} bytes with sha256 {found_sha256}, expected {size} with "
            f"{sha256}; nothing was kept; try again, or {by_hand}"
        )
    try:
        _unpack(part, target)
    except UNUSABLE as error:
        part.unlink()
        raise RunError(f"{url} cannot be unpacked ({error}); nothing was kept; {by_hand}") from None
    part.unlink()
    return target


def _fetch(url: str, part: Path, size: int) -> None:
    """Append what `part` lacks; raise when the connection ends before `size` bytes are there."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:  # the server sends the whole file, not the rest
            have = 0
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                initial=have, total=size, unit="B", unit_scale=True, desc=part.stem, file=sys.stderr
            ) as bar,
        ):
            while have <= size and (block := answer.read(1 << 16)):
                file.write(block)
                bar.update(len(block))
                have += len(block)
    if have < size:
        raise ConnectionError(f"{have} of {size} bytes came")


def _unpack(archive: Path, target: Path) -> None:
    """Unpack beside `target`, then rename: a half-unpacked folder never has its name."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        with tarfile.open(archive, "r:gz") as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(scratch, filter="data")
            else:  # Python before 3.11.4, such as Debian 12's
                tar.extractall(scratch, members=_plain(tar))
        folders = [path for path in Path(scratch).iterdir() if path.is_dir()]
        if len(folders) != 1:
            raise ValueError(f"{len(folders)} folders at its top, expected one")
        try:
            os.rename(folders[0], target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise


def _plain(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files and folders of an archive; raise ValueError for any that could leave its place."""
    for member in tar:
        path = PurePosixPath(member.name)
        inside = not path.is_absolute() and ".." not in path.parts
        if not inside or not (member.isfile() or member.isdir()):
            raise ValueError(f"{member.name!r} is a link, or would be outside")
        yield member

"""The flower_photos data set: 3,670 photographs in five classes.

They are licensed CC BY 2.0; LICENSE.txt in the archive credits each photographer.
"""

import hashlib
import os
import shutil
from pathlib import Path

from cli import RunError, notice

URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"  # of 229 MB


def download_flower_photos(target: str | Path, url: str = URL, sha256: str = SHA256) -> None:
    """Download, check and unpack the archive, so that `target`/daisy and so on exist.

    `target` appears only when all is unpacked, and is left alone where it is not empty. RunError
    for no connection or other bytes; the message says what to fetch by hand.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        return
    from torch.hub import download_url_to_file

    target.parent.mkdir(parents=True, exist_ok=True)
    archive = target.parent / f"{target.name}.tgz"
    if not archive.exists():
        notice(f"{target} is not there: downloading {url} (229 MB)")
        try:
            download_url_to_file(url, str(archive), sha256)
        except Exception as error:  # no network, or other bytes
            todo = f"fetch {url} and put it at {archive}, or name another --data-path"
            raise RunError(f"{todo} ({getattr(error, 'reason', error)})") from None
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RunError(f"delete {archive} and fetch it again: its sha256 is {found}, not {sha256}")
    # Unpacked beside the target, then renamed: a half-unpacked folder never has its name.
    scratch = target.parent / f".{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.unpack_archive(archive, scratch)
    (folder,) = (path for path in scratch.iterdir() if path.is_dir())
    if target.exists():  # and is empty: Windows would not replace it
        target.rmdir()
    os.rename(folder, target)
    shutil.rmtree(scratch)
    archive.unlink()

"""Files that are there whole or not at all, and folders that one run has to itself."""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cli import UsageError

# Names of pictures and classes come from the file system, where they may be any bytes.
UTF8 = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextmanager
def replacing(path: str | Path, mode: str = "wb", previous: Path | None = None) -> Iterator[IO]:
    """Open a file that takes the place of `path` in one step when the block ends well; until
    then, and if it fails, `path` stays as it was, and so does `previous`, which then becomes what
    `path` was. When the block has ended the file is on the disk, not only in memory."""
    path = Path(path).resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else UTF8)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous:
            keep_previous(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def keep_previous(path: Path, previous: Path) -> None:
    """Let `previous` be what `path` is now, so that replacing `path` leaves it."""
    if path.exists():
        temporary = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself. The lock goes with the process, however that ends.

    Raises:
        UsageError: another process has it.
    """
    with open(folder / ".lock", "a+b") as file:
        try:
            _lock(file)
        except OSError:
            raise UsageError(
                f"--output-dir {folder}: another run writes there now; name another folder"
            ) from None
        for left in folder.glob(".*.pth.*.tmp"):  # by a run that was killed in a write
            left.unlink(missing_ok=True)
        yield


def _lock(file: IO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        # Not flock, which the workers of a run would hold on to for seconds after it was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def save_json(value: object, path: str | Path) -> None:
    """Write indented JSON."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def save_rows(rows: list[dict], path: str | Path) -> None:
    """Write CSV with a header, a line per dict; no rows, an empty file."""
    with replacing(path, "w") as file:
        writer = csv.writer(file)
        if rows:
            writer.writerow(rows[0])
            writer.writerows(cells(row.values()) for row in rows)


def cells(values: Iterable[object]) -> list[object]:
    """Values of a CSV row in which no text is a formula to a spreadsheet: names of pictures and
    classes come from others."""
    return [
        f"'{v}" if isinstance(v, str) and v.startswith(tuple("=+-@\t\r")) else v for v in values
    ]

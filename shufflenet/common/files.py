"""Files that are there whole or not at all, and folders that one run has to itself."""

import csv
import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shufflenet.common.messages import UsageError, notice

WINDOWS = os.name == "nt"
# Names of images and classes come from the file system, where they may be any bytes.
UTF8 = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextmanager
def replacing(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` in one step when the block ends well and all of it
    is on the disk; until then, and if it fails, `path` stays as it was."""
    path = Path(path).resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """Have a folder to oneself while the process lives; UsageError if another has it."""
    with open(folder / ".lock", "a+b") as file:
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


def save_json(value: object, path: str | Path) -> None:
    """Write indented JSON."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def save_rows(rows: list[dict], path: str | Path) -> None:
    """Write CSV with a header, a line per dict, whose keys may differ; no rows, an empty file."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        if rows:
            writer.writeheader()
        writer.writerows(rows)

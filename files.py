"""Files that are there whole or not at all."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` in one step when the block ends well; until
    then, and if it fails, `path` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(value: object, path: str | Path) -> None:
    """Write indented JSON."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def save_rows(rows: list[dict], path: str | Path) -> None:
    """Write CSV with a header, a line per dict; no rows, an empty file."""
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, rows[0] if rows else [])
        writer.writeheader()
        writer.writerows(rows)

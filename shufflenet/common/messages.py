"""What every file may say: errors, notices, results and progress.

Of several processes that torchrun started, the first (rank 0) speaks.
"""

import json
import operator
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from tqdm import tqdm

WORLD, RANK, LOCAL_WORLD, LOCAL_RANK = 1, 0, 1, 0
if os.environ.keys() >= {"RANK", "WORLD_SIZE"}:  # either alone may mean something else
    WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


class UsageError(ValueError):
    """A mistake of the caller found before the work starts (exit code 2)."""


class RunError(RuntimeError):
    """A failure during the work (exit code 1)."""


def printable(text: object) -> str:
    """Text with control characters and lone surrogates escaped: no file name moves the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def notice(text: str, *, everywhere: bool = False) -> None:
    """Print one line for the reader to stderr; of several processes only the first does, unless
    what it says is true `everywhere` it is said."""
    if sys.stderr is None or (RANK and not everywhere):  # None: closed; print would take stdout
        return
    rank = f"rank {RANK}: " if everywhere and WORLD > 1 else ""
    print(rank + printable(text), file=sys.stderr, flush=True)


def listed(names: Sequence, most: int = 5) -> str:
    """The first of some names, which may be long, and how many more there are."""
    first = ", ".join(name if len(name) <= 40 else name[:39] + "…" for name in names[:most])
    return first + (f" and {len(names) - most} more" if len(names) > most else "")


def json_text(value: object, encoding: str | None = "utf-8", **options) -> str:
    """JSON, with letters as they are where the encoding has them all."""
    with suppress(UnicodeEncodeError):
        text = json.dumps(value, ensure_ascii=False, **options)
        text.encode(encoding or "utf-8")
        return text
    return json.dumps(value, **options)


def say_json(value: object) -> None:
    """Print a result to stdout as a line of JSON."""
    say(json_text(value, getattr(sys.stdout, "encoding", None)))  # None: closed


def say(text: str) -> None:
    """Print a result to stdout, once."""
    if not RANK:
        print(text, flush=True)


def progress(items: Iterable, title: str, total: int | None = None) -> Iterator:
    """The items, while a bar shows how many are done; where stderr is no terminal, a line every ten
    seconds, so that a log stays readable."""
    if RANK:
        yield from items
        return
    if sys.stderr and sys.stderr.isatty():
        yield from tqdm(items, title, total, leave=False)
        return
    total, spoke = total or operator.length_hint(items), time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() > spoke + 10:
            spoke = time.monotonic()
            notice(f"{title}: {done} of {total or '?'}")
        yield item

"""Work done ahead of the one who needs it, by threads; and numbers put into batches."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ahead(work: Callable, items: Iterable, threads: int) -> Iterator:
    """`work(item)` of every item, in order, computed by threads beside the caller; few are waiting
    at a time. With no threads, computed when asked for."""
    if not threads:
        yield from map(work, items)
        return
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody asks for the others


def batches(length: int, size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """The numbers below `length` in lists of `size`; in order, or in one of seed and epoch."""
    order = list(range(length))
    if seed is not None:
        random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[first : first + size] for first in range(0, length, size)]

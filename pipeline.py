"""Picture files to what a network says of them: threads that read and compute, answers in order.

Each thread reads some pictures and runs the network on them, with one core. So no thread waits for
another, and no more pictures are in memory than the threads have in hand.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cli import RunError
from image import ImageError, load_rgb, resize_and_crop

BATCH = 16  # pictures per call of the network; on a CPU more is slower, see inference.py


def stream(
    paths: Sequence[str],
    run: Callable[[np.ndarray], np.ndarray],
    preprocessing: dict,
    *,
    threads: int,
    batch_size: int = BATCH,
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Run a network on pictures.

    Args:
        paths: picture files.
        run: uint8 (N, crop, crop, 3) to (N, outputs); called from several threads at once,
            of which each should keep to one core.
        preprocessing: resize and crop, as for `resize_and_crop`.
        threads: how many.
        batch_size: pictures per call.

    Yields:
        for each path, in order, the path and its row (outputs,), or the error that says why the
        picture could not be read.

    Raises:
        RunError: the network answers with what is not finite.
    """

    def work(batch: Sequence[str]) -> list[tuple[str, np.ndarray | ImageError]]:
        images, answers = [], []
        for path in batch:
            try:
                # Nested, or the picture would stay in memory while the next is read.
                images.append(
                    resize_and_crop(load_rgb(path), preprocessing["resize"], preprocessing["crop"])
                )
                answers.append(None)
            except ImageError as error:
                answers.append(error)
        outputs = run(np.stack(images)) if images else np.empty(0)
        if not np.isfinite(outputs).all():
            raise RunError("the network answers with values that are not finite: it is damaged")
        rows = iter(outputs)
        return [(path, error or next(rows)) for path, error in zip(batch, answers, strict=True)]

    pool = ThreadPoolExecutor(threads)
    waiting = deque()
    try:
        for first in range(0, len(paths), batch_size):
            waiting.append(pool.submit(work, paths[first : first + batch_size]))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        # Whoever stops here waits for no thread: one may hang on a disk that does not answer.
        pool.shutdown(wait=False, cancel_futures=True)

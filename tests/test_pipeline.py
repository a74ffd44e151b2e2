"""Pictures stream through a network on threads, in order, with bounded memory."""

import threading
import time

import numpy as np
import pytest

from cli import RunError
from image import ImageError, load_rgb, resize_and_crop
from pipeline import stream

SIZES = {"resize": 40, "crop": 32}


def mean_colour(images):
    assert images.dtype == np.uint8
    assert images.shape[1:] == (32, 32, 3)
    return images.mean((1, 2))


@pytest.fixture
def paths(flowers):
    return [str(path) for path in sorted(flowers.glob("*/*"))]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 100])
def test_answers_come_in_order_whatever_the_threads_and_the_batch(paths, threads, batch_size):
    def slow_at_first(images):
        time.sleep(0.05 * (threading.current_thread().name.endswith("_0")))
        return mean_colour(images)

    found = list(stream(paths, slow_at_first, SIZES, threads=threads, batch_size=batch_size))
    assert [path for path, _ in found] == paths
    for path, answer in found:
        assert np.array_equal(answer, resize_and_crop(load_rgb(path), 40, 32).mean((0, 1)))


def test_a_picture_that_cannot_be_read_is_an_answer_of_its_own(paths, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    mixed = [str(tmp_path / "bad.jpg"), paths[0], str(tmp_path / "gone.jpg"), paths[1]]
    for batch_size in (1, 2, 4):
        options = {"threads": 2, "batch_size": batch_size}
        answers = [answer for _, answer in stream(mixed, mean_colour, SIZES, **options)]
        kinds = [isinstance(answer, ImageError) for answer in answers]
        assert kinds == [True, False, True, False]
    ((path, _),) = stream([mixed[0]], mean_colour, SIZES, threads=1)
    assert path == mixed[0]
    assert list(stream([], mean_colour, SIZES, threads=1)) == []


def test_no_more_pictures_are_read_than_the_threads_have_in_hand(paths):
    read = []

    def note(images):
        read.extend(images)
        return mean_colour(images)

    answers = stream(paths, note, SIZES, threads=2, batch_size=1)
    next(answers)
    time.sleep(0.3)
    assert len(read) <= 6
    answers.close()  # as an exception in the reader, or Ctrl-C, does
    count = len(read)
    time.sleep(0.2)
    assert len(read) == count < len(paths)


def test_an_error_of_the_network_reaches_the_reader(paths):
    def fail(images):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(paths, fail, SIZES, threads=2))


def test_answers_that_are_not_finite_are_an_error(paths):
    with pytest.raises(RunError, match="not finite"):
        list(stream(paths, lambda x: np.full((len(x), 2), np.nan), SIZES, threads=2))

"""The same network by PyTorch, ONNX Runtime and OpenVINO, and images streamed through it."""

import io
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from shufflenet.common.messages import RunError, UsageError
from shufflenet.inference import runtimes
from shufflenet.inference.checkpoint import load_trained
from shufflenet.inference.classifier import Classifier
from shufflenet.inference.pytorch import Normalize, torch_runtime
from shufflenet.inference.runtimes import OPENERS, stream
from shufflenet.reading.image import ImageError, load_centre, load_rgb

SIZES = {"resize": 40, "crop": 32}
each_runtime = pytest.mark.parametrize("runtime", OPENERS)


@pytest.fixture(scope="module")
def paths(flowers):
    return [str(path) for path in sorted(flowers.glob("*/*"))]


@pytest.fixture(scope="module")
def expected(run_dir, paths):
    images = np.stack([load_centre(path, {"resize": 256, "crop": 224}) for path in paths])
    model, metadata = load_trained(run_dir / "best.pth")
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return model(Normalize(metadata.preprocessing)(x)).detach().numpy()


def distance(found, expected):
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    return abs(found - expected).max() / abs(expected).max()


@each_runtime
def test_runtimes_compute_what_pytorch_computes(run_dir, onnx_file, paths, expected, runtime):
    exported = Classifier(onnx_file, runtime=runtime, threads=2)
    trained = Classifier(run_dir / "best.pth", device="cpu")
    for classifier in (exported, trained):
        answers = np.stack([answer for _, answer in classifier.stream(paths, threads=2)])
        assert distance(answers, expected) < 1e-5
    args = trained.metadata.args
    kept = {name: args[name] for name in ("val_rate", "seed", "data")}
    assert exported.metadata == replace(trained.metadata, args=kept, trained_on=[])
    assert args["epochs"] == 2
    assert (exported.computed_by, trained.computed_by) == (runtime, "PyTorch on cpu")


def test_a_classifier_is_a_function_of_an_image(run_dir, paths, expected):
    classify = Classifier(run_dir / "best.pth")
    with open(paths[0], "rb") as file:
        best, second = classify(file, topk=2)
    assert best == classify(paths[0])[0]
    assert best["class"] == classify.classes[expected[0].argmax()]
    assert best["prob"] == pytest.approx(torch.tensor(expected[0]).softmax(0).max().item())
    assert best["prob"] > second["prob"]
    with pytest.raises(ImageError, match="nowhere.jpg: No such file"):
        classify("nowhere.jpg")


def test_what_is_asked_for_must_be_there(run_dir, onnx_file, monkeypatch):
    with pytest.raises(UsageError, match=r"--device cuda: .* on the CPU; use the \.pth"):
        Classifier(onnx_file, device="cuda")
    with pytest.raises(UsageError, match=r"--runtime openvino: needs an \.onnx file"):
        Classifier(run_dir / "best.pth", runtime="openvino")
    with pytest.raises(UsageError, match=r"no\.onnx: no such file"):
        Classifier("no.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match="openvino"):
        Classifier(onnx_file, runtime="openvino")


CONTENTS = [50_000, b"no onnx file", {"preprocessing": "{"}, {"classes": '["a", "b"]'}]


@each_runtime
@pytest.mark.parametrize("content", CONTENTS, ids=str)
def test_a_damaged_or_foreign_file_is_one_line(onnx_file, tmp_path, runtime, content):
    """Cut off, of other bytes, or with other metadata."""
    model = onnx.load(onnx_file)
    if isinstance(content, dict):
        about = {prop.key: prop.value for prop in model.metadata_props} | content
        onnx.helper.set_model_props(model, {key: value for key, value in about.items() if value})
    data = content if isinstance(content, bytes) else model.SerializeToString()
    (tmp_path / "bad.onnx").write_bytes(data[: content if isinstance(content, int) else None])
    with pytest.raises(RunError, match="bad.onnx: (damaged, or no file|names 2 cl)") as caught:
        Classifier(tmp_path / "bad.onnx", runtime=runtime)
    assert "\n" not in str(caught.value)


def test_an_image_may_be_in_memory(run_dir, flowers, tmp_path):
    """As a path, an open file, bytes, a PIL image or an array; it is left as it was."""
    classify = Classifier(run_dir / "best.pth")
    path = flowers / "roses" / "roses_000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.open(path).save(tmp_path / "a.png", exif=exif)
    expected = classify(tmp_path / "a.png")
    picture, data = Image.open(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    with open(tmp_path / "a.png", "rb") as file:
        kinds = [str(tmp_path / "a.png"), file, data, bytearray(data), picture]
        kinds.append(np.asarray(load_rgb(picture)))
        assert all(classify(kind) == expected for kind in kinds)
    assert picture.getexif()[0x0112] == 6
    pixels, _ = classify.explain(data, "roses")
    assert pixels.shape == (224, 224, 3)


ODD = [
    io.StringIO("a"),
    np.zeros((8, 8), np.uint8),
    np.zeros((8, 8, 3)),
    np.zeros((8, 8, 4), np.uint8),
    None,
    3,
]


@pytest.mark.parametrize("image", [*ODD, torch.zeros(3, 300, 300), ["a.jpg"] * 99])
def test_what_is_no_image_is_a_short_type_error(run_dir, image):
    with pytest.raises(
        TypeError, match="no image but .*; expected a path, an open file, "
    ) as caught:
        Classifier(run_dir / "best.pth")(image)
    assert len(str(caught.value)) < 200


def mean_colour(images):
    assert (images.dtype, images.shape[1:]) == (np.uint8, (32, 32, 3))
    return images.mean((1, 2))


@pytest.mark.parametrize(("threads", "batch_size"), [(1, 16), (2, 1), (5, 7)])
def test_answers_come_in_order_whatever_the_threads_and_the_batch(
    paths, threads, batch_size, monkeypatch
):
    monkeypatch.setattr(runtimes, "BATCH", batch_size)

    def slow_at_first(images):
        time.sleep(0.05 * (threading.current_thread().name.endswith("_0")))
        return mean_colour(images)

    found, answers = zip(*stream(paths, slow_at_first, SIZES, threads), strict=True)
    assert list(found) == paths
    expected = [load_centre(path, SIZES).mean((0, 1)) for path in paths]
    assert np.array_equal(answers, expected)


def test_an_image_that_cannot_be_read_is_an_answer_of_its_own(paths, tmp_path, monkeypatch):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    mixed = [str(tmp_path / "bad.jpg"), paths[0], str(tmp_path / "gone.jpg"), paths[1]]
    for batch_size in (1, 2, 4):
        monkeypatch.setattr(runtimes, "BATCH", batch_size)
        found = stream(mixed, mean_colour, SIZES, 2)
        assert [isinstance(answer, ImageError) for _, answer in found] == [True, False] * 2
    assert list(stream([], mean_colour, SIZES, threads=1)) == []


def test_a_gpu_is_fed_by_the_thread_that_asks(paths):
    asked = threading.get_ident()

    def model(x):
        assert threading.get_ident() == asked
        return x.mean((2, 3))

    gpu = type("Gpu", (str,), {"type": "mps"})("cpu")  # the CPU in the part of a GPU
    run = torch_runtime(model, gpu, {"mean": [0.0] * 3, "std": [1.0] * 3})
    found = list(stream(paths, run, SIZES, threads=4, on_gpu=True))
    expected = stream(paths, mean_colour, SIZES, threads=1)
    for (path, row), (same, mean) in zip(found, expected, strict=True):
        assert path == same
        np.testing.assert_allclose(255 * row, mean, rtol=1e-5)

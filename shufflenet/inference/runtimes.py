"""Runtimes of exported networks, and images streamed through a network.

A runtime is a function of images, uint8 (N, H, W, 3), to what the network makes of them, float32
(N, outputs); each thread that calls it computes on one core. That of PyTorch is in pytorch.py: with
an .onnx file torch is never imported, which saves more than a second.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from shufflenet.common.messages import RunError
from shufflenet.inference.metadata import Metadata
from shufflenet.reading.ahead import ahead
from shufflenet.reading.image import ImageError, Source, load_centre

BATCH = 16  # images; more are slower on a CPU, see parallel.py
Runtime = Callable[[np.ndarray], np.ndarray]


def open_onnx(path: Path, runtime_name: str, threads: int) -> tuple[Runtime, Metadata]:
    """The network in a file of export.py, for so many `threads` at a time. RunError if the file is
    damaged or of something else."""
    try:
        session, values = OPENERS[runtime_name](path, threads)
        about = {name: json.loads(values[name]) for name in ("classes", "preprocessing", "args")}
        metadata = Metadata(values.get("model_name", "unknown"), **about)
        runtime = takes_bytes(session, metadata.preprocessing)
        crop = metadata.preprocessing["crop"]
        outputs = runtime(np.zeros((1, crop, crop, 3), np.uint8)).shape[1]
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own classes of errors
        reason = str(error).strip().rpartition("\n")[2][:200]
        raise RunError(f"{path}: damaged, or no file of export.py ({reason})") from None
    if outputs != len(metadata.classes):
        named = len(metadata.classes)
        raise RunError(f"{path}: names {named} classes, but has {outputs} outputs")
    return runtime, metadata


def takes_bytes(session: Callable[[np.ndarray], np.ndarray], preprocessing: dict) -> Runtime:
    """Wraps a function of normalised images, float32 (N, 3, H, W), so that it takes uint8
    (N, H, W, 3)."""
    # (x / 255 - mean) / std, as pytorch.Normalize
    mean, std = np.array(preprocessing["mean"]), np.array(preprocessing["std"])
    scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def runtime(images: np.ndarray) -> np.ndarray:
        n, height, width, _ = images.shape
        x = np.empty((n, 3, height, width), np.float32)
        for channel in range(3):  # a third of the time of all at once, transposed
            np.multiply(images[..., channel], scale[channel], out=x[:, channel])
            x[:, channel] += shift[channel]
        return session(x)

    return runtime


def _open_onnxruntime(path: Path, threads: int) -> tuple[Callable, dict]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # of the thread that calls
    options.log_severity_level = 4  # errors are raised
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    return lambda x: session.run(None, {"input": x})[0], metadata


def _open_openvino(path: Path, threads: int) -> tuple[Callable, dict]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    options["INFERENCE_PRECISION_HINT"] = "f32"
    model = openvino.Core().read_model(path)
    compiled = openvino.Core().compile_model(model, "CPU", options)
    local = threading.local()  # a new request each time takes a tenth longer

    def run(x: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return local.request.infer({"input": x}, share_inputs=True)["logits"]

    return run, {name: value.value for name, value in model.get_rt_info()["framework"].items()}


# Each takes (path, threads) and returns a function of normalised images, and the file's metadata.
OPENERS = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}


def stream(
    paths: Sequence[Source],
    runtime: Runtime,
    preprocessing: dict,
    threads: int,
    on_gpu: bool = False,
) -> Iterator[tuple[Source, np.ndarray | ImageError]]:
    """Run a network on image files, with threads that each read some and compute them on one core:
    none waits for another, and no more images are in memory than the threads have in hand. For a
    network `on_gpu` the threads only read, and it is run by the caller's.

    Yields for each path, in order, the path and its row (outputs,), or the error that says why it
    could not be read. RunError if an answer is not finite.
    """

    def read(batch: Sequence) -> list[tuple]:
        items = []
        for path in batch:
            try:
                items.append((path, load_centre(path, preprocessing)))
            except ImageError as error:
                items.append((path, error))
        return items

    def answer(items: list[tuple]) -> list[tuple]:
        images = [item for _, item in items if not isinstance(item, ImageError)]
        outputs = runtime(np.stack(images)) if images else np.empty(0)
        if not np.isfinite(outputs).all():
            raise RunError("the answers are not finite: use other weights, or a smaller --lr")
        rows = iter(outputs)
        return [
            (path, item if isinstance(item, ImageError) else next(rows)) for path, item in items
        ]

    parts = (paths[first : first + BATCH] for first in range(0, len(paths), BATCH))
    if on_gpu:
        answered = map(answer, ahead(read, parts, threads))
    else:
        answered = ahead(lambda batch: answer(read(batch)), parts, threads)
    for answers in answered:
        yield from answers

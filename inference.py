"""A trained network opened in PyTorch, ONNX Runtime or OpenVINO, and images streamed through it.

A .pth file is computed by PyTorch, an .onnx file (of export.py) by ONNX Runtime or OpenVINO; with
an .onnx file torch is never imported, which saves more than a second.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import RunError, UsageError
from image import ImageError, load_rgb, resize_and_crop

BATCH = 16  # images; more are slower on a CPU, see optimize.py
Run = Callable[[np.ndarray], np.ndarray]


class Network(NamedTuple):
    """What classifies images: `run` takes uint8 (N, crop, crop, 3) and returns logits float32
    (N, classes). It keeps to one core and is called from several threads, as `stream` does."""

    run: Run
    model_name: str
    classes: list[str]
    preprocessing: dict
    args: dict  # of train.py; empty where unknown
    computed_by: str


def open_network(
    weights: str | Path, device="auto", runtime: str | None = None, threads=1
) -> Network:
    """Make a trained network ready: an .onnx file of export.py, computed by a runtime, or what
    `checkpoint.load_trained` reads, computed on a device. `threads` call it at the same time.

    UsageError if what is asked for is not there, RunError if the file is damaged or foreign.
    """
    if Path(weights).suffix.lower() != ".onnx":
        if runtime:
            raise UsageError(f"--runtime {runtime}: give --weights an .onnx file, by export.py")
        return _open_torch(weights, device)
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: use the .pth; an .onnx file is computed on the CPU")
    try:
        runtime = runtime or "onnxruntime"
        run, metadata = OPEN[runtime](Path(weights), threads)
        about = [json.loads(metadata[name]) for name in ("classes", "preprocessing", "args")]
        run = _of_bytes(run, about[1])
        crop = about[1]["crop"]
        outputs = run(np.zeros((1, crop, crop, 3), np.uint8)).shape[1]
    except ImportError as error:
        raise UsageError(f"pip install -r requirements-deploy.txt: {error}") from None
    except Exception as error:  # each runtime has its own classes of errors
        reason = str(error).strip().rpartition("\n")[2]
        raise RunError(f"{weights}: damaged, or no file of export.py ({reason})") from None
    if outputs != len(about[0]):
        raise RunError(f"{weights}: names {len(about[0])} classes, but has {outputs} outputs")
    return Network(run, metadata.get("model_name", "unknown"), *about, computed_by=runtime)


def _of_bytes(run: Run, preprocessing: dict) -> Run:
    """A function of bytes (N, H, W, 3) of one that wants normalised images (N, 3, H, W)."""
    # (x / 255 - mean) / std, as my_dataset.Normalize
    mean, std = np.array(preprocessing["mean"]), np.array(preprocessing["std"])
    scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def run_bytes(images: np.ndarray) -> np.ndarray:
        n, height, width, _ = images.shape
        x = np.empty((n, 3, height, width), np.float32)
        for channel in range(3):  # a third of the time of all at once, transposed
            np.multiply(images[..., channel], scale[channel], out=x[:, channel])
            x[:, channel] += shift[channel]
        return run(x)

    return run_bytes


def _open_torch(weights: str | Path, device_name: str) -> Network:
    from checkpoint import load_trained
    from optimize import optimize_for_inference
    from utils import choose_device

    device = choose_device(device_name)
    trained = load_trained(weights)
    model = optimize_for_inference(trained.model.to(device))
    run = torch_run(model, device, trained.preprocessing)
    about = (trained.model_name, trained.classes, trained.preprocessing, trained.args)
    return Network(run, *about, computed_by=f"PyTorch on {device}")


def torch_run(model: Callable, device, preprocessing: dict) -> Run:
    """A function of bytes (N, H, W, 3), as `stream` wants it, of one of images (N, 3, H, W)."""
    import torch

    from my_dataset import Normalize

    normalize = Normalize(preprocessing).to(device)
    one_at_a_time = threading.Lock()  # on a GPU; MPS aborts otherwise (pytorch#197805)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N,H,W,3) -> (N,3,H,W)
        if device.type == "cpu":
            torch.set_num_threads(1)  # of the thread that calls; others compute other images
            return model(normalize(x)).numpy()
        with one_at_a_time:
            return model(normalize(x.to(device))).cpu().numpy()

    return run


def _open_onnxruntime(path: Path, calls: int) -> tuple[Run, dict]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # of the thread that calls
    options.log_severity_level = 4  # errors are raised
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    return lambda x: session.run(None, {"input": x})[0], metadata


def _open_openvino(path: Path, calls: int) -> tuple[Run, dict]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": calls, "NUM_STREAMS": calls}
    options["INFERENCE_PRECISION_HINT"] = "f32"
    model = openvino.Core().read_model(path)
    compiled = openvino.Core().compile_model(model, "CPU", options)
    local = threading.local()

    def run(x: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return local.request.infer({"input": x}, share_inputs=True)["logits"]

    return run, {name: value.value for name, value in model.get_rt_info()["framework"].items()}


# Of a path and the number of calls at once: a function of normalised images (N, 3, H, W) to logits
# (N, classes), and the metadata.
OPEN = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}


def stream(
    paths: Sequence[str], run: Run, preprocessing: dict, threads: int
) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Run a network on image files, with threads that each read some and compute them on one core:
    none waits for another, and no more images are in memory than the threads have in hand.

    `run` takes uint8 (N, crop, crop, 3) to (N, outputs). Yields for each path, in order, the path
    and its row (outputs,), or the error that says why it could not be read. RunError if an answer
    is not finite.
    """

    def work(batch: Sequence[str]) -> list[tuple[str, np.ndarray | ImageError]]:
        images, answers = [], []
        for path in batch:
            try:
                # Nested, or the image would stay in memory while the next is read.
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

    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for first in range(0, len(paths), BATCH):
            waiting.append(pool.submit(work, paths[first : first + BATCH]))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

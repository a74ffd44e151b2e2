"""A trained network behind one call, whichever program computes it.

A .pth file is computed by PyTorch, an .onnx file (of export.py) by ONNX Runtime or OpenVINO; with
an .onnx file torch is never imported, which saves more than a second.
"""

import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cli import RunError, UsageError, notice
from image import check_classes, check_preprocessing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RUNTIMES = ("onnxruntime", "openvino")
# OpenVINO starts 0.25 s later; where both compute in float32 it gains that back after some 1,400
# pictures (x1.0 on two cores: README, Results).
OPENVINO_PAYS = 1500  # pictures


class Network(NamedTuple):
    """What classifies pictures.

    `run` takes uint8 pictures (N, crop, crop, 3) and returns logits float32 (N, classes). It keeps
    to one core and is called from several threads, as `pipeline.stream` does.
    """

    run: Callable[[np.ndarray], np.ndarray]
    model_name: str
    classes: list[str]
    preprocessing: dict
    args: dict  # of train.py; empty where unknown
    computed_by: str


def open_network(
    weights: str | Path,
    *,
    device: str = "auto",
    runtime: str | None = None,
    amp: bool = False,
    pictures: int | None = None,
    threads: int = 1,
) -> Network:
    """Make a trained network ready.

    Args:
        weights: an .onnx file of export.py, or what `checkpoint.load_classifier` reads.
        device: for a .pth: auto, cpu, cuda, cuda:INDEX or mps.
        runtime: for an .onnx: "onnxruntime" or "openvino"; None chooses.
        amp: compute in bfloat16 (float16 on a GPU without it).
        pictures: how many will be classified, for that choice; None for many.
        threads: how many will call `run` at the same time.

    Raises:
        UsageError: what is asked for is not there.
        RunError: the file is damaged or was not made by this repository.
    """
    if Path(weights).suffix.lower() != ".onnx":
        if runtime:
            raise UsageError(
                f"--runtime {runtime}: takes an .onnx file, not {weights}; see export.py"
            )
        return _open_torch(weights, device, amp)
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: an .onnx file is computed on the CPU; use the .pth")
    _refuse_loops(Path(weights))
    runtime = _choose_runtime(runtime, amp, pictures)
    try:
        importlib.import_module(runtime)
    except ImportError as error:
        raise RunError(f"{runtime} cannot be imported ({error}); install it anew") from None
    try:
        run, metadata = OPEN[runtime](Path(weights), threads, amp)
    except Exception as error:  # each runtime has its own classes of errors
        reason = str(error).strip().rpartition("\n")[2]
        raise RunError(f"{weights}: no ONNX file, or damaged ({reason})") from None
    try:
        classes, preprocessing, args = (
            json.loads(metadata[name]) for name in ("classes", "preprocessing", "args")
        )
    except (KeyError, ValueError, RecursionError):
        raise RunError(
            f"{weights}: does not say its classes and its preprocessing; make it with export.py"
        ) from None
    check_classes(classes, weights)
    check_preprocessing(preprocessing, weights)
    crop = preprocessing["crop"]
    try:
        shape = run(np.zeros((2, 3, crop, crop), np.float32)).shape
    except Exception as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise RunError(
            f"{weights}: classifies no batches of pictures of {crop} pixels ({reason})"
        ) from None
    if shape != (2, len(classes)) or not isinstance(args, dict):
        raise RunError(f"{weights}: names {len(classes)} classes, but answers {shape}")
    scale, shift = _normalization(preprocessing)

    def run_normalized(images: np.ndarray) -> np.ndarray:
        x = np.empty((len(images), 3, crop, crop), np.float32)
        for channel in range(3):
            np.multiply(images[..., channel], scale[channel], out=x[:, channel])
            x[:, channel] += shift[channel]
        return run(x)

    name = metadata.get("model_name", "unknown")
    return Network(run_normalized, name, classes, preprocessing, args, runtime)


def _refuse_loops(path: Path) -> None:
    # Nothing stops a runtime that has begun one of 2^62 turns. In an ONNX file the name of an
    # operator follows its length, whose last byte is 4, or 0 where it is longer than need be.
    data = path.read_bytes()
    if b"\4Loop" in data or b"\0Loop" in data:
        raise RunError(f"{path}: holds a loop, which no network of export.py does")


def _normalization(preprocessing: dict) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of each channel, float32 (3,), that normalise bytes as
    `my_dataset.normalize` does: (x / 255 - mean) / std."""
    mean, std = (np.array(preprocessing[name]) for name in ("mean", "std"))
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def installed_runtimes() -> list[str]:
    """Which of `RUNTIMES` are there; raises UsageError if none is."""
    installed = [name for name in RUNTIMES if importlib.util.find_spec(name)]
    if not installed:
        raise UsageError(
            "an .onnx file needs ONNX Runtime or OpenVINO: pip install -r requirements-deploy.txt"
        )
    return installed


def _choose_runtime(asked: str | None, amp: bool, pictures: int | None) -> str:
    installed = installed_runtimes()
    if asked and asked not in installed:
        raise UsageError(f"--runtime {asked}: is not installed; pip install {asked}")
    if amp and (asked or installed[-1]) != "openvino":
        raise UsageError("--amp: ONNX Runtime computes in float32 on a CPU; use OpenVINO")
    few = not amp and pictures is not None and pictures < OPENVINO_PAYS
    return asked or installed[0 if few else -1]


def _open_torch(weights: str | Path, device_name: str, amp: bool) -> Network:
    import checkpoint
    from inference import optimize_for_inference
    from utils import amp_dtype, choose_device

    device = choose_device(device_name)
    if amp and device.type == "cpu" and not torch_has_bfloat16():
        notice("--amp: this CPU has no bfloat16; PyTorch imitates it, several times slower")
    trained = checkpoint.load_classifier(weights)
    model = optimize_for_inference(trained.model, amp_dtype(device, amp)).to(device)

    run = torch_run(model, device, trained.preprocessing)
    return Network(run, *trained[1:], computed_by=f"PyTorch on {device}")


def torch_has_bfloat16() -> bool:
    """Whether PyTorch computes convolutions in bfloat16 on this CPU, rather than imitate it."""
    import torch

    # torch has no public way to ask.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def torch_run(
    model: Callable[["Tensor"], "Tensor"], device: "torch.device", preprocessing: dict
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of bytes (N, H, W, 3), as `pipeline.stream` wants it, that runs a network or a
    part of it on normalised pictures (N, 3, H, W)."""
    import torch

    from my_dataset import normalize

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        torch.set_num_threads(1)  # of the thread that calls; others compute other pictures
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # (N,H,W,3) -> (N,3,H,W)
        return model(normalize(x, preprocessing)).cpu().numpy()

    return run


def _open_onnxruntime(
    path: Path, streams: int, amp: bool, threads: int = 1
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: np.ndarray) -> np.ndarray:
        return session.run(None, {"input": x})[0]

    return run, session.get_modelmeta().custom_metadata_map


def _open_openvino(
    path: Path, streams: int, amp: bool, threads: int = 1
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, str]]:
    import openvino
    from openvino.frontend import FrontEndManager

    if amp and not openvino_has_bfloat16():
        notice("--amp: this CPU has no bfloat16; OpenVINO computes in float32")
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if amp else "f32",
        "INFERENCE_NUM_THREADS": streams * threads,
        "NUM_STREAMS": streams,
    }
    reader = FrontEndManager().load_by_framework("onnx")  # Core.read_model tries other formats too
    model = reader.convert(reader.load(str(path)))
    compiled = openvino.Core().compile_model(model, "CPU", options)
    local = threading.local()

    def run(x: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return local.request.infer({"input": x}, share_inputs=True)["logits"]

    about = model.get_rt_info()
    metadata = about["framework"] if "framework" in about else {}  # noqa: SIM401 (it has no get)
    return run, {name: value.value for name, value in metadata.items()}


def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO finds bfloat16 in this CPU."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# (path, number of calls at once, bfloat16 or not, threads of each call) -> a function of normalised
# pictures (N, 3, H, W) that returns logits (N, classes), and the metadata of the file.
OPEN = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}

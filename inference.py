"""A trained network opened in PyTorch, ONNX Runtime or OpenVINO, and images streamed through it.

A .pth file is computed by PyTorch, an .onnx file (of export.py) by ONNX Runtime or OpenVINO; with
an .onnx file torch is never imported, which saves more than a second.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

import cli
from cli import RunError, UsageError
from distributed import gather, share
from image import ImageError, ahead, load_centre
from metrics import Tally, softmax, sum_up

BATCH = 16  # images; more are slower on a CPU, see optimize.py
Run = Callable[[np.ndarray], np.ndarray]  # uint8 (N, crop, crop, 3) to float32 (N, outputs)


class Classifier:
    """A trained network as a function of an image.

        classify = Classifier("runs/RUN/best.pth")
        classify("photo.jpg")  # [{"class": "tulips", "prob": 0.982}, ...], best first

    `weights` is an .onnx file of export.py, computed by a runtime, or a weight file, computed on a
    device. `threads` may call it at the same time; each call keeps to a core. `run` takes bytes
    (N, crop, crop, 3) to logits (N, classes). UsageError if what is asked for is not there,
    RunError if the file is damaged or foreign.
    """

    def __init__(
        self, weights: str | Path, device="auto", runtime: str | None = None, threads=1
    ) -> None:
        self.weights = cli.require_weights(weights)
        onnx = self.weights.suffix.lower() == ".onnx"
        if runtime and not onnx:
            raise UsageError(f"--runtime {runtime}: give --weights an .onnx file, by export.py")
        if onnx and device not in ("auto", "cpu"):
            raise UsageError(
                f"--device {device}: use the .pth; .onnx files are computed on the CPU"
            )
        if onnx:
            self.computed_by = runtime or "onnxruntime"
            self.run, about = _open_onnx(self.weights, self.computed_by, threads)
        else:
            self._network, self._device, about = _open_torch(self.weights, device)
            self.run = torch_run(self._network, self._device, about[2])
            self.computed_by = f"PyTorch on {self._device}"
        self.model_name, self.classes, self.preprocessing, self.args = about

    def stream(
        self, paths: Sequence[str | Path | IO[bytes]], threads: int = 1
    ) -> Iterator[tuple[str, np.ndarray | ImageError]]:
        """The path and the logits (classes,) of each image in order, or why it cannot be read."""
        return stream(paths, self.run, self.preprocessing, threads)

    def __call__(self, image: str | Path | IO[bytes], topk: int = 5) -> list[dict]:
        """The `topk` best classes of an image; ImageError if it cannot be read."""
        ((_, answer),) = self.stream([image])
        if isinstance(answer, ImageError):
            raise answer
        return self.best_classes(answer, topk)

    def explain(self, image: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What the network sees of an image, uint8 (crop, crop, 3), and how much each place of it
        speaks for the class called `name`, float32 (height, width): the mean is the logit, exactly,
        since a mean comes before `fc` (Zhou et al., "Learning Deep Features for Discriminative
        Localization", CVPR 2016). Only of a .pth file; ImageError as when called."""
        pixels = load_centre(image, self.preprocessing)
        network, k = self._network.network, self.classes.index(name)
        run = torch_run(network.feature_map, self._device, self.preprocessing)
        fc = {key: value.cpu().numpy() for key, value in network.fc.state_dict().items()}
        maps = run(pixels[None])[0]  # (C,h,w)
        return pixels, np.tensordot(fc["weight"][k], maps, 1) + fc["bias"][k]

    def best_classes(self, logits: np.ndarray, topk: int) -> list[dict]:
        """[{"class": name, "prob": 0 to 1}, ...], the `topk` best first, of logits (classes,)."""
        probabilities = softmax(logits[None])[0]
        order = (-probabilities).argsort(kind="stable")[:topk]
        return [{"class": self.classes[i], "prob": float(probabilities[i])} for i in order]


def _open_onnx(weights: Path, runtime: str, threads: int) -> tuple[Run, list]:
    try:
        run, metadata = OPEN[runtime](weights, threads)
        about = [json.loads(metadata[name]) for name in ("classes", "preprocessing", "args")]
        run = of_bytes(run, about[1])
        crop = about[1]["crop"]
        outputs = run(np.zeros((1, crop, crop, 3), np.uint8)).shape[1]
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own classes of errors
        reason = str(error).strip().rpartition("\n")[2]
        raise RunError(f"{weights}: damaged, or no file of export.py ({reason})") from None
    if outputs != len(about[0]):
        raise RunError(f"{weights}: names {len(about[0])} classes, but has {outputs} outputs")
    return run, [metadata.get("model_name", "unknown"), *about]


def of_bytes(run: Run, preprocessing: dict) -> Run:
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


def _open_torch(weights: Path, device_name: str) -> tuple:
    from checkpoint import load_trained
    from optimize import rewrite_for_inference
    from utils import choose_device

    device = choose_device(device_name)
    model, *about = load_trained(weights)
    return rewrite_for_inference(model.to(device)), device, about


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
    local = threading.local()  # a new request each time takes a tenth longer

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

    Yields for each path, in order, the path and its row (outputs,), or the error that says why it
    could not be read. RunError if an answer is not finite.
    """

    def work(batch: Sequence[str]) -> list[tuple[str, np.ndarray | ImageError]]:
        images, answers = [], []
        for path in batch:
            try:
                images.append(load_centre(path, preprocessing))
                answers.append(None)
            except ImageError as error:
                answers.append(error)
        outputs = run(np.stack(images)) if images else np.empty(0)
        if not np.isfinite(outputs).all():
            raise RunError("use other weights, or a smaller --lr: the answers are not finite")
        rows = iter(outputs)
        return [(path, error or next(rows)) for path, error in zip(batch, answers, strict=True)]

    parts = (paths[first : first + BATCH] for first in range(0, len(paths), BATCH))
    for answered in ahead(work, parts, threads):
        yield from answered


def measure(answers, labels: list[int], classes: list[str], bad) -> tuple:
    """Hold the path and answer of each image against its class, an index; returns a Tally, and the
    mistakes, largest loss first."""
    tally, mistakes = Tally(len(classes)), []
    for label, (path, answer) in zip(labels, answers, strict=True):
        if isinstance(answer, ImageError):
            bad.add(answer)
            continue
        (loss,) = tally.add(answer[None], np.array([label]))
        if (guess := answer.argmax()) != label:
            names = {"class": classes[label], "prediction": classes[guess]}
            sure = {"prob": float(softmax(answer[None]).max()), "prob_of_class": np.exp(-loss)}
            mistakes.append({"path": path} | names | sure | {"loss": float(loss)})
    return tally, sorted(mistakes, key=lambda row: -row["loss"])


def validate_network(
    model, paths: list[str], labels: list[int], device, preprocessing: dict, bad, *, log: dict
) -> None:
    """Measure a network in training as eval.py does; `log` gets "val_loss", "val_accuracy" and
    "confusion", as by utils.evaluate. RunError if no image can be read."""
    from optimize import rewrite_for_inference

    run = torch_run(rewrite_for_inference(model.eval()), device, preprocessing)
    mine = share(paths)
    answers = cli.progress(stream(mine, run, preprocessing, cli.cores()), "validation", len(mine))
    tally, _ = measure(answers, share(labels), range(model.fc.out_features), bad)
    sum_up(gather(tally)).note(log)

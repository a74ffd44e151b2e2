"""A trained network as a function of an image."""

import io
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from shufflenet.common.messages import UsageError
from shufflenet.common.options import require_weights
from shufflenet.inference.metrics import softmax
from shufflenet.inference.runtimes import open_onnx, stream
from shufflenet.reading.image import ImageError, Source, load_centre

Picture = Source | bytes | np.ndarray


class Classifier:
    """A trained network as a function of an image.

        classify = Classifier("runs/RUN/best.pth")
        classify("photo.jpg")  # [{"class": "tulips", "prob": 0.982}, ...], best first

    An image is a path, an open file, bytes of a file, a PIL image, or an RGB array, uint8
    (height, width, 3); anything else is a TypeError.

    `weights` is an .onnx file of export.py, computed by a `runtime`, or a weight file, computed by
    PyTorch on a `device`. On a CPU up to `threads` threads may call it at the same time; each
    keeps to a core. UsageError if what is asked for is not there, RunError if the file is damaged
    or foreign.
    """

    def __init__(
        self,
        weights: str | Path,
        device: str = "auto",
        runtime: str | None = None,
        threads: int = 1,
    ) -> None:
        self.weights = require_weights(weights)
        self._network, self._on_gpu = None, False  # of PyTorch
        if self.weights.suffix.lower() == ".onnx":
            if device not in ("auto", "cpu"):
                raise UsageError(
                    f"--device {device}: .onnx files are computed on the CPU; use the .pth"
                )
            self.computed_by = runtime or "onnxruntime"
            self.runtime, self.metadata = open_onnx(self.weights, self.computed_by, threads)
        else:
            if runtime:
                raise UsageError(f"--runtime {runtime}: needs an .onnx file, by export.py")
            self._open_torch(device)
        self.classes = self.metadata.classes

    def _open_torch(self, device_name: str) -> None:
        _require_our_model()
        from shufflenet.inference.checkpoint import load_trained
        from shufflenet.inference.pytorch import choose_device, torch_runtime
        from shufflenet.inference.rewrite import rewrite_for_inference

        self._device = choose_device(device_name)
        self._on_gpu = self._device.type != "cpu"
        model, self.metadata = load_trained(self.weights)
        self._network = rewrite_for_inference(model.to(self._device))
        self.computed_by = f"PyTorch on {self._device}"
        self.runtime = torch_runtime(self._network, self._device, self.metadata.preprocessing)

    def stream(
        self, images: Sequence[Picture], threads: int = 1
    ) -> Iterator[tuple[Picture, np.ndarray | ImageError]]:
        """Each image in order, and its logits (classes,), or why it cannot be read."""
        sources = [source_of(image) for image in images]
        preprocessing = self.metadata.preprocessing
        return stream(sources, self.runtime, preprocessing, threads, on_gpu=self._on_gpu)

    def __call__(self, image: Picture, topk: int = 5) -> list[dict]:
        """The `topk` best classes of an image; ImageError if it cannot be read."""
        ((_, answer),) = self.stream([image])
        if isinstance(answer, ImageError):
            raise answer
        return self.best_classes(answer, topk)

    def best_classes(self, logits: np.ndarray, topk: int) -> list[dict]:
        """[{"class": name, "prob": 0 to 1}, ...], the `topk` best first, of logits (classes,)."""
        probabilities = softmax(logits[None])[0]
        order = (-probabilities).argsort(kind="stable")[:topk]
        return [{"class": self.classes[i], "prob": float(probabilities[i])} for i in order]

    def explain(self, image: Picture, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What the network sees of an image, uint8 (crop, crop, 3), and how much each place of it
        speaks for the class called `name`, float32 (height, width): the mean is the logit, exactly,
        since a mean comes before `fc` (Zhou et al., "Learning Deep Features for Discriminative
        Localization", CVPR 2016). UsageError for a network without feature maps, as in an .onnx
        file; ImageError as when called."""
        network = self._network and self._network.network
        if not hasattr(network, "feature_map"):
            raise UsageError(
                f"--explain: {self.weights} has no feature maps; use a .pth of train.py"
            )
        from shufflenet.inference.pytorch import torch_runtime

        pixels, k = (
            load_centre(source_of(image), self.metadata.preprocessing),
            self.classes.index(name),
        )
        maps_of = torch_runtime(network.feature_map, self._device, self.metadata.preprocessing)
        maps = maps_of(pixels[None])[0]  # (C,h,w)
        fc = {key: value.cpu().numpy() for key, value in network.fc.state_dict().items()}
        return pixels, np.tensordot(fc["weight"][k], maps, 1) + fc["bias"][k]


def source_of(image: Picture) -> Source:
    """What the reading room takes, of what a caller may have in memory."""
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    is_file = hasattr(image, "read") and not isinstance(image, io.TextIOBase)
    if is_file or isinstance(image, str | os.PathLike | Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return Image.fromarray(image)
    about = [type(image).__name__, *(str(getattr(image, name, "")) for name in ("dtype", "shape"))]
    kinds = "a path, an open file, bytes, a PIL image or an RGB array, uint8 (height, width, 3)"
    raise TypeError(f"no image but {' '.join(filter(None, about))}; expected {kinds}")


def _require_our_model() -> None:
    """Raise UsageError where Python finds another model.py first, which is not imported."""
    ours, spec = Path(__file__).parents[2] / "model.py", find_spec("model")
    if not spec or Path(spec.origin or "").resolve() != ours.resolve():
        found = spec.origin if spec else "nothing"
        raise UsageError(
            f"`import model` finds {found}, not {ours}: rename yours, or put this folder first"
        )

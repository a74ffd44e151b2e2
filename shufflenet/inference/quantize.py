"""A network in 8 bits: ONNX Runtime's static quantisation of a file of export.py."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from shufflenet.common.messages import progress
from shufflenet.common.options import cores
from shufflenet.inference.classifier import Classifier
from shufflenet.inference.metadata import Metadata
from shufflenet.inference.metrics import measure
from shufflenet.inference.runtimes import stream, takes_bytes
from shufflenet.reading.folders import BadImages, Part
from shufflenet.reading.image import ImageError

CALIBRATION = 100  # images that show how large activations get


def quantize(data: bytes, images: Iterable[np.ndarray]) -> bytes:
    """An ONNX file that computes in 8 bits what the file `data` computes in float32; normalised
    float32 `images`, (N, 3, crop, crop) each, show how large activations get."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    feeds, model = ({"input": x} for x in images), onnx.load_from_string(data)
    # Spares the advice to simplify the network first: it is simple.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as scratch:
        quantize_static(
            model,
            file := Path(scratch, "int8.onnx"),
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            per_channel=True,
            activation_type=QuantType.QUInt8,  # OpenVINO computes signed ones wrongly
            extra_options={
                "TensorQuantOverrides": _weight_ranges(model),
                "OpTypesToExcludeOutputQuantization": ["Gemm"],  # logits stay float32
            },
        )
        return file.read_bytes()


def _weight_ranges(model) -> dict:
    """Of convolutions whose input may be negative, by output, the weight that becomes 127.

    A processor without VNNI multiplies weights with activations, 0 to 255, and adds up products of
    two neighbours in 16 bits: they overflow if the two weights exceed 128. After a ReLU most
    activations are near 0, but elsewhere near 128. So there the largest sum of neighbours becomes
    127, not the largest weight. `reduce_range`, which does so everywhere, costs accuracy.
    """
    from onnx.numpy_helper import to_array

    weights = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    signed = {"input", *(node.output[0] for node in convs)}  # not after a ReLU
    ranges = {}
    for name in (node.input[1] for node in convs if node.input[0] in signed):
        outputs, inputs, *_ = weights[name].shape
        rows = weights[name].reshape(outputs, inputs, -1)
        # If inputs are odd, neighbours may be those of two pixels.
        sums = 2 * rows if inputs % 2 else rows[:, ::2] + rows[:, 1::2]
        highest = np.maximum(abs(rows).max((1, 2)), abs(sums).max((1, 2)))
        ranges[name] = [{"axis": 0, "rmin": -high, "rmax": high} for high in highest]
    return ranges


def quantize_and_measure(
    data: bytes, metadata: Metadata, train: Part, val: Part
) -> tuple[bytes, dict]:
    """The file in 8 bits, calibrated on some images of `train`, and the figures of both files on
    `val`: paths, and the index of the class of each."""
    paths, _ = train
    paths = paths[:: -(-len(paths) // CALIBRATION)]  # they come by class: some of each
    val_paths, labels = val
    bad, images = BadImages(len(paths) + len(val_paths)), []
    normalised = takes_bytes(lambda x: x, metadata.preprocessing)
    for _, answer in stream(paths, normalised, metadata.preprocessing, cores()):
        if isinstance(answer, ImageError):
            bad.add(answer)
        else:
            images.append(answer[None])  # (1,3,crop,crop)
    small, accuracy = quantize(data, images), []
    with tempfile.TemporaryDirectory() as scratch:
        for each in (data, small):
            path = Path(scratch, "measured.onnx")
            path.write_bytes(each)
            answers = Classifier(path).stream(val_paths, cores())
            answers = progress(answers, "measuring", len(val_paths))
            tally, _ = measure(answers, labels, metadata.classes, bad)
            accuracy.append(tally.figures()["accuracy"])
    figures = {"float_megabytes": round(len(data) / 1e6, 2), "float_accuracy": accuracy[0]}
    return small, figures | {"accuracy": accuracy[1], "val_images": len(val_paths)}

"""A network in 8 bits: ONNX Runtime's static quantisation of a file of export.py."""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import cli
import folders
from image import ImageError
from inference import Classifier, measure, of_bytes, stream

CALIBRATION = 100  # images that show how large activations get


def quantize(data: bytes, images: Iterable[np.ndarray]) -> bytes:
    """An ONNX file that computes in 8 bits what the file `data` computes in float32; normalised
    float32 `images`, (N, 3, crop, crop) each, show how large activations get."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    feeds = ({"input": x} for x in images)
    options = {"OpTypesToExcludeOutputQuantization": ["Gemm"]}  # logits stay float32
    model = onnx.load_from_string(data)
    logging.disable(logging.WARNING)  # it advises to simplify the network first: it is simple
    try:
        with tempfile.TemporaryDirectory() as scratch:
            quantize_static(
                model,
                f"{scratch}/int8.onnx",
                SimpleNamespace(get_next=lambda: next(feeds, None)),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                # Without VNNI products of 8 bits are added in pairs in 16 bits, and would overflow.
                reduce_range=True,
                extra_options=options,
            )
            return Path(scratch, "int8.onnx").read_bytes()
    finally:
        logging.disable(logging.NOTSET)


def quantize_and_measure(data: bytes, trained, train: dict, val: dict) -> tuple[bytes, dict]:
    """The file in 8 bits, calibrated on some images of `train`, {class: paths}, and the figures of
    both files on `val`."""
    paths, _ = folders.with_labels(train, trained.classes)
    paths = paths[:: -(-len(paths) // CALIBRATION)]  # they come by class: some of each
    val_paths, labels = folders.with_labels(val, trained.classes)
    bad, images = folders.BadImages(len(paths) + len(val_paths)), []
    normalised = of_bytes(lambda x: x, trained.preprocessing)
    for _, answer in stream(paths, normalised, trained.preprocessing, cli.cores()):
        if isinstance(answer, ImageError):
            bad.add(answer)
        else:
            images.append(answer[None])  # (1,3,crop,crop)
    small, accuracy = quantize(data, images), []
    with tempfile.TemporaryDirectory() as scratch:
        for each in (data, small):
            path = Path(scratch, "measured.onnx")
            path.write_bytes(each)
            answers = Classifier(path).stream(val_paths, cli.cores())
            answers = cli.progress(answers, "measuring", len(val_paths))
            tally, _ = measure(answers, labels, trained.classes, bad)
            accuracy.append(tally.figures()["accuracy"])
    figures = {"float_megabytes": round(len(data) / 1e6, 2), "float_accuracy": accuracy[0]}
    return small, figures | {"accuracy": accuracy[1], "val_images": len(val_paths)}

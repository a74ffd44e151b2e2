"""Write a trained network as an ONNX file, for ONNX Runtime, OpenVINO, phones and browsers.

    python export.py --weights runs/RUN/best.pth --output model.onnx
    python predict.py PICTURE --weights model.onnx

What is written is the network rewritten by inference.py: the same function, faster. The file holds
class names and preprocessing beside it. Before it appears at --output, ONNX Runtime and OpenVINO
run it on pictures and must agree with PyTorch on the network as it was trained.

    input   "input"   float32 (N, 3, crop, crop), RGB, normalised; N is free
    output  "logits"  float32 (N, classes); a softmax makes probabilities of them
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from cli import RunError, UsageError, notice

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import nn

    from checkpoint import Classifier

# Read by ONNX Runtime from 1.14 on, OpenVINO, TensorRT, and the tools for Android and iOS; torch
# writes none older without converting it.
OPSET, IR_VERSION = 18, 8
CHECKED = (1, 7)  # batch sizes
TOLERANCE = 1e-5  # largest difference of a logit, over the largest logit


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Write a trained network as an ONNX file.")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="best.pth of a run, or a bare state dict (when not said: the newest runs/*/best.pth)",
    )
    parser.add_argument("--output", default="model.onnx", metavar="FILE", help="what is written")
    parser.add_argument(
        "--check-on",
        metavar="IMAGE_OR_DIR",
        help="pictures to compare the runtimes on (when not said: those of the run where they are "
        "there, else drawn flowers)",
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    """Export as the options say; returns what the last line prints."""
    weights = args.weights or cli.newest_run("best.pth")
    cli.require_path(weights, "--weights")
    output = cli.check_file("--output", args.output, (".onnx",))
    if args.check_on and not Path(args.check_on).is_dir():
        cli.require_path(args.check_on, "--check-on")
    missing = [n for n in ("onnx", "onnxscript") if not importlib.util.find_spec(n)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not installed: pip install -r requirements-deploy.txt"
        )

    # Seconds of imports, so not before the paths are known to be right.
    import checkpoint
    from files import replacing
    from runtime import installed_runtimes

    runtimes = installed_runtimes()
    trained = checkpoint.load_classifier(weights)
    images = _pictures(args.check_on or trained.args.get("data_path"), trained.preprocessing)
    data = _to_file(trained)
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft.onnx")
        draft.write_bytes(data)
        for runtime in runtimes:
            differences[runtime] = _difference(trained, draft, runtime, images)
            if not differences[runtime] <= TOLERANCE:
                raise RunError(
                    f"{runtime} computes other logits than PyTorch, by {differences[runtime]:.2g} "
                    f"of the largest where {TOLERANCE} is allowed; {output} is not written"
                )
    with replacing(output) as file:
        file.write(data)
    summary = {
        "output": str(output),
        "model": trained.model_name,
        "classes": len(trained.classes),
        "opset": OPSET,
        "megabytes": round(len(data) / 1e6, 2),
        "largest_difference": differences,
    }
    cli.say(json.dumps(summary))
    return summary


def to_onnx(network: "nn.Module", crop: int) -> "onnx.ModelProto":
    """A network of pictures (N, 3, crop, crop) as ONNX, N free, without names of this machine."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, crop, crop),),
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    graph = model.graph
    # torch notes the files and lines of this machine at every node.
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
    model.ir_version = IR_VERSION
    return model


def _to_file(trained: "Classifier") -> bytes:
    """The rewritten network, with what is needed to use it."""
    from inference import optimize_for_inference

    crop = trained.preprocessing["crop"]
    model = to_onnx(optimize_for_inference(trained.model).network, crop)
    # Of the options only those that `eval.py` needs for the same split.
    kept = {k: v for k, v in trained.args.items() if k in ("val_rate", "seed")}
    for name, value in {
        "model_name": trained.model_name,
        "classes": json.dumps(trained.classes),
        "preprocessing": json.dumps(trained.preprocessing),
        "args": json.dumps(kept),
    }.items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def _pictures(place: str | None, preprocessing: dict) -> "np.ndarray":
    """Pictures to compare on, uint8 (n, crop, crop, 3), from all over a folder."""
    import numpy as np

    from folders import pictures_below
    from image import ImageError, load_rgb, resize_and_crop
    from sample_flowers import draw_sample_flowers

    wanted = sum(CHECKED)
    with tempfile.TemporaryDirectory() as scratch:
        if not place or not os.path.exists(place):
            notice("compared on drawn flowers; --check-on takes your own pictures")
            place = str(draw_sample_flowers(Path(scratch, "flowers"), per_class=2))
        found = pictures_below(place, Counter()) if os.path.isdir(place) else [place]
        images = []
        for path in found[:: max(1, len(found) // (2 * wanted))]:
            with contextlib.suppress(ImageError):
                image = load_rgb(path)
                images.append(
                    resize_and_crop(image, preprocessing["resize"], preprocessing["crop"])
                )
    if not images:
        raise UsageError(f"{place}: no picture that can be read, to compare the runtimes on")
    return np.stack(list(itertools.islice(itertools.cycle(images), wanted)))


def _difference(trained: "Classifier", path: Path, runtime: str, images: "np.ndarray") -> float:
    """How far a runtime's logits are from PyTorch's, over the largest logit."""
    import numpy as np
    import torch

    from my_dataset import normalize
    from runtime import open_network

    network = open_network(path, runtime=runtime)
    differences, first = [], 0
    for count in CHECKED:
        batch = images[first : first + count]
        first += count
        x = normalize(torch.from_numpy(batch).permute(0, 3, 1, 2), trained.preprocessing)
        with torch.inference_mode():
            expected = trained.model(x).numpy()
        largest = abs(expected).max() or 1.0
        differences.append(abs(network.run(batch) - expected).max() / largest)
    return float(np.max(differences))  # not a number if any of them is none


if __name__ == "__main__":
    cli.run(build_parser(), main)

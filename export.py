"""Write a trained network as an ONNX file, for ONNX Runtime, OpenVINO, phones and browsers.

    python export.py --weights runs/RUN/best.pth --output model.onnx
    python predict.py IMAGE --weights model.onnx

    python export.py --weights runs/RUN/best.pth --output int8.onnx --int8 FOLDER

The network is rewritten by optimize.py: the same function, faster; ONNX Runtime must agree with
PyTorch before the file appears. Beside it model.json tells who writes a client what the input is,
how images become it, and what the output means; docs/deploy.md has three clients. With --int8 it
computes in 8 bits: a third of the size, and faster where the processor has VNNI instructions.

On a CPU with bfloat16 OpenVINO computes in it unless INFERENCE_PRECISION_HINT is "f32".
"""

import copy
import json
import os
import warnings

import cli
from cli import RunError, UsageError

# Read by ONNX Runtime from 1.14 on, OpenVINO, TensorRT, and the tools for Android and iOS; torch
# writes none older without converting it.
OPSET, IR_VERSION = 18, 8
TOLERANCE = 1e-5  # largest difference of a logit, over the largest logit


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Write a trained network as an ONNX file.")
    # fmt: off
    parser.add_argument("--weights", metavar="FILE",
        help="best.pth of a run, or a bare state dict (if omitted: the newest runs/*/best.pth)")
    parser.add_argument("--output", default="model.onnx", metavar="FILE",
        help="file to write; a .json of the same name describes it")
    parser.add_argument("--int8", metavar="DIR",
        help="compute in 8 bits: a folder laid out as for train.py, whose training images "
        "calibrate and whose validation images measure")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> dict:
    """Export as the options say; returns what the last line prints."""
    args = build_parser().parse_args(args)
    weights = cli.require_weights(args.weights)
    output = cli.check_file("--output", args.output, (".onnx",))
    if args.int8 and not os.path.isdir(args.int8):
        raise UsageError(f"--int8 {args.int8}: no such folder")

    # Seconds of imports, so not before the paths are known to be right.
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    import folders
    from checkpoint import load_trained
    from files import replacing, save_json
    from optimize import rewrite_for_inference

    trained = load_trained(weights)
    if args.int8:
        train, val = folders.sides(args.int8, folders.find_parts(args.int8), trained.args)
        folders.refuse_unknown(train | val, trained.classes, args.int8)
    cli.introduce(weights, trained, f"; {output} follows in some ten seconds")
    crop = trained.preprocessing["crop"]
    model = to_onnx(rewrite_for_inference(trained.model).network, crop)
    # Of the options only those that `eval.py` needs for the same split.
    kept = {name: trained.args.get(name) for name in ("val_rate", "seed", "data")}
    about = {"classes": trained.classes, "preprocessing": trained.preprocessing, "args": kept}
    for name, value in about.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    model.metadata_props.add(key="model_name", value=trained.model_name)
    data = model.SerializeToString()
    difference = _difference(trained.model, data, crop)
    if not difference <= TOLERANCE:
        apart = f"{difference:.2g} of the largest where {TOLERANCE} is allowed"
        raise RunError(f"{output} is not written: ONNX Runtime's logits are off by {apart}")
    figures = {"largest_difference": difference}
    if args.int8:
        from quantize import quantize_and_measure

        data, more = quantize_and_measure(data, trained, train, val)
        figures |= more
    with replacing(output) as file:
        file.write(data)
    save_json(describe(trained), output.with_suffix(".json"))
    summary = {"output": str(output), "weights": str(weights), "model": trained.model_name}
    summary |= {"classes": len(trained.classes), "megabytes": round(len(data) / 1e6, 2)} | figures
    cli.say(json.dumps(summary))
    return summary


def describe(trained) -> dict:
    """What a client has to know, for who has the file and not this repository."""
    crop, classes = trained.preprocessing["crop"], trained.classes
    steps = [
        "turn the image upright by its EXIF orientation; 8-bit RGB, transparency over white",
        "resize the shorter side to `resize` pixels, bilinear with antialiasing, as Pillow does",
        "cut out the centre of `crop` x `crop` pixels",
        "divide by 255, subtract `mean`, divide by `std`, channel by channel",
    ]
    image = {"name": "input", "type": "float32", "shape": ["batch", 3, crop, crop]}
    logits = {"name": "logits", "type": "float32", "shape": ["batch", len(classes)]}
    return {
        "model": trained.model_name,
        "classes": classes,
        "preprocessing": trained.preprocessing | {"steps": steps},
        "input": image | {"layout": "NCHW", "colours": "RGB"},
        "output": logits | {"softmax": "over the last axis, makes probabilities of logits"},
    }


def to_onnx(network, crop: int):
    """A module of images (N, 3, crop, crop) as onnx.ModelProto, N free."""
    import torch

    # As NCHW, which ONNX is: else the shuffles of v1 would convert layouts to and fro.
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
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


def _difference(model, data: bytes, crop: int) -> float:
    """How far ONNX Runtime's logits are from PyTorch's, over the largest logit."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, crop, crop, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x).numpy()
    found = session.run(None, {"input": x.numpy()})[0]
    return float(abs(found - expected).max() / abs(expected).max())


if __name__ == "__main__":
    cli.run(main)

"""Write a trained network as an ONNX file, for ONNX Runtime, OpenVINO, phones and browsers.

    python export.py --weights runs/RUN/best.pth --output model.onnx
    python predict.py IMAGE --weights model.onnx

    input   "input"   float32 (N, 3, crop, crop), RGB, normalised; N is free
    output  "logits"  float32 (N, classes); a softmax makes probabilities of them

The network is rewritten by optimize.py: the same function, faster; ONNX Runtime must agree with
PyTorch before the file appears. Its metadata holds classes and preprocessing as JSON: prepare
images as torchvision's Resize(resize), CenterCrop(crop), ToTensor, Normalize(mean, std) do, that is
the shorter side to `resize` pixels, bilinear with antialiasing; the centre; bytes / 255. On a CPU
with bfloat16 OpenVINO computes in it unless INFERENCE_PRECISION_HINT is "f32".
"""

import copy
import json
import warnings

import cli
from cli import RunError

# Read by ONNX Runtime from 1.14 on, OpenVINO, TensorRT, and the tools for Android and iOS; torch
# writes none older without converting it.
OPSET, IR_VERSION = 18, 8
TOLERANCE = 1e-5  # largest difference of a logit, over the largest logit


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Write a trained network as an ONNX file.")
    # fmt: off
    parser.add_argument("--weights", metavar="FILE",
        help="best.pth of a run, or a bare state dict (if omitted: the newest runs/*/best.pth)")
    parser.add_argument("--output", default="model.onnx", metavar="FILE", help="file to write")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> dict:
    """Export as the options say; returns what the last line prints."""
    args = cli.parse(build_parser(), args)
    weights = cli.require_weights(args.weights)
    output = cli.check_file("--output", args.output, (".onnx",))

    # Seconds of imports, so not before the paths are known to be right.
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    from checkpoint import load_trained
    from files import replacing
    from optimize import optimize_for_inference

    trained = load_trained(weights)
    cli.introduce(weights, trained, f"; {output} follows in some ten seconds")
    crop = trained.preprocessing["crop"]
    model = to_onnx(optimize_for_inference(trained.model).network, crop)
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
    with replacing(output) as file:
        file.write(data)
    summary = {"output": str(output), "weights": str(weights), "model": trained.model_name}
    summary |= {"classes": len(trained.classes), "megabytes": round(len(data) / 1e6, 2)}
    summary |= {"largest_difference": difference}
    cli.say(json.dumps(summary))
    return summary


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

"""Write a trained network as an ONNX file, for ONNX Runtime, OpenVINO, phones and browsers.

    python export.py --weights runs/RUN/best.pth --output model.onnx
    python predict.py IMAGE --weights model.onnx

    python export.py --weights runs/RUN/best.pth --output int8.onnx --int8 FOLDER
    python export.py --weights runs/RUN/best.pth --web FOLDER

The network is rewritten by rewrite.py: the same function, faster; ONNX Runtime must agree with
PyTorch before the file appears. It holds class names and preprocessing as metadata; model.json
beside it describes input, preprocessing and output for the authors of clients, of which
docs/deploy.md has three. With --int8 it computes in 8 bits: a third of the size, and faster where
the processor has VNNI instructions. --web writes a page beside it that classifies in the browser.

On a CPU with bfloat16 OpenVINO computes in it unless INFERENCE_PRECISION_HINT is "f32".
"""

import os

from shufflenet.common import options
from shufflenet.common.files import replacing, save_json
from shufflenet.common.messages import RunError, UsageError, notice, say_json
from shufflenet.inference import web
from shufflenet.inference.checkpoint import load_trained
from shufflenet.inference.onnx_file import (
    OPSETS,
    add_metadata,
    describe,
    difference,
    lower,
    require_packages,
    to_onnx,
)
from shufflenet.inference.quantize import quantize_and_measure
from shufflenet.inference.rewrite import rewrite_for_inference
from shufflenet.reading.folders import (
    find_parts,
    names_of_folders,
    refuse_unknown,
    require_classes,
    split_images,
    with_labels,
)

TOLERANCE = 1e-5  # largest difference of a logit, over the largest logit


def build_parser() -> options.Parser:
    parser = options.Parser(description="Write a trained network as an ONNX file.")
    # fmt: off
    parser.add_argument("--weights", type=options.weights_file, metavar="FILE",
        help="best.pth of a run or the run's folder, or a bare state dict (if omitted: the newest "
        "runs/*/best.pth)")
    parser.add_argument("--output", metavar="FILE",
        help="file to write; a .json of the same name describes it (if omitted: model.onnx)")
    parser.add_argument("--opset", type=int, choices=OPSETS, default=OPSETS[-1],
        help="of ONNX; older software wants 13 or 11")
    parser.add_argument("--int8", metavar="DIR",
        help="compute in 8 bits: a folder laid out as for train.py, whose training images "
        "calibrate and whose validation images measure")
    parser.add_argument("--web", metavar="FOLDER",
        help="write model.onnx and model.json to a folder, and a page that classifies images in "
        "the browser, for any static server")
    parser.add_argument("--runtime-dir", metavar="DIR",
        help="npm's package onnxruntime-web, which --web copies (if omitted: the page loads it "
        f"from {web.ADDRESS})")
    # fmt: on
    return parser


def main(words: options.Words = None) -> dict:
    """Export as the args say; returns what the last line prints."""
    args = build_parser().parse_args(words)
    weights = options.require_weights(args.weights)
    if args.web and args.output:
        raise UsageError(f"--output {args.output}: --web writes {args.web}/model.onnx; omit one")
    if args.runtime_dir and not args.web:
        raise UsageError(f"--runtime-dir {args.runtime_dir}: only --web copies it; add --web")
    runtime = web.find_runtime(args.runtime_dir) if args.runtime_dir else []
    if args.int8 and not os.path.isdir(args.int8):
        raise UsageError(f"--int8 {args.int8}: no such folder")
    if args.int8 and args.opset < 13:
        raise UsageError(f"--opset {args.opset}: --int8 needs 13 or 18")
    if args.web:
        output = web.make_folder(args.web) / "model.onnx"
    else:
        output = options.check_file("--output", args.output or "model.onnx", (".onnx",))
    require_packages()

    network, metadata = load_trained(weights)
    if args.int8:
        split = [metadata.args.get("val_rate") or 0.2, metadata.args.get("seed") or 0]
        train, val = require_classes(split_images(find_parts(args.int8), *split), args.int8)
        classes = names_of_folders(train, metadata.classes)
        refuse_unknown(train, classes, args.int8)
    notice(f"{weights}: {metadata}; {output} follows in some ten seconds")
    crop = metadata.preprocessing["crop"]
    model = lower(to_onnx(rewrite_for_inference(network).network, crop), args.opset)
    add_metadata(model, metadata)
    data = model.SerializeToString()
    figures = {"largest_difference": difference(network, data, crop)}
    if not figures["largest_difference"] <= TOLERANCE:
        apart = f"{figures['largest_difference']:.2g} of the largest where {TOLERANCE} is allowed"
        raise RunError(f"{output} is not written: ONNX Runtime's logits are off by {apart}")
    if args.int8:
        train, val = with_labels(train, classes), with_labels(val, classes)
        data, more = quantize_and_measure(data, metadata, train, val)
        figures |= more
    with replacing(output) as file:
        file.write(data)
    save_json(describe(metadata), output.with_suffix(".json"))
    if args.web:
        web.write_page(output.parent, runtime)
        if not runtime:
            notice(f"the page loads its runtime from {web.ADDRESS} (--runtime-dir copies it)")
        server = f"python -m http.server --directory {output.parent}"
        notice(f"next: {server}, then open http://localhost:8000")
    summary = {"output": str(output), "weights": str(weights), "model": metadata.model_name}
    summary |= {"classes": len(metadata.classes), "megabytes": round(len(data) / 1e6, 2)} | figures
    say_json(summary)
    return summary


if __name__ == "__main__":
    options.run_script(main)

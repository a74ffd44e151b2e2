"""A network as an ONNX file, and what the authors of clients have to know of it.

onnx, onnxruntime and onnxscript are imported where they are needed: only export.py asks for them.
"""

import copy
import json
import warnings

import torch
from torch import nn

from shufflenet.common.messages import RunError
from shufflenet.inference.metadata import Metadata

# torch writes 18, read by ONNX Runtime from 1.14 on, OpenVINO, TensorRT, and the tools for Android
# and iOS. The others are for older software: docs/deploy.md.
OPSETS = (11, 13, 18)
IR_VERSIONS = {11: 6, 13: 7, 18: 8}
# What later versions gave an operation: an attribute, and since when an input, and of what name,
# is no attribute any more.
CHANGED = {
    "Split": ("num_outputs", 13, "split"),
    "ReduceMean": ("noop_with_empty_axes", 18, "axes"),
    "Reshape": ("allowzero", 0, ""),
}


def require_packages() -> None:
    """Raise ImportError, before any work, if a package is missing."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401


def to_onnx(network: nn.Module, crop: int):
    """A network of images (N, 3, crop, crop) as onnx.ModelProto, N free."""
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
            opset_version=OPSETS[-1],
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    graph = model.graph
    # torch notes the files and lines of this machine at every node.
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
    return model


def lower(model, opset: int):
    """The same onnx.ModelProto for an older version of ONNX, in whose operations inputs were
    attributes (ONNX's own converter fails on Split). RunError if it has no such operations."""
    import onnx

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        added, since, name = CHANGED.get(node.op_type, ("", 0, ""))
        if opset < OPSETS[-1]:
            for attribute in [each for each in node.attribute if each.name == added]:
                node.attribute.remove(attribute)
        if opset < since and len(node.input) > 1 and node.input[1] in values:
            value = onnx.numpy_helper.to_array(values[node.input.pop()])
            node.attribute.append(onnx.helper.make_attribute(name, value.flatten().tolist()))
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [each for each in model.graph.initializer if each.name not in read]:
        model.graph.initializer.remove(tensor)
    del model.opset_import[:]
    model.opset_import.add(domain="", version=opset)
    model.ir_version = IR_VERSIONS[opset]
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of several kinds
        reason = str(error).strip().partition("\n")[0][:150]
        raise RunError(f"the network cannot be written as --opset {opset}: {reason}") from None
    return model


def add_metadata(model, metadata: Metadata) -> None:
    """Write into an onnx.ModelProto what runtimes.open_onnx reads."""
    # Of the options only those that `eval.py` needs for the same split.
    args = {name: metadata.args.get(name) for name in ("val_rate", "seed", "data")}
    values = {"classes": metadata.classes, "preprocessing": metadata.preprocessing, "args": args}
    for name, value in values.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    model.metadata_props.add(key="model_name", value=metadata.model_name)


def difference(network: nn.Module, data: bytes, crop: int) -> float:
    """How far ONNX Runtime's logits of a file are from PyTorch's, over the largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, crop, crop, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(x).numpy()
    found = session.run(None, {"input": x.numpy()})[0]
    return float(abs(found - expected).max() / abs(expected).max())


def describe(metadata: Metadata) -> dict:
    """What a client has to know, for those who have the file and not this repository."""
    crop, classes = metadata.preprocessing["crop"], metadata.classes
    steps = [
        "turn the image upright by its EXIF orientation; 8-bit RGB, transparency over white",
        "resize the shorter side to `resize` pixels, bilinear with antialiasing, as Pillow does",
        "cut out the centre of `crop` x `crop` pixels",
        "divide by 255, subtract `mean`, divide by `std`, channel by channel",
    ]
    image = {"name": "input", "type": "float32", "shape": ["batch", 3, crop, crop]}
    logits = {"name": "logits", "type": "float32", "shape": ["batch", len(classes)]}
    return {
        "model": metadata.model_name,
        "classes": classes,
        "preprocessing": metadata.preprocessing | {"steps": steps},
        "input": image | {"layout": "NCHW", "colours": "RGB"},
        "output": logits | {"softmax": "over the last axis, makes probabilities of logits"},
    }

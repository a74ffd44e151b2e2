"""The exported file: what it holds, and that a wrong one is not left."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import export
from cli import RunError
from inference import Classifier
from model import build_model


def test_the_file_is_standard_and_speaks_for_itself(onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    (opset,) = model.opset_import
    assert (opset.domain, opset.version, model.ir_version) == ("", 18, 8)
    tensors = *model.graph.input, *model.graph.output
    dims = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in tensors]
    assert [tensor.name for tensor in tensors] == ["input", "logits"]
    assert dims == [["batch", 3, 224, 224], ["batch", 5]]
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert about["model_name"] == "shufflenet_v2_x0_5"
    assert json.loads(about["classes"])[0] == "daisy"
    assert json.loads(about["preprocessing"])["crop"] == 224


def test_v2_moves_no_channel_for_nothing(onnx_file):
    nodes = onnx.load(onnx_file).graph.node
    kinds = {"Conv", "Relu", "Split", "Concat", "MaxPool", "ReduceMean", "Gemm"}
    assert {node.op_type for node in nodes} == kinds
    assert all(len(node.output) > 1 for node in nodes if node.op_type == "Split")


def test_the_file_says_nothing_of_this_machine(onnx_file):
    data = onnx_file.read_bytes()
    for word in (b"/optimize.py", b"site-packages", b"stack_trace", b"data_path", b"torch.nn"):
        assert word not in data


def test_a_bare_state_dict_of_v1_is_exported_with_a_transpose_a_shuffle(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_model("shufflenet_v1_x0_25_g3", 5).state_dict(), tmp_path / "bare.pth")
    output = tmp_path / "m.onnx"
    summary = export.main(["--weights", tmp_path / "bare.pth", "--output", output])
    out, err = capsys.readouterr()
    assert json.loads(out) == summary
    assert len(err.splitlines()) == 2  # about the classes; nothing of torch about itself
    assert (summary["model"], summary["classes"]) == ("shufflenet_v1_x0_25_g3", 5)
    assert summary["largest_difference"] < 1e-5
    assert Counter(node.op_type for node in onnx.load(output).graph.node)["Transpose"] == 16
    about = Classifier(output)  # v1 is prepared like v2 x1.0
    assert (about.model_name, about.preprocessing["resize"]) == ("shufflenet_v1_x0_25_g3", 256)


@pytest.mark.parametrize(("tensor", "value"), [("conv5.0.weight", 0.1), ("fc.bias", np.nan)])
def test_a_wrong_file_is_not_left(onnx_file, run_dir, tmp_path, monkeypatch, tensor, value):
    model = onnx.load(onnx_file)
    (weight,) = (each for each in model.graph.initializer if each.name.endswith(tensor))
    values = onnx.numpy_helper.to_array(weight) + np.float32(value)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    monkeypatch.setattr(export, "to_onnx", lambda *args: model)
    (tmp_path / "m.onnx").write_bytes(b"what was there before")
    with pytest.raises(RunError, match=r"m.onnx is not written: ONNX Runtime's logits are off by "):
        export.main(["--weights", run_dir / "best.pth", "--output", tmp_path / "m.onnx"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there before"]

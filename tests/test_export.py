"""The exported file: what it holds, and that a wrong one is not left."""

import json

import numpy as np
import onnx
import pytest
import torch

import export
from cli import RunError, UsageError
from model import build_model
from runtime import RUNTIMES, open_network


def run_export(*args):
    return export.main(export.build_parser().parse_args([*map(str, args)]))


def test_the_file_is_standard_and_speaks_for_itself(onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    (opset,) = model.opset_import
    assert (opset.domain, opset.version, model.ir_version) == ("", 18, 8)
    (x,), (y,) = model.graph.input, model.graph.output
    assert (x.name, y.name) == ("input", "logits")
    shapes = [
        [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim] for tensor in (x, y)
    ]
    assert shapes == [["batch", 3, 224, 224], ["batch", 5]]
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"Conv", "Relu", "Split", "Concat", "MaxPool", "ReduceMean", "Gemm"}
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert about["model_name"] == "shufflenet_v2_x0_5"
    assert json.loads(about["classes"])[0] == "daisy"
    assert json.loads(about["preprocessing"])["crop"] == 224


def test_the_file_says_nothing_of_this_machine(onnx_file):
    data = onnx_file.read_bytes()
    for word in (b"/inference.py", b"site-packages", b"stack_trace", b"data_path", b"torch.nn"):
        assert word not in data


def test_the_summary_is_printed_and_both_runtimes_agreed(run_dir, tmp_path, capsys):
    summary = run_export("--weights", run_dir / "best.pth", "--output", tmp_path / "m.onnx")
    out, err = capsys.readouterr()
    assert json.loads(out) == summary
    assert set(summary["largest_difference"]) == set(RUNTIMES)
    assert max(summary["largest_difference"].values()) < 1e-5
    assert (summary["opset"], summary["classes"]) == (18, 5)
    assert err == ""  # torch's own progress and warnings are not for the user


@pytest.mark.parametrize("name", ["shufflenet_v1_x0_25_g3", "shufflenet_v2_x1_5"])
def test_a_bare_state_dict_of_any_variant_is_exported(tmp_path, capsys, name):
    """Compared on drawn flowers, since nothing says where pictures are."""
    torch.manual_seed(0)
    torch.save(build_model(name, 5).state_dict(), tmp_path / "bare.pth")
    summary = run_export("--weights", tmp_path / "bare.pth", "--output", tmp_path / "m.onnx")
    assert summary["model"] == name
    assert "compared on drawn flowers" in capsys.readouterr().err
    network = open_network(tmp_path / "m.onnx")
    assert network.preprocessing["resize"] == (232 if name.endswith("5") else 256)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_disagrees_is_not_left(
    onnx_file, run_dir, flowers, tmp_path, monkeypatch, runtime
):
    model = onnx.load(onnx_file)
    weight = next(t for t in model.graph.initializer if t.name == "conv5.0.weight")
    values = onnx.numpy_helper.to_array(weight)[:, ::-1].copy()  # channels in another order
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    monkeypatch.setattr(export, "_to_file", lambda trained: model.SerializeToString())
    monkeypatch.setattr("runtime.installed_runtimes", lambda: [runtime])
    words = ["--weights", run_dir / "best.pth", "--check-on", flowers]
    (tmp_path / "m.onnx").write_bytes(b"what was there before")
    with pytest.raises(RunError, match=f"{runtime} computes other logits.* is not written"):
        run_export(*words, "--output", tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"what was there before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_answers_nan_is_not_left(onnx_file, run_dir, flowers, tmp_path, monkeypatch):
    model = onnx.load(onnx_file)
    weight = next(t for t in model.graph.initializer if t.name == "fc.bias")
    values = np.full(5, np.nan, np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    monkeypatch.setattr(export, "_to_file", lambda trained: model.SerializeToString())
    words = ["--weights", run_dir / "best.pth", "--check-on", flowers]
    with pytest.raises(RunError, match="computes other logits"):
        run_export(*words, "--output", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_mistakes_are_found_before_the_work(run_dir, tmp_path, monkeypatch):
    weights = ["--weights", run_dir / "best.pth"]
    for more, message in (
        (["--output", tmp_path / "m.pt"], r"the suffix must be \.onnx"),
        (["--output", tmp_path / "no" / "m.onnx"], "no such folder"),
        (["--check-on", tmp_path / "no"], "--check-on .*no such file"),
        (["--check-on", tmp_path], "no picture that can be read"),
    ):
        with pytest.raises(UsageError, match=message):
            run_export(*weights, "--output", tmp_path / "m.onnx", *more)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="onnx and onnxscript not installed: pip install -r"):
        run_export(*weights, "--output", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_one_picture_is_enough_to_compare_on(onnx_file, run_dir, flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_to_file", lambda trained: onnx_file.read_bytes())
    (tmp_path / "m.onnx").write_bytes(b"old")
    (tmp_path / "open elsewhere").hardlink_to(tmp_path / "m.onnx")
    words = ["--weights", run_dir / "best.pth", "--output", tmp_path / "m.onnx"]
    summary = run_export(*words, "--check-on", flowers / "roses" / "roses_001.jpg")
    assert (tmp_path / "open elsewhere").read_bytes() == b"old"
    assert (tmp_path / "m.onnx").read_bytes() == onnx_file.read_bytes()
    assert set(summary["largest_difference"]) == set(RUNTIMES)

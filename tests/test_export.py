"""The exported file: what it holds, and that a wrong one is not left."""

import json
import shutil
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export
from model import build_model
from shufflenet.common.messages import RunError, UsageError
from shufflenet.inference import onnx_file as writer
from shufflenet.inference import quantize
from shufflenet.inference.checkpoint import load_trained
from shufflenet.inference.classifier import Classifier
from shufflenet.inference.rewrite import rewrite_for_inference
from shufflenet.reading import folders


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


def test_a_json_beside_it_tells_a_client_what_to_do(onnx_file):
    about = json.loads(onnx_file.with_suffix(".json").read_text())
    assert about["classes"] == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert about["preprocessing"] | {"resize": 256, "crop": 224} == about["preprocessing"]
    assert about["input"]["shape"] == ["batch", 3, 224, 224]
    assert (about["input"]["name"], about["output"]["name"]) == ("input", "logits")
    assert "softmax" in about["output"]


def test_in_8_bits_it_is_a_third_and_answers_alike(onnx_file, run_dir, flowers, tmp_path):
    data, (_, trained) = onnx_file.read_bytes(), load_trained(run_dir / "best.pth")
    parts = folders.split_images(folders.find_parts(flowers), 0.2, 0)
    train, val = (folders.with_labels(parts[name], trained.classes) for name in ("train", "val"))
    small, figures = quantize.quantize_and_measure(data, trained, train, val)
    assert len(small) < 0.4 * len(data)
    assert (figures["val_images"], figures["float_megabytes"]) == (5, round(len(data) / 1e6, 2))
    (path := tmp_path / "int8.onnx").write_bytes(small)
    paths, labels = val
    for name, file in (("float_accuracy", onnx_file), ("accuracy", path)):
        answers = [answer.argmax() for _, answer in Classifier(file).stream(paths)]
        assert figures[name] == np.mean(np.equal(answers, labels))
    exact = Classifier(onnx_file)
    for runtime in ("onnxruntime", "openvino"):
        rounded, differences = Classifier(path, runtime=runtime), []
        assert rounded.metadata == exact.metadata
        for (_, ours), (_, theirs) in zip(exact.stream(paths), rounded.stream(paths), strict=True):
            differences.append(abs(ours - theirs).max() / abs(ours).max())
        assert 0 < np.median(differences) < 0.1


def test_products_of_neighbours_fit_into_16_bits_where_activations_are_large(onnx_file):
    """As processors without VNNI add them up: the weights of two neighbours, times at most 255."""
    images = np.random.default_rng(0).standard_normal((2, 1, 3, 224, 224), np.float32)
    model = onnx.load_from_string(quantize.quantize(onnx_file.read_bytes(), images))
    made_by = {name: node for node in model.graph.node for name in node.output}
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    kinds = Counter()
    for node in model.graph.node:
        if node.op_type == "Conv":
            rounded = made_by[made_by[node.input[0]].input[0]]  # DequantizeLinear, QuantizeLinear
            source = made_by.get(rounded.input[0])
            if source is None:  # the image
                continue
            rows = weights[made_by[node.input[1]].input[0]].astype(int)
            rows = rows.reshape(*rows.shape[:2], -1)
            kinds[source.op_type] += 1
            if source.op_type == "Conv" and rows.shape[1] > 1:
                sums = rows[:, ::2] + rows[:, 1::2]
                assert abs(sums).max() <= 128
                assert abs(sums).max() >= 120  # none is smaller than it has to be
    assert kinds["Conv"] > 10


def test_classes_that_the_network_does_not_know_cannot_calibrate_it(run_dir, flowers, tmp_path):
    for name in ("roses", "violets"):
        shutil.copytree(flowers / "roses", tmp_path / "two" / name)
    words = ["--weights", run_dir / "best.pth", "--output", tmp_path / "x.onnx"]
    with pytest.raises(UsageError, match="two: 1 of 2 classes are unknown, violets: rename or rem"):
        export.main([*words, "--int8", tmp_path / "two"])


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1_x0_25_g3"])
def test_older_software_gets_the_same_function(tmp_path, name, opset):
    torch.manual_seed(0)
    network, x = build_model(name, 5).eval(), np.random.default_rng(0).random((2, 3, 224, 224))
    model, found = writer.to_onnx(rewrite_for_inference(network).network, 224), []
    for version in (18, opset):
        data = writer.lower(model, version).SerializeToString()
        onnx.checker.check_model(data, full_check=True)
        session = onnxruntime.InferenceSession(data)
        found += session.run(None, {"input": x.astype(np.float32)})
        assert onnx.load_from_string(data).opset_import[0].version == version
    assert np.array_equal(*found)


def test_v2_moves_no_channel_for_nothing(onnx_file):
    nodes = onnx.load(onnx_file).graph.node
    kinds = {"Conv", "Relu", "Split", "Concat", "MaxPool", "ReduceMean", "Gemm"}
    assert {node.op_type for node in nodes} == kinds
    assert all(len(node.output) > 1 for node in nodes if node.op_type == "Split")


def test_the_file_says_nothing_of_this_machine(onnx_file):
    data = onnx_file.read_bytes()
    for word in (b"/rewrite.py", b"site-packages", b"stack_trace", b"data_path", b"torch.nn"):
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
    about = Classifier(output).metadata  # v1 is prepared like v2 x1.0
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

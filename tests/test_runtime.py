"""The same network by PyTorch, ONNX Runtime and OpenVINO."""

import json

import numpy as np
import onnx
import pytest
import torch

import checkpoint
import runtime
from cli import RunError, UsageError
from image import load_rgb, resize_and_crop
from my_dataset import normalize
from runtime import RUNTIMES, open_network

CLASSES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


@pytest.fixture(scope="module")
def images(flowers):
    """uint8 (20, 224, 224, 3)."""
    paths = sorted(flowers.glob("*/*"))[::2]
    return np.stack([resize_and_crop(load_rgb(path), 256, 224) for path in paths])


@pytest.fixture(scope="module")
def expected(run_dir, images):
    """The logits of the plain network."""
    trained = checkpoint.load_classifier(run_dir / "best.pth")
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        return trained.model(normalize(x, trained.preprocessing)).numpy()


def assert_same(found, expected):
    assert found.dtype == np.float32
    assert abs(found - expected).max() < 1e-5 * abs(expected).max()


@pytest.mark.parametrize("asked", RUNTIMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_runtimes_compute_what_pytorch_computes(onnx_file, images, expected, asked, threads):
    network = open_network(onnx_file, runtime=asked, threads=threads)
    for count in (1, 7, 20):
        assert_same(network.run(images[:count]), expected[:count])
    assert (network.model_name, network.classes) == ("shufflenet_v2_x0_5", CLASSES)
    assert network.preprocessing["resize"] == 256
    assert network.args == {"val_rate": 0.2, "seed": 0}
    assert network.computed_by == asked


def test_pytorch_computes_it_from_the_checkpoint(run_dir, images, expected, capsys):
    network = open_network(run_dir / "best.pth", device="cpu")
    assert_same(network.run(images), expected)
    assert network.computed_by == "PyTorch on cpu"
    assert capsys.readouterr().err == ""
    halved = open_network(run_dir / "best.pth", device="cpu", amp=True).run(images)
    imitated = "PyTorch imitates it" in capsys.readouterr().err
    assert imitated == (not runtime.torch_has_bfloat16())
    assert 1e-6 < abs(halved - expected).max() < 0.05 * abs(expected).max()


def test_bytes_are_normalised_as_in_training(images):
    preprocessing = {"mean": [0.1, 0.5, 0.9], "std": [0.2, 0.3, 0.4]}
    x = normalize(torch.from_numpy(images).permute(0, 3, 1, 2), preprocessing).numpy()
    scale, shift = runtime._normalization(preprocessing)
    found = images * scale + shift
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), x, rtol=1e-5, atol=1e-5)


def test_the_runtime_is_chosen_by_what_is_there_and_by_how_much_there_is_to_do(monkeypatch):
    choose = runtime._choose_runtime
    assert choose(None, False, 1) == "onnxruntime"
    assert choose(None, False, runtime.OPENVINO_PAYS) == "openvino"
    assert choose(None, False, None) == "openvino"
    assert choose("openvino", False, 1) == "openvino"
    assert choose(None, True, 1) == "openvino"
    with pytest.raises(UsageError, match="--amp: ONNX Runtime computes in float32"):
        choose("onnxruntime", True, 1)

    there = {"openvino"}
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: name if name in there else None)
    assert choose(None, False, 1) == "openvino"
    with pytest.raises(UsageError, match="onnxruntime: is not installed; pip install onnxruntime"):
        choose("onnxruntime", False, 1)
    there = {"onnxruntime"}
    assert choose(None, False, None) == "onnxruntime"
    with pytest.raises(UsageError, match="--amp"):
        choose(None, True, None)
    there = {}
    with pytest.raises(UsageError, match=r"pip install -r requirements-deploy\.txt"):
        choose(None, False, 1)


def test_what_is_asked_for_must_fit_the_file(onnx_file, run_dir):
    with pytest.raises(UsageError, match=r"--runtime openvino: takes an \.onnx file"):
        open_network(run_dir / "best.pth", runtime="openvino")
    with pytest.raises(UsageError, match=r"--device cuda: an \.onnx file is computed on the CPU"):
        open_network(onnx_file, device="cuda")


@pytest.mark.parametrize("asked", RUNTIMES)
@pytest.mark.parametrize("keep", [0, 100, 50_000, None])
def test_a_damaged_file_is_one_line(onnx_file, tmp_path, asked, keep):
    data = onnx_file.read_bytes()[:keep] if keep is not None else b"no onnx file\n" * 1000
    (tmp_path / "bad.onnx").write_bytes(data)
    with pytest.raises(RunError, match=r"bad\.onnx: (no ONNX file|does not say)") as info:
        open_network(tmp_path / "bad.onnx", runtime=asked)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("asked", RUNTIMES)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("classes", None, "does not say its classes and its preprocessing"),
        ("preprocessing", "{", "does not say its classes and its preprocessing"),
        ("classes", '["a", "b"]', "names 2 classes, but answers"),
        ("classes", '["a", "a", "b", "c", "d"]', "one stands twice"),
        ("classes", '{"0": "a"}', "are no text"),
        ("preprocessing", '{"resize": 1e9}', "not 1 <= crop <= resize"),
        ("preprocessing", "[]", "not 1 <= crop <= resize"),
        ("preprocessing", "[" * 100_000, "does not say its classes and its preprocessing"),
        ("args", "[]", "but answers"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(onnx_file, tmp_path, asked, name, value, message):
    model = onnx.load(onnx_file)
    kept = {p.key: p.value for p in model.metadata_props if p.key != name}
    onnx.helper.set_model_props(model, kept | ({name: value} if value else {}))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(RunError, match=message):
        open_network(tmp_path / "other.onnx", runtime=asked)


@pytest.mark.parametrize("asked", RUNTIMES)
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("name", ["input", "x"])
def test_a_network_of_another_kind_is_refused(tmp_path, asked, side, name):
    """One that has the metadata, but is no classifier, nor for pictures of that size."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Relu", [name], ["logits"])],
        "graph",
        [helper.make_tensor_value_info(name, kind, ["n", 3, side, side])],
        [helper.make_tensor_value_info("logits", kind, ["n", 3, side, side])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    preprocessing = {"resize": 8, "crop": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    about = {"classes": json.dumps(list("abc")), "preprocessing": json.dumps(preprocessing)}
    helper.set_model_props(model, about | {"args": "{}"})
    onnx.save(model, tmp_path / "relu.onnx")
    with pytest.raises(RunError, match="but answers|classifies no batches"):
        open_network(tmp_path / "relu.onnx", runtime=asked)


@pytest.mark.parametrize("asked", RUNTIMES)
def test_a_loop_is_refused_before_it_runs(onnx_file, tmp_path, asked):
    """Of 2^62 turns, in a network that is otherwise one of ours."""
    helper, kind = onnx.helper, onnx.TensorProto
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go on"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", kind.INT64, []),
            helper.make_tensor_value_info("go", kind.BOOL, []),
            helper.make_tensor_value_info("x", kind.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go on", kind.BOOL, []),
            helper.make_tensor_value_info("y", kind.FLOAT, None),
        ],
    )
    model = onnx.load(onnx_file)
    model.graph.node[-1].output[0] = "before"
    loop = helper.make_node("Loop", ["turns", "", "before"], ["logits"], body=body)
    model.graph.node.append(loop)
    model.graph.initializer.append(helper.make_tensor("turns", kind.INT64, [], [2**62]))
    onnx.save(model, tmp_path / "loop.onnx")
    with pytest.raises(RunError, match=r"loop\.onnx: holds a loop"):
        open_network(tmp_path / "loop.onnx", runtime=asked)
    (tmp_path / "loop.onnx").write_bytes(b"\x22\x84\x00Loop")  # its length in two bytes
    with pytest.raises(RunError, match=r"loop\.onnx: holds a loop"):
        open_network(tmp_path / "loop.onnx", runtime=asked)

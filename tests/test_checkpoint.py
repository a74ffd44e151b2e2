"""Weight files: atomic writing, careful reading."""

import argparse
import os
import pickle
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision

import checkpoint
from cli import RunError, UsageError
from image import default_preprocessing
from model import build_model


def ours(model, name="shufflenet_v2_x0_5", **changes):
    return {
        "model": model.state_dict(),
        "model_name": name,
        "classes": ["a", "b", "c"],
        "preprocessing": default_preprocessing(name),
        "epoch": 1,
        "metrics": {"val_accuracy": 0.5},
        "args": {"lr": 0.1},
    } | changes


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model("shufflenet_v2_x0_5", 3).eval()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save({"x": torch.zeros(3)}, path)
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save({"x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pth"]


def test_a_checkpoint_of_ours_round_trips(tmp_path, network):
    checkpoint.save(ours(network), tmp_path / "best.pth")
    read = checkpoint.load_trained(tmp_path / "best.pth")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(read.model(x), network(x))
    assert not read.model.training
    assert read.model_name == "shufflenet_v2_x0_5"
    assert read.classes == ["a", "b", "c"]
    assert read.preprocessing == default_preprocessing("shufflenet_v2_x0_5")
    assert read.args == {"lr": 0.1}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", None])
def test_wrapped_weights_are_unwrapped(tmp_path, network, prefix, key):
    """Of DataParallel, torch.compile, Lightning and EMA."""
    state = {prefix + name: value for name, value in network.state_dict().items()}
    state["n_averaged"] = torch.tensor(3)
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pth")
    weights = checkpoint.state_dict_of(checkpoint.load(tmp_path / "w.pth"), "w.pth")
    assert weights.keys() == network.state_dict().keys()


def test_checkpoints_of_torchvisions_training_script_load_and_run_nothing(tmp_path, network):
    options = argparse.Namespace(lr=0.1, output_dir="x")
    torch.save({"model": network.state_dict(), "args": options}, tmp_path / "w.pth")
    file = checkpoint.load(tmp_path / "w.pth")
    assert file["args"] == options
    assert checkpoint.state_dict_of(file, "w.pth").keys() == network.state_dict().keys()
    torch.save({"args": argparse.Namespace(x=Attack())}, tmp_path / "evil.pth")
    with pytest.raises(RunError, match="holds Python objects, which are never run"):
        checkpoint.load(tmp_path / "evil.pth")


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_5", "shufflenet_v1_x0_25_g8"])
def test_a_bare_state_dict_tells_its_variant_and_takes_names_from_the_json_beside_it(
    tmp_path, name
):
    torch.save(build_model(name, 3).state_dict(), tmp_path / "w.pth")
    (tmp_path / "class_indices.json").write_text('{"0": "x", "1": "y", "2": "z"}')
    read = checkpoint.load_trained(tmp_path / "w.pth")
    assert (read.model_name, read.classes) == (name, ["x", "y", "z"])
    assert read.preprocessing["resize"] == (232 if name == "shufflenet_v2_x1_5" else 256)


def test_five_nameless_classes_are_taken_for_flowers_with_a_notice(tmp_path, capsys):
    torch.save(build_model("shufflenet_v2_x0_5", 5).state_dict(), tmp_path / "model-29.pth")
    read = checkpoint.load_trained(tmp_path / "model-29.pth")
    assert read.classes == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert "no class_indices.json beside" in capsys.readouterr().err


def test_weights_of_torchvision_are_named_by_torchvision(tmp_path):
    theirs = torchvision.models.shufflenet_v2_x0_5().eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    read = checkpoint.load_trained(tmp_path / "w.pth")
    assert (len(read.classes), read.classes[985]) == (1000, "daisy")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(read.model(x), theirs(x))


def test_classes_without_names_are_an_error_that_says_what_to_write(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"put a class_indices.json of 3 classes beside"):
        checkpoint.load_trained(tmp_path / "w.pth")
    (tmp_path / "class_indices.json").write_text('{"0": "x", "2": "z"}')
    with pytest.raises(UsageError, match="without a gap"):
        checkpoint.load_trained(tmp_path / "w.pth")


def test_weights_from_before_the_batch_counters_load(tmp_path, network):
    old = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pth")
    (tmp_path / "class_indices.json").write_text('{"0": "x", "1": "y", "2": "z"}')
    assert checkpoint.load_trained(tmp_path / "w.pth").model_name == "shufflenet_v2_x0_5"


def test_only_fc_may_be_replaced(network):
    weights = build_model("shufflenet_v2_x0_5", 1000).state_dict()
    with pytest.raises(
        UsageError, match=r"w.pth: .*fc.weight: \(1000, 1024\) for \(3, 1024\)|fc.b"
    ):
        checkpoint.load_weights(network, weights, "w.pth")
    before = network.fc.weight.clone()
    keys = checkpoint.load_weights(network, weights, "w.pth", new_fc=True)
    assert keys == (["fc.weight", "fc.bias"], [])
    assert torch.equal(network.fc.weight, before)
    assert torch.equal(network.conv1[0].weight, weights["conv1.0.weight"])


@pytest.mark.parametrize(
    ("trained_on", "kept"), [(None, True), (["a", "b", "c"], True), (["a", "b", "x"], False)]
)
def test_fc_is_kept_unless_it_was_trained_on_other_classes(
    tmp_path, network, capsys, trained_on, kept
):
    torch.save({"model": network.state_dict(), "classes": trained_on}, tmp_path / "w.pth")
    other = build_model("shufflenet_v2_x0_5", 3)
    checkpoint.load_pretrained(other, "shufflenet_v2_x0_5", tmp_path / "w.pth", ["a", "b", "c"])
    assert torch.equal(other.fc.weight, network.fc.weight) == kept
    missing = "missing keys []" if kept else "missing keys ['fc.weight', 'fc.bias']"
    err = capsys.readouterr().err
    assert missing in err
    assert ("fc is new, for 3 classes" in err) != kept


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("conv5.0.weight"), "conv5.0.weight: missing for"),
        (lambda w: w.update(extra=torch.zeros(1)), r"extra: \(1,\) for none"),
        (lambda w: w.update({"conv1.0.weight": torch.zeros(648)}), r"conv1.0.weight: \(648,\) for"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(network, change, words):
    weights = build_model("shufflenet_v2_x0_5", 3).state_dict()
    change(weights)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        checkpoint.load_weights(network, weights, "w.pth", new_fc=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_width_are_refused_with_the_model_to_name(network):
    weights = build_model("shufflenet_v2_x1_0", 3).state_dict()
    with pytest.raises(UsageError, match="^w.pth: use --model shufflenet_v2_x1_0; "):
        checkpoint.load_weights(network, weights, "w.pth")


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_nothing_in_a_file_is_ever_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"model": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(RunError, match="holds Python objects, which are never run"):
        checkpoint.load(tmp_path / "evil.pth")
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_a_single_bit_that_changed_is_noticed(tmp_path, network):
    checkpoint.save(ours(network), tmp_path / "best.pth")
    data = bytearray((tmp_path / "best.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "best.pth").write_bytes(data)
    with pytest.raises(RunError, match="is not what was written"):
        checkpoint.load(tmp_path / "best.pth")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"not weights",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-30],
        lambda data: data[:2000] + b"\0" * 500 + data[2500:],
    ],
    ids=["empty", "text", "half", "tail cut", "overwritten"],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, network, spoil):
    path = tmp_path / "best.pth"
    checkpoint.save(ours(network), path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises((RunError, UsageError), match=r"best.pth: "):
        checkpoint.load_trained(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds no weights"),
        ({"a": 1}, "'a' is no tensor"),
        ({"a": torch.zeros(2)}, "fit no network"),
    ],
)
def test_a_file_of_something_else_is_one_clear_error(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises((RunError, UsageError), match=words):
        checkpoint.load_trained(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_file_is_refused_without_advice_to_run_it(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(RunError) as caught:
        checkpoint.load(tmp_path / "script.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a", "b"]}, "w.pth: .* do not fit"),
        ({"classes": None}, "not a checkpoint of train.py"),
        ({"model_name": "resnet18"}, "no model is called 'resnet18'"),
        ({"model_name": "shufflenet_v2_x1_0"}, "use --model shufflenet_v2_x0_5"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_one_clear_error(tmp_path, network, changes, words):
    checkpoint.save(ours(network, **changes), tmp_path / "w.pth")
    with pytest.raises((RunError, UsageError), match=words):
        checkpoint.load_trained(tmp_path / "w.pth")


def test_mutated_checkpoints_give_a_network_or_one_line(tmp_path):
    path, generator = tmp_path / "w.pth", np.random.default_rng(0)
    small = "shufflenet_v1_x0_25_g3"
    checkpoint.save(ours(build_model(small, 3), small), path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(25):
        data = whole.copy()
        places = generator.integers(0, len(data), 3)
        data[generator.choice([places, places % 2000, -1 - places % 2000])] = generator.integers(
            256
        )
        path.write_bytes(data[: generator.choice([len(data), generator.integers(1, len(data))])])
        try:
            assert len(checkpoint.load_trained(path).classes) == 3
        except (RunError, UsageError) as error:
            assert str(error).count("\n") == 0  # noqa: PT017 (either outcome is right)


def test_imagenet_weights_without_a_network_say_what_to_put_where(tmp_path):
    code = (
        "import cli, checkpoint; cli.run(lambda: checkpoint.imagenet_weights('shufflenet_v2_x0_5'))"
    )
    dead = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | dead,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=os.path.dirname(checkpoint.__file__),
    )
    assert result.returncode == 1
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "https://download.pytorch.org/models/shufflenetv2_x0.5-f707e7126e.pth" in error[0]
    assert str(tmp_path / "hub/checkpoints/shufflenetv2_x0.5-f707e7126e.pth") in error[0]
    assert "Traceback" not in result.stderr


def test_imagenet_weights_exist_for_v2_alone():
    with pytest.raises(UsageError, match="torchvision has none for shufflenet_v1_x1_0_g3"):
        checkpoint.imagenet_weights("shufflenet_v1_x1_0_g3")


def test_imagenet_weights_put_in_place_by_hand_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    place = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    place.parent.mkdir(parents=True)
    state = build_model("shufflenet_v2_x0_5").state_dict()
    torch.save(state, place)
    found = checkpoint.imagenet_weights("shufflenet_v2_x0_5")
    assert torch.equal(found["conv1.0.weight"], state["conv1.0.weight"])

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Attack()}, place)
    with pytest.raises(RunError, match="^fetch https://download.pytorch.org/models/shufflenetv2"):
        checkpoint.imagenet_weights("shufflenet_v2_x0_5")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("text", ["no json", "[1]", '{"0": 5}', '{"1": "a"}'])
def test_class_indices_that_are_none_are_one_line(tmp_path, text):
    (tmp_path / "class_indices.json").write_text(text)
    with pytest.raises(UsageError, match='expected {"0": "NAME", "1": ...} without a gap'):
        checkpoint.read_class_indices(tmp_path / "class_indices.json")

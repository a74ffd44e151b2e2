"""Weight files: atomic writing, careful reading."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
import torchvision

import checkpoint
from cli import RunError, UsageError
from files import replacing
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


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


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
    read = checkpoint.load_classifier(tmp_path / "best.pth")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(read.model(x), network(x))
    assert not read.model.training
    assert read.model_name == "shufflenet_v2_x0_5"
    assert read.classes == ["a", "b", "c"]
    assert read.preprocessing == default_preprocessing("shufflenet_v2_x0_5")
    assert read.args == {"lr": 0.1}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_wrapped_weights_are_unwrapped(tmp_path, network, prefix, key):
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pth")
    weights = checkpoint.state_dict_of(checkpoint.load(tmp_path / "w.pth"), "w.pth")
    assert weights.keys() == network.state_dict().keys()


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_5", "shufflenet_v1_x0_25_g8"])
def test_a_bare_state_dict_tells_its_variant_and_takes_names_from_the_json_beside_it(
    tmp_path, name
):
    torch.save(build_model(name, 3).state_dict(), tmp_path / "w.pth")
    (tmp_path / "class_indices.json").write_text('{"0": "x", "1": "y", "2": "z"}')
    read = checkpoint.load_classifier(tmp_path / "w.pth")
    assert (read.model_name, read.classes) == (name, ["x", "y", "z"])
    assert read.preprocessing["resize"] == (232 if name == "shufflenet_v2_x1_5" else 256)


def test_a_bare_state_dict_of_five_classes_is_named_by_the_json_of_the_repository(tmp_path):
    torch.save(build_model("shufflenet_v2_x0_5", 5).state_dict(), tmp_path / "model-29.pth")
    read = checkpoint.load_classifier(tmp_path / "model-29.pth")
    assert read.classes == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


def test_weights_of_torchvision_are_named_by_torchvision(tmp_path):
    theirs = torchvision.models.shufflenet_v2_x0_5().eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    read = checkpoint.load_classifier(tmp_path / "w.pth")
    assert (len(read.classes), read.classes[985]) == (1000, "daisy")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(read.model(x), theirs(x))


def test_classes_without_names_are_an_error_that_says_what_to_write(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"3 classes and no names; put a class_indices.json"):
        checkpoint.load_classifier(tmp_path / "w.pth")
    (tmp_path / "class_indices.json").write_text('{"0": "x", "2": "z"}')
    with pytest.raises(UsageError, match="without a gap"):
        checkpoint.load_classifier(tmp_path / "w.pth")


def test_weights_from_before_the_batch_counters_load(tmp_path, network):
    old = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pth")
    (tmp_path / "class_indices.json").write_text('{"0": "x", "1": "y", "2": "z"}')
    assert checkpoint.load_classifier(tmp_path / "w.pth").model_name == "shufflenet_v2_x0_5"


def test_only_a_head_may_be_replaced(network):
    weights = build_model("shufflenet_v2_x0_5", 1000).state_dict()
    assert not checkpoint.head_fits(network, weights)
    with pytest.raises(UsageError, match=r"w.pth does not fit.*fc.weight is \(1000, 1024\)"):
        checkpoint.load_weights(network, weights, "w.pth")
    before = network.fc.weight.clone()
    keys = checkpoint.load_weights(network, weights, "w.pth", new_head=True)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    assert torch.equal(network.fc.weight, before)
    assert torch.equal(network.conv1[0].weight, weights["conv1.0.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("conv5.0.weight"), "conv5.0.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is unexpected"),
        (lambda w: w.update({"conv1.0.weight": torch.zeros(24, 1, 3, 3)}), "conv1.0.weight is"),
        (lambda w: w.update({"conv1.0.weight": torch.zeros(648)}), r"is \(648,\), the model's"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(network, change, words):
    weights = build_model("shufflenet_v2_x0_5", 3).state_dict()
    change(weights)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        checkpoint.load_weights(network, weights, "w.pth", new_head=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_width_are_refused_with_a_hint(network):
    weights = build_model("shufflenet_v2_x1_0", 3).state_dict()
    with pytest.raises(UsageError, match="and .* more; it is a shufflenet_v2_x1_0: use"):
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


@pytest.mark.parametrize("field", ["model_name", "classes", "preprocessing", "args", "resize"])
def test_a_list_that_doubles_again_and_again_is_soon_refused(tmp_path, network, field):
    """A few hundred bytes whose text would have 2^60 words."""
    doubled = ["ha"]
    for _ in range(60):
        doubled = [doubled, doubled]
    file = ours(network)
    if field == "resize":
        file["preprocessing"] = file["preprocessing"] | {"resize": doubled}
    else:
        file[field] = {"a": doubled} if field == "args" else doubled
    torch.save(file, tmp_path / "laugh.pth")
    if field == "args":
        assert checkpoint.load_classifier(tmp_path / "laugh.pth").args == {}
    else:
        with pytest.raises(RunError, match=r"laugh\.pth: ") as info:
            checkpoint.load_classifier(tmp_path / "laugh.pth")
        assert len(str(info.value)) < 2000


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(10**7)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert checkpoint.load(tmp_path / "plain.pth")
    with pytest.raises(RunError, match=r"bytes that unpack to 40,\d{3},\d{3}\)$"):
        checkpoint.load(tmp_path / "bomb.pth")


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
        checkpoint.load_classifier(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds no weights"),
        ({"a": 1}, "'a' is no tensor"),
        ({"a": torch.tensor([float("nan")])}, "a holds values that are not finite"),
        ({"a": torch.zeros(2)}, "fit no network"),
        ({"a": torch.zeros(1).expand(10**12)}, "a is not stored as it is"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "a is not stored as it is"),
        ({"a": torch.zeros(9, device="meta")}, "a is not stored as it is"),
        ({"a": torch.quantize_per_tensor(torch.zeros(3), 1, 0, torch.qint8)}, "not stored as it"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch on quantized and sparse tensors
def test_a_file_of_something_else_is_one_clear_error(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises((RunError, UsageError), match=words):
        checkpoint.load_classifier(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a", "b"]}, "does not fit the model: fc.weight"),
        ({"classes": ["a", "a", "b"]}, "stands twice"),
        ({"classes": [1, 2, 3]}, "no text"),
        ({"classes": None}, "classes is missing"),
        ({"model_name": "resnet18"}, "no model is called 'resnet18'"),
        ({"model_name": "shufflenet_v2_x1_0"}, "does not fit"),
        ({"preprocessing": {"resize": 10**9, "crop": 224}}, "resize 1000000000"),
        ({"preprocessing": {"resize": 256, "crop": 224, "mean": [1], "std": [1]}}, "no colours"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_one_clear_error(tmp_path, network, changes, words):
    checkpoint.save(ours(network, **changes), tmp_path / "best.pth")
    with pytest.raises((RunError, UsageError), match=words):
        checkpoint.load_classifier(tmp_path / "best.pth")


def test_imagenet_weights_without_a_network_say_what_to_put_where(tmp_path):
    code = (
        "import cli, checkpoint; cli.run(cli.Parser(), lambda args: "
        "checkpoint.imagenet_weights('shufflenet_v2_x0_5'))"
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
    with pytest.raises(UsageError, match="publishes none for shufflenet_v1_x1_0_g3"):
        checkpoint.imagenet_weights("shufflenet_v1_x1_0_g3")


def test_imagenet_weights_put_in_place_by_hand_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    place = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    place.parent.mkdir(parents=True)
    state = build_model("shufflenet_v2_x0_5").state_dict()
    torch.save(state, place)
    found, url = checkpoint.imagenet_weights("shufflenet_v2_x0_5")
    assert url.endswith("/shufflenetv2_x0.5-f707e7126e.pth")
    assert torch.equal(found["conv1.0.weight"], state["conv1.0.weight"])

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Attack()}, place)
    with pytest.raises(RunError, match=r"\.pth: damaged, or .*\(it is damaged, or holds Python"):
        checkpoint.imagenet_weights("shufflenet_v2_x0_5")
    assert not (tmp_path / "attacked").exists()
    torch.save([state], place)
    with pytest.raises(RunError, match="holds a list, expected a state dict"):
        checkpoint.imagenet_weights("shufflenet_v2_x0_5")


def test_the_class_names_of_the_repository_are_those_of_flower_photos():
    path = os.path.join(os.path.dirname(checkpoint.__file__), "class_indices.json")
    with open(path) as file:
        assert list(json.load(file)) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"0": "\\ud800"}', '{"0": 5}', '{"1": "a"}'])
def test_class_indices_that_are_none_are_one_line(tmp_path, text):
    (tmp_path / "class_indices.json").write_text(text)
    with pytest.raises(UsageError, match='expected {"0": "NAME", "1": ...} without a gap'):
        checkpoint.read_class_indices(tmp_path / "class_indices.json")

"""Weight files of ours and of others: what is read, what is refused, and that nothing is run."""

import argparse
import copy
import json
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from model import build_model, default_preprocessing
from shufflenet.common.messages import RunError, UsageError
from shufflenet.inference import checkpoint
from shufflenet.inference.metadata import Metadata

X0_5, TINY = "shufflenet_v2_x0_5", "shufflenet_v1_x0_25_g3"
SMALL = build_model(TINY, 3)


def ours(network, name=X0_5, **changes):
    about = {"model_name": name, "classes": ["a", "b", "c"], "args": {"lr": 0.1}, "epoch": 1}
    about["preprocessing"] = default_preprocessing(name)
    return {"model": network.state_dict()} | about | changes


@pytest.fixture
def network():
    return build_model(X0_5, 3).eval()


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A place for weights in an empty working folder, with names for three classes beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "class_indices.json").write_text('{"0": "x", "1": "y", "2": "z"}')
    return tmp_path / "w.pth"


def test_a_checkpoint_of_ours_round_trips_and_a_single_bit_that_changed_is_noticed(path, network):
    checkpoint.save(ours(network), path)
    model, found = checkpoint.load_trained(path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), network(x))  # in eval mode
    assert found == Metadata(X0_5, ["a", "b", "c"], default_preprocessing(X0_5), {"lr": 0.1})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="Bad CRC-32 for file"):
        checkpoint.load(path)


WRAPPERS = [(lambda network: network, None), (nn.DataParallel, "model"), (AveragedModel, "net")]
WRAPPERS += [(lambda network: nn.ModuleDict({"model": network}), "state_dict")]  # Lightning
WRAPPERS += [(lambda network: nn.ModuleDict({"_orig_mod": network}), "model_state_dict")]  # compile


@pytest.mark.parametrize(("wrapper", "key"), WRAPPERS)
def test_what_wraps_the_weights_is_taken_off(path, network, wrapper, key):
    state = wrapper(network).state_dict()
    if key:  # as of torchvision's training script
        torch.save({key: state, "args": argparse.Namespace(lr=0.5)}, path)
    else:  # as of torch before 0.4.1
        torch.save({name: state[name] for name in state if "num_batches" not in name}, path)
    model, found = checkpoint.load_trained(path)
    assert found == Metadata(X0_5, ["x", "y", "z"], default_preprocessing(X0_5), {})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), network(x))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


FOREIGN = [
    lambda path: torch.save({"args": argparse.Namespace(lr=Attack())}, path),
    lambda path: path.write_bytes(pickle.dumps(Attack())),
    lambda path: torch.jit.script(nn.Linear(1, 1)).save(path),
]


@pytest.mark.parametrize("write", FOREIGN)
def test_nothing_in_a_file_is_ever_run_nor_is_it_advised_to(path, write, recwarn):
    write(path)
    recwarn.clear()
    with pytest.raises(RunError, match=f"^{path}: not a weight file, or damaged: .* are never run"):
        checkpoint.load(path)
    assert not os.path.exists("attacked")
    assert not recwarn.list  # by which torch would speak to the user


def test_class_names_come_from_beside_the_file_or_from_the_repository_or_torchvision(path, capsys):
    torch.save(build_model(X0_5, 5).state_dict(), path)
    with pytest.raises(UsageError, match=f"json names 3 classes, but {path} has 5 outputs"):
        checkpoint.load_trained(path)
    path.with_name("class_indices.json").unlink()
    expected = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert checkpoint.load_trained(path)[1].classes == expected
    said = f"beside {path}: its classes may be {', '.join(expected)}\n"
    assert said in capsys.readouterr().err
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), path)
    assert checkpoint.load_trained(path)[1].classes[985] == "daisy"
    torch.save(build_model(X0_5, 4).state_dict(), path)
    with pytest.raises(UsageError, match="names for its 4 classes are missing; put a .*json there"):
        checkpoint.load_trained(path)


NAMES = ["daisy", "dent-de-lion", "玫瑰"]
TABLE = {str(index): name for index, name in enumerate(NAMES)}
WRITTEN = [json.dumps(TABLE), json.dumps(NAMES), json.dumps({n: int(i) for i, n in TABLE.items()})]
WRITTEN += [json.dumps({index: [f"n0000000{index}", name] for index, name in TABLE.items()})]


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
def test_class_files_are_read_as_people_write_them(path, text, encoding):
    text = json.dumps(json.loads(text), ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    assert checkpoint.read_class_indices(path) == NAMES


REFUSED = ['{"1": "a"}', '{"0": "a", "2": "b"}', "[]x", "3", '{"0": 1.5}', '{"0": []}', "", "\xff"]
REFUSED += ['{"0": "a", "00": "b"}', '{"a": 0, "b": 0}', '{"a": {}}', "[null]"]


@pytest.mark.parametrize("text", REFUSED)
def test_other_class_files_are_refused_in_plain_words(path, text):
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=f'^{path}: not the names of .* expected {{"0": "NAME", '):
        checkpoint.read_class_indices(path)


def renamed(prefix, **more):
    """The weights of a network under other keys, and tensors that it does not have."""
    return lambda state: {prefix + name: value for name, value in state.items()} | more


AROUND = {
    "a prefix": renamed("student.net.0."),
    "of another network": renamed("model.", **{"criterion.weight": torch.ones(3)}),
    "keys that are no text": lambda state: state | {("a", 1): torch.ones(1), 3: 4},
    "a name of somebody else": lambda state: {"model_name": "mine", "state_dict": state},
    "text of NumPy": lambda state: {"net": state, "names": np.array(["a", "bb"])},
    "counters": renamed("", **{"total_ops": torch.ones(1), "conv1.0.total_ops": torch.ones(1)}),
    "deep inside": lambda state: {
        "epoch": 3,
        "best": {"ema": {"module": renamed("module.")(state)}},
    },
    "a number of NumPy": lambda state: {"net": state, "best": np.float64(0.5), "n": np.int64(3)},
    "an array": lambda state: {"net": state, "curve": np.arange(6.0).reshape(2, 3)},
    "dropout before fc": lambda state: {
        name.replace("fc.", "fc.1."): value for name, value in state.items()
    },
}


@pytest.mark.parametrize("what", AROUND)
def test_complete_weights_are_loaded_whatever_lies_around_them(path, network, what):
    torch.save(AROUND[what](network.state_dict()), path)
    model, _ = checkpoint.load_trained(path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), network(x))


def test_of_two_networks_in_a_file_that_of_the_wrapper_is_taken_and_the_other_named(
    path, network, capsys
):
    other = build_model(X0_5, 3).state_dict()
    torch.save({"ema": other, "state_dict": network.state_dict()}, path)
    assert torch.equal(checkpoint.load_trained(path)[0].fc.weight, network.fc.weight)
    torch.save(renamed("student.", **renamed("teacher.")(other))(network.state_dict()), path)
    assert torch.equal(checkpoint.load_trained(path)[0].fc.weight, network.fc.weight)
    assert (
        f"{path}: left what the network does not have, teacher.conv1.0" in capsys.readouterr().err
    )


def test_what_is_left_is_named(path, network, capsys):
    state = network.state_dict() | {f"layer{number}.x": torch.ones(1) for number in range(9)}
    torch.save(state, path)
    assert not checkpoint.load_pretrained(network, X0_5, str(path), ["x", "y", "z"])
    said = "unexpected keys [layer0.x, layer1.x, layer2.x, layer3.x, layer4.x and 4 more]\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_file_without_check_sums_is_read(path, network):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(network.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.load_trained(path)[0]


OTHERS = {
    "version https://git-lfs.github.com/spec/v1\noid": "a Git LFS pointer; run `git lfs pull`"
}
OTHERS |= {"<!doctype html>": "a web page", "epoch 1": "text", "": "empty"}


@pytest.mark.parametrize("content", OTHERS)
def test_a_file_that_is_something_else_is_called_by_its_name(path, content):
    path.write_text(content)
    with pytest.raises(RunError, match=f"^{path}: no weight file, but {OTHERS[content]}$"):
        checkpoint.load(path)


def test_whatever_is_damaged_there_is_a_network_or_one_line(path):
    """Bytes of the file or, under a check sum that fits, of the pickle in it."""
    draw, networks = random.Random(0), 0
    checkpoint.save(ours(SMALL, TINY), path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    name, whole = next(name for name in entries if "data.pkl" in name), path.read_bytes()
    for number in range(int(os.environ.get("FUZZ", "60"))):
        data = bytearray(entries[name] if number % 2 else whole)
        for _ in range(draw.randint(0, 3)):
            at, count = int(draw.random() * len(data)), draw.choice((0, 1, 8, len(data)))
            data[at : at + count] = draw.randbytes(draw.choice((0, 1, 8)))
        path.write_bytes(data)
        if number % 2:
            with zipfile.ZipFile(path, "w") as file:
                for each, content in (entries | {name: data}).items():
                    file.writestr(each, bytes(content))
        try:
            networks += len(checkpoint.load_trained(path)[1].classes) == 3
        except (RunError, UsageError) as error:
            message = str(error)
            assert (message.startswith(str(path)), message.count("\n")) == (True, 0)
    assert networks


WRONG = [
    ([1, 2], "holds a list, expected a state dict"),
    ({}, "holds no weights of a network of this repository, no conv1.0.weight"),
    ({"a": torch.zeros(2)}, "holds no weights"),
    ({"conv1.0.weight": torch.zeros(2)}, "fit no network"),
    (
        ours(SMALL, TINY, classes=["a", "b"]),
        r"weight: \(3, 240\) for \(2, 240\); outputs and",
    ),
    (ours(SMALL, TINY, preprocessing={}), "not a checkpoint of train.py"),
    (ours(SMALL, TINY, preprocessing=default_preprocessing(TINY) | {"crop": 0}), "not a checkp"),
    (ours(SMALL, TINY, classes=[0, 1, 2]), "classes, preprocessing or others are not what they"),
    (ours(SMALL, TINY, trained_on=5), "not a checkpoint of train.py"),
    (SMALL.state_dict() | {"fc.bias": torch.zeros(3).to_sparse()}, "tensors cannot be copied, su"),
    (ours(SMALL, "resnet18"), "not a checkpoint .*no model is called 'resnet18'"),
    (ours(SMALL, X0_5), f"; use --model {TINY}$"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_another_file_or_one_that_contradicts_itself_is_one_line(path, content, words):
    torch.save(content, path)
    with pytest.raises((RunError, UsageError), match=words):
        checkpoint.load_trained(path)


UNFIT = [
    (lambda w: w.update({"conv1.0.weight": torch.zeros(9)}), r"\(9,\) for \(24, 3, 3, 3\)"),
    (lambda w: w.pop("conv5.0.weight"), "conv5.0.weight: missing for"),
]


@pytest.mark.parametrize(("change", "words"), UNFIT)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(network, change, words):
    weights, before = build_model(X0_5, 3).state_dict(), copy.deepcopy(network.state_dict())
    change(weights)
    with pytest.raises(UsageError, match=f"^w.pth: .*{words}"):
        checkpoint.load_weights(network, weights, "w.pth", new_fc=True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


FC = [(1000, None, True), (3, None, False), (3, ["a", "b", "c"], False), (3, ["a", "b", "d"], True)]


@pytest.mark.parametrize(("outputs", "classes", "new"), FC)
def test_fc_is_new_where_outputs_or_classes_differ(path, network, capsys, outputs, classes, new):
    weights, before = build_model(X0_5, outputs).state_dict(), network.fc.weight.clone()
    torch.save({"model": weights, "classes": classes}, path)
    checkpoint.load_pretrained(network, X0_5, str(path), ["a", "b", "c"])
    assert torch.equal(network.conv1[0].weight, weights["conv1.0.weight"])
    assert torch.equal(network.fc.weight, before if new else weights["fc.weight"])
    keys, added = ("'fc.weight', 'fc.bias'", "fc is new, for 3 classes; ") if new else ("", "")
    said = f"loaded {path}: {added}missing keys [{keys}], unexpected keys []\n"
    assert capsys.readouterr().err == said


def test_imagenet_weights_come_from_the_cache_or_one_line_says_what_to_put_there(path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(path.parent))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # which would know another proxy
    place = path.parent / "hub/checkpoints/shufflenetv2_x0.5-f707e7126e.pth"
    url = f"https://download.pytorch.org/models/{place.name}"
    with pytest.raises(
        RunError, match=f"^{url} cannot be had .*refused.*: fetch it and put it at {place}, or"
    ):
        checkpoint.imagenet_file(X0_5)
    torch.save(build_model(X0_5).state_dict(), place)
    assert checkpoint.load(checkpoint.imagenet_file(X0_5))["fc.weight"].shape == (1000, 1024)
    torch.save({"model": Attack()}, place)
    with pytest.raises(RunError, match=f"^(?!.*weights_only).*{place}"):
        checkpoint.load(checkpoint.imagenet_file(X0_5))
    assert not os.path.exists("attacked")
    with pytest.raises(UsageError, match="torchvision has none for shufflenet_v1_x1_0_g3"):
        checkpoint.imagenet_file("shufflenet_v1_x1_0_g3")

"""CIFAR-10, from an archive in its format on this machine, and networks for small images."""

import hashlib
import http.server
import io
import json
import pickle
import random
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.datasets import CIFAR10

import eval as evaluation
import export
import predict
import train
from model import build_model, default_preprocessing
from my_dataset import RandomShift, mirror
from shufflenet.common.messages import RunError, UsageError
from shufflenet.reading.download import prepare_data
from shufflenet.reading.image import load_centre

CLASSES = ["airplane", "automobile", "bird"]


def md5(data):
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """Serves an archive like the original one: 60 images to train and 12 to test, each of one
    colour per class."""
    rng, files = np.random.default_rng(0), {"batches.meta": {"label_names": CLASSES}}
    for name, count in [(f"data_batch_{k}", 12) for k in range(1, 6)] + [("test_batch", 12)]:
        labels = [i % 3 for i in range(count)]
        pixels = rng.integers(0, 90, (count, 3, 1024), dtype=np.uint8)
        pixels[range(count), labels] += 150  # red, green or blue
        files[name] = {"data": pixels.reshape(count, 3072), "labels": labels}
    files, buffer = {name: pickle.dumps(content) for name, content in files.items()}, io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    folder = tmp_path_factory.mktemp("server")
    (folder / CIFAR10.filename).write_bytes(buffer.getvalue())
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{served.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", url)
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(buffer.getvalue()))
        sums = [[name, md5(data)] for name, data in files.items()]
        monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[0][1]})
        monkeypatch.setattr(CIFAR10, "train_list", sums[1:6])
        monkeypatch.setattr(CIFAR10, "test_list", sums[6:])
        yield served
        served.shutdown()


def test_the_archive_becomes_class_folders_and_nothing_else_is_left(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / prepare_data("data/cifar10")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10"]
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*.png"))
    expected = [f"train/{CLASSES[i % 12 % 3]}/{i:05d}.png" for i in range(60)]
    assert found == sorted(expected + [f"test/{CLASSES[i % 3]}/{i:05d}.png" for i in range(12)])
    green = np.array(Image.open(target / "test" / "automobile" / "00001.png"))
    assert green.shape == (32, 32, 3)
    assert green.mean((0, 1)).argmax() == 1
    assert server.server_address[0] in capsys.readouterr().err


def test_without_the_archive_or_with_another_one_a_line_says_what_to_fetch(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    monkeypatch.chdir(tmp_path)
    place = "data/cifar-10-python.tar.gz"
    for _ in range(2):
        with pytest.raises(
            RunError, match=f"^{CIFAR10.url} cannot .*: fetch it and put it at {place}, or"
        ):
            prepare_data("data/cifar10")
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.usefixtures("elsewhere", "server")
def test_cifar10_is_trained_evaluated_predicted_and_exported_at_32_pixels(capsys):
    words = ["--data-path", "data/cifar10", "--model", "shufflenet_v2_x0_5", "--epochs", 4]
    summary = train.main([*words, "-b", 10, "--lr", 0.02, "-j", 0, "--output-dir", "out"])
    assert (summary["train_images"], summary["val_images"]) == (60, 12)
    assert "the images are small, and so is the network" in capsys.readouterr().err
    file = torch.load("out/best.pth", weights_only=True)
    assert (file["preprocessing"]["resize"], file["preprocessing"]["crop"]) == (32, 32)
    result = evaluation.main(["--weights", "out/best.pth"])
    assert result["accuracy"] == summary["best_accuracy"]
    export.main(["--weights", "out/best.pth", "--output", "small.onnx"])
    image = "data/cifar10/test/bird/00002.png"
    torch_says, onnx_says = (
        {guess["class"]: guess["prob"] for guess in answer["predictions"]}
        for weights in ("out/best.pth", "small.onnx")
        for answer in predict.main([image, "--weights", weights])
    )
    assert onnx_says == pytest.approx(torch_says, abs=1e-5)
    assert "crop 32" in capsys.readouterr().err
    resumed = train.main(["--resume", "out", "--epochs", 5])
    assert resumed["epochs"] == 5
    words = [*words[:4], "--weights", "out/best.pth", "--freeze-layers", "--epochs", 1]
    train.main([*words, "--output-dir", "again"])  # its weights are of small images
    assert json.loads(Path("again/args.json").read_text())["small_images"] is True
    with pytest.raises(
        UsageError, match="^--train-size: small images, as of --weights, are not resized; omit"
    ):
        train.main([*words, "--no-cache-features", "--train-size", 64])


def test_the_option_wins_over_the_size_and_weights_of_large_images_keep_it(
    flowers, torchvision_file
):
    images = sorted((flowers / "roses").iterdir())
    for words, small in ((["--small-images"], True), (["--weights", torchvision_file], False)):
        args = train.build_parser().parse_args([*words, "--model", "shufflenet_v2_x0_5"])
        assert train.choose_small_images(args, images) is small
        network, _ = train.build_network(args, ["a", "b"], small, None)
        assert isinstance(network.maxpool, torch.nn.Identity) is small


@pytest.mark.parametrize(("small", "expected"), [(1, False), (4, False), (6, True), (9, True)])
def test_most_images_decide_not_the_first(tmp_path, small, expected):
    images = []
    for number in range(9):
        side = 32 if number < small else 64
        Image.new("RGB", (side, side)).save(path := tmp_path / f"{number}.png")
        images.append(str(path))
    args = train.build_parser().parse_args([])
    assert train.choose_small_images(args, images) is expected


def test_a_network_for_small_images_has_the_same_keys_and_an_eighth_of_the_side():
    name = "shufflenet_v1_x1_0_g3"
    small, large = build_model(name, 10, small_images=True).eval(), build_model(name, 10).eval()
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (small, large)]
    assert shapes[0] == shapes[1]
    x = torch.randn(2, 3, 32, 32)
    assert small.feature_map(x).shape[2:] == (4, 4)
    assert large.feature_map(x).shape[2:] == (1, 1)
    assert torch.equal(small(x), small.fc(small.feature_map(x).mean([2, 3])))


def test_it_equals_torchvisions_with_the_same_change():
    torch.manual_seed(0)
    theirs = models.shufflenet_v2_x0_5(num_classes=10).eval()
    theirs.conv1[0].stride, theirs.maxpool = (1, 1), torch.nn.Identity()
    ours = build_model("shufflenet_v2_x0_5", 10, small_images=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_small_images_are_shifted_and_mirrored_and_read_once(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(32), np.arange(32)[:, None]  # its place
    Image.fromarray(pixels).save(path := tmp_path / "a.png")
    about = default_preprocessing("shufflenet_v2_x1_0", small_images=True)
    assert (load_centre(path, about) == pixels).all()
    read, shifts = RandomShift(about), set()
    for seed in range(2000):
        rng = random.Random(seed)
        drawn = mirror(read(path, rng), rng)
        path.unlink(missing_ok=True)
        assert drawn.shape == (32, 32, 3)
        middle, left, right = drawn[16, 16], drawn[16, 15], drawn[16, 17]
        mirrored = int(left[0]) > int(right[0])
        column = 15 if mirrored else 16
        shifts.add((mirrored, int(middle[0]) - column, int(middle[1]) - 16))
    assert {shift[0] for shift in shifts} == {False, True}
    assert {shift[1:] for shift in shifts} == {(x, y) for x in range(-4, 5) for y in range(-4, 5)}

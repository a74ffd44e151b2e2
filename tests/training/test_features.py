"""Features of frozen layers, computed once, and the head that learns from them."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import utils
from model import build_model, default_preprocessing
from my_dataset import DeviceLoader, evaluation_set
from shufflenet.common.messages import RunError
from shufflenet.inference import runtimes
from shufflenet.reading import image
from shufflenet.reading.folders import BadImages, find_images, with_labels
from shufflenet.reading.image import ImageError
from shufflenet.training import features

pytestmark = pytest.mark.usefixtures("elsewhere")

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # features are up to 50 and differ by 1.5 between images
PREPROCESSING = default_preprocessing("shufflenet_v2_x0_5")


@pytest.fixture
def network():
    """x0.5 with the batch-norm statistics of a batch, not those of a fresh network."""
    torch.manual_seed(0)
    model = build_model("shufflenet_v2_x0_5", 5).train()
    model.apply(lambda module: setattr(module, "momentum", 1.0))
    model(torch.randn(8, 3, 64, 64))
    utils.freeze_layers(model)
    return model


@pytest.fixture
def images(flowers):
    paths, labels = with_labels(find := find_images(flowers), list(find))
    return paths[4:12], labels[4:12]


def compute(network, paths, preprocessing=PREPROCESSING):
    values, row_of = features.cached_features(network, paths, preprocessing, CPU, BadImages(10))
    assert row_of.keys() == set(paths)
    return values[[row_of[path] for path in paths]]


def head_and_loaders(network, train, val):
    paths = [*train[0], *val[0]]
    cached = features.cached_features(network, paths, PREPROCESSING, CPU, BadImages(10))
    return features.head_and_loaders(network.fc, cached, train, val, 3, seed=3)


def head_of(fc, x):
    return features.Head(fc, *torch.std_mean(x.double(), 0, correction=0))


def was_read(capsys):
    return "read from" in capsys.readouterr().err.splitlines()[-1]


def test_the_head_gets_every_image_with_its_class_in_the_order_of_seed_and_epoch(network, images):
    paths, labels = images
    train, val = (paths[2:], labels[2:]), (paths[:2], labels[:2])
    head, loader, val_loader = head_and_loaders(network, train, val)
    found = torch.tensor(compute(network, paths))
    torch.testing.assert_close(head.mean, found[2:].mean(0))  # of the training images alone
    std = found[2:].std(0, correction=0)
    torch.testing.assert_close(head.std, std.clamp(min=std.median()))
    expected = nn.functional.cross_entropy(head(found[:2]), torch.tensor(labels[:2])).item()
    figures = utils.validate(head, val_loader, CPU).figures()
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)

    plain = evaluation_set(*train, PREPROCESSING)
    plain = DeviceLoader(plain, CPU, PREPROCESSING, 3, 0, BadImages(6), seed=3)
    network.eval()
    for each in (plain, loader):
        each.set_epoch(1)
    for (pixels, same), (x, y) in zip(plain, loader, strict=True):
        assert torch.equal(y, same)
        torch.testing.assert_close(x, network.forward_features(pixels), **CLOSE)


def test_the_head_starts_as_fc_and_what_it_learns_is_folded_into_fc(network, images):
    x = torch.tensor(compute(network, images[0]))
    x[:, 7] = 5  # a dead channel
    head = head_of(network.fc, x)
    torch.testing.assert_close(head(x), network.fc(x), rtol=1e-4, atol=1e-5)
    nn.init.normal_(head.linear.weight, std=0.05)
    head.fold_into(network.fc)
    torch.testing.assert_close(network.fc(x), head(x), rtol=1e-3, atol=2e-3)


def test_standardised_features_are_learnt_where_plain_ones_are_not():
    """What tells the classes apart has a hundredth of the scale of what does not, and is more."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 500)
    small = 2 + 0.01 * (np.eye(5)[labels] + 0.1 * generator.normal(size=(500, 5)))
    rows = np.hstack([5 + generator.normal(size=(500, 4)), small]).astype(np.float32)
    data = TensorDataset(torch.tensor(rows), torch.tensor(labels))
    loader, accuracy, fc = DataLoader(data, 50), [], nn.Linear(9, 5)
    for learner in (head_of(fc, data.tensors[0]), fc):
        optimizer = torch.optim.SGD(learner.parameters(), 0.01, momentum=0.9)
        for epoch in range(10):
            utils.train_one_epoch(learner, optimizer, loader, CPU, epoch)
        accuracy.append(utils.evaluate(learner, loader, CPU))
    assert accuracy[1] < 0.5 < 0.95 < accuracy[0]


def test_a_second_run_reads_no_image_whatever_its_fc_and_its_split(network, images, capsys):
    paths, labels = images
    for count in (2, 5):
        head_and_loaders(network, (paths[count:], labels[count:]), (paths[:count], labels[:count]))
        assert was_read(capsys) == (count == 5)
        nn.init.normal_(network.fc.weight)


CHANGES = {
    "a weight": lambda network, paths: network.conv1[0].weight.data.view(-1)[0].add_(1e-6),
    "a statistic": lambda network, paths: network.conv1[1].running_mean[0].add_(1e-6),
    "the time": lambda network, paths: os.utime(paths[3], (2, 2)),
    "the size": lambda network, paths: [os.truncate(paths[3], 999), os.utime(paths[3], (1, 1))],
    "the bytes": lambda network, paths: [
        Path(paths[3]).write_bytes(bytes(os.path.getsize(paths[3]))),
        os.utime(paths[3], (1, 1)),
    ],
    "one fewer": lambda network, paths: paths.pop(),
    "preprocessing": lambda network, paths: {"preprocessing": PREPROCESSING | {"resize": 232}},
    "damage": lambda network, paths: [os.truncate(f, 999) for f in features.CACHE.iterdir()],
    "a pickle": lambda network, paths: [
        f.write_bytes(pickle.dumps(np.zeros(4))) for f in features.CACHE.iterdir()
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_computed_anew(network, images, tmp_path, capsys, change):
    paths = [shutil.copy(path, tmp_path) for path in images[0][:4]]
    os.utime(paths[3], (1, 1))
    compute(network, paths)
    more = CHANGES[change](network, paths)
    compute(network, paths, **(more if isinstance(more, dict) else {}))
    assert not was_read(capsys)


def test_what_could_not_be_read_is_tried_again(network, images, monkeypatch, capsys):
    """A network drive may fail once: that changes neither size nor time."""
    paths, _ = images
    expected = compute(network, paths[:3])

    def fails(path, preprocessing):
        if path == paths[1]:
            raise ImageError(path, "the drive is away")
        return image.load_centre(path, preprocessing)

    features.CACHE.rename(features.CACHE.with_name("elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "load_centre", fails)
        for _ in range(2):
            assert np.isnan(compute(network, paths[:3])[:, 0]).tolist() == [False, True, False]
            assert "away" in capsys.readouterr().err
    np.testing.assert_allclose(compute(network, paths[:3]), expected, **CLOSE)
    assert "features of 1 images computed" in capsys.readouterr().err
    assert not np.isnan(compute(network, paths[:3])).any()
    assert was_read(capsys)


def test_without_an_image_to_train_or_to_validate_on_there_is_no_result(network, images, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = ([str(tmp_path / "bad.jpg")], [0])
    with pytest.raises(RunError, match="no image to train on can be read"):
        head_and_loaders(network, bad, images)
    head, _, val_loader = head_and_loaders(network, images, bad)
    with pytest.raises(RunError, match="none of the images to measure on can be read"):
        utils.validate(head, val_loader, CPU).figures()


def test_a_folder_that_cannot_be_written_costs_nothing(network, images, tmp_path, capsys):
    (tmp_path / "cache").touch()
    assert compute(network, images[0]).shape == (8, 1024)
    assert "features are not kept: " in capsys.readouterr().err

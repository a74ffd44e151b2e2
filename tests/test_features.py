"""Features of frozen layers, computed once."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import features
import utils
from folders import BadPictures, find_pictures, with_labels
from image import default_preprocessing
from model import build_model
from my_dataset import DeviceLoader, MyDataSet, eval_transform

CPU = torch.device("cpu")
PREPROCESSING = default_preprocessing("shufflenet_v2_x0_5")


@pytest.fixture
def network():
    """x0.5 with batch-norm statistics unlike those of a fresh network."""
    torch.manual_seed(0)
    model = build_model("shufflenet_v2_x0_5", 5).train()
    model(torch.randn(8, 3, 64, 64))
    utils.freeze_layers(model)
    return model


@pytest.fixture
def pictures(flowers):
    found = find_pictures(flowers)
    return with_labels(found, list(found))


def compute(network, paths, cache, **more):
    options = {"threads": 1, "cache": cache} | more
    return features.cached_features(network, paths, PREPROCESSING, CPU, **options)


def plain_loader(pictures, **more):
    dataset = MyDataSet(*pictures, eval_transform(PREPROCESSING), seed=3)
    return DeviceLoader(dataset, CPU, PREPROCESSING, batch_size=8, workers=0, **more)


def feature_loader(network, pictures, cache, mean=None, std=None, **more):
    array = compute(network, pictures[0], cache)
    return features.FeatureLoader(
        array,
        np.arange(len(array)),
        pictures[1],
        mean=torch.zeros(1024) if mean is None else mean,
        std=torch.ones(1024) if std is None else std,
        device=CPU,
        batch_size=8,
        **more,
    )


def test_features_are_what_fc_sees(network, pictures, tmp_path):
    array = compute(network, pictures[0], tmp_path)
    assert (array.shape, array.dtype) == ((40, 1024), np.float32)
    network.eval()
    with torch.inference_mode():
        expected = torch.cat([network.forward_features(x) for x, _ in plain_loader(pictures)])
    torch.testing.assert_close(torch.tensor(array), expected)


def test_both_paths_take_the_same_gradients_and_end_with_the_same_weights(
    network, pictures, tmp_path
):
    """The same order, no augmentation, nothing standardised."""
    head = nn.Linear(1024, 5)
    head.load_state_dict(network.fc.state_dict())
    slow = plain_loader(pictures, shuffle=True)
    fast = feature_loader(network, pictures, tmp_path, shuffle=True, seed=3)

    utils.set_train_mode(network)
    for loader in (slow, fast):
        loader.set_epoch(1)
    for (images, labels), (rows, same_labels) in zip(slow, fast, strict=True):
        assert torch.equal(labels, same_labels)
        nn.functional.cross_entropy(network(images), labels).backward()
        nn.functional.cross_entropy(head(rows), labels).backward()
    torch.testing.assert_close(head.weight.grad, network.fc.weight.grad)
    torch.testing.assert_close(head.bias.grad, network.fc.bias.grad)

    for learner, loader in ((network, slow), (head, fast)):
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=0.01)
        for epoch in range(3):
            utils.train_one_epoch(learner, optimizer, loader, CPU, epoch)
    torch.testing.assert_close(head.weight, network.fc.weight)
    torch.testing.assert_close(head.bias, network.fc.bias)


def test_fold_undoes_unfold_and_both_keep_the_function(network, pictures, tmp_path):
    array = compute(network, pictures[0], tmp_path)
    mean, std = features.statistics(array, np.arange(40))
    x = torch.tensor(array)
    before = network.fc(x)
    head = features.unfold(network.fc, mean, std)
    torch.testing.assert_close(head((x - mean) / std), before, rtol=1e-4, atol=1e-5)
    nn.init.normal_(head.weight, std=0.05)
    features.fold(head, mean, std, network.fc)
    expected = head((x - mean) / std)
    torch.testing.assert_close(network.fc(x), expected, rtol=1e-3, atol=2e-3)


def test_statistics_are_those_of_the_rows_asked_for_dead_channels_included():
    generator = np.random.default_rng(0)
    array = generator.normal(3, 0.01, (10_000, 4)).astype(np.float32)
    array[:, 2] = 7
    rows = np.arange(0, 10_000, 2)
    mean, std = features.statistics(array, rows)
    chosen = torch.tensor(array[rows]).double()
    torch.testing.assert_close(mean.double(), chosen.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(std[:2].double(), chosen[:, :2].std(0, False), rtol=1e-4, atol=0)
    assert std[2] > 0


def test_standardised_features_are_learnt_where_plain_ones_are_not():
    """What tells the classes apart has a hundredth of the scale of what does not."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 500)
    array = np.concatenate(
        [
            5 + generator.normal(size=(500, 20)),
            2 + 0.01 * (np.eye(5)[labels] + 0.1 * generator.normal(size=(500, 5))),
        ],
        axis=1,
    ).astype(np.float32)
    rows = np.arange(500)
    mean, std = features.statistics(array, rows)
    accuracy = []
    for scale in ((torch.zeros(25), torch.ones(25)), (mean, std)):
        loader = features.FeatureLoader(
            array, rows, labels.tolist(), mean=scale[0], std=scale[1], device=CPU, batch_size=50
        )
        head = nn.Linear(25, 5)
        optimizer = torch.optim.SGD(head.parameters(), 0.01, momentum=0.9)
        for epoch in range(10):
            result = utils.train_one_epoch(head, optimizer, loader, CPU, epoch)
        accuracy.append(result["accuracy"])
    assert accuracy[0] < 0.5 < 0.95 < accuracy[1]


def unread(monkeypatch):
    """From here on no picture may be read."""

    def refuse(*args):
        raise AssertionError("a picture was read")

    monkeypatch.setattr("pipeline.load_rgb", refuse)


def test_a_second_run_reads_no_picture(network, pictures, tmp_path, monkeypatch):
    first = compute(network, pictures[0], tmp_path)
    unread(monkeypatch)
    assert np.array_equal(compute(network, pictures[0], tmp_path), first)
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda network, paths: network.conv1[0].weight.data.view(-1)[0].add_(1e-6),
        lambda network, paths: network.conv1[1].running_mean[0].add_(1e-6),
        lambda network, paths: os.utime(paths[3], (1, 1)),
        lambda network, paths: paths.reverse(),
        lambda network, paths: paths.pop(),
    ],
    ids=["a weight", "a statistic", "a file", "the order", "one fewer"],
)
def test_what_changed_is_computed_anew(network, flowers, tmp_path, monkeypatch, change):
    paths = [str(shutil.copy(path, tmp_path)) for path in sorted(flowers.glob("roses/*"))]
    compute(network, paths, tmp_path / "cache")
    change(network, paths)
    unread(monkeypatch)
    with pytest.raises(AssertionError, match="a picture was read"):
        compute(network, paths, tmp_path / "cache")


@pytest.mark.parametrize("size", [0, 50, 1000])
def test_a_damaged_cache_file_is_computed_anew(network, pictures, tmp_path, capsys, size):
    first = compute(network, pictures[0], tmp_path)
    (file,) = tmp_path.iterdir()
    os.truncate(file, size)
    assert np.array_equal(compute(network, pictures[0], tmp_path), first)
    assert "is damaged: computed anew" in capsys.readouterr().err


def test_statistics_are_those_of_the_training_pictures(network, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CACHE", tmp_path)
    paths, labels = pictures
    train, val = (paths[:20], labels[:20]), (paths[20:], labels[20:])
    options = {"batch_size": 8, "threads": 1, "seed": 0}
    _, loader, _ = features.head_and_loaders(network, train, val, PREPROCESSING, CPU, **options)
    expected = torch.tensor(compute(network, train[0], tmp_path)).mean(0)
    torch.testing.assert_close(loader.mean, expected)


def test_a_changed_head_reuses_the_features(network, pictures, tmp_path, monkeypatch):
    compute(network, pictures[0], tmp_path)
    nn.init.normal_(network.fc.weight)
    unread(monkeypatch)
    compute(network, pictures[0], tmp_path)


def test_a_picture_that_cannot_be_read_leaves_no_cache(network, pictures, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"bad\.jpg: not a picture"):
        compute(network, [*pictures[0], str(bad)], tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []
    skip = BadPictures(41, skip=True)
    array = compute(network, [*pictures[0], str(bad)], tmp_path / "cache", bad=skip)
    assert np.isnan(array[:, 0]).tolist() == [False] * 40 + [True]
    assert os.listdir(tmp_path / "cache") == []  # so that the next run names it again


def test_another_preprocessing_and_a_restored_time_are_seen(
    network, flowers, tmp_path, monkeypatch
):
    """A file of the same size with its old time differs by its inode or its change time."""
    paths = [str(shutil.copy(path, tmp_path)) for path in sorted(flowers.glob("roses/*"))]
    compute(network, paths, tmp_path / "cache")
    status = os.stat(paths[0])
    with open(paths[0], "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(bytes(10))
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(paths[0]).st_size == status.st_size
    unread(monkeypatch)
    with pytest.raises(AssertionError, match="a picture was read"):
        compute(network, paths, tmp_path / "cache")

    options = {"threads": 1, "cache": tmp_path / "cache"}
    other = PREPROCESSING | {"resize": 232}
    with pytest.raises(AssertionError, match="a picture was read"):
        features.cached_features(network, paths[1:], other, CPU, **options)


def test_another_precision_has_features_of_its_own(network, pictures, tmp_path, monkeypatch):
    compute(network, pictures[0], tmp_path)
    unread(monkeypatch)
    with pytest.raises(AssertionError, match="a picture was read"):
        compute(network, pictures[0], tmp_path, amp=torch.bfloat16)


def test_another_split_of_the_same_pictures_reads_none(network, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CACHE", tmp_path)
    paths, labels = pictures
    options = {"batch_size": 8, "threads": 1, "seed": 0}
    for train, val in ((slice(20), slice(20, 40)), (slice(10, 40), slice(10))):
        sides = [(paths[part], labels[part]) for part in (train, val)]
        features.head_and_loaders(network, *sides, PREPROCESSING, CPU, **options)
        unread(monkeypatch)


def test_what_a_killed_run_left_is_removed_after_a_day(network, pictures, tmp_path):
    for name, age in (("old.1.tmp", 25), ("new.2.tmp", 1)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age * 3600,) * 2)
    compute(network, pictures[0], tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".tmp"}
    assert not (tmp_path / "old.1.tmp").exists()
    assert (tmp_path / "new.2.tmp").exists()


def test_two_at_once_do_not_harm_each_other(network, pictures, tmp_path):
    code = """
import sys, torch, features
from model import build_model
from image import default_preprocessing
torch.manual_seed(0)
model = build_model("shufflenet_v2_x0_5", 5)
prep = default_preprocessing("shufflenet_v2_x0_5")
from pathlib import Path
a = features.cached_features(model, sys.argv[2:], prep, torch.device("cpu"), threads=1,
                             cache=Path(sys.argv[1]))
print(a.sum())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), *pictures[0]]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **options) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_a_folder_that_cannot_be_written_keeps_features_in_memory(
    network, pictures, tmp_path, capsys
):
    (tmp_path / "file").touch()
    array = compute(network, pictures[0], tmp_path / "file" / "cache")
    assert array.shape == (40, 1024)
    assert "features are kept in memory" in capsys.readouterr().err


def test_a_full_disk_keeps_features_in_memory(tmp_path, capsys):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        array = features._reserve(tmp_path / "x.npy", (4096, 1024))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not isinstance(array, np.memmap)
    assert "features are kept in memory" in capsys.readouterr().err


def test_disk_space_that_is_not_to_be_had_keeps_features_in_memory(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert not isinstance(features._reserve(tmp_path / "x.npy", (4096, 1024)), np.memmap)
    assert "features are kept in memory" in capsys.readouterr().err


def test_a_cache_that_is_deleted_meanwhile_costs_nothing(
    network, pictures, tmp_path, monkeypatch, capsys
):
    expected = np.array(compute(network, pictures[0], tmp_path / "kept"))
    fill = features._fill

    def fill_and_delete(*args):
        fill(*args)
        shutil.rmtree(tmp_path / "gone")

    monkeypatch.setattr(features, "_fill", fill_and_delete)
    found = compute(network, pictures[0], tmp_path / "gone")
    np.testing.assert_array_equal(found, expected)
    assert "features are not kept" in capsys.readouterr().err


def test_large_arrays_stay_on_disk(network, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "IN_MEMORY", 1000)
    compute(network, pictures[0], tmp_path)
    array = compute(network, pictures[0], tmp_path)
    assert isinstance(array, np.memmap)
    loader = features.FeatureLoader(
        array,
        np.arange(40),
        pictures[1],
        mean=torch.zeros(1024),
        std=torch.ones(1024),
        device=CPU,
        batch_size=7,
    )
    assert torch.equal(torch.cat([rows for rows, _ in loader]), torch.tensor(array))
    assert [len(rows) for rows, _ in loader] == [7] * 5 + [5]
    assert len(loader) == 6


def anonymous_memory():
    """Bytes this process holds that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_features_of_200_000_pictures_stay_out_of_memory(network, tmp_path, monkeypatch):
    """819 MB of them, a file full of holes: found, measured, trained on and evaluated."""
    monkeypatch.setattr(features, "CACHE", tmp_path)
    paths = [f"{index:06}.jpg" for index in range(200_000)]
    file = tmp_path / f"{features._key(network, paths, PREPROCESSING, None)}.npy"
    shape = (len(paths), 1024)
    assert np.prod(shape) * 4 > features.IN_MEMORY
    np.lib.format.open_memmap(file, "w+", np.float32, shape)
    labels = [index % 5 for index in range(len(paths))]
    train, val = (paths[:190_000], labels[:190_000]), (paths[190_000:], labels[190_000:])
    before, most = anonymous_memory(), 0

    def look():
        nonlocal most
        most = max(most, anonymous_memory() - before)

    options = {"batch_size": 256, "threads": 1, "seed": 0}
    tracemalloc.start()
    head, train_loader, val_loader = features.head_and_loaders(
        network, train, val, PREPROCESSING, CPU, **options
    )
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    optimizer = torch.optim.SGD(head.parameters(), 0.03)
    utils.train_one_epoch(head, optimizer, train_loader, CPU, 0, stop=look)
    assert utils.evaluate(head, val_loader, CPU, stop=look)["images"] == 10_000
    assert 0 < most < 200e6

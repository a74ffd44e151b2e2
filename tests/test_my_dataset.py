"""Data set, transforms and loader, against the pipeline of torchvision and the tutorial."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

import cli
from image import IMAGENET_MEAN, IMAGENET_STD, ImageError, default_preprocessing
from my_dataset import DeviceLoader, MyDataSet, eval_transform, normalize, train_transform

PHOTOS = sorted((Path(__file__).parents[2] / "shared/data/flower_photos").glob("*/*.jpg"))[::125]
CPU = torch.device("cpu")
PREPROCESSING = default_preprocessing("shufflenet_v2_x1_0")
SMALL = {**PREPROCESSING, "resize": 40, "crop": 32}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """Seven pictures of several shapes."""
    found = [str(tmp_path / f"{i}.png") for i in range(7)]
    for i, path in enumerate(found):
        noise(40 + 10 * i, 90 - 10 * i, i).save(path)
    return found


def loader_of(paths: list[str], *, seed=0, workers=0, shuffle=True, transform=None) -> DeviceLoader:
    """Return a loader of batches of three in which the class is the index of the picture."""
    data = MyDataSet(paths, range(len(paths)), transform or train_transform(SMALL["crop"]), seed)
    return DeviceLoader(data, CPU, SMALL, batch_size=3, workers=workers, shuffle=shuffle)


def epoch_of(loader: DeviceLoader, epoch: int) -> tuple[torch.Tensor, list[int]]:
    """Return the pictures and the classes of an epoch, in order."""
    loader.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels).tolist()


def test_without_transform_an_item_is_the_picture_and_its_class(paths):
    data = MyDataSet(paths, [5, 4, 3, 2, 1, 0, 9])
    assert len(data) == 7
    image, label = data[2]
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.asarray(image), np.asarray(noise(60, 70, 2)))
    assert label == 3


def test_the_signature_is_the_tutorials(paths):
    data = MyDataSet(images_path=paths, images_class=[0] * 7, transform=eval_transform(SMALL))
    images, labels = MyDataSet.collate_fn([data[0], data[1]])
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert torch.equal(images, torch.stack([data[0][0], data[1][0]]))
    assert torch.equal(labels, torch.tensor([0, 0]))
    assert labels.dtype == torch.int64


def test_collate_fn_keeps_the_order_of_the_classes():
    images, labels = MyDataSet.collate_fn([(torch.full((3, 2, 2), i), 9 - i) for i in range(4)])
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert labels.tolist() == [9, 8, 7, 6]


def test_lists_of_different_length_are_an_error(paths):
    with pytest.raises(ValueError, match="7 pictures but 6 classes"):
        MyDataSet(paths, [0] * 6)


def test_normalize_gives_the_floats_of_torchvision_for_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values, values.T, 255 - values], axis=2))
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )(picture)
    bytes_ = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    ours = normalize(torch.stack([bytes_, bytes_.flip(1)]), PREPROCESSING)
    assert ours.dtype == torch.float32
    assert torch.equal(ours[0], theirs)
    assert torch.equal(ours[1], theirs.flip(1))
    assert bytes_.dtype == torch.uint8


@pytest.mark.parametrize("width", ["0_5", "1_0", "1_5", "2_0"])
def test_evaluation_prepares_pictures_as_the_published_weights_want_them(width):
    preprocessing = default_preprocessing(f"shufflenet_v2_x{width}")
    transform = eval_transform(preprocessing)
    theirs = models.get_model_weights(f"shufflenet_v2_x{width}").DEFAULT.transforms()
    pictures = [noise(300, 241), noise(199, 433)]
    for path in PHOTOS:
        with Image.open(path) as photo:
            pictures.append(photo.convert("RGB"))
    for picture in pictures:
        image = transform(picture)
        assert (image.shape, image.dtype) == ((3, 224, 224), torch.uint8)
        assert torch.equal(normalize(image[None], preprocessing)[0], theirs(picture))


def test_training_augments_as_the_tutorial_does():
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    ours = train_transform(PREPROCESSING["crop"])
    for seed in range(6):
        picture = noise(300, 241, seed)
        torch.manual_seed(seed)
        expected = theirs(picture)
        torch.manual_seed(seed)
        image = ours(picture)
        assert (image.shape, image.dtype) == ((3, 224, 224), torch.uint8)
        assert torch.equal(normalize(image[None], PREPROCESSING)[0], expected)


def test_random_erase_hides_a_rectangle_in_its_share_of_pictures():
    transform = train_transform(64, random_erase=0.25)
    white = Image.new("RGB", (80, 80), "white")
    torch.manual_seed(0)
    hidden = 0
    for _ in range(400):
        image = transform(white)
        rows, columns = (image[0] != 255).nonzero(as_tuple=True)
        if len(rows):
            hidden += 1
            box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == torch.tensor([124, 116, 104]).view(3, 1, 1)).all()
            assert 0.01 < box[0].numel() / 64**2 < 0.34
    assert 70 < hidden < 130  # 100, and 3.5 of their spread


def test_fetching_an_item_leaves_the_global_random_state_alone(paths):
    data = MyDataSet(paths, [0] * 7, train_transform(SMALL["crop"]), seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = data[0][0]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(data[0][0], first)  # and does not depend on it


def test_without_a_seed_the_global_random_state_decides(paths):
    data = MyDataSet(paths, [0] * 7, train_transform(SMALL["crop"]))
    torch.manual_seed(5)
    first, second = data[0][0], data[0][0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(data[0][0], first)


def test_augmentation_differs_between_pictures_epochs_and_seeds(tmp_path):
    noise(50, 50).save(tmp_path / "a.png")
    items = []
    for seed in (0, 1, -1):
        data = MyDataSet(
            [str(tmp_path / "a.png")] * 2, [0, 0], train_transform(SMALL["crop"]), seed
        )
        for epoch in (0, 1):
            data.epoch.fill_(epoch)
            items += [data[0][0], data[1][0]]
    assert len({item.numpy().tobytes() for item in items}) == len(items) == 12


def test_the_number_of_workers_changes_nothing(paths):
    expected = [epoch_of(loader_of(paths), epoch) for epoch in (0, 1, 5)]
    for workers in (1, 2):
        loader = loader_of(paths, workers=workers)
        for epoch, (images, labels) in zip((0, 1, 5), expected, strict=True):
            got_images, got_labels = epoch_of(loader, epoch)
            assert got_labels == labels, (workers, epoch)
            assert torch.equal(got_images, images), (workers, epoch)


def test_an_epoch_repeats_and_another_epoch_or_seed_differs(paths):
    loader = loader_of(paths)
    images, labels = epoch_of(loader, 3)
    again_images, again_labels = epoch_of(loader, 3)
    assert again_labels == labels
    assert torch.equal(again_images, images)
    for other, epoch in ((loader, 4), (loader_of(paths, seed=1), 3)):
        other_images, other_labels = epoch_of(other, epoch)
        assert other_labels != labels
        by_index = images[np.argsort(labels)], other_images[np.argsort(other_labels)]
        assert all(not torch.equal(*pair) for pair in zip(*by_index, strict=True))


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_picture_comes_once_in_order_unless_shuffled(paths, shuffle):
    loader = loader_of(paths, shuffle=shuffle)
    orders = [epoch_of(loader, epoch)[1] for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert [order == list(range(7)) for order in orders] == [not shuffle] * 3


def test_batches_are_normalised_floats_and_the_last_is_smaller(paths):
    loader = loader_of(paths, shuffle=False, transform=eval_transform(SMALL))
    batches = list(loader)
    assert len(loader) == 3
    assert [images.shape for images, _ in batches] == [(n, 3, 32, 32) for n in (3, 3, 1)]
    theirs = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    expected = torch.stack([theirs(noise(40 + 10 * i, 90 - 10 * i, i)) for i in range(7)])
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


@pytest.mark.parametrize("transform", [train_transform(SMALL["crop"]), eval_transform(SMALL)])
def test_a_data_set_can_be_pickled_for_worker_processes(paths, transform):
    data = MyDataSet(paths, range(7), transform, seed=3)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[4][0], data[4][0])
    assert copy[4][1] == 4


def test_workers_may_be_spawned(paths):
    loader = loader_of(paths, workers=1)
    loader.loader.multiprocessing_context = "spawn"
    for epoch in (0, 1):  # the one worker learns of the new epoch
        images, labels = epoch_of(loader, epoch)
        expected_images, expected_labels = epoch_of(loader_of(paths), epoch)
        assert labels == expected_labels
        assert torch.equal(images, expected_images)


def damage(path: Path) -> str:
    """Write half of a picture; return the path."""
    noise(50, 50).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    return str(path)


@pytest.mark.parametrize("name", ["damaged.png", "two words: damaged.png", "two\nlines.png"])
def test_a_damaged_picture_ends_a_script_with_one_line(tmp_path, paths, capsys, monkeypatch, name):
    loader = loader_of([*paths, damage(tmp_path / name)])
    with pytest.raises(ImageError):
        list(loader)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        cli.run(cli.Parser(), lambda args: list(loader))
    assert caught.value.code == 1
    written = str(tmp_path / name).replace("\n", "\\n")
    assert capsys.readouterr().err == f"error: {written}: image file is truncated\n"


SCRIPT = """
import cli, torch
from image import ImageError, default_preprocessing
from my_dataset import DeviceLoader, MyDataSet, eval_transform

def main(args):
    preprocessing = default_preprocessing("shufflenet_v2_x1_0")
    data = MyDataSet(args.paths, [0] * len(args.paths), eval_transform(preprocessing))
    loader = DeviceLoader(data, torch.device("cpu"), preprocessing, batch_size=3, workers=1)
    try:
        list(loader)
    except ImageError:
        print("ImageError")
        raise

parser = cli.Parser()
parser.add_argument("paths", nargs="+")
cli.run(parser, main)
"""


def test_so_does_one_that_a_worker_process_meets(tmp_path, paths):
    bad = damage(tmp_path / "two words: damaged.png")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths, bad],
        cwd=Path(cli.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (1, "ImageError\n")
    assert run.stderr == f"error: {bad}: image file is truncated\n"

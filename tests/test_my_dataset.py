"""Data set, transforms and loader, against the pipeline of torchvision and the tutorial."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

from cli import RunError
from folders import BadImages
from image import IMAGENET_MEAN, IMAGENET_STD, ImageError, default_preprocessing
from my_dataset import DeviceLoader, MyDataSet, Normalize, eval_transform, train_transform

PHOTOS = sorted((Path(__file__).parents[2] / "shared/data/flower_photos").glob("*/*.jpg"))[::125]
CPU = torch.device("cpu")
PREPROCESSING = default_preprocessing("shufflenet_v2_x1_0")
SMALL = {**PREPROCESSING, "resize": 40, "crop": 32}
OF_TORCHVISION = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def paths(tmp_path):
    """Seven images of several shapes."""
    for i in range(7):
        noise(40 + 10 * i, 90 - 10 * i, i).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(7)]


def loader_of(paths, *, seed=0, workers=0, shuffle=True, bad=None):
    """Batches of three in which the class is the index of the image."""
    transform = train_transform(SMALL["crop"]) if shuffle else eval_transform(SMALL)
    data = MyDataSet(paths, range(len(paths)), transform, seed)
    return DeviceLoader(data, CPU, SMALL, 3, workers, bad, shuffle=shuffle)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels).tolist()


def test_the_data_set_is_used_as_the_tutorials(paths):
    image, label = MyDataSet(paths, [5, 4, 3, 2, 1, 0, 9])[2]
    assert (image.tobytes(), label) == (noise(60, 70, 2).tobytes(), 3)
    data = MyDataSet(images_path=paths, images_class=range(7), transform=eval_transform(SMALL))
    images, labels = MyDataSet.collate_fn([data[3], data[1]])
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert torch.equal(images[1], data[1][0])
    assert torch.equal(labels, torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="7 images but 6 classes"):
        MyDataSet(paths, [0] * 6)


def test_normalize_gives_the_floats_of_torchvision_for_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values.T, 255 - values], axis=2))
    bytes_ = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    ours = Normalize(PREPROCESSING)(torch.stack([bytes_, bytes_.flip(1)]))
    theirs = transforms.Compose(OF_TORCHVISION)(image)
    assert torch.equal(ours, torch.stack([theirs, theirs.flip(1)]))
    assert bytes_.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normalize_does_not_wait_for_the_gpu():
    normalize, images = Normalize(SMALL).cuda(), torch.zeros(2, 3, 8, 8).byte().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalize(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("width", ["0_5", "1_0", "1_5", "2_0"])
def test_evaluation_prepares_images_as_the_published_weights_want_them(width):
    preprocessing = default_preprocessing(f"shufflenet_v2_x{width}")
    theirs = models.get_model_weights(f"shufflenet_v2_x{width}").DEFAULT.transforms()
    limit = 2.01 / 255 / min(IMAGENET_STD)  # of noise; of photos half, which test_image.py sees
    for image in [noise(300, 241), noise(199, 433), *map(Image.open, PHOTOS)]:
        ours = eval_transform(preprocessing)(image)
        assert (ours.shape, ours.dtype) == ((3, 224, 224), torch.uint8)
        assert (Normalize(preprocessing)(ours[None])[0] - theirs(image)).abs().max() < limit


def test_training_augments_as_the_tutorial_does():
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *OF_TORCHVISION]
    for seed in range(6):
        image = noise(300, 241, seed)
        torch.manual_seed(seed)
        expected = transforms.Compose(steps)(image)
        torch.manual_seed(seed)
        assert torch.equal(Normalize(SMALL)(train_transform(224)(image)[None])[0], expected)


def test_random_erase_hides_a_rectangle_in_its_share_of_images():
    white, hidden = Image.new("RGB", (80, 80), "white"), 0
    torch.manual_seed(0)
    for _ in range(400):
        image = train_transform(64, random_erase=0.25)(white)
        rows, columns = (image[0] != 255).nonzero(as_tuple=True)
        if len(rows):
            hidden += 1
            box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == torch.tensor([124, 116, 104]).view(3, 1, 1)).all()
            assert 0.01 < box[0].numel() / 64**2 < 0.34
    assert 70 < hidden < 130  # 100, and 3.5 of their spread


@pytest.mark.parametrize("seed", [0, None])
def test_the_seed_or_else_the_global_random_state_decides(paths, seed):
    data = MyDataSet(paths, [0] * 7, train_transform(32), seed)
    torch.manual_seed(5)
    first, drawn = data[0][0], torch.rand(3)
    assert torch.equal(data[0][0], first) == (seed == 0)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn) == (seed == 0)  # which is left alone
    torch.manual_seed(5)
    assert torch.equal(data[0][0], first)


def test_augmentation_differs_between_images_epochs_and_seeds(paths):
    sets = [MyDataSet([paths[0]] * 2, [0, 0], train_transform(32), seed) for seed in (0, 1, -1)]
    items = [data[epoch, index][0] for data in sets for epoch in (0, 1) for index in (0, 1)]
    assert len({item.numpy().tobytes() for item in items}) == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(paths, workers):
    loader, plain = loader_of(paths, workers=workers), loader_of(paths)
    pickle.dumps([loader.dataset, loader.collate_fn, loader.worker_init_fn])  # to be spawned
    for epoch in (0, 1, 5):  # workers that live on learn of it
        (images, labels), (expected, same_labels) = epoch_of(loader, epoch), epoch_of(plain, epoch)
        assert (labels, images.tolist()) == (same_labels, expected.tolist())


def test_workers_of_validation_end_with_it_those_of_training_stay(paths):
    for shuffle in (False, True):
        loader = loader_of(paths, workers=1, shuffle=shuffle)
        list(loader)
        assert len(multiprocessing.active_children()) == shuffle


def test_an_epoch_repeats_and_another_epoch_or_seed_differs(paths):
    loader = loader_of(paths)
    images, labels = epoch_of(loader, 3)
    again, again_labels = epoch_of(loader, 3)
    assert torch.equal(again, images)
    assert (again_labels, sorted(labels)) == (labels, [*range(7)])
    for other, epoch in ((loader, 4), (loader_of(paths, seed=1), 3)):
        others, other_labels = epoch_of(other, epoch)
        assert other_labels != labels
        for index in range(7):
            assert not torch.equal(images[labels.index(index)], others[other_labels.index(index)])


def test_validation_comes_in_order_and_the_last_batch_is_smaller(paths):
    loader = loader_of(paths, shuffle=False)
    assert [images.shape for images, _ in loader] == [(n, 3, 32, 32) for n in (3, 3, 1)]
    images, labels = epoch_of(loader, 1)
    assert labels == list(range(7))
    data = loader.dataset.dataset
    assert torch.equal(images, Normalize(SMALL)(torch.stack([data[i][0] for i in range(7)])))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_missing_from_their_batch(paths, capsys, workers):
    for path in paths[2:6]:  # of the second batch, all
        Path(path).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2\.png: not an image"):
        MyDataSet(paths, range(7))[2]
    loader = loader_of(paths, workers=workers, shuffle=False, bad=BadImages(40))
    for _ in range(2):
        assert [labels.tolist() for _, labels in loader] == [[0, 1], [6]]
    assert capsys.readouterr().err.count("skipped: ") == 4
    with pytest.raises(RunError, match="2 of 7 images cannot be read"):
        list(loader_of(paths, workers=workers))

"""Data set, transforms and loader, against the pipeline of torchvision and the tutorial."""

import math
import pickle
import random
from argparse import Namespace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from model import IMAGENET_MEAN, IMAGENET_STD, default_preprocessing
from my_dataset import (
    MEAN_COLOUR,
    TRIVIAL,
    AugmentedDataSet,
    DeviceLoader,
    MyDataSet,
    erase,
    evaluation_set,
    jitter,
    mirror,
    random_box,
    random_crop,
    training_set,
    trivial_augment,
)
from shufflenet.common.messages import RunError
from shufflenet.inference.pytorch import Normalize
from shufflenet.reading.folders import BadImages
from shufflenet.reading.image import ImageError

CPU = torch.device("cpu")
PREPROCESSING = default_preprocessing("shufflenet_v2_x1_0")
SMALL = {**PREPROCESSING, "resize": 40, "crop": 32}
OF_TORCHVISION = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


@pytest.fixture
def paths(tmp_path):
    """Seven images of several shapes."""
    for i in range(7):
        noise(40 + 10 * i, 90 - 10 * i, i).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(7)]


def loader_of(paths, *, seed=0, threads=0, bad=None):
    """Batches of three in which the class is the index of the image."""
    data = data_set(paths, SMALL["crop"], seed=seed)
    return DeviceLoader(data, CPU, SMALL, 3, threads, bad or BadImages(len(paths)), seed)


def data_set(paths, side, erased=0.0, seed=0):
    options = Namespace(train_size=side, random_erase=erased, augment=None, seed=seed)
    return training_set(paths, range(len(paths)), options, SMALL, small_images=False)


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels).tolist()


def test_the_data_set_is_used_as_the_tutorials(paths):
    image, label = MyDataSet(paths, [5, 4, 3, 2, 1, 0, 9])[2]
    assert (image.tobytes(), label) == (noise(60, 70, 2).tobytes(), 3)
    steps = transforms.Compose([transforms.CenterCrop(32), *OF_TORCHVISION])
    data = MyDataSet(images_path=paths, images_class=range(7), transform=steps)
    images, labels = MyDataSet.collate_fn([data[3], data[1]])
    assert torch.equal(images, torch.stack([steps(noise(70, 60, 3)), steps(noise(50, 80, 1))]))
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


@pytest.mark.parametrize(("width", "height"), [(300, 200), (64, 64), (2000, 20), (1, 90)])
def test_crops_are_drawn_as_torchvision_draws_them(width, height):
    """Area, aspect and place: the same distributions, by their means and quartiles."""
    rng = random.Random(0)
    torch.manual_seed(0)
    image, kinds = torch.empty(3, height, width), []
    crop = transforms.RandomResizedCrop(32)
    theirs = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(3000)]
    theirs = [(left, top, left + w, top + h) for top, left, h, w in theirs]
    ours = [random_box(width, height, (0.08, 1), 4 / 3, rng) for _ in range(3000)]
    for boxes in (ours, theirs):
        left, top, right, bottom = np.array(boxes).T
        for first, last, end in ((left, right, width), (top, bottom, height)):
            assert ((first >= 0) & (first < last) & (last <= end)).all()
        w, h = (right - left) / width, (bottom - top) / height
        figures = (w * h, w / h, left / width, top / height)
        kinds.append([(f.mean(), *np.quantile(f, [0.25, 0.5, 0.75])) for f in figures])
    assert np.array(kinds[0]) == pytest.approx(np.array(kinds[1]), rel=0.08, abs=0.03)


def test_a_crop_is_resized_as_torchvision_resizes_it_and_mirrored_half_the_time(tmp_path):
    image, mirrored = noise(300, 241), 0
    image.save(path := tmp_path / "a.png")
    for seed in range(100):
        box = random_box(*image.size, (0.08, 1), 4 / 3, random.Random(seed))
        rng = random.Random(seed)
        ours = mirror(random_crop(path, rng, 64), rng).astype(int)
        crop = image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
        straight = np.array(crop).astype(int)
        difference = [abs(ours - each)[1:-1, 1:-1].max() for each in (straight, straight[:, ::-1])]
        assert min(difference) <= 1  # at the edges ours sees what lies beside the crop
        mirrored += difference[1] <= 1
    assert 35 < mirrored < 65


def test_random_erase_hides_a_rectangle_in_its_share_of_images():
    white, hidden = np.full((64, 64, 3), 255, np.uint8), 0
    for seed in range(400):
        pixels = erase(white, random.Random(seed), 0.25)
        rows, columns = (pixels[..., 0] != 255).nonzero()
        if len(rows):
            hidden += 1
            box = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == [124, 116, 104]).all()
            assert 0.01 < box[..., 0].size / 64**2 < 0.34
    assert 70 < hidden < 130  # 100, and 3.5 of their spread
    assert (white == 255).all()


def test_jitter_is_brightness_contrast_and_saturation_of_torchvision():
    image, rng = noise(40, 30), random.Random(7)
    found, expected = jitter(np.array(image), random.Random(7)), image
    adjust = {"Brightness": F.adjust_brightness, "Contrast": F.adjust_contrast}
    adjust["Color"] = F.adjust_saturation
    for name in rng.sample(list(adjust), 3):
        expected = adjust[name](expected, rng.uniform(0.6, 1.4))
    assert np.array_equal(found, np.array(expected))


FILL = {"fill": list(MEAN_COLOUR)}
# What torchvision calls the changes of TRIVIAL: they are drawn about as often for both signs.
OF_TRIVIAL = [
    lambda image, _: image,
    lambda image, s: F.affine(image, 0, [0, 0], 1, [math.degrees(math.atan(s)), 0], **FILL),
    lambda image, s: F.affine(image, 0, [0, 0], 1, [0, math.degrees(math.atan(s))], **FILL),
    lambda image, s: F.affine(image, 0, [round(-224 * s), 0], 1, [0, 0], **FILL),
    lambda image, s: F.affine(image, 0, [0, round(-224 * s)], 1, [0, 0], **FILL),
    lambda image, s: F.rotate(image, s, **FILL),
    F.adjust_brightness,
    F.adjust_saturation,
    F.adjust_contrast,
    F.adjust_sharpness,
    lambda image, s: F.posterize(image, round(s)),
    F.solarize,
    lambda image, _: F.autocontrast(image),
    lambda image, _: F.equalize(image),
]


@pytest.mark.parametrize("number", range(14))
def test_trivial_augment_does_what_torchvisions_functions_do(number):
    image = Image.effect_noise((224, 224), 90).convert("RGB")
    image.paste((255, 0, 90), (60, 100, 160, 110))
    change, least, most = TRIVIAL[number]
    for strength in (least, least + 0.3 * (most - least), most):
        expected = np.array(OF_TRIVIAL[number](image, strength))
        off = (np.array(change(image, strength)) != expected).mean()
        assert off < (0.03 if number in (1, 2) else 1e-9)  # slanted lines are rounded


def test_trivial_augment_draws_one_of_them():
    """The wide ranges of the paper's table 5: 32 pixels of 224, factors of 1 +- 0.99."""
    shears, shifts, factors = [(-0.99, 0.99)] * 2, [(-1 / 7, 1 / 7)] * 2, [(0.01, 1.99)] * 4
    ranges = [(0, 0), *shears, *shifts, (-135, 135), *factors, (2, 8), (0, 255), (0, 0), (0, 0)]
    assert [(least, most) for _, least, most in TRIVIAL] == ranges
    pixels = np.array(noise(64, 48))
    drawn = [trivial_augment(pixels, random.Random(seed)) for seed in range(60)]
    assert {each.shape for each in drawn} == {pixels.shape}
    assert len({each.tobytes() for each in drawn}) > 40


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(paths, threads):
    loader, plain = loader_of(paths, threads=threads), loader_of(paths)
    for epoch in (0, 1, 5):
        (images, labels), (expected, same_labels) = epoch_of(loader, epoch), epoch_of(plain, epoch)
        assert (labels, images.tolist()) == (same_labels, expected.tolist())


def test_an_epoch_repeats_and_another_epoch_or_seed_differs(paths):
    twice = data_set([paths[0]] * 2, 32)
    assert (twice[0][0] != twice[1][0]).any()
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


def test_the_last_batch_is_smaller_and_images_lie_as_nhwc(paths):
    loader = loader_of(paths)
    images = [images for images, _ in loader]
    assert [each.shape for each in images] == [(n, 3, 32, 32) for n in (3, 3, 1)]
    assert len(loader) == 3
    assert images[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [0, 2])
def test_images_that_cannot_be_read_are_missing_from_their_batch(paths, capsys, threads):
    for path in paths[2:6]:  # of the second batch, all
        Path(path).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2\.png: no image, but text") as caught:
        MyDataSet(paths, range(7))[2]
    copy = pickle.loads(pickle.dumps(caught.value))  # as between processes
    assert (str(copy), copy.path) == (str(caught.value), paths[2])
    loader = loader_of(paths, threads=threads, bad=BadImages(40))
    for epoch in range(2):
        assert sorted(epoch_of(loader, epoch)[1]) == [0, 1, 6]
    assert capsys.readouterr().err.count("skipped: ") == 4
    with pytest.raises(RunError, match="2 of 7 images cannot be read"):
        list(loader_of(paths, threads=threads))


def test_augmentations_are_called_in_their_order_with_one_generator(paths):
    def note(pixels, rng):
        return np.append(pixels, round(1000 * rng.random()))

    data = AugmentedDataSet(paths, range(7), lambda path, rng: np.zeros(1), [note, note], seed=5)
    data.epoch = 2
    rng = random.Random("5 2 3")
    pixels, label = data[3]
    assert pixels.tolist() == [0, round(1000 * rng.random()), round(1000 * rng.random())]
    assert label == 3


@pytest.mark.parametrize("more", [[], OF_TORCHVISION])
def test_a_compose_of_torchvision_takes_the_place_of_our_augmentations(paths, more):
    """Whether it normalises the image or leaves that to the loader."""
    steps = transforms.Compose([transforms.CenterCrop(32), *more])
    loader = DeviceLoader(MyDataSet(paths, range(7), steps), CPU, SMALL, 3, 2, BadImages(7))
    images, labels = epoch_of(loader, 0)
    plain = transforms.Compose([transforms.CenterCrop(32), *OF_TORCHVISION])
    expected = torch.stack([plain(Image.open(path)) for path in paths])
    assert torch.equal(images, expected)
    assert labels == [*range(7)]


def test_of_several_processes_each_has_as_many_images_of_a_batch(paths):
    about = (CPU, SMALL, 2, 0, BadImages(7))
    data = evaluation_set(paths, range(7), SMALL)
    whole, *parts = (
        [labels.tolist() for _, labels in DeviceLoader(data, *about, seed=1, part=part)]
        for part in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    assert [len(labels) for labels in parts] == [1, 1, 1]  # 6 images; the seventh is left out
    assert [*chain(*whole)][:6] == [*chain(*(labels[0] for labels in parts))]

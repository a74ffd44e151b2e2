"""From images on the disk to batches on the device: data set, augmentations, loader."""

import math
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from model import IMAGENET_MEAN
from shufflenet.common.messages import RunError
from shufflenet.inference.pytorch import Normalize, move
from shufflenet.reading.ahead import ahead, batches
from shufflenet.reading.folders import BadImages
from shufflenet.reading.image import ImageError, load_centre, load_crop, load_rgb

MEAN_COLOUR = tuple(round(255 * value) for value in IMAGENET_MEAN)


class MyDataSet(Dataset):
    """Images and their classes, as in the tutorial: the RGB image, or what `transform` makes of it,
    and the index of its class. ImageError on access if an image cannot be read."""

    def __init__(
        self,
        images_path: Sequence[str],
        images_class: Sequence[int],
        transform: Callable | None = None,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} images but {len(images_class)} classes")
        self.images_path = images_path
        self.images_class = images_class
        self.transform = transform
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, index: int) -> tuple:
        image = load_rgb(self.images_path[index])
        if self.transform:
            image = self.transform(image)
        return image, self.images_class[index]

    @staticmethod
    def collate_fn(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """[(image, class), ...] to images (N, 3, H, W) and classes (N,) int64."""
        images, labels = zip(*batch, strict=True)
        return torch.stack(images), torch.tensor(labels)


class AugmentedDataSet(MyDataSet):
    """Images as train.py reads them: uint8 (side, side, 3) and the index of the class.

    `read(path, rng)` reads an image, and each of `augmentations(pixels, rng)` changes it. All draw
    from `rng`, a random.Random that depends on seed, epoch and index alone: nothing else changes
    what is drawn, not the order, not the number of threads.
    """

    def __init__(
        self,
        images_path: Sequence[str],
        images_class: Sequence[int],
        read: Callable[[str, random.Random], np.ndarray],
        augmentations: Sequence[Callable[[np.ndarray, random.Random], np.ndarray]] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(images_path, images_class)
        self.read, self.augmentations, self.seed = read, augmentations, seed

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        pixels = self.read(self.images_path[index], rng)
        for augment in self.augmentations:
            pixels = augment(pixels, rng)
        return pixels, self.images_class[index]


def training_set(
    paths: Sequence[str],
    labels: Sequence[int],
    options: Namespace,
    preprocessing: dict,
    small_images: bool,
) -> MyDataSet:
    """What train.py learns from; `options` are those of its command line and recipe. An
    augmentation of your own is a line of the list; or return a MyDataSet with a Compose of
    torchvision, whose draws are repeatable with one thread only. Cached features (--freeze-layers)
    are not augmented."""
    side = options.train_size or preprocessing["crop"]
    read = RandomShift(preprocessing) if small_images else partial(random_crop, side=side)
    augmentations = [
        mirror,
        AUGMENTS[options.augment],
        partial(erase, share=options.random_erase),
    ]
    return AugmentedDataSet(paths, labels, read, augmentations, options.seed)


def evaluation_set(
    paths: Sequence[str], labels: Sequence[int], preprocessing: dict
) -> AugmentedDataSet:
    """Images as evaluation sees them; nothing is drawn."""
    return AugmentedDataSet(paths, labels, lambda path, rng: load_centre(path, preprocessing))


# -- what is drawn for an image --------------------------------------------------------------------


def random_crop(path: str | Path, rng: random.Random, side: int) -> np.ndarray:
    """A part of 8 to 100 % of the area of an image; uint8 (side, side, 3)."""
    draw = partial(random_box, area=(0.08, 1), ratio=4 / 3, rng=rng)
    return load_crop(path, draw, side, spare=1)


class RandomShift:
    """The small image that evaluation sees, shifted by up to an eighth of its side; uint8
    (crop, crop, 3). Each image is decoded once and kept in memory."""

    def __init__(self, preprocessing: dict) -> None:
        self.preprocessing = preprocessing
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, path: str | Path, rng: random.Random) -> np.ndarray:
        side = self.preprocessing["crop"]
        margin = side // 8
        if path not in self.kept:
            edges = ((margin, margin), (margin, margin), (0, 0))
            self.kept[path] = np.pad(load_centre(path, self.preprocessing), edges, "reflect")
        left, top = rng.randint(0, 2 * margin), rng.randint(0, 2 * margin)
        return self.kept[path][top : top + side, left : left + side]


def mirror(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Mirrors every second image; uint8 (H, W, 3)."""
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def keep(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Changes nothing."""
    return pixels


def jitter(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Brightness, contrast and saturation times 0.6 to 1.4, one after another in a drawn order;
    uint8 (H, W, 3)."""
    image = Image.fromarray(pixels)
    for kind in rng.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
        image = kind(image).enhance(rng.uniform(0.6, 1.4))
    return np.asarray(image)


def trivial_augment(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """One change of `TRIVIAL`, of a drawn strength (Müller and Hutter, "TrivialAugment", ICCV 2021,
    arXiv 2103.10158, the wide ranges of table 5); uint8 (H, W, 3)."""
    change, least, most = rng.choice(TRIVIAL)
    return np.asarray(change(Image.fromarray(pixels), rng.uniform(least, most)))


def _affine(image: Image.Image, b: float = 0, c: float = 0, shift: tuple = (0, 0)) -> Image.Image:
    """A pixel x, y from the centre comes from x + b y, c x + y, shifted by shares of the side."""
    x, y = image.width / 2, image.height / 2
    right, down = shift[0] * image.width, shift[1] * image.height
    places = (1, b, right - b * y, c, 1, down - c * x)
    return image.transform(image.size, Image.Transform.AFFINE, places, fillcolor=MEAN_COLOUR)


TRIVIAL = [  # (change, its least strength, its greatest)
    (lambda image, _: image, 0, 0),
    (lambda image, shear: _affine(image, b=shear), -0.99, 0.99),
    (lambda image, shear: _affine(image, c=shear), -0.99, 0.99),
    (lambda image, share: _affine(image, shift=(share, 0)), -1 / 7, 1 / 7),  # 32 pixels of 224
    (lambda image, share: _affine(image, shift=(0, share)), -1 / 7, 1 / 7),
    (lambda image, degrees: image.rotate(degrees, fillcolor=MEAN_COLOUR), -135, 135),
    (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), 0.01, 1.99),
    (lambda image, factor: ImageEnhance.Color(image).enhance(factor), 0.01, 1.99),
    (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), 0.01, 1.99),
    (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), 0.01, 1.99),
    (lambda image, bits: ImageOps.posterize(image, round(bits)), 2, 8),
    (lambda image, threshold: ImageOps.solarize(image, threshold), 0, 255),
    (lambda image, _: ImageOps.autocontrast(image), 0, 0),
    (lambda image, _: ImageOps.equalize(image), 0, 0),
]
# Values of --augment.
AUGMENTS = {None: keep, "jitter": jitter, "trivial": trivial_augment}


def erase(pixels: np.ndarray, rng: random.Random, share: float) -> np.ndarray:
    """Gives a rectangle of 2 to 33 % of the area the mean colour, in a share of the images (Zhong
    et al., "Random Erasing Data Augmentation", AAAI 2020); uint8 (side, side, 3)."""
    if rng.random() < share:
        side = len(pixels)
        left, top, right, bottom = random_box(side, side, (0.02, 0.33), 10 / 3, rng)
        pixels = pixels.copy()
        pixels[top:bottom, left:right] = MEAN_COLOUR
    return pixels


def random_box(
    width: int, height: int, area: tuple[float, float], ratio: float, rng: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random box within width x height: `area` is the range of its
    share, 1 / `ratio` to `ratio` that of its aspect (Szegedy et al., arXiv 1409.4842, section 6).
    Where ten draws do not fit in, the largest box of such an aspect in the centre."""
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        aspect = ratio ** rng.uniform(-1, 1)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * ratio)), min(height, round(width * ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# -- batches ---------------------------------------------------------------------------------------


class DeviceLoader:
    """Batches on the device: images, normalised (N, 3, H, W), and their classes (N,).

    `threads` read ahead while the device computes; 0 reads when a batch is asked for. With a `seed`
    the order is another in each epoch. Of several processes each takes a `part` (number, parts) of
    every batch. Images that cannot be read are missing from their batch and noted in `bad`.
    """

    def __init__(
        self,
        dataset: MyDataSet,
        device: torch.device,
        preprocessing: dict,
        batch_size: int,
        threads: int,
        bad: BadImages,
        seed: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset, self.device, self.threads, self.bad = dataset, device, threads, bad
        self.seed = seed
        self.number, self.parts = part
        self.batch_size = batch_size * self.parts  # of all processes
        self.normalize = Normalize(preprocessing).to(device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, and what is drawn in it."""
        self.dataset.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = batches(len(self.dataset), self.batch_size, self.seed, self.dataset.epoch)
        for items in ahead(self._read, filter(None, map(self._part_of, order)), self.threads):
            good = []
            for item in items:
                if isinstance(item, ImageError):
                    self.bad.add(item)
                else:
                    good.append(item)
            if good:
                yield self._on_device(*zip(*good, strict=True))
            elif self.parts > 1:  # the others would wait for its gradients
                raise RunError("no image of a batch can be read: use a larger --batch-size")

    def _part_of(self, batch: list[int]) -> list[int]:
        """As many for each process: of a last batch that does not divide some are left out."""
        size = len(batch) // self.parts
        return batch[self.number * size : (self.number + 1) * size]

    def _read(self, indices: list[int]) -> list[tuple | ImageError]:
        items = []
        for index in indices:
            try:
                items.append(self.dataset[index])
            except ImageError as error:
                items.append(error)
        return items

    def _on_device(self, images: Sequence, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        labels = move(torch.tensor(labels), self.device)
        if isinstance(images[0], Tensor):  # of a Compose, normalised there
            return move(torch.stack(images), self.device), labels
        pixels = move(torch.from_numpy(np.stack(images)), self.device)
        return self.normalize(pixels.permute(0, 3, 1, 2)), labels  # NHWC -> NCHW

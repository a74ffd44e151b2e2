"""From images on the disk to batches on the device: data set, transforms, order, loader."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cli import RunError
from distributed import WORLD, share
from folders import BadImages
from image import IMAGENET_MEAN, ImageError, ahead, load_centre, load_crop, load_rgb
from utils import memory_format


class MyDataSet(Dataset):
    """Images and their classes.

    `transform` is called with the RGB image. With a `seed` it is called with the path instead, and
    with a random.Random that depends on seed, epoch and index alone: nothing else changes what is
    drawn, not the order, not the number of threads. ImageError on access if an image cannot be
    read.
    """

    def __init__(
        self,
        images_path: Sequence[str],
        images_class: Sequence[int],
        transform: Callable | None = None,
        seed: int | None = None,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} images but {len(images_class)} classes")
        self.images_path = images_path
        self.images_class = images_class
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, index: int) -> tuple:
        path, label = self.images_path[index], self.images_class[index]
        if self.seed is not None:
            return self.transform(path, random.Random(f"{self.seed} {self.epoch} {index}")), label
        image = load_rgb(path)
        return self.transform(image) if self.transform else image, label

    @staticmethod
    def collate_fn(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """[(image, class), ...] to images (N, 3, H, W) and classes (N,) int64."""
        images, labels = zip(*batch, strict=True)
        return torch.stack(images), torch.tensor(labels)


def train_transform(size: int, random_erase: float = 0.0) -> Callable:
    """Reads a random crop of 8 to 100 % of the area, mirrored at random; uint8 (size, size, 3).

    With the probability `random_erase` a rectangle of 2 to 33 % of it becomes the mean colour
    (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).
    """

    def transform(path: str, rng: random.Random) -> np.ndarray:
        draw = partial(random_box, area=(0.08, 1), ratio=4 / 3, rng=rng)
        return _mirror_and_erase(load_crop(path, draw, size, spare=1), random_erase, rng)

    return transform


def small_transform(preprocessing: dict, random_erase: float = 0.0) -> Callable:
    """Shifts the image that evaluation sees by up to an eighth of its side, mirrors and erases at
    random; uint8 (crop, crop, 3). Each image is decoded once and kept in memory."""
    side, kept = preprocessing["crop"], {}
    margin = side // 8

    def transform(path: str, rng: random.Random) -> np.ndarray:
        if path not in kept:
            edges = ((margin, margin), (margin, margin), (0, 0))
            kept[path] = np.pad(load_centre(path, preprocessing), edges, "reflect")
        left, top = rng.randint(0, 2 * margin), rng.randint(0, 2 * margin)
        pixels = kept[path][top : top + side, left : left + side].copy()
        return _mirror_and_erase(pixels, random_erase, rng)

    return transform


def choose_transform(options, cached: bool, preprocessing: dict) -> Callable:
    """How train.py reads an image to train on. Cached features are read by features.py; there this
    is only for samples.png: what evaluation sees, and no draw."""
    if cached:
        return lambda path, rng: load_centre(path, preprocessing)
    if options.small_images:
        return small_transform(preprocessing, options.random_erase)
    return train_transform(options.train_size or preprocessing["crop"], options.random_erase)


def _mirror_and_erase(pixels: np.ndarray, random_erase: float, rng: random.Random) -> np.ndarray:
    side = len(pixels)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < random_erase:
        left, top, right, bottom = random_box(side, side, (0.02, 0.33), 10 / 3, rng)
        pixels[top:bottom, left:right] = [round(255 * value) for value in IMAGENET_MEAN]
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


class Normalize(nn.Module):
    """uint8 (N, 3, H, W) to the network's float32: scaled to 0..1, minus mean, over std."""

    def __init__(self, preprocessing: dict) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.float().contiguous(memory_format=memory_format(images.device))
        return images.div_(255).sub_(self.mean).div_(self.std)


def batches(length: int, size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """The numbers below `length` in lists of `size`; in order, or in one of seed and epoch."""
    order = list(range(length))
    if seed is not None:
        random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[first : first + size] for first in range(0, length, size)]


class DeviceLoader:
    """Batches to train on: images on the device, normalised (N, 3, H, W), and their classes (N,);
    in another order in each epoch.

    `threads` read ahead while the device computes; 0 reads when a batch is asked for. Images that
    cannot be read are missing from their batch and counted by `bad`.
    """

    def __init__(
        self, dataset: MyDataSet, device: torch.device, preprocessing: dict, batch_size: int,
        threads: int, bad: BadImages,
    ) -> None:  # fmt: skip
        self.dataset, self.device = dataset, device
        self.batch_size, self.threads, self.bad = batch_size, threads, bad
        self.normalize = Normalize(preprocessing).to(device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, and what is drawn in it."""
        self.dataset.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / (self.batch_size * WORLD))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.dataset
        together = batches(len(data), self.batch_size * WORLD, data.seed, data.epoch)
        # As many for each process: of a last batch that does not divide some are left out.
        order = [share(batch[: len(batch) // WORLD * WORLD]) for batch in together]
        for items in ahead(self._read, filter(None, order), self.threads):
            good = []
            for item in items:
                self.bad.add(item) if isinstance(item, ImageError) else good.append(item)
            if not good and WORLD > 1:  # the others would wait for its gradients
                raise RunError("use a larger --batch-size: no image of a batch can be read")
            if good:
                pixels, labels = zip(*good, strict=True)
                images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # NHWC -> NCHW
                images, labels = images.to(self.device), torch.tensor(labels).to(self.device)
                yield self.normalize(images), labels

    def _read(self, indices: list[int]) -> list[tuple | ImageError]:
        items = []
        for index in indices:
            try:
                items.append(self.dataset[index])
            except ImageError as error:
                items.append(error)
        return items

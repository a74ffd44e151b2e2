"""Many pictures: read them, augment them, hand them to the network in batches."""

import atexit
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from folders import BadPictures
from image import IMAGENET_MEAN, ImageError, load_rgb, resize_and_crop


class MyDataSet(Dataset):
    """Pictures and their classes.

    Args:
        images_path: one path per picture.
        images_class: one class index per picture.
        transform: called with the RGB picture; draws from torch's global generator.
        seed: with the epoch and the index it decides what `transform` draws for a picture, so
            neither the order nor the number of worker processes changes the result; the epoch is
            set by `DeviceLoader.set_epoch`. None leaves drawing to torch's generator.

    Raises:
        ValueError: the two lists differ in length.
        ImageError: (on access) a picture cannot be read.
    """

    def __init__(
        self,
        images_path: Sequence[str],
        images_class: Sequence[int],
        transform: Callable[[Image.Image], Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} pictures but {len(images_class)} classes")
        self.images_path = images_path
        self.images_class = images_class
        self.transform = transform
        self.seed = seed
        # In shared memory: worker processes that outlive an epoch see it change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, index: int) -> tuple[Tensor | Image.Image, int]:
        image = load_rgb(self.images_path[index])
        if self.transform is None:
            return image, self.images_class[index]
        if self.seed is None:
            return self.transform(image), self.images_class[index]
        with torch.random.fork_rng(devices=[]):
            mixed = (self.seed * 1_000_003 + int(self.epoch)) * 1_000_003 + index
            torch.default_generator.manual_seed(mixed % 2**63)
            return self.transform(image), self.images_class[index]

    @staticmethod
    def collate_fn(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """[(image, class), ...] to images (N, 3, H, W) and classes (N,) int64."""
        images, labels = zip(*batch, strict=True)
        return torch.stack(images), torch.tensor(labels)


def train_transform(size: int, random_erase: float = 0.0) -> Callable[[Image.Image], Tensor]:
    """Random crop of 8 to 100 % of the area and random mirroring; gives uint8 (3, size, size).

    With the probability `random_erase` a rectangle of 2 to 33 % of it becomes the mean colour
    (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).
    """
    from torchvision import transforms  # a second of import that only training needs

    steps = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    if random_erase:
        colour = [round(255 * value) for value in IMAGENET_MEAN]
        steps.append(transforms.RandomErasing(random_erase, value=colour))
    return transforms.Compose(steps)


def eval_transform(preprocessing: dict) -> Callable[[Image.Image], Tensor]:
    """Resize and centre crop; gives uint8 (3, crop, crop)."""
    return partial(_eval_tensor, resize=preprocessing["resize"], crop=preprocessing["crop"])


def _eval_tensor(image: Image.Image, resize: int, crop: int) -> Tensor:
    return torch.from_numpy(resize_and_crop(image, resize, crop)).permute(2, 0, 1)  # HWC -> CHW


def normalize(images: Tensor, preprocessing: dict) -> Tensor:
    """uint8 (N, 3, H, W) to the network's float32: scaled to 0..1, minus mean, over std."""
    mean = torch.tensor(preprocessing["mean"], device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocessing["std"], device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


class EpochSampler(DistributedSampler):
    """Every index once, in an order of (seed, epoch) if shuffled, from the place `start` on;
    `set_epoch` chooses the epoch."""

    # For one process, torch's sampler of distributed training is just this. It adds seed and epoch;
    # the factor keeps runs of neighbouring seeds from sharing their orders.
    def __init__(self, dataset: Sequence, shuffle: bool, seed: int | None) -> None:
        seed = (seed or 0) * 1_000_003
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


class _Guarded(Dataset):
    """A data set that gives the error where a picture cannot be read."""

    def __init__(self, dataset: MyDataSet) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ImageError:
        try:
            return self.dataset[index]
        except ImageError as error:
            return error

    def collate_fn(self, batch: list) -> tuple[tuple[Tensor, Tensor] | None, list[ImageError]]:
        """Images and classes, None where there are none, and the errors."""
        good = [item for item in batch if not isinstance(item, ImageError)]
        errors = [item for item in batch if isinstance(item, ImageError)]
        return self.dataset.collate_fn(good) if good else None, errors


def _start_worker(index: int, leaving: Tensor) -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM those of a service: the main process
    alone decides what becomes of it, however long its step takes. When it leaves, which it says in
    shared memory, Python ends its workers by a SIGTERM of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0) if leaving else None)


class DeviceLoader:
    """A DataLoader whose batches arrive on the device as normalised floats.

    Bytes travel from the workers to the device, a quarter of what floats would be. A batch is
    smaller, even empty, where pictures cannot be read.

    Args:
        dataset: gives uint8 (3, H, W) pictures.
        device: where batches go.
        preprocessing: holds mean and std.
        batch_size: pictures per batch; the last may be smaller.
        workers: processes that read pictures; 0 reads in this one.
        shuffle: a new order each epoch, from the data set's seed and `set_epoch`.
        bad: what becomes of pictures that cannot be read; None makes them an error.
    """

    def __init__(
        self,
        dataset: MyDataSet,
        device: torch.device,
        preprocessing: dict,
        *,
        batch_size: int,
        workers: int,
        shuffle: bool = False,
        bad: BadPictures | None = None,
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.preprocessing = preprocessing
        self.bad = bad or BadPictures(len(dataset), skip=False)
        self.sampler = EpochSampler(dataset, shuffle, dataset.seed)
        crop = preprocessing["crop"]
        self.nothing = (
            torch.empty(0, 3, crop, crop, dtype=torch.uint8),
            torch.empty(0, dtype=torch.int64),
        )
        guarded = _Guarded(dataset)
        with torch.inference_mode(False):  # else it could not be changed outside
            leaving = torch.zeros((), dtype=torch.bool).share_memory_()
        atexit.register(leaving.fill_, True)
        self.loader = DataLoader(
            guarded,
            batch_size=batch_size,
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=guarded.collate_fn,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=partial(_start_worker, leaving=leaving),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of the next pass, and where it starts."""
        self.dataset.epoch.fill_(epoch)
        self.sampler.set_epoch(epoch)
        self.sampler.start = first_batch * self.loader.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, errors in self.loader:
            for error in errors:
                self.bad.add(error)
            images, labels = batch or self.nothing
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            yield normalize(images, self.preprocessing), labels

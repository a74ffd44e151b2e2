"""From images on the disk to batches on the device: data set, transforms, order, loader."""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from folders import BadImages
from image import IMAGENET_MEAN, ImageError, load_rgb, resize_and_crop


class MyDataSet(Dataset):
    """Images and their classes.

    `transform` is called with the RGB image and draws from torch's global generator. With a `seed`,
    what it draws for an image depends on seed, epoch and index alone, so neither the order nor the
    number of worker processes changes the result. ImageError on access if one cannot be read.
    """

    def __init__(
        self,
        images_path: Sequence[str],
        images_class: Sequence[int],
        transform: Callable[[Image.Image], Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        if len(images_path) != len(images_class):
            raise ValueError(f"{len(images_path)} images but {len(images_class)} classes")
        self.images_path = images_path
        self.images_class = images_class
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor | Image.Image, int]:
        """Image and class of an index, or of the (epoch, index) that `EpochSampler` gives."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        image, label = load_rgb(self.images_path[index]), self.images_class[index]
        if self.transform is None:
            return image, label
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            mixed = (self.seed * 1_000_003 + epoch) * 1_000_003 + index
            torch.default_generator.manual_seed(mixed % 2**63)
            return self.transform(image), label

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

    colour = [round(255 * value) for value in IMAGENET_MEAN]
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    steps += [transforms.PILToTensor(), transforms.RandomErasing(random_erase, value=colour)]
    return transforms.Compose(steps)


def eval_transform(preprocessing: dict) -> Callable[[Image.Image], Tensor]:
    """Resize and centre crop; gives uint8 (3, crop, crop)."""
    return partial(_resized, resize=preprocessing["resize"], crop=preprocessing["crop"])


def _resized(image: Image.Image, resize: int, crop: int) -> Tensor:
    return torch.from_numpy(resize_and_crop(image, resize, crop)).permute(2, 0, 1)  # HWC -> CHW


class Normalize(nn.Module):
    """uint8 (N, 3, H, W) to the network's float32: scaled to 0..1, minus mean, over std."""

    def __init__(self, preprocessing: dict) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class EpochSampler(Sampler):
    """(epoch, index) for every index below `length`; shuffled, in an order of seed and epoch.

    The epoch travels along: workers that outlive it need it to know what to draw.
    """

    def __init__(self, length: int, shuffle: bool = False, seed: int = 0) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, and what is drawn in it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = range(self.length)
        if self.shuffle:
            # The factor keeps runs of neighbouring seeds from sharing their orders.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        return ((self.epoch, index) for index in order)


class DeviceLoader(DataLoader):
    """Batches that travel to the device as bytes and come out as normalised floats.

    `shuffle` gives a new order each epoch, from the data set's seed and `sampler.set_epoch`. Images
    that cannot be read are missing from their batch and counted by `bad`.
    """

    def __init__(
        self, dataset: MyDataSet, device: torch.device, preprocessing: dict, batch_size: int,
        num_workers: int = 0, bad: BadImages | None = None, *, shuffle: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            _Tolerant(dataset),
            batch_size,
            sampler=EpochSampler(len(dataset), shuffle, dataset.seed or 0),
            num_workers=num_workers,
            collate_fn=tuple,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0 and shuffle,  # validation's end with it
            worker_init_fn=_ignore_ctrl_c,
        )
        self.device = device
        self.normalize = Normalize(preprocessing).to(device)
        self.bad = bad or BadImages(len(dataset))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, errors in super().__iter__():
            for error in errors:
                self.bad.add(error)
            if images is not None:
                images = images.to(self.device, non_blocking=True)
                yield self.normalize(images), labels.to(self.device, non_blocking=True)


class _Tolerant(Dataset):
    """Batches of a data set without the images that cannot be read, and the errors of these."""

    def __init__(self, dataset: MyDataSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, items: list) -> tuple[Tensor | None, Tensor | None, list[ImageError]]:
        good, errors = [], []
        for item in items:
            try:
                good.append(self.dataset[item])
            except ImageError as error:
                errors.append(error)
        return *(self.dataset.collate_fn(good) if good else (None, None)), errors


def _ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main process speaks for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

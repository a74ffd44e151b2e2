"""Frozen layers, computed once.

With all layers but `fc` frozen, what `fc` sees of an image never changes: it is computed once and
kept, and `fc` is trained on that. One decode and one forward per image instead of one per epoch.
For --freeze-layers, and for the epoch 0 of --fc-first.

ShuffleNet's pooled features have small and uneven scales, so plain gradient descent on `fc` creeps
(the question of pytorch/vision#3090). The head is trained on standardised features, z = (x - mean)
/ std, and folded back for every saved checkpoint,

    head.linear.weight z + head.linear.bias  =  fc.weight x + fc.bias
    with  fc.weight = head.linear.weight / std,  fc.bias = head.linear.bias - fc.weight mean,

so that what is saved is the plain architecture.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from shufflenet.common.files import replacing
from shufflenet.common.messages import LOCAL_RANK, RunError, notice, progress
from shufflenet.common.options import cores
from shufflenet.inference.pytorch import torch_runtime
from shufflenet.inference.rewrite import rewrite_for_inference
from shufflenet.inference.runtimes import stream
from shufflenet.reading.ahead import batches
from shufflenet.reading.folders import BadImages, Part
from shufflenet.reading.image import ImageError

CACHE = Path(__file__).parents[2] / ".cache" / "features"
VERSION = 5  # to be raised when this file computes features in another way


class Head(nn.Module):
    """`fc` on features that are standardised by `std` and `mean` (channels,), those of the images
    that it will learn from; starts as the function of `fc`."""

    def __init__(self, fc: nn.Linear, std: Tensor, mean: Tensor) -> None:
        super().__init__()
        # Among few images a channel may hardly move, and a new image lie 100,000 such std away:
        # none is divided by less than the median channel is. Nor by less than float32 can fold
        # back, else the rounding of fc.weight x - fc.weight mean would drown the logits.
        std = std.clamp(min=std.median())
        std = std.clamp(min=1e-3 * torch.hypot(mean, std) + 1e-6)
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.linear = nn.Linear(fc.in_features, fc.out_features)
        # In float64 on the CPU, wherever fc is: Apple's GPU has none.
        weight, bias = fc.weight.detach().cpu().double(), fc.bias.detach().cpu().double()
        with torch.no_grad():
            self.linear.weight.copy_(weight * self.std.double())
            self.linear.bias.copy_(bias + weight @ self.mean.double())

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, channels) to logits (N, classes)."""
        return self.linear((x - self.mean) / self.std)

    def fold_into(self, fc: nn.Linear) -> None:
        """Make `fc` compute what this head computes."""
        mean, std = self.mean.cpu().double(), self.std.cpu().double()
        weight = self.linear.weight.detach().cpu().double() / std
        with torch.no_grad():
            fc.weight.copy_(weight)
            fc.bias.copy_(self.linear.bias.detach().cpu().double() - weight @ mean)


class FeatureLoader:
    """Batches of features (N, channels) and classes (N,): `rows` (images,) of all `features`, which
    are not copied, since those of ImageNet are 5 GB; with a seed, shuffled in each epoch."""

    def __init__(
        self, features: Tensor, rows: Tensor, labels: Tensor, size: int, seed: int | None
    ) -> None:
        self.features, self.rows, self.labels = features, rows, labels
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(len(self.labels), self.size, self.seed, self.epoch):
            yield self.features[self.rows[batch]], self.labels[batch]

    def std_mean(self) -> tuple[Tensor, Tensor]:
        """Standard deviation and mean of each channel, float64 (channels,)."""
        blocks = self.features.split(64, dim=1)
        pairs = [torch.std_mean(block[self.rows].double(), 0, correction=0) for block in blocks]
        std, mean = zip(*pairs, strict=True)
        return torch.cat(std), torch.cat(mean)


class Features(NamedTuple):
    """What `fc` sees of images: float32 (images, channels), not a number where one cannot be read;
    and the row of each path."""

    values: np.ndarray
    row_of: dict[str, int]


def head_and_loaders(
    fc: nn.Linear, features: Features, train: Part, val: Part, size: int, seed: int
) -> tuple[Head, FeatureLoader, FeatureLoader]:
    """What takes the place of a network, of the loader to train it, and of that to validate it, in
    batches of `size`. RunError if no image to train on could be read."""
    values, loaders = torch.from_numpy(features.values), []
    for (paths, labels), order in ((train, seed), (val, None)):
        rows = torch.tensor([features.row_of[path] for path in paths])
        good = ~values[rows, 0].isnan()  # could be read
        loaders.append(FeatureLoader(values, rows[good], torch.tensor(labels)[good], size, order))
    train_loader, val_loader = loaders
    if not len(train_loader.labels):
        raise RunError("no image to train on can be read")
    head = Head(fc, *train_loader.std_mean()).to(fc.weight.device)
    return head, train_loader, val_loader


def cached_features(
    model: nn.Module,
    paths: Sequence[str],
    preprocessing: dict,
    device: torch.device,
    bad: BadImages,
) -> Features:
    """The features of images. They are kept in `CACHE`, in a file named by a hash of the weights,
    the preprocessing and every image's place, size and time, and read from there the next time;
    what could not be read is tried again. Other processes of the machine wait meanwhile: all cores
    are used."""
    paths = sorted(paths)  # another split of the same images finds the same file
    file = CACHE / f"{_key(model, paths, preprocessing, device)}.npy"
    try:
        values, kept = np.load(file, allow_pickle=False), True
        notice(f"features of {len(paths)} images read from {file}")
    except (OSError, ValueError, EOFError):  # there is none, or it is damaged
        values, kept = np.full((len(paths), model.fc.in_features), np.nan, np.float32), False
    features = Features(values, {path: row for row, path in enumerate(paths)})
    missing = [path for path in paths if np.isnan(values[features.row_of[path], 0])]
    if kept and LOCAL_RANK:  # the first process of the machine has just tried them
        bad.note(missing)
        return features
    if not missing:
        return features

    network, done, start = rewrite_for_inference(model), 0, time.perf_counter()
    runtime = torch_runtime(network.forward_features, device, preprocessing)
    answers = stream(missing, runtime, preprocessing, cores(), on_gpu=device.type != "cpu")
    for path, answer in progress(answers, "computing features", len(missing)):
        if isinstance(answer, ImageError):
            bad.add(answer)
        else:
            values[features.row_of[path]] = answer
            done += 1
    if done:
        rate = done / (time.perf_counter() - start)
        notice(f"features of {done} images computed, {rate:.0f} img/s")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as opened:
                np.save(opened, values)
        except OSError as error:
            notice(f"features are not kept: {file.parent}: {error.strerror}")
    return features


def _key(model: nn.Module, paths: list[str], preprocessing: dict, device: torch.device) -> str:
    about = [VERSION, torch.__version__, PIL.__version__, np.__version__, preprocessing]
    about.append(device.type)
    for path in paths:
        about.append(os.path.realpath(path))
        with suppress(OSError):  # gone meanwhile: reading it will say so
            status = os.stat(path)
            about += [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    digest = hashlib.sha256(repr(about).encode())
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]

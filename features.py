"""Frozen layers, computed once.

With all layers but `fc` frozen, what `fc` sees of an image never changes: it is computed once and
kept, and `fc` is trained on that. One decode and one forward per image instead of one per epoch.

ShuffleNet's pooled features have small and uneven scales, so plain gradient descent on `fc` creeps
(the question of pytorch/vision#3090). The head is trained on standardised features, z = (x - mean)
/ std, and folded back for every saved checkpoint,

    head.linear.weight z + head.linear.bias  =  fc.weight x + fc.bias
    with  fc.weight = head.linear.weight / std,  fc.bias = head.linear.bias - fc.weight mean,

so that what is saved is the plain architecture.
"""

import hashlib
import json
import os
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cli import RunError, cores, notice, progress
from files import replacing
from folders import BadImages
from image import ImageError, load_rgb
from inference import stream, torch_run
from my_dataset import EpochSampler
from optimize import optimize_for_inference

CACHE = Path(__file__).parent / ".cache" / "features"
VERSION = 3  # to be raised when this file computes features in another way

# Defaults on cached features. Of 3 batch sizes x 5 rates x 3 decays, 30 epochs, 5 splits, these
# were at the top for 800 training images and for 200 (flower_photos, x0.5).
RECIPE = Namespace(epochs=30, batch_size=64, lr=0.03, lrf=0.1, weight_decay=0.1)


class Head(nn.Module):
    """`fc` on standardised features, mean and std (channels,); starts as the function of `fc`."""

    def __init__(self, fc: nn.Linear, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(fc.in_features, fc.out_features)
        # In float64 on the CPU, wherever fc is: Apple's GPU has none.
        weight, bias = fc.weight.detach().cpu().double(), fc.bias.detach().cpu().double()
        with torch.no_grad():
            self.linear.weight.copy_(weight * std.double())
            self.linear.bias.copy_(bias + weight @ mean.double())

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


class FeatureSet(Dataset):
    """Rows of features and their classes, a batch at a time."""

    def __init__(self, features: np.ndarray, rows: np.ndarray, labels: Tensor) -> None:
        self.features, self.rows, self.labels = features, rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        picked = [index for _, index in items]  # without the epoch that EpochSampler gives
        batch = torch.from_numpy(self.features[self.rows[picked]])  # (N,channels)
        return batch, self.labels[picked]


def head_and_loaders(
    model, train, val, preprocessing, device, seed: int, bad: BadImages, batch_size: int
) -> tuple[Head, DataLoader, DataLoader]:
    """What takes the place of a network, on `device`, and of its loaders for training and for
    validation, of paths and class indices each."""
    paths = sorted(train[0] + val[0])  # another split of the same images finds the same file
    features = cached_features(model, paths, preprocessing, device, bad)
    unreadable = np.isnan(features[:, 0])
    row_of = {path: row for row, path in enumerate(paths) if not unreadable[row]}
    loaders = []
    for name, (side, labels) in (("train", train), ("validate", val)):
        kept = [(row_of[p], label) for p, label in zip(side, labels, strict=True) if p in row_of]
        if not kept:
            raise RunError(f"no image to {name} on can be read")
        rows, labels = (np.array(column) for column in zip(*kept, strict=True))
        data = FeatureSet(features, rows, torch.from_numpy(labels))
        sampler = EpochSampler(len(data), shuffle=name == "train", seed=seed)
        loaders.append(DataLoader(data, batch_size, sampler=sampler, collate_fn=tuple))
    mean, std = statistics(features[loaders[0].dataset.rows])
    return Head(model.fc, mean, std).to(device), *loaders


def statistics(features: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 (channels,), of (n, channels)."""
    # A channel that hardly moves beside its mean keeps a scale that float32 can fold back: divided
    # by less, rounding of fc.weight x - fc.weight mean would drown the logits.
    mean, std = features.mean(0, np.float64), features.std(0, np.float64)
    std = np.maximum(std, 1e-3 * np.hypot(mean, std) + 1e-6)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def cached_features(
    model: nn.Module, paths: list[str], preprocessing: dict, device, bad: BadImages
) -> np.ndarray:
    """The features of images, float32 (n, channels), row i for paths[i], not a number where that
    cannot be read; computed now or read from an earlier run.

    The file in `CACHE` is named by a hash of the weights, the preprocessing and every image's
    place, size and time, so a change of any of them computes anew.
    """
    file = CACHE / f"{_key(model, paths, preprocessing)}.npy"
    with suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
        features = np.load(file, mmap_mode="r", allow_pickle=False)
        notice(f"features of {len(paths)} images read from {file}")
        for row in np.flatnonzero(np.isnan(features[:, 0])):
            try:
                load_rgb(paths[row])
            except ImageError as error:  # named in every run
                bad.add(error)
        return features

    optimized = optimize_for_inference(model.eval())
    run = torch_run(optimized.forward_features, device, preprocessing)
    features = np.empty((len(paths), model.fc.in_features), np.float32)
    start = time.perf_counter()
    with progress(len(paths), "computing features") as bar:
        for row, (_, answer) in enumerate(stream(paths, run, preprocessing, cores())):
            if isinstance(answer, ImageError):
                bad.add(answer)
                answer = np.nan
            features[row] = answer
            bar.update()
    rate = len(paths) / (time.perf_counter() - start)
    notice(f"features of {len(paths)} images computed, {rate:.0f} img/s")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as kept:
            np.save(kept, features)
    except OSError as error:
        notice(f"features are not kept: {file.parent}: {error.strerror}")
    return features


def _key(model: nn.Module, paths: list[str], preprocessing: dict) -> str:
    digest = hashlib.sha256()
    versions = [VERSION, torch.__version__, PIL.__version__, np.__version__]
    digest.update(json.dumps([versions, preprocessing], sort_keys=True).encode())
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    for path in paths:
        digest.update(os.fsencode(os.path.realpath(path)) + b"\0")
        with suppress(OSError):  # gone meanwhile: reading it will say so
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]

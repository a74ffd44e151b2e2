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

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from shufflenet.common.files import replacing
from shufflenet.common.messages import RunError, notice, progress
from shufflenet.common.options import cores
from shufflenet.inference.pytorch import torch_runtime
from shufflenet.inference.rewrite import rewrite_for_inference
from shufflenet.inference.runtimes import stream
from shufflenet.reading.ahead import batches
from shufflenet.reading.folders import BadImages
from shufflenet.reading.image import ImageError

CACHE = Path(__file__).parents[2] / ".cache" / "features"
VERSION = 4  # to be raised when this file computes features in another way


class Head(nn.Module):
    """`fc` on features that are standardised as those (n, channels) that it will learn from; starts
    as the function of `fc`."""

    def __init__(self, fc: nn.Linear, features: Tensor) -> None:
        super().__init__()
        std, mean = torch.std_mean(features.double(), dim=0, correction=0)
        # A channel that hardly moves beside its mean keeps a scale that float32 can fold back:
        # divided by less, rounding of fc.weight x - fc.weight mean would drown the logits.
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
    """Batches of features (N, channels) and classes (N,); with a seed, shuffled in each epoch."""

    def __init__(self, features: Tensor, labels: Tensor, size: int, seed: int | None) -> None:
        self.features, self.labels = features, labels
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(len(self.labels), self.size, self.seed, self.epoch):
            yield self.features[batch], self.labels[batch]


Part = tuple[Sequence[str], Sequence[int]]  # paths of images, and the index of the class of each


def head_and_loaders(
    fc: nn.Linear, features: dict[str, np.ndarray], train: Part, val: Part, size: int, seed: int
) -> tuple[Head, FeatureLoader, FeatureLoader]:
    """What takes the place of a network, of the loader to train it, and of that to validate it, in
    batches of `size`. RunError if no image to train on could be read."""
    loaders = []
    for (paths, labels), order in ((train, seed), (val, None)):
        rows = torch.from_numpy(np.stack([features[path] for path in paths]))
        good = ~rows[:, 0].isnan()  # could be read
        loaders.append(FeatureLoader(rows[good], torch.tensor(labels)[good], size, order))
    train_loader, val_loader = loaders
    if not len(train_loader.labels):
        raise RunError("no image to train on can be read")
    head = Head(fc, train_loader.features).to(fc.weight.device)
    return head, train_loader, val_loader


def cached_features(
    model: nn.Module,
    paths: Sequence[str],
    preprocessing: dict,
    device: torch.device,
    bad: BadImages,
) -> dict[str, np.ndarray]:
    """The features of images, {path: float32 (channels,)}, not a number where one cannot be read.
    They are kept in `CACHE`, in a file named by a hash of the weights, the preprocessing and every
    image's place, size and time, and read from there the next time. Other processes of the machine
    wait meanwhile: all cores are used."""
    paths = sorted(paths)  # another split of the same images finds the same file
    file, features = CACHE / f"{_key(model, paths, preprocessing)}.npy", None
    with suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
        features = np.load(file, allow_pickle=False)
    if features is not None:
        notice(f"features of {len(paths)} images read from {file}")
        missing = [paths[row] for row in np.flatnonzero(np.isnan(features[:, 0]))]
        for path in missing:
            notice(f"skipped: {path}: could not be read")
        bad.note(missing)
        return dict(zip(paths, features, strict=True))

    network = rewrite_for_inference(model)
    runtime = torch_runtime(network.forward_features, device, preprocessing)
    features = np.empty((len(paths), model.fc.in_features), np.float32)
    start, answers = time.perf_counter(), stream(paths, runtime, preprocessing, cores())
    for row, (_, answer) in enumerate(progress(answers, "computing features", len(paths))):
        if isinstance(answer, ImageError):
            bad.add(answer)
            answer = np.nan
        features[row] = answer
    rate = len(paths) / (time.perf_counter() - start)
    notice(f"features of {len(paths)} images computed, {rate:.0f} img/s")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as kept:
            np.save(kept, features)
    except OSError as error:
        notice(f"features are not kept: {file.parent}: {error.strerror}")
    return dict(zip(paths, features, strict=True))


def _key(model: nn.Module, paths: list[str], preprocessing: dict) -> str:
    about = [VERSION, torch.__version__, PIL.__version__, np.__version__, preprocessing]
    for path in paths:
        about.append(os.path.realpath(path))
        with suppress(OSError):  # gone meanwhile: reading it will say so
            status = os.stat(path)
            about += [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(repr(about).encode())
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]

"""Frozen layers, computed once.

With all layers but `fc` frozen, what `fc` sees of a picture never changes: compute it once, keep
it, and train `fc` on that. One decode and one forward a picture instead of one an epoch.

ShuffleNet's pooled features have small and uneven scales, so plain gradient descent on `fc` creeps
(the question of pytorch/vision#3090). The head is trained on standardised features, z = (x - mean)
/ std, and folded back for every saved checkpoint,

    head.weight z + head.bias  =  fc.weight x + fc.bias
    with  fc.weight = head.weight / std,  fc.bias = head.bias - fc.weight mean,

so that what is saved is the plain architecture.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import RunError, notice
from folders import BadPictures
from image import ImageError
from inference import optimize_for_inference
from my_dataset import EpochSampler
from pipeline import stream
from runtime import torch_run
from utils import cosine_lr, evaluate, train_one_epoch

CACHE = Path(__file__).parent / ".cache" / "features"
COMPUTED = 2  # to be raised when this file computes features in another way
IN_MEMORY = 1 << 29  # bytes; larger arrays stay on disk, memory-mapped

# Defaults on cached features. Of 3 batch sizes x 5 rates x 3 decays, 30 epochs, 5 splits, these
# were at the top for 800 training pictures and for 200 (flower_photos, x0.5).
RECIPE = {"lr": 0.03, "batch_size": 64, "weight_decay": 0.1}
HEAD_EPOCHS = 30  # of `train_head`


def cached_features(
    model: nn.Module,
    paths: list[str],
    preprocessing: dict,
    device: torch.device,
    *,
    threads: int,
    cache: Path,
    bad: BadPictures | None = None,
    amp: torch.dtype | None = None,
) -> np.ndarray:
    """The features of pictures, computed now or read from an earlier run.

    The cache file is named by a hash of the weights, the preprocessing and every picture's place,
    size and times, so a change of any of them computes anew. It appears only when it is complete.

    Args:
        model: with `forward_features`, on `device`; put in eval mode.
        paths: n pictures.
        preprocessing: as `default_preprocessing` returns it.
        device: where the model is.
        threads: how many read pictures and compute.
        cache: folder of the cache.
        bad: what becomes of pictures that cannot be read; None makes them an error.
        amp: dtype of autocast, None for float32.

    Returns:
        float32 (n, channels), row i for paths[i], not a number where that cannot be read; on disk
        where larger than `IN_MEMORY`.

    Raises:
        ImageError: a picture cannot be read.
    """
    file = cache / f"{_key(model, paths, preprocessing, amp)}.npy"
    shape = (len(paths), model.fc.in_features)
    features = _read(file, shape)
    bad = bad or BadPictures(len(paths), skip=False)
    if features is None:
        _clear(cache)
        temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            features = _reserve(temporary, shape)
            _fill(features, model, paths, preprocessing, device, threads, bad, amp)
            # With pictures that cannot be read nothing is kept, so that the next run names them.
            if not isinstance(features, np.memmap) or np.isnan(features[:, 0]).any():
                return features
            try:
                features.flush()
                os.replace(temporary, file)
            except OSError as error:  # such as the folder removed meanwhile
                notice(f"features are not kept: {file.parent}: {error.strerror}")
                return features
        finally:
            with suppress(OSError):
                temporary.unlink()
        kept = _read(file, shape)
        return features if kept is None else kept
    notice(f"features of {len(paths)} pictures read from {file}")
    return features


def _read(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array of a cache file, None where there is none or it is damaged."""
    if not file.exists():
        return None
    try:
        large = file.stat().st_size > IN_MEMORY
        features = np.load(file, mmap_mode="r" if large else None, allow_pickle=False)
        if (features.shape, features.dtype) == (shape, np.float32):
            return features
    except (OSError, ValueError, EOFError):
        pass
    notice(f"{file} is damaged: computed anew")
    return None


def _key(model: nn.Module, paths: list[str], preprocessing: dict, amp: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    versions = [COMPUTED, torch.__version__, PIL.__version__, np.__version__]
    digest.update(json.dumps([versions, preprocessing, str(amp)], sort_keys=True).encode())
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    for path in paths:
        digest.update(os.fsencode(os.path.realpath(path)) + b"\0")
        with suppress(OSError):  # gone meanwhile: reading it will say so
            status = os.stat(path)
            times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
            digest.update(times.encode() + b"\0")
    return digest.hexdigest()[:32]


def _clear(cache: Path) -> None:
    """Remove what killed runs left half-written more than a day ago."""
    for file in cache.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > 24 * 3600:
                file.unlink()


def _reserve(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """An array in a file, its disk space reserved; in memory where that is not to be had."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        features = np.lib.format.open_memmap(file, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):
            # Writing to a mapped page that finds no disk space would kill the process.
            with open(file, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
        return features
    except OSError as error:
        notice(f"features are kept in memory: {file.parent}: {error.strerror}")
        return np.empty(shape, np.float32)


def _fill(
    features: np.ndarray,
    model: nn.Module,
    paths: list[str],
    preprocessing: dict,
    device: torch.device,
    threads: int,
    bad: BadPictures,
    amp: torch.dtype | None,
) -> None:
    optimized = optimize_for_inference(model.eval(), amp)
    run = torch_run(optimized.forward_features, device, preprocessing)
    start = time.perf_counter()
    with tqdm(total=len(paths), desc="computing features", unit="img", leave=False) as bar:
        for row, (_, answer) in enumerate(stream(paths, run, preprocessing, threads=threads)):
            if isinstance(answer, ImageError):
                bad.add(answer)
                answer = np.nan
            features[row] = answer
            bar.update()
    rate = len(paths) / (time.perf_counter() - start)
    notice(f"features of {len(paths)} pictures computed, {rate:.0f} img/s")


def statistics(features: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the rows, float32 (channels,) each."""
    total, squares = 0.0, 0.0
    for chunk in np.array_split(rows, max(1, len(rows) // 4096)):
        values = np.asarray(features[chunk], np.float64)
        total += values.sum(0)
        squares += (values**2).sum(0)
    mean = total / len(rows)
    std = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))
    # A channel that hardly moves beside its mean keeps a scale that float32 can fold back: divided
    # by less, rounding of fc.weight x - fc.weight mean would drown the logits.
    floor = 1e-3 * np.sqrt(std**2 + mean**2) + 1e-6
    return torch.from_numpy(mean).float(), torch.from_numpy(np.maximum(std, floor)).float()


class FeatureLoader:
    """Batches of standardised features on the device; stands where a DeviceLoader stands.

    Args:
        features: (n, channels).
        rows: which of them, and in which order.
        labels: one class index for each of `rows`.
        mean: (channels,), subtracted.
        std: (channels,), divided by.
        device: where batches go.
        batch_size: rows per batch; the last may be smaller.
        shuffle: a new order each epoch, the one that a DeviceLoader takes for the same seed.
        seed: of the order.
    """

    def __init__(
        self,
        features: np.ndarray,
        rows: np.ndarray,
        labels: list[int],
        *,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.features = features
        self.dataset = rows
        self.labels = torch.tensor(labels)
        self.mean, self.std = mean.to(device), std.to(device)
        self.device = device
        self.batch_size = batch_size
        self.sampler = EpochSampler(rows, shuffle, seed)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order of the next pass, and where it starts."""
        self.sampler.set_epoch(epoch)
        self.sampler.start = first_batch * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(self.sampler)
        for first in range(0, len(order), self.batch_size):
            picked = torch.tensor(order[first : first + self.batch_size])
            batch = torch.from_numpy(self.features[self.dataset[picked.numpy()]])  # (N,channels)
            yield (
                (batch.to(self.device) - self.mean) / self.std,
                self.labels[picked].to(self.device),
            )


def head_and_loaders(
    model: nn.Module,
    train: tuple[list[str], list[int]],
    val: tuple[list[str], list[int]],
    preprocessing: dict,
    device: torch.device,
    *,
    batch_size: int,
    threads: int,
    seed: int,
    bad: BadPictures | None = None,
    amp: torch.dtype | None = None,
) -> tuple[nn.Linear, FeatureLoader, FeatureLoader]:
    """What takes the place of the network and its two loaders.

    Args:
        model: on `device`; its `fc` is where the head starts.
        train: paths and class indices.
        val: likewise.
        preprocessing: as `default_preprocessing` returns it.
        device: where everything runs.
        batch_size: rows per step.
        threads: how many read pictures and compute features.
        seed: of the order.
        bad: what becomes of pictures that cannot be read; None makes them an error.
        amp: dtype of autocast for the features, None for float32.
    """
    # Sorted, so that another split of the same pictures finds the same file.
    paths = sorted(train[0] + val[0])
    array = cached_features(
        model, paths, preprocessing, device, threads=threads, cache=CACHE, bad=bad, amp=amp
    )
    unreadable = np.isnan(array[:, 0])
    row_of = {path: row for row, path in enumerate(paths) if not unreadable[row]}

    def readable(side: tuple[list[str], list[int]]) -> tuple[np.ndarray, list[int]]:
        kept = [(row_of[path], label) for path, label in zip(*side, strict=True) if path in row_of]
        if not kept:
            raise RunError("no picture for training, or none for validation, can be read")
        return np.array([row for row, _ in kept]), [label for _, label in kept]

    rows, labels = readable(train)
    mean, std = statistics(array, rows)
    options = {"mean": mean, "std": std, "device": device, "batch_size": batch_size}
    return (
        unfold(model.fc, mean, std),
        FeatureLoader(array, rows, labels, shuffle=True, seed=seed, **options),
        FeatureLoader(array, *readable(val), **options),
    )


def train_head(
    model: nn.Module,
    train: tuple[list[str], list[int]],
    val: tuple[list[str], list[int]],
    preprocessing: dict,
    device: torch.device,
    *,
    threads: int,
    seed: int,
    bad: BadPictures | None = None,
    amp: torch.dtype | None = None,
) -> dict:
    """Train the `fc` of a network in place, as `--freeze-layers` does by default.

    All layers trained together from a fresh `fc` are moved by gradients that mean nothing until it
    is learnt (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", ICLR 2022).

    Args: as of `head_and_loaders`, but for the batch size.

    Returns:
        what `utils.evaluate` returns for `val`.
    """
    lr, decay = RECIPE["lr"], RECIPE["weight_decay"]
    head, train_loader, val_loader = head_and_loaders(
        model, train, val, preprocessing, device,
        batch_size=RECIPE["batch_size"], threads=threads, seed=seed, bad=bad, amp=amp,
    )  # fmt: skip
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=decay)
    for epoch in range(HEAD_EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(lr, 0.1, epoch, HEAD_EPOCHS)
        title = f"fc first, epoch {epoch + 1}"
        train_one_epoch(head, optimizer, train_loader, device, epoch, title=title)
    fold(head, train_loader.mean, train_loader.std, model.fc)
    return evaluate(head, val_loader, device)


def unfold(fc: nn.Linear, mean: Tensor, std: Tensor) -> nn.Linear:
    """The head on standardised features that computes what `fc` computes on plain ones."""
    head = nn.Linear(fc.in_features, fc.out_features)
    weight, bias = fc.weight.detach().cpu().double(), fc.bias.detach().cpu().double()
    with torch.no_grad():
        head.weight.copy_(weight * std.double())
        head.bias.copy_(bias + weight @ mean.double())
    return head.to(fc.weight.device)


def fold(head: nn.Linear, mean: Tensor, std: Tensor, fc: nn.Linear) -> None:
    """Make `fc` compute on plain features what `head` computes on standardised ones."""
    # On the CPU, wherever they are: Apple's GPU has no float64.
    mean, std = mean.cpu().double(), std.cpu().double()
    weight = head.weight.detach().cpu().double() / std
    with torch.no_grad():
        fc.weight.copy_(weight)
        fc.bias.copy_(head.bias.detach().cpu().double() - weight @ mean)

"""Training for an epoch, validating, and what they need: split, device, seed, schedule."""

import math
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import RunError, UsageError
from folders import split_pictures, with_labels
from metrics import measure
from my_dataset import DeviceLoader

MOST_PARTS = 8  # of a batch: its parts would be small where there are more cores


def read_split_data(
    root: str, val_rate: float = 0.2, seed: int = 0
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Split a folder of class folders into a training and a validation part, class by class.

    See `split_pictures`; this is the same in the form of the tutorial.

    Returns:
        training paths, their class indices, validation paths, their class indices.
    """
    train, val = split_pictures(root, val_rate, seed)
    return *with_labels(train, list(train)), *with_labels(val, list(train))


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        UsageError: it is not there.
    """
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= cuda:
        raise UsageError(f"--device {name}: torch sees {cuda} CUDA devices; use --device cpu")
    if device.type == "mps" and not mps:
        raise UsageError("--device mps: torch sees no Apple GPU; use --device cpu")
    return device


def amp_dtype(device: torch.device, amp: bool | None) -> torch.dtype | None:
    """What autocast computes in, or None for plain float32; None for `amp` asks for it on CUDA."""
    if amp is None:
        amp = device.type == "cuda"
    if not amp:
        return None
    old_gpu = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if old_gpu else torch.bfloat16


def set_seed(seed: int) -> None:
    """Seed every generator, and have CUDA choose convolutions that repeat their results."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def freeze_layers(model: nn.Module) -> None:
    """Leave only `fc` to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))


def freeze_batch_norm(model: nn.Module) -> None:
    """Leave batch norm as it is: statistics, scale and shift."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def set_train_mode(model: nn.Module) -> None:
    """Train mode for what is trained, eval mode for what is frozen: batch norm would otherwise
    move its statistics, and the "frozen" layers with them."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def cosine_lr(lr: float, lrf: float, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch (from 0): a half cosine from `lr` towards `lr * lrf`."""
    return lr * (lrf + (1 - lrf) * (1 + math.cos(math.pi * epoch / epochs)) / 2)


class Stopped(Exception):
    """Training was asked to stop and did so after a step."""

    def __init__(self, position: dict) -> None:
        self.position = position  # where the epoch goes on, see `train_one_epoch`


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader | DeviceLoader,
    device: torch.device,
    epoch: int,
    *,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    position: dict | None = None,
    title: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Train once over the data.

    Args:
        model: on `device`.
        optimizer: of the parameters to be trained.
        data_loader: (images (N, 3, H, W) normalised, classes (N,)); a DeviceLoader, a
            FeatureLoader or any DataLoader of such batches.
        device: where it runs.
        epoch: counted from 0; decides order and augmentation.
        amp: dtype of autocast, None for float32.
        scaler: for float16; it keeps its scale from epoch to epoch.
        position: go on with an epoch that was stopped, from what `Stopped` told.
        title: of the progress bar, which else names the epoch.
        stop: asked after every step.

    Returns:
        {"loss": mean, "accuracy": 0 to 1, "images_per_second": over the epoch, "position": as
        that of `Stopped`, at the end}.

    Raises:
        RunError: the loss is not finite, or no picture could be read.
        Stopped: `stop` said so.
    """
    set_train_mode(model)
    step = position["step"] if position else 0
    if hasattr(data_loader, "set_epoch"):
        data_loader.set_epoch(epoch, step)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    lr = optimizer.param_groups[0]["lr"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum, correct = torch.zeros(2, device=device)
    seen = 0
    if position:
        loss_sum, correct = position["sums"].to(device)
        seen = position["seen"]

    def here() -> dict:
        return {"step": step, "seen": seen, "sums": torch.stack((loss_sum, correct)).cpu()}

    def mean_loss() -> float:
        if not seen:
            raise RunError(f"no picture of epoch {epoch + 1} can be read")
        mean = loss_sum.item() / seen
        if not math.isfinite(mean):
            raise RunError(
                f"the loss is {mean} after {seen} pictures of epoch {epoch + 1}; "
                f"use a smaller --lr (now {lr:.3g})"
            )
        return mean

    def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Logits, share of the mean loss, and its gradients."""
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(images)  # (n, classes)
            loss = nn.functional.cross_entropy(logits, labels)
        loss = loss * (len(labels) / count)
        gradients = torch.autograd.grad(scaler.scale(loss), trained, allow_unused=True)
        return logits.detach(), loss.detach(), gradients

    progress = _progress(data_loader, title or f"epoch {epoch + 1} training", seen)
    with progress as bar, _in_parts(model, device) as in_parts:
        for images, labels in data_loader:
            step += 1
            if not len(labels):
                continue
            images, labels, count = images.to(device), labels.to(device), len(labels)
            logits, losses, gradients = zip(*in_parts(part, images, labels), strict=True)
            # In the order of the parts, whichever was ready first: every time the same result.
            for parameter, *shares in zip(trained, *gradients, strict=True):
                unused = shares[0] is None
                parameter.grad = None if unused else sum(shares[1:], start=shares[0])
            logits, loss = torch.cat(logits), sum(losses)  # (N, classes), mean
            scaler.step(optimizer)
            scaler.update()

            loss_sum = loss_sum + loss * len(labels)
            correct = correct + (logits.argmax(1) == labels).sum()
            seen += len(labels)
            bar.update(len(labels))
            # Reading a figure waits for the device, so not at every step.
            if step % 10 == 0 or seen == bar.total:
                mean, accuracy = mean_loss(), correct.item() / seen
                bar.set_postfix(
                    refresh=seen == bar.total, loss=f"{mean:.3f}", acc=f"{accuracy:.3f}", lr=lr
                )
            if stop():
                raise Stopped(here())
    return {
        "loss": mean_loss(),
        "accuracy": correct.item() / seen,
        "images_per_second": (bar.n - bar.initial) / bar.format_dict["elapsed"],
        "position": here(),
    }


@contextmanager
def _in_parts(model: nn.Module, device: torch.device) -> Iterator[Callable[..., list]]:
    """A function that applies another to equal parts of a batch, each on its own core of the CPU;
    to the whole on other devices, and where batch norm makes the parts depend on each other.

    A network this small leaves cores waiting for each other at every operation: two of them train
    a third faster in parts (README, Results).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    independent = norms and not any(norm.training for norm in norms)
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1 or not independent:
        yield lambda work, *batch: [work(*batch)]
        return
    parts = min(cores, MOST_PARTS)
    with ThreadPoolExecutor(parts, "part", torch.set_num_threads, [cores // parts]) as pool:
        yield lambda work, *batch: list(pool.map(work, *(piece.chunk(parts) for piece in batch)))


def evaluate(
    model: nn.Module,
    data_loader: DataLoader | DeviceLoader,
    device: torch.device,
    *,
    amp: torch.dtype | None = None,
    title: str = "evaluating",
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Classify the data and compare with the truth.

    Args: as of `train_one_epoch`; `title` names the progress bar.

    Returns:
        what `metrics.measure` returns, and "images_per_second".

    Raises:
        RunError: no picture could be read.
        Stopped: `stop` said so; its position means nothing.
    """
    model.eval()
    outputs, truth = [], []

    @torch.inference_mode()
    def part(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return model(images).float()  # (n, classes)

    with _progress(data_loader, title) as bar, _in_parts(model, device) as in_parts:
        for images, labels in data_loader:
            if not len(labels):
                continue
            images, labels = images.to(device), labels.to(device)
            outputs.append(torch.cat(in_parts(part, images)))  # (N, classes)
            truth.append(labels)
            bar.update(len(labels))
            if stop():
                raise Stopped({})
    if not truth:
        raise RunError("no picture for validation can be read")
    result = measure(torch.cat(outputs).cpu().numpy(), torch.cat(truth).cpu().numpy())
    return result | {"images_per_second": result["images"] / bar.format_dict["elapsed"]}


def _progress(data_loader: DataLoader | DeviceLoader, title: str, seen: int = 0) -> tqdm:
    return tqdm(
        total=len(data_loader.dataset),
        initial=seen,
        desc=title,
        unit="img",
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    )

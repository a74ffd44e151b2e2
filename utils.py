"""One epoch of training, validation, and what they need: split, frozen layers, schedule."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from shufflenet.common.files import save_json
from shufflenet.common.messages import RunError, progress
from shufflenet.inference.metrics import Tally
from shufflenet.inference.pytorch import exact_float32, move
from shufflenet.reading.folders import (
    Parts,
    find_parts,
    require_classes,
    split_images,
    with_labels,
)


def read_split_data(
    root: str, val_rate: float = 0.2, seed: int = 0, class_indices: str | Path | None = None
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Training paths and class indices, validation paths and class indices.

    Of one folder per class `int(n * val_rate)` images a class, at least one of two, are drawn for
    validation; `train/` and `val/` are taken as they are. `class_indices` names a file that gets
    the class names; beside weights that are saved with `torch.save(model.state_dict(), ...)` it has
    to be called class_indices.json. UsageError for fewer than two classes, or one without images to
    train on.
    """
    classes, train, val = split_data(find_parts(root), root, val_rate, seed)
    if class_indices:
        save_json(dict(enumerate(classes)), class_indices)
    return *train, *val


def split_data(
    parts: Parts, root: str | Path, val_rate: float, seed: int
) -> tuple[list[str], tuple, tuple]:
    """The classes in sorted order; paths and class indices for training, and for validation."""
    train, val = require_classes(split_images(parts, val_rate, seed), root)  # {class: paths} each
    classes = list(train)
    return classes, with_labels(train, classes), with_labels(val, classes)


def use_bfloat16(device: torch.device, amp: bool | None) -> bool:
    """Whether to compute in bfloat16: if asked for, or (None) on a GPU of NVIDIA that has it."""
    if amp is None and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(amp)


def freeze_layers(model: nn.Module) -> None:
    """Leave only `fc` to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))


def freeze_batch_norm(model: nn.Module) -> None:
    """Freeze scale and shift of batch norm; `set_train_mode` keeps its statistics, too."""
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


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: Iterable,
    device: torch.device,
    epoch: int,
) -> float:
    """Train once over the data, as `train_epoch`; returns the mean loss, as in the tutorial."""
    return train_epoch(model, optimizer, data_loader, device, epoch)["train_loss"]


def evaluate(model: nn.Module, data_loader: Iterable, device: torch.device) -> float:
    """Classify the data, as `validate`; returns the accuracy, 0 to 1, as in the tutorial."""
    return validate(model, data_loader, device).figures()["accuracy"]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: Iterable,
    device: torch.device,
    epoch: int,
    *,
    criterion: Callable = nn.functional.cross_entropy,
    amp: bool = False,
    clip: float | None = None,
) -> dict[str, float]:
    """Train once over the data. What is frozen stays in eval mode.

    Args:
        model: a network, or a head on cached features.
        data_loader: (images (N, 3, H, W) normalised, or for a head features (N, channels);
            classes (N,)).
        epoch: counted from 0; decides the order where the loader has `set_epoch`.
        criterion: loss of logits (N, classes) and classes (N,): of each image, or their mean.
        amp: compute in bfloat16 where autocast does.
        clip: largest norm of the gradients of a step; longer ones are shortened to it.

    Returns "train_loss" (the mean), "train_accuracy" (0 to 1) and "images_per_second".
    RunError if the loss is not finite, or no image can be read.
    """
    set_train_mode(model)
    if hasattr(data_loader, "set_epoch"):
        data_loader.set_epoch(epoch)
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    images_seen, start = 0, time.perf_counter()
    for images, labels in progress(data_loader, f"epoch {epoch + 1}"):
        images, labels = move(images, device), move(labels, device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            logits = model(images)  # (N, classes)
            loss = criterion(logits, labels).mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

        loss_sum += loss.detach() * len(labels)  # on the device: reading it would wait
        correct += (logits.argmax(1) == labels).sum()
        images_seen += len(labels)
    if not images_seen:
        raise RunError("no image to train on can be read")
    mean_loss = loss_sum.item() / images_seen
    if not math.isfinite(mean_loss):
        lr = optimizer.param_groups[0]["lr"]
        raise RunError(f"the loss is {mean_loss}: use a smaller --lr (now {lr:.3g})")
    seconds = max(time.perf_counter() - start, 1e-9)
    return {
        "train_loss": mean_loss,
        "train_accuracy": correct.item() / images_seen,
        "images_per_second": images_seen / seconds,
    }


@exact_float32()
@torch.inference_mode()
def validate(model: nn.Module, data_loader: Iterable, device: torch.device) -> Tally:
    """Classify the data, (images or features, classes) as in `train_epoch`, in float32; returns
    what was counted: its `figures()` are loss, accuracy and so on."""
    model.eval()
    tally = None
    for images, labels in progress(data_loader, "validation"):
        logits = model(move(images, device)).float()  # (N, classes)
        if tally is None:
            tally = Tally(logits.shape[1])
        tally.add(logits.cpu().numpy(), labels.cpu().numpy())
    return tally or Tally(0)

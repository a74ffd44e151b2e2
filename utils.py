"""One epoch of training, validation, and what they need: split, device, seed, schedule."""

import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from cli import RunError, UsageError, progress
from distributed import LOCAL_RANK
from files import save_json
from folders import split_images, with_labels
from metrics import Tally


def read_split_data(
    root: str, val_rate: float = 0.2, seed: int = 0, class_indices: str | Path | None = None
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Training paths and class indices, validation paths and class indices, as `split_images`.

    `class_indices` names a file that gets the class names. Beside weights that are saved with
    `torch.save(model.state_dict(), ...)` it has to be called class_indices.json.
    """
    train, val = split_images(root, val_rate, seed)
    if class_indices:
        save_json(dict(enumerate(train)), class_indices)
    return *with_labels(train, list(train)), *with_labels(val, list(train))


def choose_device(name: str) -> torch.device:
    """The device called `name`, if it is there, else UsageError; "auto" is CUDA, MPS or the CPU."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if cuda and name in ("auto", "cuda"):
        name = f"cuda:{LOCAL_RANK}"  # of several processes each has its own
    elif name == "auto":
        name = "mps" if mps else "cpu"
    there = {"cpu", *["mps"] * mps, *["cuda"] * bool(cuda), *map("cuda:{}".format, range(cuda))}
    if name not in there:
        raise UsageError(f"--device {name}: use {' or '.join(sorted(there))}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # what asks for no device means this one
    return device


def memory_format(device: torch.device) -> torch.memory_format:
    """NHWC, which convolutions prefer, but on Apple's GPU: wrong gradients (pytorch#175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


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
    *,
    amp: bool = False,
    clip: float | None = None,
    log: dict | None = None,
) -> float:
    """Train once over the data; returns the mean loss. What is frozen stays in eval mode.

    Args:
        data_loader: (images (N, 3, H, W) normalised, or for a head features (N, channels);
            classes (N,)).
        epoch: counted from 0; decides the order where the loader has `set_epoch`.
        amp: compute in bfloat16 where autocast does.
        clip: largest norm of the gradients of a step; longer ones are shortened to it.
        log: gets "train_loss", "train_accuracy" (0 to 1) and "images_per_second".

    RunError if the loss is not finite, or no image can be read.
    """
    set_train_mode(model)
    if hasattr(data_loader, "set_epoch"):
        data_loader.set_epoch(epoch)
    loss_sum, correct = torch.zeros(2, device=device)
    images_seen, start = 0, time.perf_counter()
    for images, labels in progress(data_loader, f"epoch {epoch + 1}"):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            logits = model(images)  # (N, classes)
            loss = nn.functional.cross_entropy(logits, labels)
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
        raise RunError(f"use a smaller --lr (now {lr:.3g}): the loss is {mean_loss}")
    if log is not None:
        log |= {"train_loss": mean_loss, "train_accuracy": correct.item() / images_seen}
        log["images_per_second"] = images_seen / max(time.perf_counter() - start, 1e-9)
    return mean_loss


@torch.inference_mode()
def evaluate(
    model: nn.Module, data_loader: Iterable, device: torch.device, *, log: dict | None = None
) -> float:
    """Classify the data; returns the accuracy, 0 to 1. `log` gets "val_loss", "val_accuracy" and
    "confusion", int64 (classes, classes) by [truth, prediction]. RunError if no image can be read.
    """
    model.eval()
    tally = None
    for images, labels in progress(data_loader, "validation"):
        logits = model(images.to(device)).float()  # (N, classes)
        tally = tally or Tally(logits.shape[1])
        tally.add(logits.cpu().numpy(), labels.cpu().numpy())
    tally = tally or Tally(0)
    if log is not None:
        tally.note(log)
    return tally.figures()["accuracy"]

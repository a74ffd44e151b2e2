"""Where a network computes in PyTorch, and how images lie there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shufflenet.common.messages import UsageError


@dataclass(frozen=True)
class Compute:
    """Where and how a network is trained."""

    device: torch.device
    threads: int  # cores that it may use on a CPU
    amp: bool  # in bfloat16 where autocast does


def choose_device(name: str, index: int = 0) -> torch.device:
    """The device called `name`, if it is there, else UsageError; "auto" is CUDA, MPS or the CPU,
    and "cuda" the GPU of that index."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if cuda and name in ("auto", "cuda"):
        name = f"cuda:{index}"
    elif name == "auto":
        name = "mps" if mps else "cpu"
    present = ["cpu", *(f"cuda:{number}" for number in range(cuda))]
    if mps:
        present.append("mps")
    if name not in present:
        raise UsageError(f"--device {name} is not there: use {' or '.join(present)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for no device means this one
    return device


def memory_format(device: torch.device) -> torch.memory_format:
    """NHWC, which convolutions prefer, but on Apple's GPU: wrong gradients (pytorch#175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@contextmanager
def torch_threads(count: int, before: int | None = None) -> Iterator[None]:
    """Compute with so many of torch's threads, then with as many as `before`. What is set last
    holds for threads that begin later, so of several that come here each is told what to leave."""
    before = before or torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Normalize(nn.Module):
    """uint8 (N, 3, H, W) to the network's float32: scaled to 0..1, minus mean, over std."""

    def __init__(self, preprocessing: dict) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.float().contiguous(memory_format=memory_format(images.device))
        return images.div_(255).sub_(self.mean).div_(self.std)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute convolutions in all 23 bits of float32: NVIDIA's GPUs take 10 of them (TF32) where
    nothing else is said, which moves logits by 1e-3."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def move(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device. One of NVIDIA computes on meanwhile: out of pageable memory the copy would
    wait for all that it has been given to do."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def torch_runtime(network: Callable, device: torch.device, preprocessing: dict) -> Callable:
    """A runtime, uint8 (N, H, W, 3) to float32 (N, outputs), of a function of normalised images
    (N, 3, H, W). On a CPU each thread that calls it computes on one core; a GPU takes one thread,
    since cuDNN plans for each anew, and Apple's aborts (pytorch#197805)."""
    normalize, threads = Normalize(preprocessing).to(device), torch.get_num_threads()

    @torch.inference_mode()
    def runtime(images: np.ndarray) -> np.ndarray:
        x = move(torch.from_numpy(images), device).permute(0, 3, 1, 2)  # (N,H,W,3) -> (N,3,H,W)
        with torch_threads(1, threads) if device.type == "cpu" else exact_float32():
            return network(normalize(x)).cpu().numpy()

    return runtime

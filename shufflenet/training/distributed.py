"""One of several processes that torchrun started, or the only one.

Every process reads the folder, builds the network and keeps the history of the run; each takes its
share of the images, and the first (rank 0) prints and writes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shufflenet.common.messages import LOCAL_RANK, LOCAL_WORLD, RANK, WORLD, UsageError
from shufflenet.inference.metrics import Tally, sum_up


def join(device: torch.device) -> None:
    """Meet the other processes, to share gradients on a `device`; torchrun may start only one."""
    alone = device.type == "mps" or not torch.distributed.is_torchelastic_launched()
    if WORLD == 1 and alone:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "mps":
        raise UsageError("--device mps: several processes cannot share Apple's GPU; start one")
    patient = {"timeout": timedelta(days=1)}  # while the first downloads, or computes features
    if LOCAL_WORLD < WORLD:
        torch.distributed.init_process_group(backend, **patient)
        return
    # torchrun starts processes again with the same store, where the dead left their addresses.
    store, *_ = next(torch.distributed.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(attempt, store)
    torch.distributed.init_process_group(
        backend, store=store, rank=RANK, world_size=WORLD, **patient
    )


def share(items: Sequence) -> Sequence:
    """The part of this process; the parts of all, by rank, are the items in their order."""
    return items[len(items) * RANK // WORLD : len(items) * (RANK + 1) // WORLD]


def gather(value: object) -> list:
    """The values of all processes, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * WORLD
    torch.distributed.all_gather_object(values, value)
    return values


def require_same(value: object, message: str) -> None:
    """UsageError in a process whose `value` is another than that of the first."""
    if gather(value)[0] != value:
        raise UsageError(message)


@contextmanager
def first_on_its_machine() -> Iterator[None]:
    """Let one process of each machine do what the others then find done, such as a download."""
    if LOCAL_RANK:
        gather(None)
    yield
    if not LOCAL_RANK:
        gather(None)


def wrap(learner: nn.Module, device: torch.device) -> nn.Module:
    """A network whose gradients are the mean over all processes, with the parameters of `learner`.
    Batch norm that learns sees the images of its own process."""
    if not torch.distributed.is_initialized():
        return learner
    return DistributedDataParallel(learner, [device] if device.type == "cuda" else None)


def share_statistics(*networks: nn.Module) -> None:
    """Give all processes the statistics of batch norm of the first, once each."""
    if torch.distributed.is_initialized():
        for buffer in dict.fromkeys(b for network in networks for b in network.buffers()):
            torch.distributed.broadcast(buffer, 0)


def mean(figures: dict[str, float]) -> dict[str, float]:
    """Figures over all processes, which had as many images each; images per second are added."""
    rows = gather(figures)
    means = {name: sum(row[name] for row in rows) / WORLD for name in figures}
    return means | {"images_per_second": WORLD * means["images_per_second"]}


def total(tally: Tally) -> Tally:
    """What all processes have counted."""
    return sum_up(gather(tally))

"""One of several processes that torchrun started, or the only one; all that knows of ranks.

Every process reads the folder, builds the network and keeps the history of the run; each takes its
share of the images, and the first (rank 0) prints and writes. No torch is imported before it is
needed, so that a mistake is answered at once.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WORLD, RANK, LOCAL_WORLD, LOCAL_RANK = 1, 0, 1, 0
if os.environ.keys() >= {"RANK", "WORLD_SIZE"}:  # either alone may mean something else
    WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def join(device) -> None:
    """Meet the other processes, to share gradients on a `device`."""
    if WORLD > 1:
        import torch

        backend = "nccl" if device.type == "cuda" else "gloo"
        if LOCAL_WORLD < WORLD:
            torch.distributed.init_process_group(backend)
            return
        # torchrun starts processes again with the same store: apart from the addresses of the dead.
        store, *_ = next(torch.distributed.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(attempt, store)
        where = {"rank": RANK, "world_size": WORLD}
        torch.distributed.init_process_group(backend, store=store, **where)


def share(items: Sequence) -> Sequence:
    """The part of this process; the parts of all, by rank, are the items in their order."""
    return items[len(items) * RANK // WORLD : len(items) * (RANK + 1) // WORLD]


def gather(value: object) -> list:
    """The values of all processes, by rank."""
    if WORLD == 1:
        return [value]
    import torch

    values = [None] * WORLD
    torch.distributed.all_gather_object(values, value)
    return values


def require_same(value: object, message: str) -> None:
    """UsageError in a process whose `value` is another than that of the first."""
    if gather(value)[0] != value:
        from cli import UsageError

        raise UsageError(message)


@contextmanager
def first_on_its_machine() -> Iterator[None]:
    """Let one process of each machine do what the others then find done, such as a download."""
    if LOCAL_RANK:
        gather(None)
    yield
    if not LOCAL_RANK:
        gather(None)


def meet(learner, row: dict) -> dict:
    """After an epoch: give all processes batch norm's statistics of the first, and return the
    figures of training over all of them, which had as many images each."""
    if WORLD == 1 or not hasattr(learner, "no_sync"):  # a head, which each trains alike
        return row
    import torch

    for buffer in learner.buffers():
        torch.distributed.broadcast(buffer, 0)
    rows = gather(row)
    mean = {name: sum(r[name] for r in rows) / WORLD for name in ("train_loss", "train_accuracy")}
    return row | mean | {"images_per_second": sum(r["images_per_second"] for r in rows)}


def wrap(learner, device, sync_bn: bool):
    """A network whose gradients are the mean over all processes, with the parameters of `learner`;
    with `sync_bn` batch norm takes its statistics over all of them, too (CUDA only)."""
    if WORLD == 1:
        return learner
    import copy

    from torch.nn import SyncBatchNorm
    from torch.nn.parallel import DistributedDataParallel

    if sync_bn:  # in a copy that shares all tensors: what is saved stays the plain network
        tensors = [*learner.parameters(), *learner.buffers()]
        learner = copy.deepcopy(learner, {id(tensor): tensor for tensor in tensors})
        learner = SyncBatchNorm.convert_sync_batchnorm(learner)
    return DistributedDataParallel(learner, [device] if device.type == "cuda" else None)

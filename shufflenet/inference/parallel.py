"""A batch in parts, each computed by one thread (or several, of more threads than parts).

torch's own threads meet at the end of every operation, and spin until all are there: whatever else
runs on the machine stops them all. Parts of a batch meet once. An image must not see the others of
its batch: batch norm is frozen, or learns from parts of a fixed size, whatever the number of
threads ("ghost batches": Hoffer et al., "Train longer, generalize better", arXiv 1705.08741).
"""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor, nn

from shufflenet.inference.pytorch import torch_threads

PART = 16  # images at most: the fastest of 1, 2, 4 ... 64 for x0.5, x1.0 and v1
GHOST = 64  # images at least that batch norm learns from at once


def split_batch(x: Tensor, threads: int) -> Sequence[Tensor]:
    """A batch (N, ...) in even parts, one or more a thread, of at least two images if possible."""
    rounds = -(-len(x) // (PART * threads))
    return x.tensor_split(max(1, min(rounds * threads, len(x) // 2)))


def run_in_parts(
    function: Callable[[Tensor], Tensor], x: Tensor, threads: int | None = None
) -> Tensor:
    """function(x) of a batch on the CPU, computed by so many threads, or as many as torch uses."""
    threads = threads or torch.get_num_threads()
    parts = split_batch(x, threads)
    if len(parts) == 1:
        return function(x)
    if threads == 1:
        return torch.cat([function(part) for part in parts])
    return torch.cat(_map(threads, function, parts))


class InParts(nn.Module):
    """A network that computes and learns as `network`, whose parameters it has, in parts on a CPU:
    the same gradients, but for the order of sums. With `ghosts` its batch norms learn from each
    part alone, and their statistics move by the mean over the parts."""

    def __init__(self, network: nn.Module, threads: int, ghosts: bool = False) -> None:
        super().__init__()
        self.network, self.threads, self.ghosts = network, threads, ghosts
        self.copies: list[nn.Module] = []  # the same parameters, statistics of their own

    def forward(self, x: Tensor) -> Tensor:
        """As that of the network, of x (N, ...) that needs no gradient."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        parts = self.cut(x)
        if not (self.ghosts and self.training):
            return _Parts.apply(self.threads, [self.network] * len(parts), parts, *parameters)
        while len(self.copies) < len(parts) - 1:
            shared = {id(parameter): parameter for parameter in self.network.parameters()}
            self.copies.append(copy.deepcopy(self.network, shared))
        networks = [self.network, *self.copies][: len(parts)]
        logits = _Parts.apply(self.threads, networks, parts, *parameters)
        # As data: autograd keeps them, without a use, and would complain of the change.
        for values in zip(*(network.buffers() for network in networks), strict=True):
            if values[0].is_floating_point():
                # So that equal values stay as they are, to the bit.
                values[0].data.add_(torch.stack(values).sub_(values[0]).mean(0))
        for one in self.copies:
            for value, mean in zip(one.buffers(), self.network.buffers(), strict=True):
                value.data.copy_(mean)
        return logits

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """The even parts of a batch (N, ...)."""
        if self.ghosts:
            return x.tensor_split(max(1, len(x) // GHOST))
        return split_batch(x, self.threads)


class _Parts(torch.autograd.Function):
    """Forward: a graph for each part. Backward: each graph alone, then the sum over the parts."""

    @staticmethod
    def forward(
        ctx,
        threads: int,
        networks: Sequence[nn.Module],
        parts: Sequence[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.threads, ctx.parameters = threads, parameters
        with torch.enable_grad():  # each part has a graph of its own
            ctx.outputs = _map(threads, nn.Module.__call__, networks, parts)
        return torch.cat([output.detach() for output in ctx.outputs])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        def gradients_of(output: Tensor, its_gradient: Tensor) -> tuple:
            return torch.autograd.grad(output, ctx.parameters, its_gradient, allow_unused=True)

        given = gradient.split([len(output) for output in ctx.outputs])
        gradients = _map(ctx.threads, gradients_of, ctx.outputs, given)
        columns = zip(*gradients, strict=True)  # of each parameter, which a part may not use
        used = [[each for each in column if each is not None] for column in columns]
        return None, None, None, *(sum(each[1:], each[0]) if each else None for each in used)


def _map(threads: int, function: Callable, *columns: Sequence) -> list:
    """function of the items of the columns, by threads in the modes of the caller; of more threads
    than items each item gets several."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    before, of_a_part = torch.get_num_threads(), max(1, threads // len(columns[0]))
    amp, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(*items: object) -> object:
        with (
            torch_threads(of_a_part, before),
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype, enabled=amp),
        ):
            return function(*items)

    return list(_pool(threads, os.getpid()).map(work, *columns))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads; a forked `process` has none of those of its parent."""
    return ThreadPoolExecutor(threads)

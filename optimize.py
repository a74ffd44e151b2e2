"""Exact rewrites of a network that make it faster.

`optimize_for_inference` changes how a trained network computes, not what:
1. Every batch norm is folded into the convolution before it.
2. In v2 no channel is shuffled, split off or passed along any more: see `DealtStage`.
3. Weights and activations lie in memory as NHWC (channels_last), which convolutions prefer, and on
   a CPU a large batch is computed in parts.

In v1 the shuffle stays: its 1x1 convolutions are grouped, so a channel cannot be made beside others
that are read with it without leaving its group.

`optimize_for_training` folds batch norms that are frozen, while the convolutions learn.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model import InvertedResidual, ShuffleNetV1, ShuffleNetV2, ShuffleUnit
from utils import memory_format

CPU_BATCH = 16  # images; the fastest of 1, 2, 4 ... 64 for x0.5, x1.0 and v1


def optimize_for_training(model: ShuffleNetV1 | ShuffleNetV2) -> nn.Module:
    """A network with the parameters of `model`, to be trained in its place where batch norm is
    frozen: the same function and gradients, without a pass of batch norm over the activations."""
    network = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    _fold_batch_norms(network, FoldedConv)
    return network


class FoldedConv(nn.Module):
    """A convolution and the frozen batch norm after it as one convolution, whose weights are scaled
    anew each time, so that gradients reach those of `conv`."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        scale = bn.weight.detach() * torch.rsqrt(bn.running_var + bn.eps)
        self.register_buffer("scale", scale.view(-1, 1, 1, 1))
        self.register_buffer("shift", bn.bias.detach() - bn.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        conv, weight = self.conv, self.conv.weight * self.scale
        return nn.functional.conv2d(
            x, weight, self.shift, conv.stride, conv.padding, groups=conv.groups
        )


def optimize_for_inference(model: ShuffleNetV1 | ShuffleNetV2) -> "Optimized":
    """A network that computes what `model` computes in eval mode, faster, on the same device and in
    the same precision; `model` is left as it is. TypeError for what is no ShuffleNet of `model.py`,
    or has units of another kind."""
    unit_kind = {ShuffleNetV1: ShuffleUnit, ShuffleNetV2: InvertedResidual}.get(type(model))
    stages = [model.stage2, model.stage3, model.stage4] if unit_kind else []
    if not unit_kind or any(type(unit) is not unit_kind for stage in stages for unit in stage):
        raise TypeError(f"{type(model).__name__} is no ShuffleNetV1 or ShuffleNetV2 of model.py")
    device = next(model.parameters()).device
    network = copy.deepcopy(model).requires_grad_(False).eval().cpu()
    # In float64, to be rounded once; on the CPU, since Apple's GPU has none.
    _fold_batch_norms(network.double(), fuse_conv_bn_eval)
    if isinstance(network, ShuffleNetV2):
        network.stage2 = DealtStage(network.stage2)
        network.stage3 = DealtStage(network.stage3, network.stage2.order)
        network.stage4 = DealtStage(network.stage4, network.stage3.order)
        _permute(network.conv5[0], columns=network.stage4.order)
    network.to(model.fc.weight.dtype)
    return Optimized(network).to(device, memory_format=memory_format(device))


def _fold_batch_norms(network: nn.Module, fold: Callable) -> None:
    """Put fold(convolution, batch norm) in the place of every such pair."""
    for module in list(network.modules()):
        if isinstance(module, ShuffleUnit):
            for conv, bn in (("pw1", "bn1"), ("dw", "bn2"), ("pw2", "bn3")):
                setattr(module, conv, fold(getattr(module, conv), getattr(module, bn)))
                setattr(module, bn, nn.Identity())
        elif isinstance(module, nn.Sequential):
            for place in reversed(range(len(module))):
                if isinstance(module[place], nn.BatchNorm2d):
                    module[place - 1] = fold(module[place - 1], module[place])
                    del module[place]


class Optimized(nn.Module):
    """What `optimize_for_inference` returns; it is called as the network that it was made from."""

    def __init__(self, network: ShuffleNetV1 | ShuffleNetV2) -> None:
        super().__init__()
        self.network = network

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to what `fc` sees, (N, channels)."""
        x = x.to(memory_format=memory_format(x.device))
        # On a CPU a few images at a time, whose activations stay in its caches; traced, the number
        # of parts would be that of the example.
        traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
        parts = x.split(CPU_BATCH) if x.device.type == "cpu" and not traced else [x]
        return torch.cat([self.network.forward_features(part) for part in parts])

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, num_classes)."""
        return self.network.fc(self.forward_features(x))


class DealtStage(nn.Module):
    """A stage of v2 without shuffle, split and concatenation of what only passes through.

    Shuffle and split decide which unit reads a channel, and nothing else: a channel is made by one
    unit, handed on untouched, and read by one later unit or by what follows the stage. So every
    unit deals its channels straight to their readers. Take 8 channels and 3 units; `a` and `b` are
    made by the branches of the first unit, `c` and `d` by the others, `|` is the split:

                    shuffled                         dealt
        unit 1 makes   a0 a1 a2 a3   b0 b1 b2 b3     a2 a3, a1, a0   b2 b3, b1, b0
               gives   a0 b0 a1 b1 | a2 b2 a3 b3
        unit 2 reads                 a2 b2 a3 b3     a2 a3 b2 b3
               makes                 c0 c1 c2 c3     c2 c3, c0 c1
               gives   a0 c0 b0 c1 | a1 c2 b1 c3
        unit 3 reads                 a1 c2 b1 c3     a1 b1 c2 c3
               makes                 d0 d1 d2 d3     d0 d1 d2 d3
               gives   a0 d0 c0 d1   b0 d2 c1 d3     a0 b0 c0 c1 d0 d1 d2 d3

    A comma separates what goes to different readers. That the channels of one reader are made
    side by side is a matter of ordering the rows of a unit's last 1x1 convolution; that they are
    read in the order in which they arrive, one of ordering the columns of the first convolution of
    the reader. What follows the stage finds its channels in the order of `self.order`. `units` have
    their batch norms folded, and their weights are permuted; `order` is that of the stage before.
    """

    def __init__(self, units: nn.Sequential, order: Tensor | None = None) -> None:
        super().__init__()
        first, *others = units
        if order is not None:
            depthwise, pointwise, _ = first.branch1
            _permute(depthwise, rows=order)
            _permute(pointwise, columns=order)
            _permute(first.branch2[0], columns=order)

        # makers: both branches of the first unit, then the others; readers: the others, then the
        # end of the stage. A channel is numbered by maker * width + place among what that makes.
        self.makers = nn.ModuleList([first.branch1, first.branch2, *(u.branch2 for u in others)])
        width = first.branch2[-2].out_channels
        made = torch.arange(width * len(self.makers)).split(width)  # per maker (width,)
        line = _deal(made[0], made[1])  # (2*width,): what the first unit gives, after its shuffle
        reads = []
        for new in made[2:]:
            kept, read = line.chunk(2)
            reads.append(read)
            line = _deal(kept, new)
        reads.append(line)

        for branch, read in zip(self.makers[2:], reads[:-1], strict=True):
            _permute(branch[0], columns=read.argsort())
        self.order = reads[-1].argsort()
        self.parts = []  # per maker [(reader, number of channels), ...] in the order it makes them
        for number, branch in enumerate(self.makers):
            rows = [read.sort().values for read in reads]
            rows = [row[row // width == number] % width for row in rows]
            _permute(branch[-2], rows=torch.cat(rows))
            self.parts.append([(reader, len(row)) for reader, row in enumerate(rows) if len(row)])

    def forward(self, x: Tensor) -> Tensor:
        inboxes = [[] for _ in range(len(self.makers) - 1)]  # one per reader
        for number, (branch, parts) in enumerate(zip(self.makers, self.parts, strict=True)):
            y = branch(x if number < 2 else torch.cat(inboxes[number - 2], dim=1))  # (N,C/2,H,W)
            counts = [channels for _, channels in parts]
            pieces = y.split(counts, dim=1) if len(counts) > 1 else [y]
            for (reader, _), piece in zip(parts, pieces, strict=True):
                inboxes[reader].append(piece)
        return torch.cat(inboxes[-1], dim=1)  # (N,C,H,W)


def _deal(left: Tensor, right: Tensor) -> Tensor:
    """Left and right in turn: what `channel_shuffle` with 2 groups makes of their channels."""
    return torch.stack((left, right), dim=1).flatten()


def _permute(conv: nn.Conv2d, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Reorder what a convolution makes (rows) or reads (columns). The rows of a depthwise
    convolution are what it reads, too."""
    with torch.no_grad():
        if rows is not None:
            conv.weight.copy_(conv.weight[rows])
            conv.bias.copy_(conv.bias[rows])
        if columns is not None:
            conv.weight.copy_(conv.weight[:, columns])

"""Exact rewrites of a trained network that make it faster.

`optimize_for_inference` changes how a network computes, not what:

1. Every batch norm is folded into the convolution before it.
2. In v2 no channel is shuffled, split off or passed along any more: see `DealtStage`.
3. Weights and activations lie in memory as NHWC (channels_last), which convolutions prefer, and on
   a CPU a large batch is computed in parts.

In v1 the shuffle stays: its 1x1 convolutions are grouped, so a channel cannot be made beside others
that are read with it without leaving its group.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model import InvertedResidual, ShuffleNetV1, ShuffleNetV2, ShuffleUnit

CPU_BATCH = 16  # pictures; the fastest of 1, 2, 4 ... 64 for x0.5, x1.0 and v1


def optimize_for_inference(
    model: ShuffleNetV1 | ShuffleNetV2, dtype: torch.dtype | None = None
) -> "Optimized":
    """A network that computes what `model` computes, faster; `model` is left as it is.

    Blocks that are not known (another `inverted_residual`, or one whose layers were exchanged) are
    left as they are, and the channels of their network stay in place.

    Args:
        model: in eval mode, on any device.
        dtype: what to compute in, torch.bfloat16 for instance; None keeps the model's. The last
            layer, whose cost is nothing, always keeps the model's.

    Raises:
        ValueError: the model is in train mode, where batch norm depends on the batch.
        TypeError: it is no ShuffleNet of `model.py`.
    """
    if not (_is(model, ShuffleNetV1) or _is(model, ShuffleNetV2)):
        raise TypeError(
            f"{type(model).__name__} is neither ShuffleNetV1 nor ShuffleNetV2, or has hooks"
        )
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in train mode; call model.eval() first")
    network = copy.deepcopy(model).requires_grad_(False)
    network.conv1 = _fold_batch_norms(network.conv1)
    stages = [network.stage2, network.stage3, network.stage4]
    for unit in (unit for stage in stages for unit in stage):
        if _is(unit, ShuffleUnit):
            unit.pw1, unit.bn1 = _fold(unit.pw1, unit.bn1)
            unit.dw, unit.bn2 = _fold(unit.dw, unit.bn2)
            unit.pw2, unit.bn3 = _fold(unit.pw2, unit.bn3)
        elif _is(unit, InvertedResidual):
            unit.branch1 = _fold_batch_norms(unit.branch1)
            unit.branch2 = _fold_batch_norms(unit.branch2)
    if isinstance(network, ShuffleNetV2):
        network.conv5 = _fold_batch_norms(network.conv5)
        known = all(map(_is_known, stages)) and _are(network.conv5, nn.Conv2d, nn.ReLU)
        if known and network.conv5[0].groups == 1 and not _shares_weights(network):
            network.stage2 = DealtStage(network.stage2)
            network.stage3 = DealtStage(network.stage3, network.stage2.order)
            network.stage4 = DealtStage(network.stage4, network.stage3.order)
            _permute(network.conv5[0], columns=network.stage4.order)
    return Optimized(network, dtype)


class Optimized(nn.Module):
    """What `optimize_for_inference` returns; it is called as the network that it was made from."""

    def __init__(self, network: ShuffleNetV1 | ShuffleNetV2, dtype: torch.dtype | None) -> None:
        super().__init__()
        own = _dtype(network.fc)
        self.network = network.to(dtype or own, memory_format=torch.channels_last)
        self.network.fc.to(own)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) to what `fc` sees, (N, channels)."""
        x = x.to(_dtype(self.network.conv1), memory_format=torch.channels_last)
        # On a CPU a few pictures at a time, whose activations stay in its caches.
        small = x.device.type == "cpu" and not torch.compiler.is_exporting()
        parts = x.split(CPU_BATCH) if small else [x]
        features = [self.network.forward_features(part) for part in parts]
        return torch.cat(features).to(_dtype(self.network.fc))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pictures (N, 3, H, W) to logits (N, num_classes)."""
        return self.network.fc(self.forward_features(x))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


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
    the reader. What follows the stage finds its channels in the order of `self.order`.

    Args:
        units: InvertedResidual blocks, batch norms folded; their weights are permuted.
        order: `order` of the stage before; None where its channels are in place.
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
            pieces = y.split([channels for _, channels in parts], dim=1)
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


def _fold_batch_norms(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, each batch norm folded into the convolution before it."""
    if not _is(layers, nn.Sequential):
        return layers
    folded = []
    for layer in layers:
        if folded:
            folded[-1], layer = _fold(folded[-1], layer)
        if type(layer) is not nn.Identity:
            folded.append(layer)
    return nn.Sequential(*folded)


def _fold(conv: nn.Module, bn: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution that includes the batch norm, and nothing in its place; both as they were
    where they are something else."""
    if not (_is(conv, nn.Conv2d) and _is(bn, nn.BatchNorm2d) and bn.running_mean is not None):
        return conv, bn
    dtype = conv.weight.dtype
    folded = fuse_conv_bn_eval(conv.double(), bn.double())  # rounded once, not at every step
    return folded.to(dtype), nn.Identity()


def _is(module: nn.Module, kind: type) -> bool:
    """Whether a module is just this, nothing derived from it, without hooks that alter it."""
    altered = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not altered


def _are(layers: nn.Module, *kinds: type) -> bool:
    return _is(layers, nn.Sequential) and len(layers) == len(kinds) and all(map(_is, layers, kinds))


def _shares_weights(network: nn.Module) -> bool:
    """Whether a weight is used in two places: it could not be permuted for both."""
    every = network.named_parameters(remove_duplicate=False)
    return len(list(every)) > len(list(network.parameters()))


def _is_known(stage: nn.Module) -> bool:
    """Whether the blocks of a stage, their batch norms folded, are what `DealtStage` expects."""
    conv, relu = nn.Conv2d, nn.ReLU
    if not _is(stage, nn.Sequential):
        return False
    makers = []
    for unit in stage:
        first = unit is stage[0]
        if not (
            _is(unit, InvertedResidual)
            and unit.stride == (2 if first else 1)
            and _are(unit.branch1, *((conv, conv, relu) if first else ()))
            and _are(unit.branch2, conv, relu, conv, conv, relu)
        ):
            return False
        pointwise, _, depthwise, last, _ = unit.branch2
        if not (pointwise.groups == last.groups == 1 and _is_depthwise(depthwise)):
            return False
        makers.append(last)
        if first:
            depthwise, last, _ = unit.branch1
            if not (_is_depthwise(depthwise) and last.groups == 1):
                return False
            makers.append(last)
    return len({last.out_channels for last in makers}) == 1


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels

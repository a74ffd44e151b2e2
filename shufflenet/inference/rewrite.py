"""Exact rewrites of a network that make it faster.

`rewrite_for_inference` changes how a trained network computes, not what:
1. Every batch norm is folded into the convolution before it.
2. In v2 no channel is shuffled, split off or passed along any more: see `DealtStage`.
3. Weights and activations lie in memory as NHWC (channels_last), which convolutions prefer, and on
   a CPU a batch is computed in parts: see parallel.py.

In v1 the shuffle stays: its 1x1 convolutions are grouped, so a channel cannot be made beside others
that are read with it without leaving its group.

`rewrite_for_training` folds batch norms that are frozen, while the convolutions learn.

Rewritten are the units and the skeleton of model.py. A network, unit or layer of another kind
passes through as it is: correct, merely not faster.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model import InvertedResidual, ShuffleNetV1, ShuffleNetV2, ShuffleUnit
from shufflenet.inference.parallel import GHOST, InParts, run_in_parts
from shufflenet.inference.pytorch import memory_format

KNOWN = (InvertedResidual, ShuffleNetV1, ShuffleNetV2, ShuffleUnit)  # but nothing derived of them


def rewrite_for_training(model: nn.Module, threads: int = 1, batch_size: int = 1) -> nn.Module:
    """A network with the parameters and buffers of `model`, to be trained in its place: the same
    function and gradients, without a pass of frozen batch norms over the activations. On a CPU
    several `threads` compute parts of a batch, where no layer sees more than one image; where batch
    norm learns, and a batch is several times `GHOST` images, it sees so many at once."""
    trial = _try(_fold_for_training, model)
    if not trial.exact:
        return model
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    network = _fold_for_training(copy.deepcopy(model, shared))
    on_cpu = next(network.parameters()).device.type == "cpu"
    if on_cpu and trial.learns_alone:
        return InParts(network, threads) if threads > 1 else network
    if on_cpu and batch_size >= 2 * GHOST and trial.repeats:
        return InParts(network, threads, ghosts=True)
    return network


def rewrite_for_inference(model: nn.Module, threads: int | None = None) -> "Rewritten":
    """A network that computes what `model` computes in eval mode, faster, on the same device and in
    the same precision; `model` is left as it is. On a CPU so many `threads` compute parts of a
    batch, by default as many as torch uses."""
    like = next(model.parameters())
    network = copy.deepcopy(model).requires_grad_(False).eval()
    trial = _try(_fold_and_deal, network)
    if trial.exact:
        # In float64, to be rounded once; on the CPU, since Apple's GPU has none.
        network = _fold_and_deal(network.cpu().double()).to(like.dtype)
    network = Rewritten(network, threads, in_parts=like.device.type == "cpu" and trial.alone)
    return network.to(like.device, memory_format=memory_format(like.device))


def _fold_for_training(network: nn.Module) -> nn.Module:
    return _fold_batch_norms(network, FoldedConv)


def _fold_and_deal(network: nn.Module) -> nn.Module:
    return _deal_channels(_fold_batch_norms(network, fuse_conv_bn_eval))


class Trial(NamedTuple):
    """What a rewrite did to a network; nothing is claimed of one that has no known parts."""

    exact: bool = False  # it is the same function
    alone: bool = False  # an image does not see the others of its batch
    learns_alone: bool = False  # nor while it learns, and nothing is drawn
    repeats: bool = False  # nothing is drawn while it learns


_trials: dict[tuple, Trial] = {}  # by rewrite and structure, since one takes a tenth of a second


def _try(rewrite: Callable[[nn.Module], nn.Module], model: nn.Module) -> Trial:
    """Try a rewrite in float64 on random weights, since model.py is there to be edited: a unit may
    no longer do what is known of it here."""
    kinds = [type(module) for module in model.modules()]
    if not any(kind in KNOWN for kind in kinds):
        return Trial()
    details = [module.extra_repr() for module in model.modules()]
    learns = [parameter.requires_grad for parameter in model.parameters()]
    key = (rewrite, *(kind.forward for kind in kinds), *details, *learns)
    if key not in _trials:
        plain = copy.deepcopy(model).cpu().double().eval()
        generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
        try:
            _trials[key] = _compare(rewrite, plain, generator)
        except MemoryError:
            raise
        except Exception:  # the rewrite, or the size tried, does not even fit
            _trials[key] = Trial()
        torch.set_rng_state(state)
    return _trials[key]


@torch.no_grad()
def _compare(rewrite: Callable, network: nn.Module, generator: torch.Generator) -> Trial:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=generator)
    for value in [*network.parameters(), *network.buffers()]:
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    expected, one = network(x), network(x[:1])
    rewritten = rewrite(network)
    found = rewritten(x)
    state = torch.get_rng_state()
    learning, again = rewritten.train()(x), rewritten(x)
    drawn = not torch.equal(state, torch.get_rng_state())
    close = partial(torch.allclose, rtol=0, atol=1e-9 * expected.abs().max().item())
    return Trial(
        exact=close(found, expected),
        alone=close(expected[:1], one),
        learns_alone=close(learning[:1], rewritten(x[:1])) and not drawn,
        repeats=close(learning, again) and not drawn,
    )


def _fold_batch_norms(network: nn.Module, fold: Callable) -> nn.Module:
    """Put fold(convolution, batch norm) in the place of every such pair of known modules."""
    for module in list(network.modules()):
        if type(module) is ShuffleUnit:
            for conv, bn in (("pw1", "bn1"), ("dw", "bn2"), ("pw2", "bn3")):
                if _can_be_folded(getattr(module, conv), getattr(module, bn)):
                    setattr(module, conv, fold(getattr(module, conv), getattr(module, bn)))
                    setattr(module, bn, nn.Identity())
        elif type(module) in KNOWN:
            for layers in module.children():
                if type(layers) is nn.Sequential:
                    for place in reversed(range(1, len(layers))):
                        if _can_be_folded(layers[place - 1], layers[place]):
                            layers[place - 1] = fold(layers[place - 1], layers[place])
                            del layers[place]
    return network


def _can_be_folded(conv: nn.Module, bn: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(bn) is nn.BatchNorm2d
        and conv.padding_mode == "zeros"
        and bn.affine
        and bn.track_running_stats
        and not bn.weight.requires_grad
    )


class FoldedConv(nn.Module):
    """A convolution and the frozen batch norm after it as one convolution, whose weights are scaled
    anew each time, so that gradients reach those of `conv`."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        scale = bn.weight.detach() * torch.rsqrt(bn.running_var + bn.eps)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", bn.bias.detach() - bn.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        conv, shift = self.conv, self.shift
        if conv.bias is not None:
            shift = shift + conv.bias * self.scale
        weight = conv.weight * self.scale.view(-1, 1, 1, 1)
        return nn.functional.conv2d(
            x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups
        )


class Rewritten(nn.Module):
    """What `rewrite_for_inference` returns; it is called as the network that it was made from."""

    def __init__(self, network: nn.Module, threads: int | None, in_parts: bool) -> None:
        super().__init__()
        self.network, self.threads, self.in_parts = network, threads, in_parts

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to what `fc` sees, (N, channels)."""
        return self._run(self.network.forward_features, x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, num_classes)."""
        return self._run(self.network, x)

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.to(memory_format=memory_format(x.device))
        return run_in_parts(function, x, self.threads) if self.in_parts else function(x)


def _deal_channels(network: nn.Module) -> nn.Module:
    """Rewrite the stages of v2 whose units are folded."""
    if type(network) is ShuffleNetV2:
        stages = nn.Sequential(network.stage2, network.stage3, network.stage4)
        layers = {type(layer) for stage in stages for unit in stage for layer in unit.modules()}
        if layers == {InvertedResidual, nn.Conv2d, nn.ReLU, nn.Sequential}:
            network.stage2 = DealtStage(network.stage2)
            network.stage3 = DealtStage(network.stage3, network.stage2.order)
            network.stage4 = DealtStage(network.stage4, network.stage3.order)
            _permute(network.conv5[0], columns=network.stage4.order)
    return network


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

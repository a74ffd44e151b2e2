"""ShuffleNet v1 and v2.

v1: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
    Devices", CVPR 2018, arXiv 1707.01083.
v2: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
    ECCV 2018, arXiv 1807.11164.

Both share one skeleton; the shapes are those of one 224x224 image, width 1.0 (v1: 3 groups):

    layer            output    v1 channels   v2 channels   units
    image            224x224        3             3
    conv1 3x3, /2    112x112       24            24
    maxpool 3x3, /2   56x56        24            24
    stage2            28x28       240           116         4 (the first has stride 2)
    stage3            14x14       480           232         8
    stage4             7x7        960           464         4
    conv5 1x1          7x7         -           1024
    mean               1x1        960          1024
    fc                           classes       classes

The v2 networks interchange weights with torchvision: same keys, same shapes, same logits.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
import torch.fx
from torch import Tensor, nn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of `groups` equal blocks of (N, C, H, W) out in turn, as cards (v1, section
    3.1): 12 channels in 3 groups leave in the order 0 4 8 1 5 9 2 6 10 3 7 11.

    The memory format is kept. ValueError if the channels do not divide into the groups.
    """
    n, c, h, w = x.shape
    if groups < 1 or c % groups != 0:
        raise ValueError(f"channel_shuffle: {c} channels do not divide into {groups} groups")
    if x.stride(1) != 1:
        x = x.reshape(n, groups, c // groups, h, w)
        return x.transpose(1, 2).reshape(n, c, h, w)  # (N,g,C/g,H,W) -> (N,C/g,g,H,W)
    # channels_last in memory: the same shuffle on the last axis, so that it stays so.
    x = x.permute(0, 2, 3, 1).reshape(n, h, w, groups, c // groups)
    return x.transpose(3, 4).reshape(n, h, w, c).permute(0, 3, 1, 2)


# torch.fx, and what is built on it, takes the shuffle as one operation: it branches on its input.
torch.fx.wrap("channel_shuffle")


def _pointwise(input_c: int, output_c: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(input_c, output_c, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


def _stem(channels: int, small_images: bool) -> tuple[nn.Sequential, nn.Module]:
    """The start that both versions share: (N,3,H,W) -> (N,channels,H/4,W/4). Images of some 32
    pixels would be shrunk to 8: with `small_images` the stem keeps their size."""
    conv = nn.Conv2d(3, channels, 3, 1 if small_images else 2, padding=1, bias=False)
    conv1 = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return conv1, nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)


# -- v2 --------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """The unit of v2 (figure 3 c and d).

    Stride 1 splits the channels: the first half passes untouched, the second goes through 1x1,
    3x3 depthwise and 1x1 convolutions. Stride 2 sends all channels through both branches. The
    concatenation is then shuffled, so that the next split mixes the two.

    ValueError unless the stride is 1 or 2, `output_c` is even, and equals `input_c` at stride 1.
    """

    def __init__(self, input_c: int, output_c: int, stride: int) -> None:
        super().__init__()
        if stride not in (1, 2) or output_c % 2 or (stride == 1 and input_c != output_c):
            raise ValueError(
                f"InvertedResidual({input_c}, {output_c}, {stride}): the stride must be 1 or 2, "
                "output_c even, and equal to input_c at stride 1"
            )
        self.stride = stride
        branch_c = output_c // 2

        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(
                _depthwise(input_c, stride),
                nn.BatchNorm2d(input_c),
                _pointwise(input_c, branch_c),
                nn.BatchNorm2d(branch_c),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            _pointwise(input_c if stride == 2 else branch_c, branch_c),
            nn.BatchNorm2d(branch_c),
            nn.ReLU(inplace=True),
            _depthwise(branch_c, stride),
            nn.BatchNorm2d(branch_c),
            _pointwise(branch_c, branch_c),
            nn.BatchNorm2d(branch_c),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            left, right = x.chunk(2, dim=1)  # (N,C,H,W) -> 2 x (N,C/2,H,W)
        else:
            left = right = x
        x = torch.cat((self.branch1(left), self.branch2(right)), dim=1)
        return channel_shuffle(x, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNet v2 (table 5), interchangeable with torchvision's.

    Args:
        stages_repeats: units of stage 2, 3 and 4.
        stages_out_channels: channels of conv1, stage 2, 3, 4 and conv5.
        num_classes: outputs of `fc`.
        inverted_residual: the unit, called with (input_c, output_c, stride).
        small_images: for some 32 pixels; keys and shapes of the weights stay.
    """

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        num_classes: int = 1000,
        inverted_residual: Callable[[int, int, int], nn.Module] = InvertedResidual,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if len(stages_repeats) != 3 or len(stages_out_channels) != 5:
            raise ValueError("stages_repeats must be 3 numbers and stages_out_channels 5")
        conv1_c, *stages_c, conv5_c = stages_out_channels

        self.conv1, self.maxpool = _stem(conv1_c, small_images)
        stages, input_c = [], conv1_c
        for repeats, output_c in zip(stages_repeats, stages_c, strict=True):
            units = [inverted_residual(input_c, output_c, 2)]
            units += [inverted_residual(output_c, output_c, 1) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(*units))
            input_c = output_c
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = nn.Sequential(
            _pointwise(input_c, conv5_c), nn.BatchNorm2d(conv5_c), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(conv5_c, num_classes)

    def feature_map(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, channels of conv5, H/32, W/32)."""
        x = self.maxpool(self.conv1(x))  # (N,3,224,224) -> (N,24,112,112) -> (N,24,56,56)
        x = self.stage2(x)  # -> (N,116,28,28)
        x = self.stage3(x)  # -> (N,232,14,14)
        x = self.stage4(x)  # -> (N,464,7,7)
        return self.conv5(x)  # -> (N,1024,7,7)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to what `fc` sees, (N, channels of conv5)."""
        return self.feature_map(x).mean([2, 3])  # (N,1024,7,7) -> (N,1024)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, num_classes)."""
        return self.fc(self.forward_features(x))


# -- v1 --------------------------------------------------------------------------------------------


class ShuffleUnit(nn.Module):
    """The unit of v1 (figure 2 b and c): a residual bottleneck of grouped 1x1 convolutions.

    The shuffle lets every group of the second 1x1 convolution see all groups of the first. No
    ReLU follows the depthwise convolution.

    Stride 1 adds the input. Stride 2 halves the size and concatenates the average-pooled input, so
    the convolutions make only `output_c - input_c` channels. The bottleneck is a quarter of
    `output_c`. `first_grouped` False leaves the first 1x1 convolution ungrouped (the paper's choice
    for stage 2, where the input is narrow). ValueError if the widths do not fit.
    """

    def __init__(
        self, input_c: int, output_c: int, stride: int, groups: int, first_grouped: bool = True
    ) -> None:
        super().__init__()
        if stride not in (1, 2) or (input_c != output_c if stride == 1 else input_c >= output_c):
            raise ValueError(
                f"ShuffleUnit: stride {stride} from {input_c} to {output_c} channels; stride 1 "
                "must keep them and stride 2, the only other, widen them"
            )
        self.stride = stride
        self.groups = groups
        bottleneck = output_c // 4
        branch_c = output_c if stride == 1 else output_c - input_c

        self.pw1 = _pointwise(input_c, bottleneck, groups if first_grouped else 1)
        self.bn1 = nn.BatchNorm2d(bottleneck)
        self.dw = _depthwise(bottleneck, stride)
        self.bn2 = nn.BatchNorm2d(bottleneck)
        self.pw2 = _pointwise(bottleneck, branch_c, groups)
        self.bn3 = nn.BatchNorm2d(branch_c)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(3, 2, padding=1)
        if stride == 1:
            # The unit starts as the identity (Goyal et al., arXiv 1706.02677, section 5.1). Else
            # sixteen positive sums make the features so large that fc diverges at usual rates.
            nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.pw1(x)))  # (N,C_in,H,W) -> (N,C_out/4,H,W)
        y = channel_shuffle(y, self.groups)
        y = self.bn2(self.dw(y))  # -> (N,C_out/4,H/stride,W/stride)
        y = self.bn3(self.pw2(y))  # -> (N,C_out or C_out-C_in,H/stride,W/stride)
        x = self.shortcut(x)
        y = x + y if self.stride == 1 else torch.cat((x, y), dim=1)
        return self.relu(y)


# Channels of conv1 and of stage 2, by groups and width; stages 3 and 4 double. The paper prints the
# row of width 1.0 (table 1) and says to scale the others. Stage 2 is rounded to a multiple of
# 4 * groups, so that the bottleneck divides into the groups; conv1 is as in megvii's code, or what
# divides by the groups and stays near the paper's multiply-adds (within 5 %, x0.25 g8 8 %).
_V1_CHANNELS = {
    # width:   0.25        0.5         1.0         1.5         2.0
    1: {0.25: (12, 36), 0.5: (12, 72), 1.0: (24, 144), 1.5: (20, 216), 2.0: (48, 288)},
    2: {0.25: (12, 48), 0.5: (8, 104), 1.0: (24, 200), 1.5: (20, 304), 2.0: (48, 400)},
    3: {0.25: (12, 60), 0.5: (12, 120), 1.0: (24, 240), 1.5: (24, 360), 2.0: (48, 480)},
    4: {0.25: (16, 64), 0.5: (8, 144), 1.0: (24, 272), 1.5: (24, 416), 2.0: (48, 544)},
    8: {0.25: (8, 96), 0.5: (16, 192), 1.0: (24, 384), 1.5: (24, 576), 2.0: (48, 768)},
}


class ShuffleNetV1(nn.Module):
    """ShuffleNet v1 (table 1), of 1, 2, 3, 4 or 8 groups (the paper's figures are mostly for 3) and
    width 0.25, 0.5, 1.0, 1.5 or 2.0, the paper's "s x"; ValueError for others. `small_images`: see
    ShuffleNetV2."""

    def __init__(
        self,
        groups: int = 3,
        width: float = 1.0,
        num_classes: int = 1000,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if width not in _V1_CHANNELS.get(groups, {}):
            known = f"{list(_V1_CHANNELS)} at one of {list(_V1_CHANNELS[1])}"
            raise ValueError(f"{groups} groups at width {width}: must be one of {known}")
        input_c, output_c = _V1_CHANNELS[groups][width]

        self.conv1, self.maxpool = _stem(input_c, small_images)
        stages = []
        for repeats in (4, 8, 4):
            first_grouped = bool(stages)  # only stage 2 starts ungrouped
            units = [ShuffleUnit(input_c, output_c, 2, groups, first_grouped)]
            units += [ShuffleUnit(output_c, output_c, 1, groups) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(*units))
            input_c, output_c = output_c, 2 * output_c
        self.stage2, self.stage3, self.stage4 = stages
        self.fc = nn.Linear(input_c, num_classes)

    def feature_map(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, channels of stage 4, H/32, W/32)."""
        x = self.maxpool(self.conv1(x))  # (N,3,224,224) -> (N,24,112,112) -> (N,24,56,56)
        x = self.stage2(x)  # -> (N,240,28,28)
        x = self.stage3(x)  # -> (N,480,14,14)
        return self.stage4(x)  # -> (N,960,7,7)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to what `fc` sees, (N, channels of stage 4)."""
        return self.feature_map(x).mean([2, 3])  # (N,960,7,7) -> (N,960)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, num_classes)."""
        return self.fc(self.forward_features(x))


# -- The variants ----------------------------------------------------------------------------------

_V2_CHANNELS = {  # table 5: conv1, stage 2, 3, 4, conv5
    "x0_5": [24, 48, 96, 192, 1024],
    "x1_0": [24, 116, 232, 464, 1024],
    "x1_5": [24, 176, 352, 704, 1024],
    "x2_0": [24, 244, 488, 976, 2048],
}

# Every network of this repository: name -> what builds it, called with num_classes=... It has `fc`
# (nn.Linear), `forward_features` and, to be explained, `feature_map`; docs/change.md adds one.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    f"shufflenet_v2_{width}": partial(ShuffleNetV2, [4, 8, 4], channels)
    for width, channels in _V2_CHANNELS.items()
} | {
    f"shufflenet_v1_x{str(width).replace('.', '_')}_g{groups}": partial(ShuffleNetV1, groups, width)
    for groups, widths in _V1_CHANNELS.items()
    for width in widths
}


IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of RGB values in 0 to 1
IMAGENET_STD = [0.229, 0.224, 0.225]
# What torchvision publishes with its weights; networks without such weights use the same as x1.0.
RESIZE = {"shufflenet_v2_x1_5": 232, "shufflenet_v2_x2_0": 232}


def default_preprocessing(name: str, small_images: bool = False) -> dict:
    """How an image is prepared for a network of `VARIANTS`: its shorter side becomes `resize`
    pixels, the centre of `crop` pixels is cut out, `mean` subtracted and divided by `std`."""
    resize, crop = (32, 32) if small_images else (RESIZE.get(name, 256), 224)
    return {"resize": resize, "crop": crop, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def takes_small_images(name: str) -> bool:
    """Whether a network of `VARIANTS` can be made for some 32 pixels: a parameter says so."""
    return "small_images" in signature(VARIANTS[name]).parameters


def build_model(name: str, num_classes: int = 1000, small_images: bool = False) -> nn.Module:
    """A network of `VARIANTS` by its name, with fresh weights; ValueError for no such name."""
    if name not in VARIANTS:
        raise ValueError(f"no model is called {name!r}, only {', '.join(VARIANTS)}")
    if small_images:
        return VARIANTS[name](num_classes=num_classes, small_images=True)
    return VARIANTS[name](num_classes=num_classes)


# The v2 networks by their names in the tutorial and in torchvision; called with num_classes=...
shufflenet_v2_x0_5 = partial(build_model, "shufflenet_v2_x0_5")
shufflenet_v2_x1_0 = partial(build_model, "shufflenet_v2_x1_0")
shufflenet_v2_x1_5 = partial(build_model, "shufflenet_v2_x1_5")
shufflenet_v2_x2_0 = partial(build_model, "shufflenet_v2_x2_0")
shufflenet_v1_g3 = partial(build_model, "shufflenet_v1_x1_0_g3")  # the paper's usual v1

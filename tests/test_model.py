"""Networks, against torchvision and the papers."""

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import model
from model import (
    VARIANTS,
    InvertedResidual,
    ShuffleNetV1,
    ShuffleNetV2,
    ShuffleUnit,
    build_model,
    channel_shuffle,
)

V2 = [name for name in VARIANTS if "_v2_" in name]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_the_shuffle_is_that_permutation_everywhere_and_keeps_the_layout(groups, layout):
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=layout)
    order = [block * (12 // groups) + i for i in range(12 // groups) for block in range(groups)]
    assert groups != 3 or order == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    shuffled = channel_shuffle(x, groups)
    assert torch.equal(shuffled, x[:, order])
    assert shuffled.is_contiguous(memory_format=layout)


def pair(name):
    """The network of torchvision and ours, each built from the same seed."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    torch.manual_seed(0)
    return theirs, build_model(name, 7)


def assert_same(theirs, ours):
    assert list(theirs) == list(ours)
    assert not [key for key in theirs if not torch.equal(theirs[key], ours[key])]


@pytest.mark.parametrize("name", V2)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_v2_is_torchvision_to_the_bit(name, train):
    """Keys, initialisation, logits, gradients, and how the statistics move."""
    theirs, ours = (network.train(train) for network in pair(name))
    assert_same(theirs.state_dict(), ours.state_dict())
    x = torch.randn(2, 3, 96, 96)
    a, b = theirs(x), ours(x)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = [{k: p.grad for k, p in each.named_parameters()} for each in (theirs, ours)]
    assert_same(*gradients)
    assert_same(theirs.state_dict(), ours.state_dict())


def test_the_named_factories_have_as_many_parameters_as_published():
    for name in V2:
        published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta["num_params"]
        assert sum(p.numel() for p in getattr(model, name)().parameters()) == published, name
    g3 = model.shufflenet_v1_g3(num_classes=1000)
    assert sum(p.numel() for p in g3.parameters()) == 1_865_728  # counted by hand


def multiply_adds(build, *args) -> tuple[float, float]:
    """Millions for one 224x224 image, without and with `fc`, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        network = build(*args).eval()
        network(torch.zeros(1, 3, 224, 224))
    total = counter.get_total_flops() / 2
    return (total - network.fc.weight.numel()) / 1e6, total / 1e6


# Paper 1, table 1: 143 140 137 133 137; the decimals and parameters are a hand count.
COSTS = [(1, 142.50, 143.08, 1_531_936), (2, 140.04, 140.84, 1_733_848)]
COSTS += [(3, 136.50, 137.46, 1_865_728), (4, 133.25, 134.34, 1_968_344)]
COSTS += [(8, 136.83, 138.37, 2_434_768)]


@pytest.mark.parametrize(("groups", "conv", "total", "parameters"), COSTS)
def test_v1_costs_what_the_table_of_the_paper_says(groups, conv, total, parameters):
    assert multiply_adds(ShuffleNetV1, groups) == pytest.approx((conv, total), abs=0.005)
    assert sum(p.numel() for p in ShuffleNetV1(groups).parameters()) == parameters


@pytest.mark.parametrize("name", [name for name in VARIANTS if "_v1_" in name])
def test_v1_of_other_widths_costs_what_the_paper_says(name):
    width = name.removeprefix("shufflenet_v1_").rpartition("_")[0]
    paper = {"x0_25": 13, "x0_5": 38, "x1_0": 140, "x1_5": 292, "x2_0": 524}[width]
    conv, total = multiply_adds(build_model, name)
    # The one network that only fits with `fc` is named beside the table of channels.
    assert abs((total if name == "shufflenet_v1_x0_25_g8" else conv) / paper - 1) < 0.05


# Channels of stage 2 and of conv1 in megvii's tables, and for 1, 2 and 4 groups in the paper's.
MEGVII = [(3, 0.5, 120, 12), (3, 1.0, 240, 24), (3, 1.5, 360, 24), (3, 2.0, 480, 48)]
MEGVII += [(8, 0.5, 192, 16), (8, 1.0, 384, 24), (8, 1.5, 576, 24), (8, 2.0, 768, 48)]
PAPER = [(1, 1.0, 144, 24), (2, 1.0, 200, 24), (4, 1.0, 272, 24)]


@pytest.mark.parametrize(("groups", "width", "stage2", "conv1"), MEGVII + PAPER)
def test_v1_has_the_channels_and_units_of_megvii_and_the_paper(groups, width, stage2, conv1):
    network = ShuffleNetV1(groups, width)
    stages = network.stage2, network.stage3, network.stage4
    assert [len(stage) for stage in stages] == [4, 8, 4]
    assert [stage[0].pw1.groups for stage in stages] == [1, groups, groups]  # 2 starts ungrouped
    assert [stage[1].pw2.out_channels for stage in stages] == [stage2, 2 * stage2, 4 * stage2]
    assert network.conv1[0].out_channels == conv1


@pytest.mark.parametrize(("stride", "first_grouped"), [(1, True), (2, True), (2, False)])
def test_the_unit_of_v1_is_the_figure_of_the_paper(stride, first_grouped):
    """Written out again with plain tensor operations, in float64."""
    torch.manual_seed(0)
    unit = ShuffleUnit(24 if stride == 1 else 12, 24, stride, 3, first_grouped).double().eval()
    for bn in (unit.bn1, unit.bn2, unit.bn3):
        for tensor in (bn.running_mean, bn.running_var, bn.weight.data, bn.bias.data):
            tensor.uniform_(0.5, 2)
    x = torch.randn(2, unit.pw1.in_channels, 6, 6, dtype=torch.float64)

    def normed(y, bn):
        tensors = bn.running_mean, bn.running_var, bn.weight, bn.bias
        mean, var, scale, shift = (tensor.view(-1, 1, 1) for tensor in tensors)
        return (y - mean) / (var + bn.eps).sqrt() * scale + shift

    def grouped(y, weight, groups):  # (N,C,H,W) -> one matrix product per group
        pairs = zip(weight.flatten(1).chunk(groups), y.chunk(groups, 1), strict=True)
        return torch.cat([torch.einsum("oc,nchw->nohw", *each) for each in pairs], 1)

    def windows(y, step):  # (N,C,H,W) -> (N,C,H/step,W/step,3,3)
        padded = torch.nn.functional.pad(y, (1, 1, 1, 1))
        return padded.unfold(2, 3, step).unfold(3, 3, step)

    y = normed(grouped(x, unit.pw1.weight, 3 if first_grouped else 1), unit.bn1).relu()
    y = y[:, [0, 2, 4, 1, 3, 5]]  # 6 channels in 3 groups
    y = torch.einsum("nchwij,cij->nchw", windows(y, stride), unit.dw.weight[:, 0])
    y = normed(grouped(normed(y, unit.bn2), unit.pw2.weight, 3), unit.bn3)
    expected = x + y if stride == 1 else torch.cat((windows(x, 2).mean((4, 5)), y), 1)
    torch.testing.assert_close(unit(x), expected.relu(), rtol=1e-12, atol=1e-12)


def test_units_of_v1_with_stride_1_start_as_the_identity():
    x = torch.randn(2, 24, 6, 6).relu()
    assert torch.equal(ShuffleUnit(24, 24, 1, 3)(x), x)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_v1_trains_all_its_parameters(groups):
    network = ShuffleNetV1(groups, 0.5, 3)
    y = network(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 3)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1_x0_5_g3"])
def test_features_are_what_fc_sees_and_tools_of_others_take_the_network(name):
    network = build_model(name, 3).eval()
    x = torch.randn(2, 3, 64, 64)
    features, expected = network.forward_features(x), network(x)
    assert features.shape == (2, network.fc.in_features)
    assert torch.equal(network.fc(features), expected)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), expected)
    assert create_feature_extractor(network, ["stage4.3"])(x)["stage4.3"].shape[2:] == (2, 2)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    more = torch.randn(5, 3, 64, 64)
    expected = network(more)
    torch.testing.assert_close(exported.module()(more), expected)
    last = {"memory_format": torch.channels_last}
    torch.testing.assert_close(network.to(**last)(more.contiguous(**last)), expected)


MISTAKES = [
    (channel_shuffle, (torch.zeros(1, 12, 1, 1), 5), "12 channels do not divide into 5 groups"),
    (InvertedResidual, (8, 8, 3), r"\(8, 8, 3\): the stride must be 1 or 2"),
    (InvertedResidual, (8, 17, 2), r"\(8, 17, 2\).*output_c even"),
    (InvertedResidual, (8, 16, 1), r"\(8, 16, 1\).*equal to input_c"),
    (ShuffleNetV2, ([4, 8], [24, 48, 96, 192, 1024]), "stages_repeats must be 3 numbers"),
    (ShuffleUnit, (24, 48, 1, 3), "stride 1 from 24 to 48"),
    (ShuffleUnit, (24, 24, 2, 3), "stride 2 from 24 to 24"),
    (ShuffleUnit, (25, 50, 2, 3), "must be divisible by groups"),
    (ShuffleNetV1, (5,), r"5 groups at width 1.0: must be one of \[1, 2, 3, 4, 8\]"),
    (ShuffleNetV1, (3, 0.75), r"0.75: .* at one of \[0.25, 0.5, 1.0, 1.5, 2.0\]"),
    (build_model, ("shufflenet_v1_x1_0",), "'shufflenet_v1_x1_0'.*shufflenet_v1_x1_0_g3"),
]


@pytest.mark.parametrize(("build", "arguments", "words"), MISTAKES)
def test_bad_arguments_are_named_with_their_value(build, arguments, words):
    with pytest.raises(ValueError, match=words):
        build(*arguments)


def test_a_unit_of_your_own_takes_the_place_of_inverted_residual():
    kind = type("Own", (InvertedResidual,), {})
    network = ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 128], 3, inverted_residual=kind)
    assert all(type(unit) is kind for unit in network.stage3)

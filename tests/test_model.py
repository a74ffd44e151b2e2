"""Networks, against torchvision and the papers."""

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

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
V1 = [name for name in VARIANTS if "_v1_" in name]


def test_channel_shuffle_deals_the_groups_out_in_turn():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert channel_shuffle(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_channel_shuffle_is_that_permutation_everywhere_and_in_both_layouts(groups):
    x = torch.randn(2, 12, 5, 7)
    order = [block * (12 // groups) + i for i in range(12 // groups) for block in range(groups)]
    assert torch.equal(channel_shuffle(x, groups), x[:, order])
    last = channel_shuffle(x.contiguous(memory_format=torch.channels_last), groups)
    assert torch.equal(last, x[:, order])
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert channel_shuffle(x, groups).is_contiguous()


@pytest.mark.parametrize("groups", [5, 0, -1])
def test_channel_shuffle_names_what_does_not_divide(groups):
    with pytest.raises(ValueError, match=rf"12 channels do not divide into {groups} groups"):
        channel_shuffle(torch.zeros(1, 12, 1, 1), groups)


class Shuffle(torch.nn.Module):
    def forward(self, x):
        return channel_shuffle(x, 3)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_shuffle_exports_compiles_and_scripts(layout):
    x = torch.randn(2, 12, 4, 4).contiguous(memory_format=layout)
    expected = channel_shuffle(x, 3)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Shuffle(), (x,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(exported(x), expected)
    larger = torch.cat((x, x, x)).contiguous(memory_format=layout)
    assert torch.equal(exported(larger), channel_shuffle(larger, 3))
    assert torch.equal(torch.compile(Shuffle(), backend="aot_eager")(x), expected)
    assert torch.equal(torch.jit.script(Shuffle())(x), expected)


def pair(name):
    """The network of torchvision and ours, each built from the same seed."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    torch.manual_seed(0)
    return theirs, build_model(name, 7)


@pytest.mark.parametrize("name", V2)
def test_v2_has_the_keys_shapes_and_initialisation_of_torchvision(name):
    theirs, ours = (network.state_dict() for network in pair(name))
    assert list(ours) == list(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", V2)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_v2_computes_what_torchvision_computes_to_the_bit(name, train):
    theirs, ours = (network.train(train) for network in pair(name))
    x = torch.randn(2, 3, 96, 96)
    a, b = theirs(x), ours(x)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        assert torch.equal(parameter.grad, gradients[key].grad), key
    for key, value in theirs.state_dict().items():  # the statistics moved alike
        assert torch.equal(value, ours.state_dict()[key]), key


@pytest.mark.parametrize("name", V2)
def test_v2_weights_load_in_both_directions(name):
    theirs, ours = pair(name)
    other = build_model(name, 7)
    other.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(build_model(name, 7).state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), ours.eval()(x))


def test_v2_parameter_counts_are_those_torchvision_publishes():
    for name in V2:
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        count = sum(p.numel() for p in build_model(name).parameters())
        assert count == weights.meta["num_params"], name


def multiply_adds(network) -> tuple[float, float]:
    """Millions for one 224x224 picture, without and with the classifier, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 224, 224))
    total = counter.get_total_flops() / 2
    return (total - network.fc.weight.numel()) / 1e6, total / 1e6


@pytest.mark.parametrize(
    ("groups", "conv", "total", "parameters"),
    [  # paper 1, table 1: 143 140 137 133 137; the decimals and parameters are a hand count
        (1, 142.50, 143.08, 1_531_936),
        (2, 140.04, 140.84, 1_733_848),
        (3, 136.50, 137.46, 1_865_728),
        (4, 133.25, 134.34, 1_968_344),
        (8, 136.83, 138.37, 2_434_768),
    ],
)
def test_v1_multiply_adds_are_the_row_of_the_paper(groups, conv, total, parameters):
    network = ShuffleNetV1(groups)
    assert multiply_adds(network) == (
        pytest.approx(conv, abs=0.005),
        pytest.approx(total, abs=0.005),
    )
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name", V1)
def test_v1_widths_cost_what_the_paper_says(name):
    _, _, *width, groups = name.split("_")
    paper = {"x0_25": 13, "x0_5": 38, "x1_0": 140, "x1_5": 292, "x2_0": 524}["_".join(width)]
    conv, total = multiply_adds(build_model(name))
    # The one case that only fits with the classifier is named beside the table of channels.
    assert min(abs(conv / paper - 1), abs(total / paper - 1)) < 0.05
    assert abs(conv / paper - 1) < 0.05 or name == "shufflenet_v1_x0_25_g8"
    assert groups in ("g1", "g2", "g3", "g4", "g8")


def test_v1_channels_are_the_tables_of_megvii_and_the_paper():
    def channels(groups, width):
        network = ShuffleNetV1(groups, width)
        units = (network.stage2[0], network.stage3[0], network.stage4[0])
        grown = [unit.pw2.out_channels + unit.pw1.in_channels for unit in units]
        return [network.conv1[0].out_channels, *grown]

    assert channels(3, 0.5) == [12, 120, 240, 480]
    assert channels(3, 1.0) == [24, 240, 480, 960]
    assert channels(3, 1.5) == [24, 360, 720, 1440]
    assert channels(3, 2.0) == [48, 480, 960, 1920]
    assert channels(8, 0.5) == [16, 192, 384, 768]
    assert channels(8, 1.0) == [24, 384, 768, 1536]
    assert channels(8, 1.5) == [24, 576, 1152, 2304]
    assert channels(8, 2.0) == [48, 768, 1536, 3072]
    assert channels(1, 1.0) == [24, 144, 288, 576]
    assert channels(2, 1.0) == [24, 200, 400, 800]
    assert channels(4, 1.0) == [24, 272, 544, 1088]


def test_v1_unit_is_the_figure_of_the_paper():
    """Written out again with plain tensor operations, in float64."""
    torch.manual_seed(0)
    for stride, first_grouped in ((1, True), (2, True), (2, False)):
        input_c = 24 if stride == 1 else 12
        unit = ShuffleUnit(input_c, 24, stride, 3, first_grouped).double().eval()
        for module in unit.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 2)
                torch.nn.init.normal_(module.bias)
        x = torch.randn(2, input_c, 6, 6, dtype=torch.float64)

        def normed(y, bn):
            shape = (1, -1, 1, 1)
            y = (y - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
            return y * bn.weight.view(shape) + bn.bias.view(shape)

        def grouped(y, weight, groups):  # (N,C,H,W) -> one matrix product per group
            parts = y.chunk(groups, 1)
            kernels = weight.flatten(1).chunk(groups)
            pairs = zip(kernels, parts, strict=True)
            return torch.cat([torch.einsum("oc,nchw->nohw", k, p) for k, p in pairs], 1)

        y = normed(grouped(x, unit.pw1.weight, 3 if first_grouped else 1), unit.bn1).relu()
        y = y[:, [0, 2, 4, 1, 3, 5]]  # 6 channels in 3 groups
        padded = torch.nn.functional.pad(y, (1, 1, 1, 1))
        windows = padded.unfold(2, 3, stride).unfold(3, 3, stride)
        y = normed(torch.einsum("nchwij,cij->nchw", windows, unit.dw.weight[:, 0]), unit.bn2)
        y = normed(grouped(y, unit.pw2.weight, 3), unit.bn3)
        if stride == 1:
            expected = (x + y).relu()
        else:
            padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
            pooled = padded.unfold(2, 3, 2).unfold(3, 3, 2).mean((4, 5))
            expected = torch.cat((pooled, y), 1).relu()
        torch.testing.assert_close(unit(x), expected, rtol=1e-12, atol=1e-12)


def test_v1_units_of_stride_1_start_as_the_identity():
    x = torch.randn(2, 24, 6, 6).relu()
    assert torch.equal(ShuffleUnit(24, 24, 1, 3)(x), x)


def test_v1_stage_2_alone_starts_ungrouped():
    network = ShuffleNetV1(groups=4)
    first = [stage[0].pw1.groups for stage in (network.stage2, network.stage3, network.stage4)]
    assert first == [1, 4, 4]
    assert [len(s) for s in (network.stage2, network.stage3, network.stage4)] == [4, 8, 4]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_trains_all_its_parameters(name):
    network = build_model(name, 3)
    y = network(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 3)
    y.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "shufflenet_v1_x1_0_g3"])
def test_features_are_what_fc_sees_and_channels_last_changes_nothing(name):
    network = build_model(name, 3).eval()
    x = torch.randn(2, 3, 64, 64)
    features = network.forward_features(x)
    assert features.shape == (2, network.fc.in_features)
    assert torch.equal(network.fc(features), network(x))
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(last), network(x))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1_x0_5_g3"])
def test_networks_export_with_a_dynamic_batch(name):
    network = build_model(name, 3).eval()
    x = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported(x), network(x))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: InvertedResidual(8, 8, 3), "stride is 3"),
        (lambda: InvertedResidual(8, 17, 2), "output_c is 17"),
        (lambda: InvertedResidual(8, 0, 2), "output_c is 0"),
        (lambda: InvertedResidual(8, 16, 1), "input_c is 8 and output_c is 16"),
        (lambda: ShuffleNetV2([4, 8], [24, 48, 96, 192, 1024]), r"stages_repeats is \[4, 8\]"),
        (lambda: ShuffleNetV2([4, 0, 4], [24, 48, 96, 192, 1024]), r"is \[4, 0, 4\]"),
        (lambda: ShuffleNetV2([4, 8, 4], [24, 48, 96, 192]), r"is \[24, 48, 96, 192\]"),
        (lambda: ShuffleUnit(24, 24, 0, 3), "stride is 0"),
        (lambda: ShuffleUnit(24, 48, 1, 3), "input_c is 24 and output_c is 48"),
        (lambda: ShuffleUnit(24, 24, 2, 3), "input_c is 24 and output_c is 24"),
        (lambda: ShuffleUnit(24, 50, 2, 3), "they are 24 and 50"),
        (lambda: ShuffleUnit(25, 48, 2, 3), "they are 25 and 48"),
        (lambda: ShuffleUnit(24, 48, 2, 0), "with 0 groups"),
        (lambda: ShuffleNetV1(groups=5), r"groups is 5, must be one of \[1, 2, 3, 4, 8\]"),
        (lambda: ShuffleNetV1(width=0.75), "width is 0.75, must be one of"),
        (lambda: build_model("shufflenet_v2_x3_0"), "'shufflenet_v2_x3_0'.*shufflenet_v2_x2_0"),
        (lambda: build_model("shufflenet_v1_x1_0"), "shufflenet_v1_x1_0_g3"),
        (lambda: build_model("shufflenet_v2_x1_0", 0), "num_classes is 0"),
    ],
)
def test_bad_arguments_are_named_with_their_value(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_named_factories_build_what_they_say():
    for name in [*V2, "shufflenet_v1_g3"]:
        network = getattr(model, name)(num_classes=4)
        table = "shufflenet_v1_x1_0_g3" if name == "shufflenet_v1_g3" else name
        other = build_model(table, 4)
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        assert shapes == {key: value.shape for key, value in other.state_dict().items()}


def test_a_unit_of_your_own_takes_the_place_of_inverted_residual():
    class Plain(InvertedResidual):
        pass

    network = ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 128], 3, inverted_residual=Plain)
    assert all(isinstance(unit, Plain) for unit in network.stage3)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)

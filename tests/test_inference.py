"""The rewritten network computes what the plain one computes."""

import copy
import random

import pytest
import torch
from torch import nn

from inference import DealtStage, optimize_for_inference
from model import InvertedResidual, ShuffleNetV2, build_model

# float32 sums in another order; float64 shows that this is all.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def trained(model, seed=0):
    """In eval mode, with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def difference(model, optimized, size=64, pictures=2):
    """The largest difference of the logits, over the largest logit."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(pictures, 3, size, size, dtype=dtype)
    with torch.inference_mode():
        expected, found = model(x), optimized(x)
    assert found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(25))
def test_any_stages_compute_the_same(seed, dtype):
    """Random depths and widths, branches of odd width among them."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    repeats = [draw.randint(1, 9) for _ in range(3)]
    channels = [draw.randint(1, 30), *(2 * draw.randint(1, 40) for _ in range(3))]
    channels.append(draw.randint(1, 50))
    model = trained(ShuffleNetV2(repeats, channels, draw.randint(1, 9)), seed).to(dtype)
    optimized = optimize_for_inference(model)
    assert type(optimized.network.stage4) is DealtStage
    assert difference(model, optimized) < TOLERANCE[dtype], (repeats, channels)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "name",
    [f"shufflenet_v2_x{w}" for w in ("0_5", "1_0", "1_5", "2_0")]
    + ["shufflenet_v1_x1_0_g3", "shufflenet_v1_x0_5_g1", "shufflenet_v1_x0_25_g8"],
)
def test_every_kind_of_variant_computes_the_same(name, dtype):
    model = trained(build_model(name, 10)).to(dtype)
    optimized = optimize_for_inference(model)
    assert difference(model, optimized, size=224) < TOLERANCE[dtype]
    assert not [m for m in optimized.modules() if isinstance(m, nn.BatchNorm2d)]


def folded(width, stride):
    """A block without batch norms, as `DealtStage` takes it."""
    unit, half, conv = InvertedResidual(width, width, stride), width // 2, nn.Conv2d
    if stride == 2:
        depthwise = conv(width, width, 3, groups=width)
        unit.branch1 = nn.Sequential(depthwise, conv(width, half, 1), nn.ReLU())
    first = conv(width if stride == 2 else half, half, 1)
    depthwise = conv(half, half, 3, groups=half)
    unit.branch2 = nn.Sequential(first, nn.ReLU(), depthwise, conv(half, half, 1), nn.ReLU())
    return unit


def test_the_drawing_of_the_docstring_is_true():
    units = nn.Sequential(folded(8, 2), folded(8, 1), folded(8, 1))
    makers = [units[0].branch1, units[0].branch2, units[1].branch2, units[2].branch2]
    for branch in makers:
        branch[-2].bias.data = torch.arange(4.0)  # every row carries its number
    for unit in units[1:]:
        unit.branch2[0].weight.data[:] = torch.arange(4.0).view(4, 1, 1)  # every column its place
    stage = DealtStage(units)
    made = [branch[-2].bias.int().tolist() for branch in makers]
    assert made == [[2, 3, 1, 0], [2, 3, 1, 0], [2, 3, 0, 1], [0, 1, 2, 3]]
    assert stage.parts == [[(0, 2), (1, 1), (2, 1)]] * 2 + [[(1, 2), (2, 2)], [(2, 4)]]
    shuffled = ["a2 b2 a3 b3", "a1 c2 b1 c3", "a0 d0 c0 d1 b0 d2 c1 d3"]
    places = [unit.branch2[0].weight[0].flatten().int().tolist() for unit in units[1:]]
    dealt = [
        " ".join(names.split()[place] for place in order)
        for names, order in zip(shuffled, [*places, stage.order.tolist()], strict=True)
    ]
    assert dealt == ["a2 a3 b2 b3", "a1 b1 c2 c3", "a0 b0 c0 c1 d0 d1 d2 d3"]
    for line in dealt:
        assert line in DealtStage.__doc__


@pytest.mark.parametrize("pictures", [1, 15, 16, 17, 40])
def test_a_batch_of_any_size_comes_back_in_order(pictures):
    model = trained(build_model("shufflenet_v2_x0_5", 10))
    assert difference(model, optimize_for_inference(model), 32, pictures) < 1e-6


def test_the_model_is_left_untouched():
    model = trained(build_model("shufflenet_v2_x0_5", 10))
    before = copy.deepcopy(model.state_dict())
    optimize_for_inference(model, torch.bfloat16)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())


def test_bfloat16_keeps_the_head_and_comes_close():
    model = trained(build_model("shufflenet_v2_x0_5", 10))
    optimized = optimize_for_inference(model, torch.bfloat16)
    assert optimized.network.stage2.makers[0][0].weight.dtype == torch.bfloat16
    assert optimized.network.fc.weight.dtype == torch.float32
    assert 1e-6 < difference(model, optimized) < 0.05


def test_it_computes_in_small_parts_that_lie_as_nhwc_and_for_no_gradients():
    optimized = optimize_for_inference(trained(build_model("shufflenet_v2_x0_5", 10)))
    seen = []
    optimized.network.stage3.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    optimized(torch.randn(40, 3, 64, 64))
    assert [len(x) for x in seen] == [16, 16, 8]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    for parameter in optimized.parameters():
        assert not parameter.requires_grad
        assert parameter.dim() != 4 or parameter.is_contiguous(memory_format=torch.channels_last)


def test_folding_rounds_once():
    """Each folded weight is the float32 next to what float64 makes of the same weights."""
    model = trained(build_model("shufflenet_v2_x0_5", 10))
    exact = optimize_for_inference(copy.deepcopy(model).double()).state_dict()
    for name, value in optimize_for_inference(model).state_dict().items():
        assert torch.equal(value, exact[name].float()), name


def test_it_may_be_converted_afterwards():
    model = trained(build_model("shufflenet_v2_x0_5", 10))
    optimized = optimize_for_inference(model)
    assert difference(model.double(), optimized.double()) < 1e-6
    assert optimized.half()(torch.randn(1, 3, 64, 64)).dtype == torch.float16


@pytest.mark.parametrize("part", ["whole", "one batch norm"])
def test_a_model_in_train_mode_is_refused(part):
    model = build_model("shufflenet_v2_x0_5", 10)
    if part != "whole":
        model.eval().stage3[2].branch2[1].train()
    with pytest.raises(ValueError, match="in train mode"):
        optimize_for_inference(model)


def test_what_is_no_shufflenet_of_ours_is_refused():
    class Derived(ShuffleNetV2):
        def forward(self, x):
            return -super().forward(x)

    hooked = ShuffleNetV2([1, 1, 1], [4, 4, 4, 4, 4])
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    for model in (nn.Linear(2, 2), Derived([1, 1, 1], [4, 4, 4, 4, 4]), hooked):
        with pytest.raises(TypeError, match="neither ShuffleNetV1 nor ShuffleNetV2"):
            optimize_for_inference(model.eval())


class Halved(InvertedResidual):
    """A block that someone derived."""

    def forward(self, x):
        return super().forward(x) / 2


def exchange_activation(model):
    model.stage3[1].branch2[2] = nn.SiLU()


def exchange_order(model):
    model.stage3 = nn.Sequential(*model.stage3[1:], model.stage3[0])


def add_hook(model):
    model.stage3[1].branch2[3].register_forward_hook(lambda module, args, output: 2 * output)


def drop_statistics(model):
    norm = model.stage3[1].branch2[1]
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def drop_scale(model):
    model.stage3[1].branch2[1] = nn.BatchNorm2d(12, affine=False).eval()


def add_dropout(model):
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc).eval()


def replace_conv5(model):
    model.conv5 = nn.Sequential(nn.Conv2d(24, 30, 1, groups=2), nn.Hardswish())


def repeat_a_unit(model):
    model.stage3[2] = model.stage3[1]


def share_a_convolution(model):
    model.stage3[2].branch2[0] = model.stage3[1].branch2[0]


def make_depthwise_dense(model):
    model.stage3[0].branch1[0] = nn.Conv2d(12, 12, 3, 2, padding=1)


def make_branches_unequal(model):
    unit = model.stage4[0]
    unit.branch1[2], unit.branch1[3] = nn.Conv2d(24, 10, 1), nn.BatchNorm2d(10)
    unit.branch2[5], unit.branch2[6] = nn.Conv2d(12, 14, 1), nn.BatchNorm2d(14)


def group_conv5(model):
    model.conv5[0] = nn.Conv2d(24, 30, 1, groups=3)


def group_a_pointwise(model):
    model.stage3[1].branch2[0] = nn.Conv2d(12, 12, 1, groups=2)


def group_the_last_pointwise(model):
    model.stage3[1].branch2[5] = nn.Conv2d(12, 12, 1, groups=3)


def group_a_shortcut(model):
    model.stage3[0].branch1[2] = nn.Conv2d(12, 12, 1, groups=2)


def replace_stem(model):
    model.conv1 = nn.Conv2d(3, 8, 5, 2, padding=2)


CHANGES = [exchange_activation, exchange_order, add_hook, drop_statistics, drop_scale]
CHANGES += [add_dropout, replace_conv5, replace_stem, repeat_a_unit, share_a_convolution]
CHANGES += [make_depthwise_dense, make_branches_unequal, group_conv5, group_a_pointwise]
CHANGES += [group_the_last_pointwise, group_a_shortcut]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_was_changed_is_never_silently_wrong(change):
    channels = [8, 24, 24, 24, 30] if change is exchange_order else [8, 12, 24, 24, 30]
    model = ShuffleNetV2([3, 3, 3], channels, 10)
    model = trained(model).double()
    change(model)
    model.double().eval()
    assert difference(model, optimize_for_inference(model)) < 1e-12


def test_blocks_that_are_not_known_are_left_as_they_are():
    def block(input_c, output_c, stride):
        kind = Halved if output_c == 16 and stride == 1 else InvertedResidual
        return kind(input_c, output_c, stride)

    model = trained(ShuffleNetV2([2, 3, 2], [8, 12, 16, 24, 30], 10, block)).double()
    optimized = optimize_for_inference(model)
    assert difference(model, optimized) < 1e-12
    assert type(optimized.network.stage3[1]) is Halved
    assert isinstance(optimized.network.stage3[1].branch2[1], nn.BatchNorm2d)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.network.stage2.modules())

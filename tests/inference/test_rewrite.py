"""The rewritten network computes what the plain one computes."""

import copy
import random

import pytest
import torch
from torch import nn

from model import InvertedResidual, ShuffleNetV2, build_model, channel_shuffle
from shufflenet.inference.rewrite import DealtStage, rewrite_for_inference, rewrite_for_training
from utils import freeze_batch_norm, set_train_mode

# float32 sums in another order; float64 shows that this is all.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
KINDS = [f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")]
KINDS += ["shufflenet_v1_x1_0_g3", "shufflenet_v1_x0_5_g1", "shufflenet_v1_x0_25_g8"]


def trained(model):
    """In eval mode, with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)
    return model.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained(build_model("shufflenet_v2_x0_5", 10))


def difference(model, optimized, size=64, images=2):
    """The largest difference of the logits, over the largest logit."""
    x = torch.randn(images, 3, size, size, dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        expected, found = model(x), optimized(x)
    assert found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(6))
def test_any_stages_compute_the_same(seed, dtype):
    """Random depths and widths, branches of odd width among them."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    repeats = [draw.randint(1, 9) for _ in range(3)]
    channels = [draw.randint(1, 30), *(2 * draw.randint(1, 40) for _ in range(3))]
    channels.append(draw.randint(1, 50))
    model = trained(ShuffleNetV2(repeats, channels, draw.randint(1, 9))).to(dtype)
    optimized = rewrite_for_inference(model)
    assert type(optimized.network.stage4) is DealtStage
    assert difference(model, optimized) < TOLERANCE[dtype], (repeats, channels)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_variant_computes_the_same_without_batch_norm(name, dtype):
    torch.manual_seed(0)
    model = trained(build_model(name, 10)).to(dtype)
    optimized = rewrite_for_inference(model)
    assert difference(model, optimized, size=128) < TOLERANCE[dtype]
    assert not [m for m in optimized.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("images", [1, 16, 17, 40])
def test_a_batch_of_any_size_comes_back_in_order(model, images):
    assert difference(model, rewrite_for_inference(model), 32, images) < 1e-6


def test_the_model_is_left_as_it_is_in_train_mode_too(model):
    before = copy.deepcopy(model.state_dict())
    optimized = rewrite_for_inference(model.train())
    assert model.training
    assert difference(model.eval(), optimized) < 1e-6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_frozen_batch_norm_folds_into_what_learns_with_the_same_gradients(name):
    torch.manual_seed(0)
    model = trained(build_model(name, 10)).double()
    freeze_batch_norm(model)
    learner, x = rewrite_for_training(model), torch.randn(2, 3, 64, 64).double()
    expected, found = [], []
    for network, figures in ((model, expected), (learner, found)):
        set_train_mode(network)
        figures.append(network(x))
        nn.functional.cross_entropy(figures[0], torch.tensor([1, 7])).backward()
        for parameter in model.parameters():  # both networks have the same ones
            figures.append(parameter.grad)
            parameter.grad = None
    for one, two in zip(expected, found, strict=True):
        assert (one is None) is (two is None)  # of batch norm
        assert one is None or (one - two).abs().max() <= 1e-12 * one.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in learner.modules())
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(p) for p in learner.parameters()] == [id(p) for p in learnt]  # in this order


class PreActivation(nn.Module):
    """A unit of another kind: batch norm before its convolutions, which have a bias."""

    def __init__(self, input_c, output_c, stride):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(input_c), nn.Conv2d(input_c, output_c, 3, stride, 1)
        self.layers = nn.Sequential(nn.Conv2d(output_c, output_c, 1), nn.BatchNorm2d(output_c))

    def forward(self, x):
        y = self.conv(self.norm(x).relu())
        return y + self.layers[1](self.layers[0](y).relu())  # no pair, though it looks like one


class Widened(InvertedResidual):
    def forward(self, x):
        return super().forward(x) * 2


class Own(ShuffleNetV2):
    def forward(self, x):
        return self.fc(self.forward_features(x).relu() - 1)


SIZES = [1, 2, 1], [4, 4, 4, 4, 4]
FOREIGN = {
    "units": lambda: ShuffleNetV2(*SIZES, 5, PreActivation),
    "derived units": lambda: ShuffleNetV2(*SIZES, 5, Widened),
    "a derived network": lambda: Own(*SIZES, 5),
    "no network of ours": lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_known_passes_through(kind):
    torch.manual_seed(0)
    model = trained(FOREIGN[kind]()).double()
    assert difference(model, rewrite_for_inference(model)) < 1e-12
    freeze_batch_norm(model)
    assert difference(model, rewrite_for_training(model).eval()) < 1e-12


def squeezed(self, x):
    """As someone might edit it: a gate behind the branches."""
    return InvertedResidual.plain(self, x) * x.mean((1, 2, 3), keepdim=True).sigmoid()


def swapped(self, x):
    """Or batch norm of the first convolution before it."""
    left, right = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
    conv, norm, *others = self.branch2
    right = nn.Sequential(*others)(norm(conv(right).relu()))
    return channel_shuffle(torch.cat((self.branch1(left), right), dim=1), 2)


def unrolled(self, x):
    """Or called layer by layer: the same, but nothing may be deleted."""
    left, right = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
    for place in range(8):
        right = self.branch2[place](right)
    return channel_shuffle(torch.cat((self.branch1(left), right), dim=1), 2)


@pytest.mark.parametrize("forward", [squeezed, swapped, unrolled])
def test_a_unit_that_was_edited_passes_through(model, monkeypatch, forward):
    monkeypatch.setattr(InvertedResidual, "plain", InvertedResidual.forward, raising=False)
    monkeypatch.setattr(InvertedResidual, "forward", forward)
    assert difference(model.double(), rewrite_for_inference(model)) < 1e-12
    freeze_batch_norm(model)
    assert difference(model, rewrite_for_training(model).eval()) < 1e-12


def test_a_bias_before_a_frozen_batch_norm_learns_on(model):
    conv = model.conv5[0]
    model.conv5[0] = nn.Conv2d(conv.in_channels, conv.out_channels, 1)
    freeze_batch_norm(model.double())
    learner = rewrite_for_training(model)
    assert difference(model, learner.eval()) < 1e-12
    assert learner.conv5[0].conv.bias is model.conv5[0].bias

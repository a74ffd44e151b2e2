"""A batch in parts, a thread each: the same function and gradients as the whole."""

import copy
import threading

import pytest
import torch
from torch import nn

from model import build_model
from shufflenet.inference.parallel import InParts, run_in_parts, split_batch
from shufflenet.inference.rewrite import rewrite_for_inference, rewrite_for_training
from utils import freeze_batch_norm, set_train_mode

NAMES = ["shufflenet_v2_x0_5", "shufflenet_v1_x0_25_g3"]


def frozen(name="shufflenet_v2_x0_5"):
    torch.manual_seed(0)
    model = build_model(name, 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
    freeze_batch_norm(model)
    set_train_mode(model)
    return model


def gradients(model, learner, x, labels):
    model.zero_grad()
    nn.functional.cross_entropy(learner(x), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("images", "threads"), [(16, 2), (5, 2), (3, 8), (16, 8), (40, 2), (1, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_those_of_the_whole_batch(name, images, threads):
    model = frozen(name).double()
    learner = rewrite_for_training(model, threads)
    assert isinstance(learner, InParts)
    x, labels = torch.randn(images, 3, 64, 64).double(), torch.arange(images) % 5
    expected = gradients(model, model, x, labels)
    found = gradients(model, learner, x, labels)
    assert found.keys() == expected.keys()
    assert len(found) > 30
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-12 * value.abs().max(), key
    again = gradients(model, learner, x, labels)
    assert all(torch.equal(again[key], found[key]) for key in found)


def test_parts_are_even_and_of_two_images_at_least():
    sizes = {n: [len(part) for part in split_batch(torch.zeros(n, 1), 4)] for n in (1, 3, 16, 72)}
    assert sizes == {1: [1], 3: [3], 16: [4] * 4, 72: [9] * 8}  # as many for each thread


def test_the_modes_of_the_caller_hold_in_every_part():
    seen, model = set(), frozen()
    for layers in (model.conv1, model.conv5):
        layers.register_forward_hook(
            lambda module, inputs, out: seen.add(
                (threading.get_ident(), out.dtype, module.training)
            )
        )
    learner = InParts(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        learner(torch.randn(4, 3, 64, 64)).float().sum().backward()
    assert {dtype for _, dtype, _ in seen} == {torch.bfloat16}
    assert threading.get_ident() not in {thread for thread, *_ in seen}
    assert model.fc.weight.grad.dtype == torch.float32
    with torch.inference_mode():
        assert run_in_parts(model, torch.randn(4, 3, 64, 64), 2).is_inference()


def test_an_exception_of_a_part_reaches_the_caller_whose_threads_stay():
    before, learner = torch.get_num_threads(), InParts(frozen(), 2)
    with pytest.raises(RuntimeError, match="expected input"):
        learner(torch.randn(4, 5, 64, 64))
    assert torch.get_num_threads() == before
    assert learner(torch.randn(4, 3, 64, 64)).shape == (4, 5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batch_norm_learns_from_64_images_at_once_whatever_the_threads(threads):
    """As the network alone, given part after part from the same statistics, which then move by the
    mean."""
    torch.manual_seed(0)
    model = build_model("shufflenet_v2_x0_5", 5, small_images=True).double().train()
    plain = copy.deepcopy(model)
    learner = rewrite_for_training(model, threads, batch_size=128).train()
    for images, sizes in ((130, [65, 65]), (80, [80]), (128, [64, 64])):
        x, labels = torch.randn(images, 3, 8, 8).double(), torch.arange(images) % 5
        found = gradients(model, learner, x, labels)
        copies = [copy.deepcopy(plain) for _ in sizes]
        for part, part_labels, each in zip(
            x.split(sizes), labels.split(sizes), copies, strict=True
        ):
            loss = nn.functional.cross_entropy(each(part), part_labels, reduction="sum")
            (loss / images).backward()
        for name, value in found.items():
            expected = sum(dict(each.named_parameters())[name].grad for each in copies)
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        for name, value in model.named_buffers():
            values = [dict(each.named_buffers())[name].double() for each in copies]
            torch.testing.assert_close(value.double(), sum(values) / len(values))
        plain.load_state_dict(model.state_dict())


class Batchwise(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Drawing(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("layer", [Batchwise(), Drawing(), nn.Dropout(0.5), nn.BatchNorm2d(192)])
def test_a_layer_that_sees_the_batch_or_draws_is_computed_whole(layer):
    """Threads would draw in an order of their own."""
    model = frozen()
    model.stage4.append(layer)
    assert not isinstance(rewrite_for_training(model, 2), InParts)
    x = torch.randn(6, 3, 64, 64)
    whole = rewrite_for_inference(model, 2)(x)
    torch.testing.assert_close(whole, model.eval()(x), rtol=1e-4, atol=1e-5)
    model.stage4[-1] = nn.Identity()
    assert isinstance(rewrite_for_training(model, 2), InParts)
    assert not isinstance(rewrite_for_training(model, 1, 128), InParts)  # as torchrun gives
    model.requires_grad_(True)  # batch norm learns
    assert not isinstance(rewrite_for_training(model, 2, 127), InParts)
    assert isinstance(rewrite_for_training(model, 2, 128), InParts)
    model.stage4[-1] = Drawing()
    assert not isinstance(rewrite_for_training(model, 2, 128), InParts)


def test_a_parameter_may_be_unused_in_a_part():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * (self.fc(x) if x[0, 0] > 0 else x)

    learner = InParts(network := Sometimes(), 2)
    x = torch.tensor([[-1.0, 1], [-1, 1], [1, 1], [1, 1]])
    learner(x).sum().backward()
    assert network.fc.bias.grad.tolist() == [2, 2]

"""Training for an epoch, evaluating, and what they need."""

import copy
import math
import os
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import predict
import utils
from model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_model,
    default_preprocessing,
    shufflenet_v2_x0_5,
)
from my_dataset import DeviceLoader, MyDataSet, training_set
from shufflenet.reading.folders import BadImages

CPU = torch.device("cpu")
V1, V2 = "shufflenet_v1_x0_25_g3", "shufflenet_v2_x0_5"


@pytest.fixture
def loader(flowers):
    paths, labels, *_ = utils.read_split_data(flowers, 0.25)
    options = Namespace(train_size=64, random_erase=0.0, augment=None, seed=0)
    dataset = training_set(paths, labels, options, default_preprocessing(V2), small_images=False)
    return DeviceLoader(dataset, CPU, default_preprocessing(V2), 8, 0, BadImages(30), seed=0)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model(V2, 5)


def sgd(network, lr=0.01):
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=0.9)


def changed(network, before):
    return {key for key, value in network.state_dict().items() if not value.equal(before[key])}


def test_an_epoch_is_the_plain_loop_written_out_and_evaluation_changes_nothing(network, loader):
    network.unused = nn.Linear(2, 2)  # as networks of others have: it stays as it is
    plain, same = copy.deepcopy(network), copy.deepcopy(network)
    figures = utils.train_epoch(network, sgd(network), loader, CPU, epoch=3)
    assert utils.train_one_epoch(same, sgd(same), loader, CPU, 3) == figures["train_loss"]
    accuracy = utils.validate(network, loader, CPU).figures()["accuracy"]
    assert utils.evaluate(network, loader, CPU) == accuracy

    optimizer, losses, correct = sgd(plain), 0.0, 0
    plain.train()
    loader.set_epoch(3)
    for images, labels in loader:
        logits = plain(images)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
    assert not changed(network, plain.state_dict())
    assert figures["train_loss"] == pytest.approx(losses / 30, rel=1e-6)
    assert figures["train_accuracy"] == pytest.approx(correct / 30)
    assert figures["images_per_second"] > 0


def test_the_loop_of_the_tutorial_works_up_to_the_prediction(flowers, tmp_path, capsys):
    """A plain DataLoader, float transforms, unpacked lists."""
    from torch.utils.tensorboard import SummaryWriter

    paths, labels, val_paths, val_labels = utils.read_split_data(str(flowers), 0.25)
    steps = [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    dataset = MyDataSet(paths, labels, transform=transforms.Compose(steps))
    val = MyDataSet(val_paths, val_labels, transform=transforms.Compose(steps))
    options = {"batch_size": 8, "collate_fn": dataset.collate_fn}
    loaders = DataLoader(dataset, shuffle=True, **options), DataLoader(val, **options)
    model = shufflenet_v2_x0_5(num_classes=5).to(CPU)
    mean_loss = utils.train_one_epoch(model, sgd(model), loaders[0], CPU, 0)
    acc = utils.evaluate(model=model, data_loader=loaders[1], device=CPU)
    assert round(acc, 3) == acc == round(10 * acc) / 10  # of ten images
    with SummaryWriter(tmp_path / "log") as writer:
        writer.add_scalar("loss", mean_loss, 0)
    torch.save(model.state_dict(), tmp_path / "model-0.pth")
    (result,) = predict.main([paths[0], "--weights", tmp_path / "model-0.pth"])
    assert sorted(guess["class"] for guess in result["predictions"]) == sorted(os.listdir(flowers))
    assert "its classes may be daisy, dandelion, " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "frozen"), [(V1, "layers"), (V2, "layers"), (V2, "batch_norm")])
def test_what_is_frozen_does_not_move_by_a_bit_and_all_else_does(name, frozen, loader):
    network = build_model(name, 5)
    getattr(utils, f"freeze_{frozen}")(network)
    before = copy.deepcopy(network.state_dict())
    utils.train_one_epoch(network, sgd(network), loader, CPU, epoch=0)
    kinds = dict(network.named_modules())
    norms = {k for k in before if isinstance(kinds[k.rpartition(".")[0]], nn.BatchNorm2d)}
    expected = {"fc.weight", "fc.bias"} if frozen == "layers" else before.keys() - norms
    moved = changed(network, before)
    assert moved <= expected
    assert len(moved) > 0.9 * len(expected)  # images this small leave some weights no gradient


def test_amp_trains_in_bfloat16_on_the_cpu(network, loader):
    seen = set()
    network.conv5.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    figures = utils.train_epoch(network, sgd(network), loader, CPU, 0, amp=True)
    assert math.isfinite(figures["train_loss"])
    assert seen == {torch.bfloat16}
    chosen = [utils.use_bfloat16(CPU, amp) for amp in (None, False, True)]
    assert chosen == [False, False, True]


def test_the_learning_rate_is_a_half_cosine():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.5 * 0.1)
    for epoch in range(10):
        assert utils.cosine_lr(0.5, 0.1, epoch, 10) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()

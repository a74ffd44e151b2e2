"""Training for an epoch, evaluating, and the figures."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import utils
from cli import RunError, UsageError
from folders import split_pictures, with_labels
from image import default_preprocessing
from metrics import measure
from model import build_model
from my_dataset import DeviceLoader, MyDataSet, eval_transform, train_transform

CPU = torch.device("cpu")
PREPROCESSING = default_preprocessing("shufflenet_v2_x0_5")


@pytest.fixture
def loader(flowers):
    train, _ = split_pictures(flowers, 0.25, 0)
    dataset = MyDataSet(
        *with_labels(train, list(train)), train_transform(PREPROCESSING["crop"]), seed=0
    )
    return DeviceLoader(dataset, CPU, PREPROCESSING, batch_size=8, workers=0, shuffle=True)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model("shufflenet_v2_x0_5", 5)


def sgd(network, lr=0.01):
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=0.9)


def test_an_epoch_is_the_plain_loop_written_out(network, loader):
    network.unused = nn.Linear(2, 2)  # as networks of others have: it stays as it is
    plain = copy.deepcopy(network)
    result = utils.train_one_epoch(network, sgd(network), loader, CPU, epoch=3)

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
    for key, value in plain.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key
    assert result["loss"] == pytest.approx(losses / 30, rel=1e-6)
    assert result["accuracy"] == pytest.approx(correct / 30)
    assert result["images_per_second"] > 0


def test_frozen_batch_norm_does_not_move(network, loader):
    before = copy.deepcopy(network.state_dict())
    utils.freeze_batch_norm(network)
    utils.train_one_epoch(network, sgd(network), loader, CPU, epoch=0)
    for name, module in network.named_modules():
        for key, value in module.state_dict(prefix=f"{name}.").items():
            if isinstance(module, nn.BatchNorm2d):
                assert torch.equal(value, before[key]), key
    assert not torch.equal(network.fc.weight, before["fc.weight"])


def test_the_loop_of_the_tutorial_works(flowers, network):
    """A plain DataLoader, float transforms, unpacked lists; each pass draws its own crops."""
    from torchvision import transforms

    paths, labels, val_paths, val_labels = utils.read_split_data(str(flowers), 0.25)
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(64),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    dataset = MyDataSet(images_path=paths, images_class=labels, transform=augment)
    plain = torch.utils.data.DataLoader(
        dataset, batch_size=8, shuffle=True, collate_fn=dataset.collate_fn
    )
    result = utils.train_one_epoch(
        model=network, optimizer=sgd(network), data_loader=plain, device=CPU, epoch=0
    )
    assert math.isfinite(result["loss"])
    val = MyDataSet(val_paths, val_labels, transform=augment)
    val_loader = torch.utils.data.DataLoader(val, batch_size=8, collate_fn=val.collate_fn)
    assert utils.evaluate(model=network, data_loader=val_loader, device=CPU)["images"] == 10
    assert not torch.equal(dataset[0][0], dataset[0][0])


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1_x0_25_g3"])
def test_frozen_layers_do_not_move_by_a_bit_and_fc_does(name, loader):
    network = build_model(name, 5)
    utils.freeze_layers(network)
    before = copy.deepcopy(network.state_dict())
    utils.train_one_epoch(network, sgd(network), loader, CPU, epoch=0)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fc.weight", "fc.bias"}


def test_without_freezing_everything_moves(network, loader):
    before = copy.deepcopy(network.state_dict())
    utils.train_one_epoch(network, sgd(network), loader, CPU, epoch=0)
    same = [k for k, v in network.state_dict().items() if torch.equal(v, before[k])]
    assert len(same) < 10, same  # a weight of 1 may outlast gradients below its last bit


def test_amp_trains_in_bfloat16_on_the_cpu(network, loader):
    seen = []
    network.conv5.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    result = utils.train_one_epoch(network, sgd(network), loader, CPU, 0, amp=torch.bfloat16)
    assert math.isfinite(result["loss"])
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_a_loss_that_is_not_finite_stops_with_a_hint(network, loader):
    optimizer = sgd(network, lr=1e12)
    with pytest.raises(RunError, match=r"the loss is (nan|inf) after .* of epoch 1; use a smaller"):
        utils.train_one_epoch(network, optimizer, loader, CPU, epoch=0)


class Answers(nn.Module):
    """Gives the logits it was made with, batch by batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.next = logits, 0

    def forward(self, images):
        first, self.next = self.next, self.next + len(images)
        return self.logits[first : self.next]


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_evaluate_joins_the_batches_in_order(flowers, batch_size):
    train, _ = split_pictures(flowers, 0.01 + 1 / 8, 0)  # 7 of 8 pictures a class
    paths, labels = with_labels(train, list(train))
    dataset = MyDataSet(paths, labels, eval_transform(PREPROCESSING))
    loader = DeviceLoader(dataset, CPU, PREPROCESSING, batch_size=batch_size, workers=0)
    torch.manual_seed(0)
    logits = torch.randn(35, 8)
    result = utils.evaluate(Answers(logits), loader, CPU)
    expected = measure(logits.numpy(), np.array(labels))
    assert result.keys() - expected.keys() == {"images_per_second"}
    for key, value in expected.items():
        assert np.array_equal(result[key], value), key


def test_top5_of_five_classes_says_nothing(network, loader):
    assert utils.evaluate(network, loader, CPU)["top5"] is None


def test_evaluating_changes_nothing(network, loader):
    before = copy.deepcopy(network.state_dict())
    utils.evaluate(network, loader, CPU)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_learning_rate_is_a_half_cosine():
    torch_lr = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = torch_lr(optimizer, T_max=10, eta_min=0.5 * 0.1)
    for epoch in range(10):
        lr = optimizer.param_groups[0]["lr"]
        assert utils.cosine_lr(0.5, 0.1, epoch, 10) == pytest.approx(lr)
        optimizer.step()
        schedule.step()


def test_choose_device_takes_what_is_there_and_names_what_is_not():
    count = torch.cuda.device_count()
    assert utils.choose_device("cpu") == CPU
    auto = "cuda" if count else "mps" if torch.backends.mps.is_available() else "cpu"
    assert utils.choose_device("auto").type == auto
    with pytest.raises(UsageError, match=f"--device cuda:{count}: torch sees {count} CUDA"):
        utils.choose_device(f"cuda:{count}")
    if auto != "mps":
        with pytest.raises(UsageError, match="torch sees no Apple GPU"):
            utils.choose_device("mps")


def test_amp_is_off_on_the_cpu_unless_asked_for():
    assert utils.amp_dtype(CPU, None) is None
    assert utils.amp_dtype(CPU, False) is None
    assert utils.amp_dtype(CPU, True) is torch.bfloat16


def test_set_seed_repeats_every_generator():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    utils.set_seed(5)
    first = draw()
    utils.set_seed(5)
    assert draw() == first
    assert torch.backends.cudnn.deterministic
    utils.set_seed(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_parts_of_a_batch_on_their_cores_take_the_steps_of_the_whole(frozen):
    """Three parts of an odd batch; with batch norm in training they would depend on each other."""
    results = []
    for threads in (1, 3, 3):
        torch.manual_seed(0)
        network = build_model("shufflenet_v2_x0_5", 3)
        if frozen:
            utils.freeze_batch_norm(network)
        sizes = []
        network.register_forward_hook(lambda module, x, y, sizes=sizes: sizes.append(len(y)))
        data = TensorDataset(torch.randn(16, 3, 64, 64), torch.arange(16) % 3)
        loader = DataLoader(data, batch_size=8)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            trained = utils.train_one_epoch(network, sgd(network), loader, CPU, epoch=0)
            count = torch.get_num_threads()  # of a machine with fewer cores not `threads`
            parts = [len(part) for part in torch.arange(8).chunk(count if frozen else 1)]
            assert sorted(sizes) == sorted(parts * 2)
            validated = utils.evaluate(network, loader, CPU)
        finally:
            torch.set_num_threads(before)
        weights = torch.cat([value.flatten() for value in network.state_dict().values()])
        results.append((weights, trained["loss"], trained["accuracy"], validated["loss"]))
    whole, parts, again = results
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-3, atol=1e-5)
    assert parts[1:] == pytest.approx(whole[1:], rel=1e-4)
    assert torch.equal(parts[0], again[0])
    assert parts[1:] == again[1:]

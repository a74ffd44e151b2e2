"""train.py, eval.py and predict.py, end to end on small folders of drawn flowers."""

import copy
import csv
import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from conftest import small
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import models, transforms

import eval as evaluation
import export
import predict
import train
import utils
from model import IMAGENET_MEAN, IMAGENET_STD, ShuffleNetV2
from shufflenet.common.messages import RunError, UsageError
from shufflenet.inference import checkpoint, plots
from shufflenet.inference.classifier import Classifier
from shufflenet.inference.metadata import Metadata
from shufflenet.inference.metrics import measure
from shufflenet.inference.parallel import InParts
from shufflenet.inference.pytorch import Compute
from shufflenet.reading.folders import BadImages, image_hashes
from shufflenet.reading.image import load_rgb
from shufflenet.training.run_folder import RunFolder, best_figure

pytestmark = pytest.mark.usefixtures("elsewhere")

CLASSES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
SCRIPTS = {"train.py": train, "eval.py": evaluation, "predict.py": predict, "export.py": export}


def load(*place):
    return torch.load(os.path.join(*place), weights_only=True)


def table(*place):
    with open(os.path.join(*place), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- train.py ------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_says(run_dir):
    names = {path.name for path in run_dir.iterdir() if path.name[0] != "."}
    (events,) = (name for name in names if name.startswith("events.out.tfevents"))
    kept = {"last.pth", "best.pth", "metrics.csv", "args.json", "class_indices.json"}
    drawn = {"curves.png", "confusion_matrix.png", "confusions.csv", "samples.png"}
    assert names - {events} == kept | drawn
    indices = json.loads((run_dir / "class_indices.json").read_text())
    assert indices == {str(index): name for index, name in enumerate(CLASSES)}
    assert json.loads((run_dir / "args.json").read_text())["epochs"] == 2
    rows = table(run_dir, "metrics.csv")
    figures = [f"{side}_{name}" for side in ("train", "val") for name in ("loss", "accuracy")]
    assert list(rows[0]) == ["epoch", "lr", *figures, "val_balanced_accuracy", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    scalars = EventAccumulator(str(run_dir)).Reload()
    sides = {f"{name}/{side}" for name in ("loss", "accuracy") for side in ("train", "val")}
    sides.add("balanced_accuracy/val")
    best = {f"best/{name}" for name in ("accuracy", "balanced_accuracy", "loss", "epoch")}
    speed = {"learning_rate", "images_per_second"}
    assert set(scalars.Tags()["scalars"]) == sides | best | speed
    logged = [event.value for event in scalars.Scalars("loss/val")]
    assert logged == pytest.approx([float(row["val_loss"]) for row in rows])


def test_a_checkpoint_stands_alone_and_the_optimizer_is_sgd(run_dir):
    file = load(run_dir, "best.pth")
    about = {"model_name", "classes", "preprocessing", "epoch", "metrics", "args", "trained_on"}
    assert file.keys() == {"model"} | about
    assert (file["classes"], file["preprocessing"]["resize"]) == (CLASSES, 256)
    models.shufflenet_v2_x0_5(num_classes=5).load_state_dict(file["model"])
    optimizer = load(run_dir, "last.pth")["learning"]["optimizer"]
    (group,) = optimizer["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 4e-5, False)
    stem = optimizer["state"][0]["momentum_buffer"]
    assert stem.is_contiguous(memory_format=torch.channels_last)  # what training computes in
    assert all(value.is_contiguous() for value in file["model"].values())


def test_main_takes_parsed_options_too_and_prints_the_summary_last(flowers, tmp_path, capsys):
    args = train.build_parser().parse_args([])
    assert (args.epochs, args.lrf, args.val_rate, args.seed) == (None, None, 0.2, 0)
    assert (args.model, args.weights, args.device) == ("shufflenet_v2_x1_0", "", "auto")
    assert (args.data_path, args.freeze_layers, args.amp) == ("data/flower_photos", False, None)
    words = small(flowers, tmp_path / "out", "--epochs", 1, "--val-rate", 0.25)
    summary = train.main(train.build_parser().parse_args([*map(str, words)]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1/1  lr 0.01  train loss ")
    assert json.loads(lines[-1]) == summary
    keys = "best_accuracy best_balanced_accuracy best_epoch epochs train_images val_images seconds"
    assert list(summary) == [*keys.split(), "output_dir"]
    assert (summary["train_images"], summary["val_images"], summary["epochs"]) == (30, 10, 1)
    words = [str(flowers / "roses"), "--weights", "out/best.pth"]
    assert len(predict.main(predict.build_parser().parse_args(words))) == 8


def test_the_same_seed_trains_the_same_weights_for_any_workers(flowers, tmp_path):
    results = []
    for seed, workers in ((3, 0), (3, 2), (4, 0)):
        out = tmp_path / f"{seed} {workers}"
        train.main(small(flowers, out, "--epochs", 2, "--seed", seed, "--workers", workers))
        results.append(load(out, "last.pth")["model"])
    first, same, other = results
    assert not soak.difference(first, same, "model")
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("cache", ["--cache-features", "--no-cache-features"])
def test_freezing_changes_fc_alone(flowers, tmp_path, torchvision_file, capsys, cache):
    options = ["--weights", torchvision_file, "--freeze-layers", cache, "--epochs", 1]
    train.main(small(flowers, tmp_path / "out", *options))
    start = load(torchvision_file)
    for name in ("best.pth", "last.pth"):
        after = load(tmp_path, "out", name)["model"]
        assert after["fc.weight"].shape == (5, 1024)
        moved = {key for key, value in start.items() if not torch.equal(after[key], value)}
        assert moved == {"fc.weight", "fc.bias"}
    said = "fc is new, for 5 classes; missing keys ['fc.weight', 'fc.bias'], unexpected keys []"
    assert said in capsys.readouterr().err


def test_fc_first_trains_fc_and_then_all(flowers, tmp_path, torchvision_file, capsys):
    weights = ["--weights", torchvision_file]
    summary = train.main(small(flowers, tmp_path / "fc", *weights, "--freeze-layers"))
    result = evaluation.main(["--data-path", flowers, "--weights", "fc/best.pth"])
    assert result["accuracy"] == summary["best_accuracy"]  # of the plain network, too
    still = ["--lr", 1e-30, "--freeze-bn", "--epochs", 1]
    train.main(small(flowers, tmp_path / "all", *weights, "--fc-first", *still))
    frozen, whole = (load(tmp_path, name, "last.pth") for name in ("fc", "all"))
    assert not soak.difference(frozen["model"], whole["model"], "model")
    assert len(whole["learning"]["optimizer"]["state"]) > 2
    assert [row["epoch"] for row in whole["history"]] == [0, 1]
    assert whole["best"]["epoch"] == load(tmp_path, "all", "best.pth")["epoch"]
    accuracy = frozen["history"][-1]["val_accuracy"]
    assert f"fc alone reaches accuracy {accuracy:.4f}; now all layers" in capsys.readouterr().err


def test_loaded_weights_are_epoch_0_so_that_the_best_is_never_worse(flowers, run_dir, capsys):
    """Whatever learns."""
    weights, still = ["--weights", run_dir], ["--lr", 1e-30, "--epochs", 2]
    start = evaluation.main(["--weights", run_dir])
    for more in ([], ["--freeze-layers"], ["--freeze-layers", "--no-cache-features"]):
        summary = train.main(
            small(flowers, out := "-".join(["out", *more]), *weights, *still, *more)
        )
        history = load(out, "last.pth")["history"]
        assert [row["epoch"] for row in history] == [0, 1, 2]
        assert history[0]["val_accuracy"] == pytest.approx(start["accuracy"])
        assert history[0]["val_loss"] == pytest.approx(start["loss"], rel=1e-4)
        assert summary["best_accuracy"] >= start["accuracy"]
        reached = f"the loaded weights reach accuracy {start['accuracy']:.4f}"
        assert reached in capsys.readouterr().err
        assert table(out, "metrics.csv")[0]["train_loss"] == ""


CHOSEN = [  # options, whether fc is new, and what is chosen
    ("--weights x", True, {"fc_first": True, "freeze_bn": True, "lr": 0.003, "clip": 5}),
    ("--weights x", True, {"epochs": 12, "train_size": 176, "ema": 0.99}),
    ("--weights x --train-size 224", True, {"epochs": 12, "train_size": 224}),
    ("--weights x --small-images", False, {"lr": 0.003, "train_size": 0}),
    ("--weights x --no-fc-first --lr 1", True, {"fc_first": False, "freeze_bn": False, "lr": 1}),
    ("--weights x --no-fc-first", True, {"epochs": 30, "train_size": 0}),
    ("--weights x --no-freeze-bn", True, {"fc_first": True, "freeze_bn": False, "lrf": 0.01}),
    ("--weights x", False, {"fc_first": False, "freeze_bn": True, "lr": 0.003, "epochs": 12}),
    ("", True, {"fc_first": False, "freeze_bn": False, "lrf": 0.1, "batch_size": 16}),
    ("--weights x --freeze-layers", True, {"fc_first": False, "lr": 0.03, "weight_decay": 0.1}),
    ("--weights x --freeze-layers --lr 0.02 --wd 0", True, {"lr": 0.02, "weight_decay": 0}),
    ("--weights x --freeze-layers --no-cache-features", True, {"fc_first": False, "lr": 0.01}),
    ("--small-images", True, {"lr": 0.1, "weight_decay": 5e-4, "batch_size": 128}),
    ("--opt adamw", True, {"opt": "adamw", "lr": 0.002, "weight_decay": 0.05, "epochs": 30}),
    ("--weights x --opt adamw --lr 1", True, {"lr": 1, "weight_decay": 0.05, "freeze_bn": True}),
    ("--weights x --freeze-layers --opt adamw", True, {"lr": 0.003, "weight_decay": 0.5}),
    ("--label-smoothing 0.1 --ema 0.9", True, {"label_smoothing": 0.1, "ema": 0.9, "opt": "sgd"}),
]


@pytest.mark.parametrize(("words", "new_fc", "expected"), CHOSEN)
def test_what_is_omitted_depends_on_what_learns(words, new_fc, expected, capsys):
    args = train.build_parser().parse_args(words.split())
    recipe = train.choose_recipe(args, new_fc, bool(args.small_images))
    assert expected.items() <= asdict(recipe).items()
    err = capsys.readouterr().err
    assert (err.count("\n"), err.startswith("recipe "), f"lr {recipe.lr}, " in err) == (
        1,
        True,
        True,
    )


CPU = Compute(torch.device("cpu"), 1, False)
BUSY = "the machine was busy (load 1.0); other work slows torch's threads: set OMP_WAIT_POLICY=P"


@pytest.mark.parametrize(
    ("batch", "in_parts", "device", "threads", "load", "policy", "expected"),
    [
        (16, True, "cpu", 8, 1.0, "", ""),
        (16, True, "cpu", 16, 1.0, "", "a batch of 16 makes 8 parts for 16 cores"),
        (128, "ghosts", "cpu", 2, 1.0, "", ""),
        (128, "ghosts", "cpu", 16, 1.0, "", "a batch of 128 makes 2 parts for 16 cores"),
        (16, False, "cpu", 8, 1.0, "", BUSY),
        (16, False, "cpu", 8, 0.2, "", ""),
        (16, False, "cpu", 4, 1.0, "", ""),  # leaves cores to others
        (16, False, "cpu", 8, 1.0, "PASSIVE", ""),
        (16, False, "cuda", 8, 1.0, "", ""),
    ],
)
def test_cores_that_would_wait_are_told(
    batch, in_parts, device, threads, load, policy, expected, monkeypatch, capsys
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    learner = torch.nn.Linear(1, 1)
    if in_parts:
        learner = InParts(learner, threads, ghosts=in_parts == "ghosts")
    train.say_what_waits(batch, learner, Compute(torch.device(device), threads, False))
    said = capsys.readouterr().err
    assert (expected in said) if expected else not said


def test_what_cannot_be_had_is_one_line_with_the_place_to_put_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(RunError, match=r"flower_photos.tgz cannot .*put it at data/flower_ph"):
        train.main(["--weights", "imagenet"])
    (tmp_path / "data" / "flower_photos" / "full").mkdir(parents=True)
    with pytest.raises(RunError, match=r"x1-5666bf0f80.pth cannot .*put it at .*/checkpoints/"):
        train.main(["--weights", "imagenet"])
    assert capsys.readouterr().out == ""  # nor does torch say there that it downloads


@pytest.mark.parametrize("clip", [None, 5.0])
def test_steep_gradients_move_the_weights_no_further_than_the_clip(clip):
    learner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    batch = torch.full((8, 1, 2, 2), 1e4), torch.arange(8) % 2
    before = torch.cat([value.flatten().clone() for value in learner.parameters()])
    recipe = train.Recipe(epochs=1, batch_size=8, lr=1.0, lrf=1.0, weight_decay=0, clip=clip)
    train.fit(learner, learner, [batch], [batch], recipe, torch.nn.CrossEntropyLoss(), CPU)
    after = torch.cat([value.flatten() for value in learner.parameters()])
    moved = (after - before).norm().item()
    assert moved == pytest.approx(5, rel=1e-3) if clip else moved > 1000


def test_the_average_is_validated_while_the_network_goes_on():
    """With 0.75 it keeps three quarters of itself in every step after the first."""
    torch.manual_seed(0)
    learner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    plain = copy.deepcopy(learner)
    batches = [(torch.randn(8, 1, 2, 2), torch.arange(8) % 2) for _ in range(3)]
    recipe = train.Recipe(epochs=1, batch_size=8, lr=0.5, lrf=1, weight_decay=0, ema=0.75)
    criterion = torch.nn.CrossEntropyLoss()
    figures, _ = train.fit(learner, learner, batches, batches, recipe, criterion, CPU)
    optimizer, average = torch.optim.SGD(plain.parameters(), 0.5, momentum=0.9), None
    for images, labels in batches:
        optimizer.zero_grad()
        criterion(plain(images), labels).backward()
        optimizer.step()
        weights = [value.detach().clone() for value in plain.parameters()]
        pairs = zip(average or weights, weights, strict=True)
        average = [0.75 * old + 0.25 * new for old, new in pairs]
    assert all(map(torch.equal, learner.parameters(), plain.parameters()))
    for value, mean in zip(plain.parameters(), average, strict=True):
        value.data.copy_(mean)
    losses = [criterion(plain(images), labels).item() for images, labels in batches]
    assert figures["val_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_smoothing_and_weights_reach_the_loss(flowers, tmp_path, monkeypatch):
    data, seen = shutil.copytree(flowers, tmp_path / "data"), []
    for number in range(4):
        (data / "roses" / f"roses_00{number}.jpg").unlink()

    def look(*args, criterion, **others):
        seen.append(criterion)
        raise RunError("enough")

    monkeypatch.setattr(train, "train_epoch", look)
    words = ["--class-weights", "--label-smoothing", 0.1]
    with pytest.raises(RunError, match="enough"):
        train.main(small(data, tmp_path / "out", *words))
    # Logits of zero: every class costs log 5, times its weight. The images to train on are counted.
    weights = [31 / (5 * count) for count in (7, 7, 3, 7, 7)]
    expected = [math.log(5) * (0.9 * weight + 0.1 * sum(weights) / 5) for weight in weights]
    losses = [seen[0](torch.zeros(1, 5), torch.tensor([label])).mean() for label in range(5)]
    assert torch.stack(losses).tolist() == pytest.approx(expected)  # not divided by the weight


def test_weighted_classes_weigh_alike():
    data = train.Data(["a", "b"], ([], [0] * 6 + [1] * 2), ([], []), "", None)
    assert train.balanced_weights(data).tolist() == pytest.approx([8 / 12, 8 / 4])


def test_resume_finds_the_run_keeps_its_options_and_refuses_others(tmp_path, run_dir, capsys):
    folder = shutil.copytree(run_dir, tmp_path / "runs" / "x")
    with pytest.raises(UsageError, match=r"began with 0.01: omit --lr 0.5, or start a new run"):
        train.main(["--resume", "--lr", 0.5])
    assert train.main(["--resume"])["epochs"] == 2  # finished already: only its summary again
    assert "--epochs" not in capsys.readouterr().err
    summary = train.main(["--resume", "--output-dir", folder, "--epochs", 3])
    assert (summary["epochs"], summary["output_dir"]) == (3, str(folder))
    err = capsys.readouterr().err
    assert "--epochs 3, was 2: the rates ahead change, too" in err
    best = load(run_dir, "last.pth")["best"]
    said = f"best accuracy {best['accuracy']:.4f} in epoch {best['epoch']}"
    assert f"resuming {folder}: 2 of 3 epochs are done, {said}" in err
    steps = [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss/val")]
    assert steps == [1, 2, 3]
    with pytest.raises(UsageError, match="best.pth is not the last.pth of a run; name one"):
        train.main(["--resume", folder / "best.pth"])
    (folder / "best.pth").rename(folder / "away.pth")
    with pytest.raises(UsageError, match="x lacks best.pth: put it back, or .* --weights .*last"):
        train.main(["--resume"])
    (folder / "away.pth").rename(folder / "best.pth")
    os.truncate(folder / "last.pth", 50_000)
    with pytest.raises(RunError, match=r"^[^\n]*last\.pth: not a weight file, or damaged: [^\n]*$"):
        train.main(["--resume"])


def test_a_run_from_before_an_option_was_there_goes_on_without_it(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "old")
    state = load(folder, "last.pth")
    state["args"] |= {"weights": "x.pth", "fc_is_new": False, "train_size": None}  # fine-tuning
    for name in ("opt", "ema", "augment", "class_weights", "label_smoothing"):
        del state["args"][name]
    for figures in (state["best"], *state["history"]):
        figures.pop("balanced_accuracy", figures.pop("val_balanced_accuracy", None))
    checkpoint.save(state, folder / "last.pth")
    with pytest.raises(UsageError, match="began with sgd: omit --opt adamw, or start a new run"):
        train.main(["--resume", folder, "--opt", "adamw"])
    with pytest.raises(UsageError, match="began without it: omit --class-weights, or start a new"):
        train.main(["--resume", folder, "--opt", "sgd", "--ema", 0, "--class-weights"])
    with pytest.raises(UsageError, match="began with it: omit --no-cache-features, or start a new"):
        train.main(["--resume", folder, "--no-cache-features"])
    with pytest.raises(UsageError, match="began with 0: omit --seed 1, or start a new run"):
        train.main(["--resume", folder, "--seed", 1])
    assert train.main(["--resume", folder, "--epochs", 3])["epochs"] == 3
    assert "averaged" not in load(folder, "last.pth")["learning"]
    assert load(folder, "last.pth")["args"]["train_size"] == 0  # as large as in evaluation
    assert load(folder, "last.pth")["history"][2]["lr"] == utils.cosine_lr(0.01, 0.1, 2, 3)


def test_a_run_on_other_images_is_not_resumed_where_the_split_is_drawn(flowers, tmp_path, capsys):
    for part in ("data", "parts/train", "parts/val"):
        shutil.copytree(flowers, part)
    for root in ("data", "parts"):
        train.main(small(root, f"out-{root}", "--epochs", 1))
        shutil.copy("data/roses/roses_000.jpg", next(Path(root).rglob("roses")) / "more.jpg")
    with pytest.raises(UsageError, match="data holds other images than when the run began, of wh"):
        train.main(["--resume", "out-data", "--epochs", 2])
    assert train.main(["--resume", "out-parts", "--epochs", 2])["train_images"] == 41
    assert "parts holds other images than when the run began\n" in capsys.readouterr().err


def test_v1_trains_from_nothing_with_amp(flowers, tmp_path, capsys):
    options = ["--model", "shufflenet_v1_x0_25_g3", "--epochs", 1, "--amp", "--freeze-layers"]
    train.main(small(flowers, tmp_path / "out", *options, "--no-cache-features"))
    err = capsys.readouterr().err
    assert "training on cpu in bfloat16" in err
    assert "what is frozen holds random weights: add --weights" in err
    assert load(tmp_path, "out", "best.pth")["model_name"] == "shufflenet_v1_x0_25_g3"


@pytest.mark.parametrize("wrong", [{"lr": 1e9}, {"lr": 1e6, "batch-size": 64, "wd": 1000}])
def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(flowers, tmp_path, wrong):
    """In training, or, with one step an epoch, where only validation sees it."""
    options = [f"--{name}={value}" for name, value in wrong.items()]
    with pytest.raises(RunError, match="loss is (nan|inf).*: use a smaller --lr"):
        train.main(small(flowers, tmp_path / "out", "--epochs", 9, *options))
    for path in (tmp_path / "out").glob("*.pth"):
        assert all(value.isfinite().all() for value in load(path)["model"].values())


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_epoch_has_the_lowest_loss_of_equal_accuracy(tmp_path, weighted):
    """Of equal balanced accuracy, where classes are weighted."""
    metadata = Metadata("x", CLASSES, {}, {"patience": 2, "class_weights": weighted})
    judged, other = ["val_accuracy", "val_balanced_accuracy"][:: -1 if weighted else 1]
    figures = [(0.5, 1.0), (0.5, 1.5), (0.5, 0.9), (0.4, 0.1), (0.5, 0.9)]
    run, better = RunFolder(tmp_path, torch.nn.Linear(1, 1), metadata), []
    for epoch, (accuracy, loss) in enumerate(figures, 1):
        row = {"epoch": epoch, "lr": 1, "train_loss": 1, "train_accuracy": 1}
        row |= {"val_loss": loss, judged: accuracy, other: epoch / 10, "seconds": 1.0}
        row["images_per_second"] = 9.0
        better.append(run.record(row, np.eye(5, dtype=int)))
    assert better == [True, False, True, False, False]
    assert load(tmp_path, "best.pth")["metrics"] == run.history[2]
    name = "balanced accuracy" if weighted else "accuracy"
    assert best_figure(metadata.args, run.best) == f"{name} 0.5000"
    assert run.stalled  # two epochs have brought nothing better
    for patience in (None, 3):
        run.metadata.args["patience"] = patience
        assert not run.stalled


def test_training_images_may_be_small_and_partly_hidden(flowers, tmp_path, monkeypatch):
    """Down to 64 pixels, at which batch norm has values enough in a last batch of one image."""
    seen, forward = set(), ShuffleNetV2.forward

    def spy(self, x):
        # The mean colour, 0 once normalised up to rounding, in 2 % of an image or more.
        hidden = (x.abs() < 0.01).all(1).float().mean((1, 2)) > 0.019
        if self.training and x.dtype == torch.float32:  # else a rewrite is tried
            seen.add((x.shape[-1], hidden.all().item(), hidden.any().item()))
        return forward(self, x)

    monkeypatch.setattr(ShuffleNetV2, "forward", spy)
    options = ["--epochs", 1, "--train-size", 64, "-b", 17, "--random-erase", 1]
    train.main(small(flowers, tmp_path / "out", *options))
    assert seen == {(64, True, True)}
    assert load(tmp_path, "out", "best.pth")["preprocessing"]["crop"] == 224


def test_fine_tuning_is_on_smaller_crops_than_evaluation(
    flowers, tmp_path, torchvision_file, monkeypatch
):
    sides, make = [], train.training_set

    def spy(*args):
        made = make(*args)
        sides.append(made[0][0].shape)
        return made

    monkeypatch.setattr(train, "training_set", spy)
    words = ["--data-path", flowers, "--model", "shufflenet_v2_x0_5", "--epochs", 1, "-j", 0]
    train.main([*words, "--weights", torchvision_file, "--output-dir", "out"])
    train.main(["--resume", "out", "--epochs", 2])
    assert sides == [(176, 176, 3)] * 2
    assert load("out", "best.pth")["preprocessing"]["crop"] == 224


def test_patience_ends_a_run_that_gets_no_better(flowers, tmp_path, torchvision_file, capsys):
    options = ["--weights", torchvision_file, "--freeze-layers", "--lr", 1e-30, "--patience", 2]
    assert train.main(small(flowers, tmp_path / "out", *options))["epochs"] == 3
    assert "stopped: --patience epochs have brought nothing better" in capsys.readouterr().err
    assert train.main(["--resume", tmp_path / "out"])["epochs"] == 3  # also when it goes on
    assert train.main(["--resume", tmp_path / "out", "--patience", 3])["epochs"] == 4


MISTAKES = [
    ("train.py --data-path file", "--data-path file: no such folder"),
    ("train.py --data-path . --weights no.pth", "--weights no.pth: no such file"),
    ("train.py --data-path .", ". holds no class folders with images"),
    ("train.py --resume", "^no runs/./last.pth here: run train.py first"),
    ("train.py --resume file", "--resume file is neither the folder of a run nor its"),
    ("train.py --data-path . --model x", "--model x is not there: use shufflenet_v2_x0_5, "),
    ("train.py --data-path . --device cuda:99", "--device cuda:99 is not there: use .*cpu"),
    ("train.py --data-path FLOWERS --output-dir file/x", "--output-dir file/x: .*; name another"),
    ("train.py --data-path FLOWERS --weights imagenet --model V1", "torchvision has none for .*v1"),
    ("train.py --data-path FLOWERS --name a/b", "--name a/b: no place but a name"),
    ("train.py FLOWERS", "/flowers stands alone: write --data-path .*/flowers"),
    ("train.py --data-path FLOWERS --weights RUN/../none", "--weights .*none: no such file"),
    ("train.py --freeze-layers --data-path . --train-size 96", "--no-cache-features"),
    ("train.py --freeze-layers --data-path . --random-erase 0.5", "--no-cache-features"),
    ("train.py --freeze-layers --data-path . --augment trivial", "--no-cache-features"),
    ("train.py --freeze-layers --data-path . --ema 0.9", "--no-cache-features"),
    ("train.py --fc-first --data-path .", "--fc-first: there are no .*; add --weights"),
    (
        "train.py --data-path FLOWERS --output-dir RUN",
        "holds a run: add --resume, or name another",
    ),
    ("eval.py --data-path nowhere", "--data-path nowhere: no such folder"),
    ("eval.py --data-path FLOWERS --weights RUN --split test", "no such part, but train and val"),
    ("predict.py no.jpg", "image no.jpg: no such file"),
    ("predict.py no*.jpg", "image no[*].jpg: no such file"),
    ("predict.py . --weights file", ".: no images in it, by their suffix"),
    ("predict.py file --weights file --save-plot x.txt", "the suffix must be .png or .jpg"),
    (
        "predict.py file --weights file --output no/x.csv",
        "--output no/x.csv: cannot be written; name",
    ),
    ("predict.py file --weights file --output d.csv", "--output d.csv: cannot be written; name"),
    ("export.py --weights file --output x.pt", "--output x.pt: the suffix must be .onnx"),
    ("export.py --weights x.onnx", "x.onnx is exported already; name the .pth that it was made of"),
    ("export.py --weights RUN --opset 11 --int8 FLOWERS", "--opset 11: --int8 needs 13 or 18"),
    ("export.py --weights file --web file", "--web file: File exists; name another"),
    ("export.py --weights file --web .", "--web .: its index.html is of another page; name"),
    ("export.py --weights file --web file/x", "--web file/x: Not a directory; name another"),
    ("export.py --weights file --web w --output x.onnx", "x.onnx: --web writes w/model.onnx; omit"),
    ("export.py --weights file --runtime-dir .", "--runtime-dir .: only --web copies it; add"),
    ("export.py --weights file --web w --runtime-dir .", "no ort.wasm.* in it: run npm install"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_found_before_the_work(flowers, run_dir, tmp_path, command, message):
    (tmp_path / "file").touch(mode=0o777)  # as folders are
    (tmp_path / "x.onnx").touch()
    (tmp_path / "index.html").touch()
    (tmp_path / "d.csv").mkdir()
    names = {"FLOWERS": flowers, "RUN": run_dir, "V1": "shufflenet_v1_x1_0_g3"}
    script, *words = command.split()
    with pytest.raises(UsageError, match=message) as caught:
        SCRIPTS[script].main([names.get(word, word) for word in words])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def imported(result):
    """The packages and modules that a process has named by PYTHONPROFILEIMPORTTIME."""
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_groups_options_and_prints_defaults(script, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["--help"])
    out = capsys.readouterr().out
    assert "(default: " in out
    assert "(default: None)" not in out


# -- eval.py -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--amp"]])
def test_eval_repeats_the_validation_of_training_for_any_threads(flowers, run_dir, tmp_path, more):
    """In float32, also where training is not."""
    if more:
        train.main(small(flowers, run_dir := tmp_path / "out", "--epochs", 1, *more))
    best = load(run_dir, "best.pth")["metrics"]
    for threads in (1, 4):
        result = evaluation.main(["--weights", run_dir / "best.pth", "-j", threads])
        assert (result["accuracy"], result["images"]) == (best["val_accuracy"], 5)
        assert result["loss"] == pytest.approx(best["val_loss"], rel=1e-5)


def test_mistakes_are_those_of_the_answers_largest_loss_first(flowers):
    paths = [str(path) for path in sorted(flowers.glob("roses/*"))[:4]]
    answers = np.log([[0.9, 0.1], [0.25, 0.75], [0.2, 0.8], [0.99, 0.01]]).astype(np.float32)
    answers = zip(paths, answers, strict=True)
    tally, mistakes = measure(answers, [0, 0, 1, 1], ["a", "b"], BadImages(4))
    assert tally.confusion.tolist() == [[1, 1], [1, 1]]
    assert [row["path"] for row in mistakes] == [paths[3], paths[1]]
    assert [row["class"] + row["prediction"] for row in mistakes] == ["ba", "ab"]
    assert [row["prob"] for row in mistakes] == pytest.approx([0.99, 0.75])
    assert [row["prob_of_class"] for row in mistakes] == pytest.approx([0.01, 0.25])
    assert [row["loss"] for row in mistakes] == pytest.approx(-np.log([0.01, 0.25]), rel=1e-5)


def test_eval_takes_the_validation_part_of_what_the_run_saw_and_all_of_another(
    flowers, run_dir, tmp_path, capsys
):
    """And says how many of the images were trained on, wherever they lie now."""
    shutil.copytree(flowers, "moved")
    shutil.copytree(flowers, "fewer")
    os.remove("fewer/roses/roses_000.jpg")
    shutil.copytree(flowers / "roses", "other/roses")
    os.rename("other/roses/roses_000.jpg", "other/roses/new name.jpg")
    for side in ("train", "val", "Test"):
        shutil.copytree(flowers / "tulips", f"parts/{side}/tulips")
    os.remove("parts/Test/tulips/tulips_000.jpg")
    seen = load(run_dir, "best.pth")["trained_on"]
    assert len(seen) == 35
    for place, split, images in (
        ("moved", "val", 5), ("fewer", "all", 39), ("other", "all", 8), ("parts", "test", 7),
    ):  # fmt: skip
        more = ["--split", "test"] if split == "test" else []
        result = evaluation.main(["--data-path", place, "--weights", run_dir, *more])
        assert (result["split"], result["images"]) == (split, images)
        root = f"{place}/Test" if split == "test" else place
        known = sum(image_hashes([str(path)])[0] in seen for path in Path(root).rglob("*.jpg"))
        assert known in {"moved": [35], "fewer": [34, 35], "other": [6, 7], "parts": [6, 7]}[place]
        known = 0 if split == "val" else known
        said = f"{place}: {split}, {images} images; {known} of them were trained on"
        assert said in capsys.readouterr().err
    torch.save(load(run_dir, "best.pth")["model"], "bare.pth")
    evaluation.main(["--data-path", "other", "--weights", "bare.pth"])
    assert "8 images; the weights do not say which were trained on" in capsys.readouterr().err


def test_eval_prints_a_table_and_leaves_files(flowers, run_dir, capsys):
    words = ["--data-path", flowers, "--split", "train", "--output-dir", "out"]
    result = evaluation.main([*words, "--weights", run_dir / "best.pth"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["class", "images", "precision", "recall", "f1"]
    assert [line.split()[:2] for line in out[1:6]] == [[name, "7"] for name in CLASSES]
    assert out[6].startswith(f"* Acc@1 {100 * result['accuracy']:.3f}")
    last = json.loads(out[-1])
    assert (last["accuracy"], last["images"], last["top5"]) == (result["accuracy"], 35, None)
    found = {"confusion_matrix.png", "confusions.csv", "mistakes.png", "mistakes.csv"}
    assert set(os.listdir("out")) == found | {"per_class.csv"}
    wrong = table("out", "mistakes.csv")
    assert len(wrong) == 35 - round(35 * result["accuracy"])
    assert list(wrong[0]) == ["path", "class", "prediction", "prob", "prob_of_class", "loss"]
    assert [row["class"] for row in table("out", "per_class.csv")] == CLASSES


def test_eval_goes_by_the_names_of_folders_not_by_their_place(flowers, tmp_path, run_dir):
    """Two of the five classes, which alone would have the indices 0 and 1."""
    for name in ("roses", "tulips"):
        shutil.copytree(flowers / name, tmp_path / "two" / name)
    options = ["--weights", run_dir / "best.pth", "--split", "all"]
    two, whole = (evaluation.main([*options, "--data-path", path]) for path in ("two", flowers))
    kept = {row["class"]: row["recall"] for row in two["per_class"] if row["images"]}
    assert list(kept) == ["roses", "tulips"]
    assert kept.items() <= {row["class"]: row["recall"] for row in whole["per_class"]}.items()
    (tmp_path / "two" / "roses").rename(tmp_path / "two" / "violets")
    with pytest.raises(
        UsageError, match="^two: 1 of 2 classes are unknown, violets: rename or rem"
    ):
        evaluation.main([*options, "--data-path", "two"])


# -- predict.py ----------------------------------------------------------------------------------


def test_predict_agrees_with_torchvision(flowers, run_dir):
    """Decoding, preprocessing and network once more, by torchvision alone."""
    theirs = models.shufflenet_v2_x0_5(num_classes=5).eval()
    theirs.load_state_dict(load(run_dir, "best.pth")["model"])
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    pipeline = transforms.Compose([*steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    paths = sorted(flowers.glob("*/*_00[01].jpg"))
    results = predict.main([*paths, "--weights", run_dir / "best.pth"])
    for path, result in zip(paths, results, strict=True):
        expected = theirs(pipeline(load_rgb(path))[None]).softmax(1)[0].tolist()
        found = {guess["class"]: guess["prob"] for guess in result["predictions"]}
        assert [found[name] for name in CLASSES] == pytest.approx(expected, abs=1e-4)


def test_predict_prints_path_then_classes_best_first(flowers, tmp_path, run_dir, capsys):
    """By default with the newest run."""
    shutil.copytree(run_dir, tmp_path / "runs" / "x")
    image = flowers / "roses" / "roses_000.jpg"
    ((path, guesses, _),) = (result.values() for result in predict.main([image, "--topk", 99]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == path == str(image)
    assert lines[1:] == [f"class: {g['class']:<10}   prob: {g['prob']:.3f}" for g in guesses]
    probabilities = [guess["prob"] for guess in guesses]
    assert probabilities == sorted(probabilities, reverse=True)
    assert (len(guesses), sum(probabilities)) == (5, pytest.approx(1))


def test_predict_prints_a_line_for_each_of_several_images_and_a_summary(flowers, run_dir, capsys):
    places = [flowers / "roses", flowers / "tulips" / "tulips_000.jpg"]
    words = [*places, "--weights", run_dir / "best.pth"]
    results = predict.main(words)
    out, err = capsys.readouterr()
    for line, result in zip(out.splitlines(), results, strict=True):
        guess = result["predictions"][0]
        assert line == f"{result['path']}  {guess['class']} {guess['prob']:.3f}"
    first, last = err.splitlines()
    assert first.startswith(f"{run_dir}/best.pth: shufflenet_v2_x0_5, 5 classes (daisy, dandel")
    assert first.endswith("), resize 256, crop 224; PyTorch on cpu")
    assert last.startswith("9 images in ")
    counts = Counter(result["predictions"][0]["class"] for result in results)
    assert last.endswith(", ".join(f"{name} {count}" for name, count in counts.most_common()))
    predict.main([*words, "--topk", 2])
    assert all(line.count("0.") >= 2 for line in capsys.readouterr().out.splitlines())


def test_predict_takes_folders_and_files_in_any_mix_and_order(flowers, run_dir, capsys):
    places = [flowers / "tulips", flowers / "daisy" / "daisy_003.jpg", flowers]
    words = [*places, "--weights", run_dir / "best.pth", "--topk", 2, "-j", 3]
    results = predict.main([*words, "--json"])
    expected = [*sorted((flowers / "tulips").iterdir()), places[1], *sorted(flowers.glob("*/*"))]
    assert [result["path"] for result in results] == list(map(str, expected))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == results

    predict.main([*words, "--output", "result.csv"])
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[1:2], err.count("\n")) == ("", ["wrote result.csv"], 3)
    for row, result in zip(table("result.csv"), results, strict=True):
        (one, p), (two, q) = (guess.values() for guess in result["predictions"])
        cells = {"path": result["path"], "class_1": one, "prob_1": str(round(p, 6))}
        assert row == cells | {"class_2": two, "prob_2": str(round(q, 6))}


def test_predict_goes_on_after_an_image_it_cannot_read(flowers, tmp_path, run_dir, capsys):
    shutil.copytree(flowers / "roses", tmp_path / "roses")
    (tmp_path / "roses" / "roses_001.jpg").write_bytes(b"")
    (tmp_path / "roses" / "a\x1b[31m.jpg").write_text("no image")
    with pytest.raises(RunError, match="2 of 9 images could not be read, named above"):
        predict.main(["roses", "--weights", run_dir / "best.pth", "--json"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 7
    assert "error: roses/roses_001.jpg: no image, but empty" in err
    assert "error: roses/a\\x1b[31m.jpg: no image, but text" in err


def test_predict_expands_what_the_shell_left_and_says_what_it_skips(flowers, run_dir, capsys):
    shutil.copytree(flowers / "roses", "roses [1]/deep")
    Path("roses [1]/a.heic").touch()
    words = ["--weights", run_dir]
    results = predict.main(["roses*/**/*_00[01].jpg", *words])
    assert [result["path"][-6:] for result in results] == ["00.jpg", "01.jpg"]
    capsys.readouterr()
    assert len(predict.main(["roses [1]", *words])) == 8  # its name, no pattern
    os.mkdir("roses [1]/empty")
    assert len(predict.main(["roses [1]/*", *words])) == 8
    assert "skipped: 1 .heic\n" in capsys.readouterr().err


def test_predict_draws_without_a_display_or_torchvision(shell, flowers, tmp_path, run_dir):
    words = [flowers / "roses", "--weights", run_dir / "best.pth", "--save-plot", "plot.png"]
    env = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "MPLBACKEND": "", "PYTHONPROFILEIMPORTTIME": "1"}
    show = ["--show"] if sys.platform == "linux" else []
    result = shell("predict.py", *words, *show, env=env)
    lines = result.stderr.splitlines()
    assert Image.open(tmp_path / "plot.png").width == 1200
    assert "wrote plot.png" in lines
    assert "torchvision" not in imported(result)
    assert result.returncode == len(show)
    assert not show or any(line.startswith("error: --show: use --save-plot") for line in lines)


def test_a_plot_knows_the_truth_where_a_folder_is_called_as_a_class(
    flowers, tmp_path, run_dir, monkeypatch
):
    panels, draw = [], plots.draw_images
    monkeypatch.setattr(plots, "draw_images", lambda drawn: panels.extend(drawn) or draw(drawn))
    shutil.copy(flowers / "roses" / "roses_000.jpg", "photo.jpg")
    words = [flowers / "roses", "photo.jpg", "--weights", run_dir / "best.pth"]
    results = predict.main([*words, "--save-plot", "p.png"])
    found = [panel.right for panel in panels]
    answers = [result["predictions"][0]["class"] for result in results]
    assert found == [*(answer == "roses" for answer in answers[:-1]), None]


def without_torch(shell, script, *words):
    """The last line of a script that must not import torch, and what main gives with it."""
    result = shell(script, *words, env={"PYTHONPROFILEIMPORTTIME": "1", "TQDM_DISABLE": "1"})
    assert result.returncode == 0, result.stderr
    assert "numpy" in imported(result)
    assert not imported(result) & {"torch", "torchvision"}
    return json.loads(result.stdout.splitlines()[-1])


def test_an_exported_network_needs_no_torch(shell, flowers, run_dir, onnx_file):
    weights = ["--weights", run_dir / "best.pth"]
    options = ["--weights", onnx_file, "--runtime"]
    found = without_torch(shell, "eval.py", "--data-path", flowers, *options, "openvino")
    expected = evaluation.main(["--data-path", flowers, *weights])
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    image = flowers / "roses" / "roses_000.jpg"
    found = without_torch(shell, "predict.py", image, "--json", *options, "onnxruntime")
    (expected,) = predict.main([image, *weights])
    for one, two in zip(found["predictions"], expected["predictions"], strict=True):
        assert one == {"class": two["class"], "prob": pytest.approx(two["prob"], abs=1e-5)}


# -- ImageNet ------------------------------------------------------------------------------------


def test_imagenets_folders_are_in_the_order_of_its_classes(
    flowers, imagenet_file, tmp_path, monkeypatch
):
    """The same image in a folder per class: only that of torchvision's answer is right."""
    theirs = models.shufflenet_v2_x1_0().eval()
    theirs.load_state_dict(load(imagenet_file))
    image = flowers / "roses" / "roses_000.jpg"
    prepare = models.ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.transforms()
    answer = theirs(prepare(load_rgb(image))[None]).argmax().item()
    ids = [f"n{10_000_000 + 7 * number}" for number in range(1000)]
    for name in ids:
        (tmp_path / "val" / name).mkdir(parents=True)
        os.symlink(image, tmp_path / "val" / name / "a.JPEG")
    ((_, logits),) = Classifier("imagenet").stream([image])  # once, not a thousand times
    monkeypatch.setattr(Classifier, "stream", lambda self, paths, threads: product(paths, [logits]))
    result = evaluation.main(["--data-path", tmp_path / "val", "--weights", "imagenet"])
    right = [row["class"] for row in result["per_class"] if row["recall"]]
    assert (right, result["accuracy"]) == ([ids[answer]], 0.001)

"""train.py, eval.py and predict.py, end to end on small folders of drawn flowers."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, run_train, small
from PIL import Image

import checkpoint
import eval as evaluate_script
import predict
import train
from cli import RunError, UsageError
from model import build_model

pytestmark = pytest.mark.usefixtures("elsewhere")

CLASSES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


def run_eval(*args):
    return evaluate_script.main(evaluate_script.build_parser().parse_args([*map(str, args)]))


def run_predict(*args):
    return predict.main(predict.build_parser().parse_args([*map(str, args)]))


@pytest.fixture(scope="session")
def torchvision_file(tmp_path_factory):
    """A state dict as torchvision publishes them: bare, 1000 classes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "shufflenetv2_x0.5.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), path)
    return path


# -- train.py ------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_says(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert {name for name in names - events if name[0] != "."} == {
        "args.json",
        "best.pth",
        "class_indices.json",
        "confusion_matrix.png",
        "curves.png",
        "last.pth",
        "metrics.csv",
        "previous.pth",
    }
    names = json.loads((run_dir / "class_indices.json").read_text())
    assert names == {str(index): name for index, name in enumerate(CLASSES)}
    assert json.loads((run_dir / "args.json").read_text())["epochs"] == 2
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[0]["lr"]) == 0.01
    for picture in ("curves.png", "confusion_matrix.png"):
        Image.open(run_dir / picture).verify()


def test_the_summary_is_the_last_line_and_says_what_was_done(flowers, tmp_path, capsys):
    summary = run_train(*small(flowers, tmp_path / "out", "--epochs", 1, "--val-rate", 0.25))
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == summary
    assert summary.keys() == {
        "best_accuracy",
        "best_epoch",
        "epochs",
        "train_images",
        "val_images",
        "seconds",
        "output_dir",
    }
    assert (summary["train_images"], summary["val_images"], summary["epochs"]) == (30, 10, 1)
    assert out.splitlines()[0].startswith("epoch 1/1  lr 0.01  train loss ")
    assert "img/s" in err
    assert "loss=" in err
    assert "acc=" in err
    assert "lr=" in err


def test_a_checkpoint_stands_alone(run_dir):
    file = torch.load(run_dir / "best.pth", weights_only=True)
    assert file.keys() == {
        "model",
        "model_name",
        "classes",
        "preprocessing",
        "epoch",
        "metrics",
        "args",
    }
    assert file["classes"] == CLASSES
    assert file["preprocessing"]["resize"] == 256
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    theirs.load_state_dict(file["model"])  # torchvision can use what we trained
    assert all(value.is_contiguous() for value in file["model"].values())


def test_training_computes_as_nhwc(run_dir):
    state = torch.load(run_dir / "last.pth", weights_only=True)["optimizer"]["state"]
    momenta = [each["momentum_buffer"] for each in state.values()]
    (stem,) = (m for m in momenta if m.shape == (24, 3, 3, 3))
    assert stem.is_contiguous(memory_format=torch.channels_last)


def test_tensorboard_gets_loss_accuracy_and_learning_rate(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/train",
        "loss/val",
        "accuracy/train",
        "accuracy/val",
        "learning_rate",
    }
    with open(run_dir / "metrics.csv", newline="") as file:
        expected = [float(row["val_loss"]) for row in csv.DictReader(file)]
    found = [event.value for event in events.Scalars("loss/val")]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("cache", ["--cache-features", "--no-cache-features"])
def test_freezing_changes_fc_alone(flowers, tmp_path, torchvision_file, capsys, cache):
    out = tmp_path / "out"
    options = ["--weights", torchvision_file, "--freeze-layers", cache, "--epochs", 1]
    run_train(*small(flowers, out, *options))
    start = torch.load(torchvision_file, weights_only=True)
    for name in ("best.pth", "last.pth"):
        after = torch.load(out / name, weights_only=True)["model"]
        assert after.keys() == start.keys()
        assert after["fc.weight"].shape == (5, 1024)
        for key in start.keys() - {"fc.weight", "fc.bias"}:
            assert torch.equal(after[key], start[key]), key
    err = capsys.readouterr().err
    assert "missing keys ['fc.weight', 'fc.bias'], unexpected keys []" in err


def test_the_same_seed_trains_the_same_weights_for_any_workers(flowers, tmp_path):
    results = []
    for name, seed, workers in (("a", 3, 0), ("b", 3, 1), ("c", 3, 2), ("d", 3, 4), ("e", 4, 0)):
        options = ["--epochs", 2, "--seed", seed, "--workers", workers]
        run_train(*small(flowers, tmp_path / name, *options))
        results.append(torch.load(tmp_path / name / "last.pth", weights_only=True)["model"])
    first, *same, other = results
    for key in first:
        assert all(torch.equal(first[key], weights[key]) for weights in same), key
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_fc_first_trains_what_freeze_layers_trains_and_then_all(
    flowers, tmp_path, torchvision_file, capsys
):
    weights = ["--weights", torchvision_file]
    run_train(*small(flowers, tmp_path / "fc", *weights, "--freeze-layers"))
    still = ["--lr", 1e-30, "--freeze-bn", "--epochs", 1]
    run_train(*small(flowers, tmp_path / "all", *weights, "--fc-first", *still))
    frozen, whole = (
        torch.load(tmp_path / n / "last.pth", weights_only=True) for n in ("fc", "all")
    )
    for key in frozen["model"]:
        assert torch.equal(frozen["model"][key], whole["model"][key]), key
    assert len(whole["optimizer"]["state"]) > 2
    assert whole["best"]["epoch"] == 0  # nothing better came
    best = checkpoint.load(tmp_path / "all" / "best.pth")
    assert (best["epoch"], best["metrics"]["val_accuracy"]) == (0, whole["best"]["accuracy"])
    accuracy = frozen["history"][-1]["val_accuracy"]
    assert f"fc alone reaches {accuracy:.4f}; now all layers" in capsys.readouterr().err
    for wrong, message in (
        ([*weights, "--freeze-layers"], "with --freeze-layers fc is all there is"),
        ([], "fc would learn what random layers see; add --weights"),
        ([*weights, "--no-cache-features"], "needs cached features"),
    ):
        with pytest.raises(UsageError, match=f"--fc-first: {message}"):
            run_train(*small(flowers, tmp_path / "no", "--fc-first", *wrong))


@pytest.mark.parametrize(
    ("done", "more"),
    [(2, ""), (2, "--freeze-layers"), (0, "--fc-first --freeze-bn --lr 1e-5")],
)
def test_some_epochs_and_the_rest_are_four(
    flowers, tmp_path, torchvision_file, monkeypatch, done, more
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = more and ["--weights", torchvision_file, *more.split()]
    run_train(*small(flowers, whole, "--epochs", 4, *more))

    def stop(*args, **kwargs):
        if args[4] == done:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **kwargs)

    import utils

    train_one_epoch = utils.train_one_epoch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "train_one_epoch", stop)
        run_train(*small(flowers, parts, "--epochs", 4, *more))
    run_train("--resume", parts / "last.pth")

    a, b = (torch.load(folder / "last.pth", weights_only=True) for folder in (whole, parts))
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    assert a["history"] == b["history"]
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    first, second = (checkpoint.load_classifier(f / "best.pth").model for f in (whole, parts))
    assert torch.equal(first.fc.weight, second.fc.weight)


def test_cached_features_have_defaults_of_their_own_and_typed_options_win(
    flowers, tmp_path, torchvision_file
):
    frozen = ["--weights", torchvision_file, "--freeze-layers", "--epochs", 1]
    for name, more, expected in (
        ("a", [], (0.03, 64, 0.1)),
        ("b", ["--lr", 0.01, "--wd", 0], (0.01, 64, 0)),
        ("c", ["--no-cache-features"], (0.01, 16, 4e-5)),
        ("d", ["--no-freeze-layers", "--fc-first", "--freeze-bn"], (0.001, 16, 4e-5)),
    ):
        run_train(*small(flowers, tmp_path / name, *frozen, *more))
        args = json.loads((tmp_path / name / "args.json").read_text())
        assert (args["lr"], args["batch_size"], args["weight_decay"]) == expected


def test_what_is_saved_from_cached_features_is_the_plain_network(
    flowers, tmp_path, torchvision_file
):
    out = tmp_path / "out"
    options = ["--weights", torchvision_file, "--freeze-layers", "--val-rate", 0.5, "--epochs", 3]
    summary = run_train(*small(flowers, out, *options))
    saved = torch.load(out / "best.pth", weights_only=True)["metrics"]
    result = run_eval("--data-path", flowers, "--weights", out / "best.pth", "-j", 0)
    assert result["accuracy"] == saved["val_accuracy"] == summary["best_accuracy"]
    assert result["loss"] == pytest.approx(saved["val_loss"], rel=1e-3)


def test_a_resumed_head_keeps_the_scales_it_was_trained_on(flowers, tmp_path, torchvision_file):
    """One epoch, then one more without one of the pictures."""
    data = tmp_path / "data"
    shutil.copytree(flowers, data)
    options = ["--weights", torchvision_file, "--freeze-layers", "--epochs", 1]
    run_train(*small(data, tmp_path / "out", *options))
    before = torch.load(tmp_path / "out" / "last.pth", weights_only=True)["head"]
    (data / "roses" / "roses_007.jpg").unlink()
    run_train("--resume", tmp_path / "out", "--epochs", 2)
    after = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    assert torch.equal(after["head"]["mean"], before["mean"])
    assert torch.equal(after["head"]["std"], before["std"])
    folded = after["head"]["weights"]["weight"].double() / before["std"].double()
    assert torch.equal(after["model"]["fc.weight"], folded.float())


def test_resume_finds_the_run_keeps_its_options_and_refuses_others(tmp_path, run_dir, capsys):
    folder = tmp_path / "runs" / "x"
    shutil.copytree(run_dir, folder)
    with pytest.raises(UsageError, match=r"--lr 0.5: the run .* began with 0.01"):
        run_train("--resume", "--lr", 0.5)
    assert run_train("--resume")["epochs"] == 2  # finished already: only its summary is made again
    assert "all 2 epochs are done; --epochs N" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--epochs 1: .* has 2 already"):
        run_train("--resume", "--epochs", 1)
    summary = run_train("--resume", "--output-dir", folder, "--epochs", 3)
    assert (summary["epochs"], summary["output_dir"]) == (3, str(folder))
    with pytest.raises(UsageError, match="not the last.pth of a run"):
        run_train("--resume", folder / "best.pth")


def test_fine_tuning_starts_from_a_run_of_ours(flowers, tmp_path, run_dir, capsys):
    """The head stays where the classes are the same, and is new where they are not."""
    options = ["--weights", run_dir / "best.pth", "--epochs", 1]
    run_train(*small(flowers, tmp_path / "a", *options))
    assert "missing keys [], unexpected keys []" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(flowers, other)
    (other / "roses").rename(other / "violets")
    run_train(*small(other, tmp_path / "b", *options))
    assert "but for its head" in capsys.readouterr().err


def test_v1_trains_from_nothing_with_amp(flowers, tmp_path, capsys):
    options = ["--model", "shufflenet_v1_x0_25_g3", "--epochs", 1, "--amp", "--freeze-layers"]
    options += ["--no-cache-features"]
    run_train(*small(flowers, tmp_path / "out", *options))
    err = capsys.readouterr().err
    assert "torch.bfloat16" in err
    assert "the frozen layers hold random weights" in err
    assert checkpoint.load_classifier(tmp_path / "out" / "best.pth").model_name.endswith("25_g3")


def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(flowers, tmp_path, monkeypatch):
    import utils

    monkeypatch.setattr(utils, "cosine_lr", lambda lr, lrf, epoch, epochs: lr if epoch < 1 else 1e9)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="the loss is .* epoch 2.*use a smaller --lr"):
        run_train(*small(flowers, out, "--epochs", 3))
    assert torch.load(out / "last.pth", weights_only=True)["epoch"] == 1
    checkpoint.load_classifier(out / "best.pth")


def test_an_update_that_spoils_the_network_at_the_end_of_an_epoch_is_noticed(flowers, tmp_path):
    """One step an epoch: its loss was still finite, only validation sees what it did."""
    out = tmp_path / "out"
    options = ["--batch-size", 64, "--lr", 1e6, "--wd", 1000, "--epochs", 9]
    with pytest.raises(RunError, match="loss is (nan|inf) after .*; use a smaller --lr"):
        run_train(*small(flowers, out, *options))
    for saved in out.glob("*.pth"):
        checkpoint.state_dict_of(checkpoint.load(saved), saved)  # refuses what is not finite


def test_the_first_of_equally_good_epochs_is_the_best(flowers, tmp_path, monkeypatch):
    import utils

    def same(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"accuracy": 0.5}

    evaluate = utils.evaluate
    monkeypatch.setattr(utils, "evaluate", same)
    summary = run_train(*small(flowers, tmp_path / "out", "--epochs", 2))
    assert (summary["best_epoch"], summary["best_accuracy"]) == (1, 0.5)


def test_training_may_be_smaller_than_evaluating(flowers, tmp_path, monkeypatch):
    """Down to 64 pixels, at which batch norm has values enough in a last batch of one picture."""
    import model

    seen, forward = set(), model.ShuffleNetV2.forward
    spy = lambda self, x: seen.add((self.training, x.shape[-1])) or forward(self, x)  # noqa: E731
    monkeypatch.setattr(model.ShuffleNetV2, "forward", spy)
    run_train(*small(flowers, tmp_path / "out", "--epochs", 1, "--train-size", 64, "-b", 17))
    assert seen == {(True, 64), (False, 224)}
    assert checkpoint.load(tmp_path / "out" / "best.pth")["preprocessing"]["crop"] == 224


def test_cached_features_refuse_augmentation(flowers, tmp_path):
    for option in (["--train-size", 96], ["--random-erase", 0.5]):
        with pytest.raises(UsageError, match=f"{option[0]}: cached features are of whole pictures"):
            run_train(*small(flowers, tmp_path / "two", "--freeze-layers", *option))


def test_random_erase_reaches_the_pictures(flowers, tmp_path, monkeypatch):
    """At 1 it hides a part of each picture to train on; those for validation stay."""
    import model

    hidden, forward = [], model.ShuffleNetV2.forward

    def spy(self, x):
        # The mean colour, 0 once normalised up to rounding, in 2 % of the picture or more.
        share = (x.abs() < 0.01).all(1).float().mean((1, 2))
        hidden.extend((self.training, bool(each > 0.019)) for each in share)
        return forward(self, x)

    monkeypatch.setattr(model.ShuffleNetV2, "forward", spy)
    run_train(*small(flowers, tmp_path / "out", "--epochs", 1, "--random-erase", 1))
    assert set(hidden) == {(True, True), (False, False)}


def test_patience_ends_a_run_that_gets_no_better(flowers, tmp_path, capsys):
    options = ["--epochs", 9, "--lr", 1e-9, "--patience", 2]
    assert run_train(*small(flowers, tmp_path / "out", *options))["epochs"] == 3
    assert "stopped: nothing better for 2 epochs" in capsys.readouterr().err
    assert run_train("--resume", tmp_path / "out")["epochs"] == 3  # also when it goes on


def test_frozen_batch_norm_is_that_of_the_weights(flowers, tmp_path, torchvision_file):
    options = ["--weights", torchvision_file, "--freeze-bn", "--epochs", 1]
    run_train(*small(flowers, tmp_path / "out", *options))
    start = torch.load(torchvision_file, weights_only=True)
    after = torch.load(tmp_path / "out" / "best.pth", weights_only=True)["model"]
    for key in ("conv1.1.running_mean", "conv1.1.weight", "stage4.3.branch2.6.running_var"):
        assert torch.equal(after[key], start[key]), key
    assert not torch.equal(after["conv1.0.weight"], start["conv1.0.weight"])


def test_the_options_are_those_of_the_contract():
    args = train.build_parser().parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.lrf) == (30, 16, 0.01, 0.1)
    assert (args.val_rate, args.seed, args.device, args.amp) == (0.2, 0, "auto", None)
    assert (args.model, args.weights) == ("shufflenet_v2_x1_0", "")
    assert (args.data_path, args.freeze_layers) == ("data/flower_photos", False)


def test_the_optimizer_is_sgd_with_momentum_and_decay(run_dir):
    (group,) = torch.load(run_dir / "last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 4e-5, False)
    assert len(group["params"]) == len(list(build_model("shufflenet_v2_x0_5").parameters()))


def test_a_folder_that_holds_a_run_is_not_overwritten(flowers, tmp_path, run_dir):
    with pytest.raises(UsageError, match="holds a run; add --resume"):
        run_train("--data-path", flowers, "--output-dir", run_dir)
    shutil.copytree(run_dir, tmp_path / "other")
    with pytest.raises(UsageError, match="holds another run than"):
        run_train("--resume", run_dir, "--output-dir", tmp_path / "other")


def test_a_run_may_go_on_in_another_folder_and_takes_its_best_along(tmp_path, run_dir):
    best = (run_dir / "best.pth").read_bytes()
    run_train("--resume", run_dir, "--output-dir", tmp_path / "new")
    assert (tmp_path / "new" / "best.pth").read_bytes() == best


def test_a_reader_of_the_output_that_leaves_does_not_stop_training(flowers, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *small(flowers, tmp_path / "out")]
    words = [str(word) for word in [*command, "--epochs", 2]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (tmp_path / "out" / "curves.png").exists()
    assert len((tmp_path / "out" / "metrics.csv").read_text().splitlines()) == 3


def test_tensorboard_steps_do_not_repeat_after_a_resume(tmp_path, run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "last.pth").unlink()
    state = torch.load(run_dir / "last.pth", weights_only=True)
    state["history"] = state["history"][:1]  # as if the second epoch had been cut off
    checkpoint.save(state, tmp_path / "run" / "last.pth")
    run_train("--resume", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("loss/val")] == [1, 2]


def test_train_and_val_folders_are_taken_as_they_are(flowers, tmp_path):
    shutil.copytree(flowers, tmp_path / "d" / "train")
    for name in CLASSES:
        (tmp_path / "d" / "val" / name).mkdir(parents=True)
        picture = tmp_path / "d" / "train" / name / f"{name}_000.jpg"
        picture.rename(tmp_path / "d" / "val" / name / "x.JPG")
    summary = run_train(*small(tmp_path / "d", tmp_path / "out", "--epochs", 1))
    assert (summary["train_images"], summary["val_images"]) == (35, 5)
    assert run_eval("--data-path", "d", "--weights", "out/best.pth", "-j", 0)["images"] == 5


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("train.py", ["--data-path", "nowhere"], "--data-path nowhere: no such folder"),
        ("train.py", ["--data-path", "file"], "--data-path file: not a folder"),
        ("train.py", ["--data-path", ".", "--weights", "no.pth"], "--weights no.pth: no such file"),
        ("train.py", ["--data-path", ".", "--weights", "."], "--weights .: not a file"),
        ("train.py", ["--data-path", "."], ".: no class folders with pictures"),
        ("train.py", ["--data-path", ".", "--train-size", "63"], "63 must be at least 64"),
        ("train.py", ["--resume"], "there is no runs/*/last.pth here"),
        ("train.py", ["--resume", "no.pth"], "--resume no.pth: no such file"),
        ("train.py", ["--data-path", ".", "--model", "x"], "no model is called 'x'"),
        ("train.py", ["--data-path", ".", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        ("train.py", ["--data-path", ".", "--output-dir", "file/x"], "cannot be made in"),
        (
            "train.py",
            ["--data-path", ".", "--output-dir", "file"],
            "--output-dir file: not a folder",
        ),
        (
            "train.py",
            ["--weights", "imagenet", "--model", "shufflenet_v1_x1_0_g3"],
            "publishes none",
        ),
        (
            "eval.py",
            ["--data-path", ".", "--output-dir", "file"],
            "--output-dir file: not a folder",
        ),
        ("train.py", ["--epochs", "-1"], "argument --epochs: -1 must be at least 1"),
        ("train.py", ["--freeze-layers", "perhaps"], "'perhaps' is neither true nor false"),
        ("eval.py", ["--data-path", "nowhere"], "--data-path nowhere: no such folder"),
        ("eval.py", ["--data-path", "."], "there is no runs/*/best.pth here"),
        ("eval.py", ["--data-path", ".", "--split", "x"], "invalid choice: 'x'"),
        ("predict.py", ["no.jpg"], "picture no.jpg: no such file"),
        ("predict.py", ["file"], "there is no runs/*/best.pth here"),
        ("predict.py", [".", "--weights", "file"], ".: no pictures in it"),
        ("predict.py", ["file", "--topk", "0"], "0 must be at least 1"),
        (
            "predict.py",
            ["file", "--weights", "file", "--save-plot", "x.txt"],
            "suffix must be .png",
        ),
        ("predict.py", ["file", "--weights", "file", "--save-plot", "no/x.png"], "no such folder"),
        ("predict.py", ["file", "--weights", "file", "--output", "x.txt"], ".csv or .jsonl"),
        ("predict.py", ["file", "--weights", "file", "--output", "no/x.csv"], "no such folder"),
        ("predict.py", ["file", "--weights", "no.onnx"], "--weights no.onnx: no such file"),
        ("predict.py", ["file", "--runtime", "x"], "invalid choice: 'x'"),
        ("predict.py", ["file", "--json", "--output", "x.csv"], "not allowed with argument --json"),
        ("benchmark.py", ["inference", "--model", "vgg"], "invalid choice: 'vgg'"),
        ("benchmark.py", ["inference", "--plot", "x.txt"], "the suffix must be .png or"),
        ("export.py", [], "there is no runs/*/best.pth here"),
        ("export.py", ["--weights", "file", "--output", "x.pt"], "the suffix must be .onnx"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(shell, tmp_path, script, args, message):
    (tmp_path / "file").touch(mode=0o777)  # as folders are
    result = shell(script, *args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py", "export.py"])
def test_help_groups_options_prints_defaults_and_imports_nothing_heavy(shell, script):
    result = shell(script, "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    assert "(default: " in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"}


def test_flower_photos_without_a_network_says_what_to_fetch_and_where_to_put_it(shell):
    result = shell("train.py", env={"https_proxy": "http://127.0.0.1:9"})
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1
    assert len(error) == 1
    assert "flower_photos.tgz" in error[0]
    assert "data/flower_photos/daisy exists" in error[0]
    assert "Traceback" not in result.stderr


def test_a_damaged_picture_is_named_in_one_line_and_exit_code_1(shell, flowers, tmp_path):
    shutil.copytree(flowers, tmp_path / "d")
    bad = tmp_path / "d" / "roses" / "roses_003.jpg"
    bad.write_bytes(bad.read_bytes()[:700])
    options = ["--epochs", 1, "-j", 1, "--on-bad-image", "fail"]
    result = shell("train.py", "--data-path", "d", *options)
    assert result.returncode == 1
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert error[0].startswith("error: d/roses/roses_003.jpg: ")
    assert "Traceback" not in result.stderr


# -- eval.py -------------------------------------------------------------------------------------


def test_eval_repeats_training_for_any_batch_size_and_threads(flowers, tmp_path, run_dir):
    best = torch.load(run_dir / "best.pth", weights_only=True)["metrics"]
    for batch_size, threads in ((1, 0), (3, 4), (64, 2)):
        out = tmp_path / f"out{batch_size}"
        options = ["--output-dir", out, "--batch-size", batch_size, "-j", threads]
        result = run_eval("--data-path", flowers, "--weights", run_dir / "best.pth", *options)
        assert result["accuracy"] == best["val_accuracy"]
        assert result["loss"] == pytest.approx(best["val_loss"], rel=1e-5)


def test_eval_takes_the_data_of_the_run_unless_told_otherwise(tmp_path, run_dir):
    assert run_eval("--weights", run_dir / "best.pth", "-j", 0)["images"] == 5
    state = checkpoint.load(run_dir / "best.pth")
    state["args"]["data_path"] = "gone"
    checkpoint.save(state, tmp_path / "moved.pth")
    with pytest.raises(UsageError, match="--data-path gone: no such folder"):
        run_eval("--weights", tmp_path / "moved.pth")


def test_mistakes_are_listed_and_captioned_by_hand():
    result = {
        "predicted": np.array([0, 1, 1, 0]),
        "confidence": np.array([0.5, 0.75, 0.25, 1.0]),
        "losses": np.array([1.0, 2.0, 0.1, 3.0]),
    }
    rows = evaluate_script._mistakes(result, ["a/1", "a/2", "b/3", "b/4"], [0, 0, 1, 1], ["x", "y"])
    assert [row["path"] for row in rows] == ["b/4", "a/2"]
    assert rows[0] == {"path": "b/4", "class": "y", "prediction": "x", "prob": 1.0, "loss": 3.0}
    assert evaluate_script._caption(rows[1]) == "2\nis x\ntaken for y 0.75"


def test_eval_prints_a_table_and_leaves_files(flowers, tmp_path, run_dir, capsys):
    weights = ["--weights", run_dir / "best.pth", "-j", 0]
    result = run_eval("--data-path", flowers, *weights, "--split", "all", "--output-dir", "out")
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["class", "images", "precision", "recall", "f1"]
    assert [line.split()[:2] for line in out[1:6]] == [[name, "8"] for name in CLASSES]
    assert out[6].startswith(f"* Acc@1 {100 * result['accuracy']:.3f}")
    last = json.loads(out[-1])
    assert (last["accuracy"], last["images"], last["top5"]) == (result["accuracy"], 40, None)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"mistakes.csv", "per_class.csv", "metrics.json"}
    assert found == {"confusion_matrix.png", "mistakes.png"} | tables
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["per_class"] == result["per_class"]


@pytest.mark.parametrize(("split", "images"), [("val", 5), ("train", 35), ("all", 40)])
def test_eval_takes_the_part_it_is_asked_for(flowers, run_dir, split, images):
    weights = ["--weights", run_dir / "best.pth", "-j", 0]
    assert run_eval("--data-path", flowers, *weights, "--split", split)["images"] == images


def test_eval_goes_by_the_names_of_folders_not_by_their_place(flowers, tmp_path, run_dir):
    """Two of the five classes, which alone would have the indices 0 and 1."""
    for name in ("roses", "tulips"):
        shutil.copytree(flowers / name, tmp_path / "two" / name)
    options = ["--weights", run_dir / "best.pth", "--split", "all", "-j", 0]
    two = run_eval("--data-path", "two", *options)
    whole = run_eval("--data-path", flowers, *options)
    kept = {row["class"]: row["recall"] for row in two["per_class"] if row["images"]}
    assert kept == {
        row["class"]: row["recall"] for row in whole["per_class"] if row["class"] in kept
    }
    assert list(kept) == ["roses", "tulips"]

    (tmp_path / "two" / "roses").rename(tmp_path / "two" / "violets")
    with pytest.raises(UsageError, match="knows no class called violets, only daisy"):
        run_eval("--data-path", "two", *options)


def test_eval_gives_top_5_where_there_are_more_than_five_classes(flowers, tmp_path):
    names = {str(i): name for i, name in enumerate([*CLASSES, "violets"])}
    (tmp_path / "class_indices.json").write_text(json.dumps(names))
    torch.save(build_model("shufflenet_v2_x0_5", 6).state_dict(), tmp_path / "bare.pth")
    result = run_eval("--data-path", flowers, "--weights", "bare.pth", "-j", 0)
    assert result["accuracy"] <= result["top5"] <= 1


# -- predict.py ----------------------------------------------------------------------------------


def test_predict_prints_path_then_classes_best_first(flowers, run_dir, capsys):
    picture = flowers / "roses" / "roses_000.jpg"
    results = run_predict(picture, "--weights", run_dir / "best.pth")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(picture)
    assert len(lines) == 6
    probabilities = [guess["prob"] for guess in results[0]["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    first = results[0]["predictions"][0]
    assert lines[1] == f"class: {first['class']:<10}   prob: {first['prob']:.3f}"


def test_predict_agrees_with_torchvision(flowers, run_dir):
    """Decoding, preprocessing and network once more, by torchvision alone."""
    from torchvision import transforms

    file = torch.load(run_dir / "best.pth", weights_only=True)
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    theirs.load_state_dict(file["model"])
    pipeline = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms()
    paths = sorted(flowers.glob("*/*_00[01].jpg"))
    results = run_predict(*paths, "--weights", run_dir / "best.pth")
    to_tensor = transforms.PILToTensor()
    for path, result in zip(paths, results, strict=True):
        picture = transforms.Resize(256)(Image.open(path).convert("RGB"))
        image = transforms.functional.normalize(
            to_tensor(transforms.CenterCrop(224)(picture)).float() / 255,
            pipeline.mean,
            pipeline.std,
        )
        with torch.inference_mode():
            expected = theirs.eval()(image[None]).softmax(1)[0]
        for guess in result["predictions"]:
            assert guess["prob"] == pytest.approx(expected[CLASSES.index(guess["class"])].item())


def test_predict_takes_folders_and_files_in_any_mix_and_order(flowers, run_dir, capsys):
    places = [flowers / "tulips", flowers / "daisy" / "daisy_003.jpg", flowers]
    results = run_predict(*places, "--weights", run_dir / "best.pth", "--json", "--topk", 2)
    expected = [*sorted((flowers / "tulips").iterdir()), places[1], *sorted(flowers.glob("*/*"))]
    assert [result["path"] for result in results] == list(map(str, expected))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == results
    assert all(len(result["predictions"]) == 2 for result in results)


def test_predict_gives_no_more_classes_than_there_are(flowers, run_dir):
    picture = flowers / "roses" / "roses_000.jpg"
    results = run_predict(picture, "--weights", run_dir / "best.pth", "--topk", 99)
    assert len(results[0]["predictions"]) == 5


def test_predict_goes_on_after_a_picture_it_cannot_read(shell, flowers, tmp_path, run_dir):
    shutil.copytree(flowers / "roses", tmp_path / "roses")
    (tmp_path / "roses" / "roses_001.jpg").write_bytes(b"")
    (tmp_path / "roses" / "a\x1b[31m.jpg").write_text("no picture")
    result = shell("predict.py", "roses", "--weights", run_dir / "best.pth", "--json")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 7
    assert "error: roses/roses_001.jpg: the file is empty" in result.stderr
    assert "error: roses/a\\x1b[31m.jpg: not a picture" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 2 of 9 pictures could not be read")


def test_names_in_the_answer_move_no_cursor():
    answer = {"path": "a\nb", "predictions": [{"class": "\x1b[31m", "prob": 0.5}]}
    assert predict._text(answer).splitlines() == [r"a\nb", r"class: \x1b[31m     prob: 0.500"]


def test_predict_takes_the_newest_run(flowers, tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "runs" / "x")
    assert len(run_predict(flowers / "roses")) == 8


def test_predict_draws_without_a_display_and_says_so_when_asked_for_a_window(
    shell, flowers, tmp_path, run_dir
):
    options = ["--weights", run_dir / "best.pth", "--save-plot", "plot.png"]
    headless = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "MPLBACKEND": ""}
    result = shell("predict.py", flowers / "roses", *options, env=headless)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "plot.png").width == 1200
    if sys.platform == "linux":
        result = shell("predict.py", flowers / "roses", *options, "--show", env=headless)
        assert result.returncode == 1
        assert "--show: there is no display here" in result.stderr


def test_predict_draws_even_when_nobody_reads_on(flowers, tmp_path, run_dir):
    words = [ROOT / "predict.py", flowers / "roses", "--weights", run_dir / "best.pth"]
    command = [sys.executable, *words, "--save-plot", tmp_path / "plot.png"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(120) == 0
    assert (tmp_path / "plot.png").exists()


def test_predict_warns_when_the_json_beside_the_weights_disagrees(
    flowers, tmp_path, run_dir, capsys
):
    shutil.copytree(run_dir, tmp_path / "run")
    names = {str(index): name for index, name in enumerate(reversed(CLASSES))}
    (tmp_path / "run" / "class_indices.json").write_text(json.dumps(names))
    results = run_predict(flowers / "roses", "--weights", "run/best.pth")
    assert "class_indices.json names other classes than run/best.pth" in capsys.readouterr().err
    expected = run_predict(flowers / "roses", "--weights", run_dir / "best.pth")
    assert [r["predictions"] for r in results] == [r["predictions"] for r in expected]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_exported_network_needs_neither_torch_nor_torchvision(
    shell, flowers, run_dir, onnx_file, runtime
):
    options = ["--weights", onnx_file, "--runtime", runtime]
    profile = {"PYTHONPROFILEIMPORTTIME": "1"}
    for script, words in (
        ("predict.py", [flowers / "roses", "--json"]),
        ("eval.py", ["--data-path", flowers]),
    ):
        result = shell(script, *words, *options, env=profile)
        assert result.returncode == 0, result.stderr
        lines = result.stderr.splitlines()
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
        assert runtime in imported
        assert not imported & {"torch", "torchvision"}
        last = json.loads(result.stdout.splitlines()[-1])
        if script == "predict.py":
            expected = run_predict(flowers / "roses", "--weights", run_dir / "best.pth")[-1]
            assert last["path"] == expected["path"]
            found = {guess["class"]: guess["prob"] for guess in last["predictions"]}
            for guess in expected["predictions"]:
                assert found[guess["class"]] == pytest.approx(guess["prob"], abs=1e-5)
        else:
            expected = run_eval("--data-path", flowers, "--weights", run_dir / "best.pth")
            assert last["accuracy"] == expected["accuracy"]
            assert last["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_checkpoint_is_used_without_torchvision(shell, flowers, run_dir):
    picture = flowers / "roses" / "roses_000.jpg"
    options = ["--weights", run_dir / "best.pth"]
    result = shell("predict.py", picture, *options, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch" in imported
    assert not imported & {"torchvision", "matplotlib"}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_predict_writes_tables_in_the_order_of_the_pictures(
    flowers, tmp_path, run_dir, capsys, workers
):
    options = ["--weights", run_dir / "best.pth", "--topk", 2, "-j", workers]
    expected = run_predict(flowers, *options)
    capsys.readouterr()
    run_predict(flowers, *options, "--output", "result.jsonl")
    out, err = capsys.readouterr()
    assert out == ""
    assert "40 pictures, PyTorch on cpu, written to result.jsonl" in err
    lines = (tmp_path / "result.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected

    run_predict(flowers, *options, "--output", "result.csv")
    with open(tmp_path / "result.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class_1", "prob_1", "class_2", "prob_2"]
    for row, result in zip(rows, expected, strict=True):
        assert row["path"] == result["path"]
        for rank, guess in enumerate(result["predictions"], 1):
            assert row[f"class_{rank}"] == guess["class"]
            assert float(row[f"prob_{rank}"]) == pytest.approx(guess["prob"], abs=1e-6)


@pytest.mark.parametrize("options", ["", "--json", "--save-plot plot.png"])
def test_predict_ends_when_nobody_reads_on_but_draws(flowers, tmp_path, onnx_file, options):
    (tmp_path / "bad.jpg").touch()
    words = [sys.executable, ROOT / "predict.py", *[flowers / "roses"] * 20, "bad.jpg"]
    words += ["--weights", onnx_file, *options.split()]
    process = subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    process.stdout.readline()
    process.stdout.close()
    reached_the_last = "plot" in options
    assert process.wait(timeout=60) == int(reached_the_last)
    assert (b"bad.jpg" in process.stderr.read()) == reached_the_last
    assert (tmp_path / "plot.png").exists() == reached_the_last


def test_predict_works_without_stdout(flowers, tmp_path, onnx_file):
    words = [sys.executable, ROOT / "predict.py", flowers / "roses", "--weights", onnx_file]
    command = f"{shlex.join(map(str, words))} >&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_interrupted_predict_leaves_whole_lines(flowers, tmp_path, onnx_file, suffix):
    many = tmp_path / "many"
    many.mkdir()
    for index in range(1000):
        os.link(flowers / "roses" / "roses_000.jpg", many / f"{index:04}.jpg")
    table = tmp_path / f"result.{suffix}"
    words = [ROOT / "predict.py", many, "--weights", onnx_file, "--output", table]
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while (not table.exists() or table.stat().st_size < 5000) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "error: interrupted"
    lines = table.read_text().splitlines()
    assert 10 < len(lines) < 1000
    if suffix == "jsonl":
        paths = [json.loads(line)["path"] for line in lines]
    else:
        rows = list(csv.reader(lines))
        assert {len(row) for row in rows} == {11}
        paths = [row[0] for row in rows[1:]]
    assert paths == [str(many / f"{index:04}.jpg") for index in range(len(paths))]

"""Runs that are killed, interrupted, doubled, or given damaged files."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import soak
import torch
from conftest import ROOT, small
from PIL import Image

import eval as evaluation
import predict
import train
from shufflenet.common import files
from shufflenet.common.messages import RunError, UsageError
from shufflenet.inference import checkpoint

pytestmark = pytest.mark.usefixtures("elsewhere")


# What is trained, and in which forward pass the first process ends, the next one ...: the first
# step, a middle one, validation.
KINDS = {
    "all layers": (["--epochs", 3, "--random-erase", 0.5], [1, 4, 3]),
    "more options": (
        [
            "--epochs",
            3,
            *["--augment", "trivial", "--opt", "adamw", "--ema", "0.9", "--class-weights"],
        ],
        [1, 4, 3],
    ),
    "cached features": (["--epochs", 3, "--freeze-layers", "--batch-size", 8], [1, 7, 6]),
    "fc first": (["--epochs", 2, "--fc-first"], [20, 65, 3]),
    "fc that fits": (["--epochs", 3, "--freeze-layers", "--weights", "FITS"], [1, 3, 4]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_ends_anywhere_goes_on(
    flowers, run_dir, tmp_path, monkeypatch, torchvision_file, kind
):
    more, moments = KINDS[kind]
    more = ["--weights", torchvision_file, *(run_dir if word == "FITS" else word for word in more)]
    train.main(small(flowers, tmp_path / "whole", *more))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    forward, words = torch.nn.Linear.forward, small(flowers, tmp_path / "parts", *more)
    for moment in moments:
        calls = [forward] * (moment - 1)  # then it ends with an error

        def until(self, x, left=calls):
            return left.pop()(self, x) if x.dtype == torch.float32 else forward(self, x)  # a trial

        with monkeypatch.context() as patch, pytest.raises(IndexError):
            patch.setattr(torch.nn.Linear, "forward", until)
            train.main(words)
        words = ["--resume", tmp_path / "parts"]
    train.main(words)
    soak.compare(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_ends_at_any_checkpoint_loses_none(flowers, tmp_path, monkeypatch):
    """Written are last.pth before the first epoch, then best.pth and last.pth."""
    train.main(small(flowers, tmp_path / "whole", "--epochs", 1))
    save = checkpoint.save
    for count in range(3):
        left = [save] * count  # then it ends with an error
        words = small(flowers, tmp_path / f"out{count}", "--epochs", 1)
        with monkeypatch.context() as patch, pytest.raises(IndexError):
            patch.setattr(checkpoint, "save", lambda *args, left=left: left.pop()(*args))
            train.main(words)
        train.main(["--resume", tmp_path / f"out{count}"] if count else words)
        soak.compare(tmp_path / "whole", tmp_path / f"out{count}")


def test_the_harness_sees_a_single_bit(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "other")
    soak.compare(run_dir, other)
    state = checkpoint.load(run_dir / "last.pth")
    momentum = state["learning"]["optimizer"]["state"][3]["momentum_buffer"]
    momentum.view(-1)[0] = torch.nextafter(momentum.view(-1)[0], torch.tensor(1.0))
    checkpoint.save(state, other / "last.pth")
    with pytest.raises(RunError, match=r"differs in last\.pth, learning, optimizer, state, 3, mom"):
        soak.compare(run_dir, other)


def test_a_table_that_a_kill_left_unwritten_is_written_by_the_next_run(run_dir, tmp_path):
    out = shutil.copytree(run_dir, tmp_path / "out")
    (out / "metrics.csv").unlink()
    train.main(["--resume", out])
    soak.compare(run_dir, out)


def test_a_process_that_is_killed_is_resumed_to_the_same_end(flowers, tmp_path):
    """Until then no other run may write to its folder. `make soak` kills for half an hour."""
    out, more = tmp_path / "out", ["--epochs", 8, "--workers", 2]
    words = [sys.executable, ROOT / "train.py", *map(str, small(flowers, out, *more))]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (out / "best.pth").exists():  # of the first epoch
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(UsageError, match=f"a run writes to {out}: wait for it"):
            train.main(["--resume", out])
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train.main(["--resume", out])
    train.main(small(flowers, tmp_path / "whole", *more))
    soak.compare(tmp_path / "whole", out)


def test_ctrl_c_says_in_one_line_how_the_run_goes_on(flowers, tmp_path):
    out = tmp_path / "out"
    script = "import signal; signal.signal(2, signal.default_int_handler); import runpy, sys; "
    script += f"sys.path.insert(0, {str(ROOT)!r}); "
    script += f"sys.argv = {list(map(str, ['train.py', *small(flowers, out, '--epochs', 50)]))}; "
    script += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        while not (out / "best.pth").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130
    todo = f"python train.py --resume {out} goes on after the last whole epoch"
    assert last == f"error: interrupted: {todo}"


def test_a_full_disk_ends_with_a_clear_line_and_the_last_good_checkpoint(run_dir, tmp_path):
    """The limit on the size of files stands for the disk: checkpoints no longer fit."""
    out = shutil.copytree(run_dir, tmp_path / "out")
    limited = f"ulimit -f 500; {sys.executable} {ROOT / 'train.py'} --resume out --epochs 3"
    words = ["bash", "-c", f"export TQDM_DISABLE=1; {limited}"]  # as on clusters
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: File too large: ")
    assert (out / "last.pth").read_bytes() == (run_dir / "last.pth").read_bytes()
    assert not list(out.glob(".*.tmp"))


@pytest.fixture
def damaged(flowers, tmp_path):
    """One image that is none, and one that breaks off after a good start."""
    data = shutil.copytree(flowers, tmp_path / "d")
    (data / "roses" / "roses_001.jpg").write_text("no image")
    os.truncate(data / "tulips" / "tulips_002.jpg", 700)
    return data


@pytest.mark.parametrize("more", [["-j", 2], ["--freeze-layers"], ["--fc-first"]])
def test_bad_images_are_named_once_in_every_run_and_passed_over(
    damaged, tmp_path, capsys, torchvision_file, more
):
    more = [*more, "--weights", torchvision_file]
    for number in range(2):  # the second reads cached features
        train.main(small(damaged, tmp_path / f"out{number}", "--epochs", 2, *more))
        err = capsys.readouterr().err
        assert err.count("skipped: ") == 2
        assert err.count("roses_001.jpg: ") == err.count("tulips_002.jpg: ") == 1


def test_eval_counts_what_it_passed_over(damaged, run_dir, capsys):
    words = ["--weights", run_dir / "best.pth", "--split", "all"]
    result = evaluation.main(["--data-path", damaged, *words])
    assert (result["images"], result["bad_images"]) == (38, 2)
    assert capsys.readouterr().err.count("skipped: ") == 2


NOT_UTF8 = os.fsdecode(b"caf\xe9")
NAMES = ["with space", "quo'te\"s", "郁金香 ñ", "new\nline", "=1+2", "x" * 250, NOT_UTF8]


def test_names_of_any_kind_work_from_training_to_the_table(tmp_path, capsys):
    for number, name in enumerate(NAMES):
        (tmp_path / NOT_UTF8 / name).mkdir(parents=True)
        for index in range(4):
            image = Image.effect_noise((64, 64), 10 + 20 * number).convert("RGB")
            image.save(tmp_path / NOT_UTF8 / name / f"{name[:200]} {index}.png")
    train.main(small(tmp_path / NOT_UTF8, tmp_path / "out", "--epochs", 1, "--val-rate", 0.25))
    names = json.loads((tmp_path / "out" / "class_indices.json").read_text())
    assert list(names.values()) == sorted(NAMES)
    weights = ["--weights", "out/best.pth"]
    evaluation.main([*weights, "--output-dir", "e"])
    assert "new\\nline" in capsys.readouterr().out
    predict.main([NOT_UTF8, *weights, "--output", "t.csv"])
    for name, column in (("t.csv", "class_1"), ("e/per_class.csv", "class")):
        with open(name, **files.UTF8) as file:
            found = [row[column] for row in csv.DictReader(file)]
        assert set(found) <= set(NAMES)
        assert len(found) == {"class": 7, "class_1": 28}[column]

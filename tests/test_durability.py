"""Runs that are killed, interrupted, doubled, or given damaged files."""

import contextlib
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

import checkpoint
import eval as evaluation
import files
import predict
import run
import train
from cli import RunError, UsageError

pytestmark = pytest.mark.usefixtures("elsewhere")


# What is trained, and in which forward pass the first process ends, the next one ...: the first
# step, a middle one, validation.
KINDS = {
    "all layers": (["--epochs", 3, "--random-erase", 0.5], [1, 4, 3]),
    "bfloat16": (["--epochs", 2, "--amp"], [5]),
    "cached features": (["--epochs", 3, "--freeze-layers", "--batch-size", 8], [1, 7, 6]),
    "fc first": (["--epochs", 2, "--fc-first"], [20, 65, 3]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_ends_anywhere_goes_on(flowers, tmp_path, monkeypatch, torchvision_file, kind):
    more, moments = KINDS[kind]
    more = [*more, "--weights", torchvision_file]
    train.main(small(flowers, tmp_path / "whole", *more))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    forward, words = torch.nn.Linear.forward, small(flowers, tmp_path / "parts", *more)
    for moment in moments:
        calls = [forward] * (moment - 1)  # then it ends with an error
        until = lambda self, x, left=calls: left.pop()(self, x)  # noqa: E731
        with monkeypatch.context() as patch, pytest.raises(IndexError):
            patch.setattr(torch.nn.Linear, "forward", until)
            train.main(words)
        words = ["--resume", tmp_path / "parts"]
    train.main(words)
    soak.compare(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_that_ends_at_any_checkpoint_loses_none(flowers, tmp_path, monkeypatch, count):
    """Written are last.pth before the first epoch, then best.pth and last.pth."""
    train.main(small(flowers, tmp_path / "whole", "--epochs", 1))
    save, saved = checkpoint.save, []

    def save_some(state, path):
        saved.append(path)
        if len(saved) == count:
            raise OSError(28, "No space left on device")
        save(state, path)

    words = small(flowers, tmp_path / "out", "--epochs", 1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoint, "save", save_some)
        train.main(words)
    train.main(["--resume", tmp_path / "out"] if count > 1 else words)
    soak.compare(tmp_path / "whole", tmp_path / "out")


def test_a_process_killed_at_a_random_moment_loses_nothing():
    """`make soak` does the same for an hour."""
    assert soak.main(["--kills", 1, "--kinds", "cached features"])["differences"] == 0


def test_the_harness_sees_a_single_bit(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "other")
    soak.compare(run_dir, other)
    state = checkpoint.load(run_dir / "last.pth")
    momentum = state["learning"]["optimizer"]["state"][3]["momentum_buffer"]
    momentum.view(-1)[0] = torch.nextafter(momentum.view(-1)[0], torch.tensor(1.0))
    checkpoint.save(state, other / "last.pth")
    with pytest.raises(RunError, match=r"differs in last\.pth, learning, optimizer, state, 3, mom"):
        soak.compare(run_dir, other)


def test_what_a_run_killed_in_a_write_left_or_lacks_is_put_right(run_dir, tmp_path):
    out = shutil.copytree(run_dir, tmp_path / "out")
    (out / ".best.pth.123.tmp").write_bytes(b"half")
    (out / "metrics.csv").unlink()
    train.main(["--resume", out])
    assert not list(out.glob(".*.tmp"))
    soak.compare(run_dir, out)


@pytest.fixture
def begin():
    """Start train.py in a process group of its own, as a terminal does."""
    begun = []

    def start(*words):
        words = [sys.executable, ROOT / "train.py", *words]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen([*map(str, words)], start_new_session=True, **streams))
        return begun[-1]

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_at_once(flowers, tmp_path, begin, signum):
    """Until then no other run may write to its folder, afterwards any."""
    out = tmp_path / "out"
    process = begin(*small(flowers, out, "--epochs", 1000, "--workers", 2))
    until = time.monotonic() + 60
    while not (out / "best.pth").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(UsageError, match=f"name another --output-dir: a run writes to {out}"):
        train.main(["--resume", out])
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    assert process.wait(timeout=60) == 128 + signum
    said = [line for line in process.stderr if "error" in line.lower() or "Traceback" in line]
    assert said == [f"error: {'interrupted' if signum == signal.SIGINT else 'terminated'}\n"]
    with files.locked(out):
        checkpoint.load(out / "last.pth")


def test_a_run_that_another_overtook_does_not_write_over_it(run_dir):
    with pytest.raises(UsageError, match="holds a run"):
        run.Run(run_dir, {}, None)


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


@pytest.mark.parametrize("more", [["-j", 0], ["-j", 2], ["--freeze-layers"]])
def test_bad_images_are_named_once_in_every_run_and_passed_over(damaged, tmp_path, capsys, more):
    for number in range(1 + ("--freeze-layers" in more)):  # the second reads cached features
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
        (tmp_path / "d" / name).mkdir(parents=True)
        for index in range(4):
            image = Image.effect_noise((64, 64), 10 + 20 * number).convert("RGB")
            image.save(tmp_path / "d" / name / f"{name[:200]} {index}.png")
    train.main(small(tmp_path / "d", tmp_path / "out", "--epochs", 1, "--val-rate", 0.25))
    names = json.loads((tmp_path / "out" / "class_indices.json").read_text())
    assert list(names.values()) == sorted(NAMES)
    weights = ["--weights", "out/best.pth"]
    evaluation.main([*weights, "--output-dir", "e"])
    assert "new\\nline" in capsys.readouterr().out
    predict.main(["d", *weights, "--output", "t.csv"])
    for name, column in (("t.csv", "class_1"), ("e/per_class.csv", "class")):
        with open(name, **files.UTF8) as file:
            found = [row[column] for row in csv.DictReader(file)]
        assert set(found) <= set(NAMES)
        assert len(found) == {"class": 7, "class_1": 28}[column]

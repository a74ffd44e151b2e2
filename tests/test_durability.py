"""Runs that are killed, stopped, doubled, or given damaged files."""

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
import torch
from conftest import ROOT, run_train, small
from PIL import Image

import checkpoint
import eval as evaluate_script
import files
import soak
from cli import RunError, UsageError
from files import cells, locked, replacing, save_json, save_rows

pytestmark = pytest.mark.usefixtures("elsewhere")


# -- stopped -------------------------------------------------------------------------------------

# What is trained, the signal, and in which forward pass it comes to the first process, the next
# ... : a first step, a middle one, validation.
KINDS = {
    "all layers": (["--epochs", 3], signal.SIGTERM, [1, 4]),
    "bfloat16": (["--epochs", 1, "--amp"], signal.SIGINT, [2]),
    "cached features": (["--epochs", 3, "--freeze-layers", "--batch-size", 8], signal.SIGINT, [4]),
}

SIGNALLED = """
import signal, sys, torch, cli, train
at, signum = int(sys.argv.pop(1)), int(sys.argv.pop(1))
forward, calls = torch.nn.Linear.forward, 0

def counted(self, x):
    global calls
    calls += 1
    if calls == at:
        signal.raise_signal(signum)
    return forward(self, x)

torch.nn.Linear.forward = counted
cli.run(train.build_parser(), train.main)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_at_some_step_goes_on_as_if_it_had_not_been(flowers, tmp_path, kind):
    more, signum, moments = KINDS[kind]
    run_train(*small(flowers, tmp_path / "whole", *more))
    arguments = small(flowers, tmp_path / "parts", *more)
    for at in moments:
        words = [sys.executable, "-c", SIGNALLED, at, signum.value, *arguments]
        result = subprocess.run(
            [*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 128 + signum, result.stderr
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: stopped after ")
        assert "all is saved; go on with --resume" in last
        arguments = ["--resume", tmp_path / "parts"]
    run_train(*arguments)
    soak.compare(tmp_path / "whole", tmp_path / "parts")


# A step in which the signal comes to the workers too, as from a terminal, and in which they have
# the time to end of it; in the next epoch it comes twice.
TO_ALL = """
import os, signal, sys, time, torch, cli, train
signum = int(sys.argv.pop(1))
forward, calls = torch.nn.Linear.forward, 0

def counted(self, x):
    global calls
    calls += 1
    if "--resume" in sys.argv:
        signal.raise_signal(signum)
        signal.raise_signal(signum)
    elif calls == 2:
        os.killpg(0, signum)
        time.sleep(1)
    return forward(self, x)

torch.nn.Linear.forward = counted
cli.run(train.build_parser(), train.main)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_finishes_the_step_and_a_second_one_ends_at_once(
    flowers, tmp_path, signum, code
):
    words = [sys.executable, "-c", TO_ALL, signum.value]
    out = tmp_path / "out"
    process = start([*words, *small(flowers, out, "-j", 1, "--batch-size", 4)])
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()
    assert err.decode().splitlines()[-1].startswith("error: stopped after 0 epochs, all is saved")
    assert "Traceback" not in err.decode()
    assert err.decode().count("stopping after this step") == 1
    assert checkpoint.load(out / "last.pth")["position"]["step"] == 2

    process = start([*words, "--resume", out, "-j", 0])  # workers would be waited for
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signum, err.decode()


def start(words):
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for(path, process, newer_than=0):
    until = time.monotonic() + 60
    while not path.exists() or path.stat().st_mtime < newer_than:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_signal_before_training_ends_in_one_line(tmp_path, flowers):
    words = [sys.executable, ROOT / "train.py", *small(flowers, tmp_path / "out")]
    process = start(words)
    time.sleep(0.7)  # torch is being imported
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.decode().splitlines()[-1] == "error: terminated"


def test_a_run_killed_at_random_moments_loses_nothing():
    """`make soak` does the same for an hour."""
    args = soak.build_parser().parse_args(["--kills", "1", "--kinds", "cached features"])
    summary = soak.main(args)
    assert summary["kills"] >= 1
    assert summary["runs"] >= 1


def test_the_harness_sees_a_single_bit(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "other")
    soak.compare(run_dir, tmp_path / "other")
    state = checkpoint.load(run_dir / "last.pth")
    momentum = state["optimizer"]["state"][3]["momentum_buffer"]
    momentum.view(-1)[0] = torch.nextafter(momentum.view(-1)[0], torch.tensor(1.0))
    checkpoint.save(state, tmp_path / "other" / "last.pth")
    with pytest.raises(RunError, match=r"differs in last\.pth, optimizer, state, 3, momentum"):
        soak.compare(run_dir, tmp_path / "other")


# -- damaged, doubled, full ----------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_is_killed(flowers, tmp_path):
    words = [sys.executable, ROOT / "train.py", *small(flowers, tmp_path / "out")]
    # Its workers live on for some seconds when it is killed.
    process = start([*words, "--epochs", 1000, "--workers", 2])
    wait_for(tmp_path / "out" / "metrics.csv", process)
    with pytest.raises(UsageError, match="another run writes there now; name another folder"):
        run_train("--resume", tmp_path / "out")
    process.kill()
    process.wait()
    with locked(tmp_path / "out"):
        pass
    epochs = len(checkpoint.load(tmp_path / "out" / "last.pth")["history"])
    # It says 1000 epochs; as many as are done make it only draw its summary.
    state = checkpoint.load(tmp_path / "out" / "last.pth")
    state["args"]["epochs"] = epochs
    checkpoint.save(state, tmp_path / "out" / "last.pth")
    assert run_train("--resume", tmp_path / "out")["epochs"] == epochs


def test_a_run_that_another_overtook_does_not_write_over_it(flowers, tmp_path, monkeypatch):
    lock = files.locked

    @contextlib.contextmanager
    def late(folder):
        (folder / "last.pth").write_bytes(b"of the other")
        with lock(folder):
            yield

    monkeypatch.setattr(files, "locked", late)
    with pytest.raises(UsageError, match="holds a run"):
        run_train(*small(flowers, tmp_path / "out", "--epochs", 1))
    assert (tmp_path / "out" / "last.pth").read_bytes() == b"of the other"


def test_what_a_run_killed_in_a_write_left_is_removed(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "out")
    (tmp_path / "out" / ".best.pth.123.tmp").write_bytes(b"half")
    run_train("--resume", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_its_name_then(tmp_path, monkeypatch):
    did = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (did.append(name), real(*args))
        )
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert did == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    ("write", "value"), [(save_json, ["begun", object()]), (save_rows, [{"a": 1}, None])]
)
def test_what_fails_while_it_is_written_leaves_the_file_before(tmp_path, write, value):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises((TypeError, AttributeError)):
        write(value, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_ends_with_a_clear_line_and_the_last_good_checkpoint(shell, flowers, tmp_path):
    """The limit on the size of files stands for the disk: checkpoints no longer fit."""
    words = small(flowers, tmp_path / "out", "--epochs", 2)
    run_train(*words)
    before = (tmp_path / "out" / "last.pth").read_bytes()
    limited = f"ulimit -f 500; exec {sys.executable} {ROOT / 'train.py'} --resume out --epochs 4"
    result = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 1, result.stderr
    end = f"error: File too large: {tmp_path / 'out' / 'last.pth'}"
    assert result.stderr.splitlines()[-1] == end
    assert (tmp_path / "out" / "last.pth").read_bytes() == before
    assert not list((tmp_path / "out").glob(".*.tmp"))


# -- bad pictures --------------------------------------------------------------------------------


@pytest.fixture
def damaged(flowers, tmp_path):
    """One picture that is none, and one that breaks off after a good start."""
    shutil.copytree(flowers, tmp_path / "d")
    (tmp_path / "d" / "roses" / "roses_001.jpg").write_text("no picture")
    half = tmp_path / "d" / "tulips" / "tulips_002.jpg"
    half.write_bytes(half.read_bytes()[:700])
    return tmp_path / "d"


@pytest.mark.parametrize("more", [["-j", 0], ["-j", 2], ["--freeze-layers"]])
def test_bad_pictures_are_named_once_and_passed_over(damaged, tmp_path, capsys, more):
    summary = run_train(*small(damaged, tmp_path / "out", "--epochs", 3, *more))
    err = capsys.readouterr().err
    assert err.count("skipped: ") == 2
    assert err.count("roses_001.jpg: not a picture") == 1
    assert err.count("tulips_002.jpg: ") == 1
    assert summary["epochs"] == 3
    assert summary["train_images"] + summary["val_images"] == 39  # one is seen before training


def test_cached_features_hide_no_bad_picture_from_the_next_run(damaged, tmp_path, capsys):
    for name in ("one", "two"):
        run_train(*small(damaged, tmp_path / name, "--epochs", 1, "--freeze-layers"))
        assert "tulips_002.jpg: " in capsys.readouterr().err


def test_fail_stops_at_the_first(damaged, tmp_path):
    more = ["--epochs", 1, "--on-bad-image", "fail"]
    with pytest.raises(OSError, match=r"roses_001\.jpg: not a picture"):
        run_train(*small(damaged, tmp_path / "out", *more))
    (damaged / "roses" / "roses_001.jpg").unlink()
    with pytest.raises(OSError, match=r"tulips_002\.jpg: "):
        run_train(*small(damaged, tmp_path / "out", *more))


@pytest.mark.parametrize("content", [b"", None])
def test_a_broken_disk_does_not_look_like_a_small_data_set(flowers, tmp_path, content):
    """A tenth may be bad: of 40 pictures four, not five."""
    shutil.copytree(flowers, tmp_path / "d")
    for index, path in enumerate(sorted((tmp_path / "d").glob("*/*"))[:5]):
        if index == 4:
            run_train(*small(tmp_path / "d", tmp_path / "out", "--epochs", 1))
        path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with pytest.raises(RunError, match="5 of 40 pictures cannot be read, more than 10%"):
        run_train(*small(tmp_path / "d", tmp_path / "out2", "--epochs", 1))


def test_a_picture_that_vanishes_while_training_is_passed_over(
    flowers, tmp_path, monkeypatch, capsys
):
    import folders

    shutil.copytree(flowers, tmp_path / "d")
    scan = folders.BadPictures.scan

    def scan_then_lose(self, paths, labels):
        kept = scan(self, paths, labels)
        (tmp_path / "d" / "daisy" / "daisy_003.jpg").unlink(missing_ok=True)
        return kept

    monkeypatch.setattr(folders.BadPictures, "scan", scan_then_lose)
    run_train(*small(tmp_path / "d", tmp_path / "out", "--epochs", 2))
    assert capsys.readouterr().err.count("skipped: ") == 1


def test_eval_counts_what_it_passed_over(damaged, run_dir, capsys):
    words = ["--data-path", damaged, "--weights", run_dir / "best.pth", "--split", "all"]
    parser = evaluate_script.build_parser()
    result = evaluate_script.main(parser.parse_args([*map(str, words)]))
    assert (result["images"], result["bad_images"]) == (38, 2)
    assert capsys.readouterr().err.count("skipped: ") == 2
    with pytest.raises(OSError, match=r"roses_001\.jpg"):
        evaluate_script.main(parser.parse_args([*map(str, words), "--on-bad-image", "fail"]))


# -- names ---------------------------------------------------------------------------------------

NOT_UTF8 = os.fsdecode(b"caf\xe9")
NAMES = ["with space", "quo'te\"s", "郁金香 ñ", "new\nline", "=1+2", "x" * 250, NOT_UTF8]


def test_names_of_any_kind_work_from_training_to_the_table(tmp_path, shell):
    for number, name in enumerate(NAMES):
        (tmp_path / "d" / name).mkdir(parents=True)
        for index in range(4):
            picture = Image.effect_noise((64, 64), 10 + 20 * number).convert("RGB")
            picture.save(tmp_path / "d" / name / f"{name[:200]} {index}.png")
    run_train(*small(tmp_path / "d", tmp_path / "out", "--epochs", 1, "--val-rate", 0.25))
    names = json.loads((tmp_path / "out" / "class_indices.json").read_text())
    assert list(names.values()) == sorted(NAMES)
    words = ["--weights", "out/best.pth", "--data-path", "d", "--output-dir", "e"]
    result = shell("eval.py", *words)
    assert result.returncode == 0, result.stderr
    assert "new\\nline" in result.stdout
    result = shell("predict.py", "d", "--weights", "out/best.pth", "--output", "t.csv")
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "t.csv", **files.UTF8) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 28
    with open(tmp_path / "e" / "per_class.csv", **files.UTF8) as file:
        assert {row["class"].lstrip("'") for row in csv.DictReader(file)} == set(NAMES)
    assert {row["class_1"].lstrip("'") for row in rows} <= set(NAMES)
    for row in rows:
        assert not row["class_1"].startswith("=")


def test_formulas_are_text_in_tables(tmp_path):
    risky = ["=1+1", "+1", "-1", "@x", "\tx", "\rx"]
    assert cells([*risky, "a=1", -1, 0.5]) == [*(f"'{text}" for text in risky), "a=1", -1, 0.5]
    save_rows([{"path": "=cmd|' /C calc'!A0", "loss": -1.5}], tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().splitlines()[1] == "'=cmd|' /C calc'!A0,-1.5"

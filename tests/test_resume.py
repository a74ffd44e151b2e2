"""What a run goes on from, and what it refuses."""

import shutil

import pytest
import torch
from conftest import run_train, small

import checkpoint
import resume
import soak
import utils
from cli import RunError, UsageError

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(
    flowers, tmp_path, run_dir, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_train(*small(flowers, whole, "--epochs", 3))
    shutil.copytree(run_dir, parts)
    (parts / "last.pth").write_bytes((parts / "last.pth").read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"last\.pth: damaged, or"):
        run_train("--resume", parts / "last.pth")
    run_train("--resume", parts, "--epochs", 3)
    assert "last.pth: " in (err := capsys.readouterr().err)
    assert f"going on from {parts / 'previous.pth'}" in err
    assert [row["epoch"] for row in checkpoint.load(parts / "last.pth")["history"]] == [1, 2, 3]


def test_resume_takes_the_checkpoint_before_one_that_is_gone(tmp_path, run_dir, capsys):
    shutil.copytree(run_dir, tmp_path / "out")
    (tmp_path / "out" / "last.pth").unlink()
    with pytest.raises(UsageError, match="holds a run; add --resume"):
        run_train(*small(tmp_path, tmp_path / "out"))
    with pytest.raises(UsageError, match="holds another run than"):
        run_train("--resume", run_dir, "--output-dir", tmp_path / "out")
    assert run_train("--resume", tmp_path / "out")["epochs"] == 2
    assert f"last.pth is gone; going on from {tmp_path / 'out' / 'previous.pth'}" in (
        capsys.readouterr().err
    )
    soak.compare(run_dir, tmp_path / "out")


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced", "moved"])
def test_resume_says_when_the_pictures_are_others(flowers, tmp_path, run_dir, capsys, change):
    shutil.copytree(flowers, tmp_path / "d")
    picture = tmp_path / "d" / "roses" / "roses_003.jpg"
    if change == "removed":
        picture.unlink()
    elif change == "renamed":
        picture.rename(picture.with_name("zzz.jpg"))
    elif change == "replaced":
        picture.write_bytes(picture.read_bytes() + b"\0")
    run_train("--resume", run_dir, "--data-path", tmp_path / "d", "--output-dir", tmp_path / "out")
    said = "the pictures are not those the run began with" in capsys.readouterr().err
    assert said == (change != "moved")


def test_a_run_that_ends_between_its_two_checkpoints_loses_neither(flowers, tmp_path, monkeypatch):
    words = ["--epochs", 1]
    run_train(*small(flowers, tmp_path / "whole", *words))
    save, left = checkpoint.save, 2

    def save_some(state, path, **more):
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        save(state, path, **more)

    monkeypatch.setattr(checkpoint, "save", save_some)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space"):
        run_train(*small(flowers, out, *words))
    # Whichever is written first, what there is to go on with must lead to both.
    run_train(*(["--resume", out] if (out / "last.pth").exists() else small(flowers, out, *words)))
    soak.compare(tmp_path / "whole", out)


def test_a_resumed_run_keeps_the_scale_of_float16(flowers, tmp_path, monkeypatch):
    """As of an old GPU."""
    monkeypatch.setattr(utils, "amp_dtype", lambda device, amp: torch.float16)
    run_train(*small(flowers, tmp_path / "whole", "--epochs", 2))
    run_train(*small(flowers, tmp_path / "parts", "--epochs", 1))
    run_train("--resume", tmp_path / "parts", "--epochs", 2)
    soak.compare(tmp_path / "whole", tmp_path / "parts")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(run_dir, tmp_path, monkeypatch):
    """Resumed from the one before, and stopped by a full disk at the next checkpoint."""
    shutil.copytree(run_dir, tmp_path / "out")
    (tmp_path / "out" / "last.pth").write_bytes(b"damaged")
    good = (tmp_path / "out" / "previous.pth").read_bytes()

    def fail(state, path, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        run_train("--resume", tmp_path / "out")
    assert (tmp_path / "out" / "last.pth").read_bytes() == good
    assert (tmp_path / "out" / "previous.pth").read_bytes() == good


def test_metrics_of_a_run_killed_before_it_wrote_them_are_made_up(tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "out")
    (tmp_path / "out" / "metrics.csv").unlink()
    run_train("--resume", tmp_path / "out")
    expected = (run_dir / "metrics.csv").read_bytes()
    assert (tmp_path / "out" / "metrics.csv").read_bytes() == expected


def test_a_save_that_fails_leaves_both_checkpoints(tmp_path, run_dir, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "out")
    names = ("last.pth", "previous.pth")
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    assert before[0] != before[1]

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        resume.save_last(tmp_path / "out", {"a": 1})
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before
    monkeypatch.undo()
    resume.save_last(tmp_path / "out", {"a": 1})
    assert (tmp_path / "out" / "previous.pth").read_bytes() == before[0]
    assert checkpoint.load(tmp_path / "out" / "last.pth") == {"a": 1}


def test_resume_without_a_name_means_the_newest_run_whatever_it_has_left(tmp_path, run_dir):
    for name in ("old", "new"):
        shutil.copytree(run_dir, tmp_path / "runs" / name)
    (tmp_path / "runs" / "new" / "previous.pth").touch()
    (tmp_path / "runs" / "new" / "last.pth").unlink()
    assert resume.find("", None)[0].parent.name == "new"


def change(state, *keys, value):
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("position",), {"step": 2**62, "seen": 1, "sums": torch.zeros(2)}),
        (("position",), {"step": 1, "seen": 1, "sums": torch.full((2,), torch.nan)}),
        (("history", 0, "val_loss"), float("inf")),
        (("best",), None),
        (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(2)),
        (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(1).expand(24, 3, 3, 3)),
        (("optimizer", "state", 999), {"momentum_buffer": torch.zeros(2)}),
        (("head",), {}),
    ],
)
def test_a_state_that_no_run_saves_is_one_line(tmp_path, run_dir, keys, value):
    shutil.copytree(run_dir, tmp_path / "out")
    state = checkpoint.load(run_dir / "last.pth")
    change(state, *keys, value=value)
    checkpoint.save(state, tmp_path / "out" / "last.pth")
    with pytest.raises(RunError, match=f"last.pth: {keys[0]} is not that of such a run"):
        run_train("--resume", tmp_path / "out", "--epochs", 3)


def test_momenta_that_overlap_are_taken_as_the_numbers_they_are(tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "out")
    state = checkpoint.load(run_dir / "last.pth")
    buffers = state["optimizer"]["state"][0]
    shape = buffers["momentum_buffer"].shape
    buffers["momentum_buffer"] = torch.zeros(shape.numel()).as_strided(shape, [0] * len(shape))
    checkpoint.save(state, tmp_path / "out" / "last.pth")
    assert run_train("--resume", tmp_path / "out", "--epochs", 3)["epochs"] == 3


def test_attributes_of_a_saved_head_are_not_obeyed(flowers, tmp_path):
    """One of them makes torch put the file's tensors in the place of those that are trained."""
    out = tmp_path / "out"
    run_train(*small(flowers, out, "--freeze-layers", "--epochs", 1))
    state = checkpoint.load(out / "last.pth")
    state["head"]["weights"]._metadata = {"": {"assign_to_params_buffers": True}}
    before = state["head"]["weights"]["weight"].clone()
    checkpoint.save(state, out / "last.pth")
    run_train("--resume", out, "--epochs", 2)
    assert not torch.equal(checkpoint.load(out / "last.pth")["head"]["weights"]["weight"], before)


def test_a_run_in_float16_goes_on_where_there_is_none(flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "amp_dtype", lambda device, amp: torch.float16)
    run_train(*small(flowers, tmp_path / "out", "--epochs", 1))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run_train("--resume", tmp_path / "out", "--epochs", 2)["epochs"] == 2
    monkeypatch.setattr(utils, "amp_dtype", lambda device, amp: torch.float16)
    assert run_train("--resume", tmp_path / "out", "--epochs", 3)["epochs"] == 3

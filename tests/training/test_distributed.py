"""Several processes of torchrun on the CPU against one."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import webdataset
from conftest import ROOT, small
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import train
import utils
from model import build_model
from shufflenet.common.messages import UsageError
from shufflenet.training import distributed
from shufflenet.training.features import FeatureLoader

pytestmark = pytest.mark.usefixtures("elsewhere")


def start(count, *words, options=()):
    """train.py by torchrun with so many processes, in the working folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, *options]
    command += [ROOT / "train.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], **pipes)


def torchrun(*args, **kwargs):
    """Its last line of stdout as JSON, all of stdout, and stderr; it must end well."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), out, err


def history(folder):
    with open(Path(folder, "metrics.csv"), newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def load(*place):
    return torch.load(Path(*place), weights_only=True)


def all_layers(flowers, torchvision_file, folder, size, *more):
    words = f"--weights {torchvision_file} --no-fc-first --freeze-bn --epochs 2 --val-rate 0.5"
    return small(flowers, folder, *words.split(), "--batch-size", size, *more)


def test_losses_of_one_and_four_processes_agree(flowers, torchvision_file):
    train.main(all_layers(flowers, torchvision_file, "1", 4))
    summary, out, err = torchrun(4, *all_layers(flowers, torchvision_file, "4", 1))
    assert (out.count("best_accuracy"), out.count("epoch 2/2")) == (1, 1)
    assert err.count("20 images to train, 20 to validate") == 1
    assert summary["val_images"] == 20
    for ours, theirs in zip(history("4"), history("1"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, four = load("1", "best.pth")["model"], load("4", "best.pth")["model"]
    assert one.keys() == four.keys()
    assert all(torch.allclose(one[k].float(), four[k].float(), atol=1e-4) for k in one)


def test_validation_is_of_the_network_that_is_saved_statistics_included(flowers):
    """Each process has its own statistics of batch norm until the end of an epoch."""
    summary, *_ = torchrun(2, *small(flowers, "bn", "--epochs", 2, "--batch-size", 4))
    again = evaluation.main(["--weights", "bn/best.pth", "--output-dir", "again"])
    assert again["accuracy"] == summary["best_accuracy"]
    best = history("bn")[summary["best_epoch"] - 1]
    assert again["loss"] == pytest.approx(best["val_loss"], rel=1e-6)


def test_features_are_computed_once_and_fc_learns_as_in_one_process(flowers, torchvision_file):
    """And an image that cannot be read is named once."""
    flowers = shutil.copytree(flowers, "data")
    Path("data", "tulips", "tulips_000.jpg").write_bytes(b"no image")
    words = ["--weights", torchvision_file, "--freeze-layers", "--epochs", 3]
    train.main(small(flowers, "one", *words))
    summary, _, err = torchrun(2, *small(flowers, "two", *words))
    assert summary["epochs"] == 3
    assert err.count("features of 39 images computed") == 1
    assert err.count("skipped: data/tulips/tulips_000.jpg: ") == 1
    for ours, theirs in zip(history("two"), history("one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_worker_that_is_killed_is_started_again_to_the_same_end(flowers, torchvision_file):
    words = [*all_layers(flowers, torchvision_file, "calm", 4, "--fc-first"), "--epochs", 6]
    words.remove("--no-fc-first")
    torchrun(2, *words)
    words[words.index("calm")] = "killed"
    process = start(2, *words, options=["--max-restarts", 3])
    while not (Path("killed", "metrics.csv").exists() and len(history("killed")) >= 3):
        time.sleep(0.01)
        assert process.poll() is None
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        os.kill(int(children.read().split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming killed" in err
    for name in ("last.pth", "best.pth"):
        calm, killed = load("calm", name), load("killed", name)
        assert all(torch.equal(calm["model"][k], killed["model"][k]) for k in calm["model"])
    assert history("calm") == history("killed")


def test_a_process_that_sees_other_images_says_so_and_all_stop(flowers):
    os.symlink(flowers, "data0")
    Path("data1").mkdir()
    for folder in sorted(Path(flowers).iterdir())[:3]:
        os.symlink(folder, Path("data1", folder.name))
    script = f'exec "{sys.executable}" "{ROOT}/train.py" --data-path data$RANK --output-dir out'
    Path("start.sh").write_text(script + " --epochs 1 -j 0 --train-size 64\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--no-python", "sh", "start.sh"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "rank 1: error: data1 holds other images than rank 0 sees" in done.stderr


def test_a_run_is_resumed_by_its_own_command_and_by_as_many_processes(
    flowers, run_dir, tmp_path, monkeypatch
):
    """And needs a folder that does not depend on the time."""
    shutil.copytree(run_dir, "older")
    words = small(flowers, "older", "--epochs", 9)
    monkeypatch.setattr(distributed, "WORLD", 2)
    with pytest.raises(UsageError, match="began with 1 processes: start as many, not 2"):
        train.main(words)
    state = load("older", "last.pth")
    state["args"]["processes"] = 2
    torch.save(state, "older/last.pth")
    with pytest.raises(UsageError, match="older holds another run: add --resume, or name another"):
        train.main(words)
    with pytest.raises(UsageError, match="^--output-dir is missing"):
        train.main(["--data-path", flowers])
    monkeypatch.setattr(distributed, "WORLD", 1)
    with pytest.raises(UsageError, match="began with 2 processes: start as many, not 1"):
        train.main(["--resume", tmp_path / "older"])


@pytest.mark.parametrize("names", [["RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"]])
def test_variables_of_a_cluster_alone_stop_no_script(shell, names):
    result = shell("predict.py", "--help", env=dict.fromkeys(names, "1"))
    assert result.returncode == 0, result.stderr


def test_a_network_that_the_user_wrapped_trains_and_is_evaluated(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = build_model("shufflenet_v2_x0_5", 3)
        images, rows = torch.randn(8, 3, 64, 64), torch.arange(8)
        loader = FeatureLoader(images, rows, rows % 3, 4, 0)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
        before = model.fc.weight.clone()
        assert utils.train_one_epoch(wrapped, optimizer, loader, torch.device("cpu"), 0) > 0
        assert not torch.equal(before, model.fc.weight)
        assert 0 <= utils.evaluate(wrapped, loader, torch.device("cpu")) <= 1
    finally:
        dist.destroy_process_group()


def test_the_loader_of_shards_in_the_docs_trains(flowers, tmp_path):
    for number, folder in enumerate(sorted(flowers.iterdir())):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as shard:
            for path in folder.iterdir():
                content = {"jpg": path.read_bytes(), "cls": str(number)}
                shard.write({"__key__": path.stem} | content)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.S)
    names = {}
    exec(compile(code, "scaling.md", "exec"), names)
    loader = names["ShardLoader"](str(tmp_path / "{0..4}.tar"), 8, workers=0)
    images, classes = zip(*loader, strict=True)
    assert torch.cat(images).shape == (40, 3, 224, 224)
    assert torch.cat(classes).bincount().tolist() == [8] * 5
    model, device = build_model("shufflenet_v2_x0_5", 5), torch.device("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    assert utils.train_one_epoch(model, optimizer, loader, device, 0) > 0

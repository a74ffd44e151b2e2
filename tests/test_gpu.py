"""What only a GPU of NVIDIA can show: `make gpu`, some two minutes; skipped where there is none."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soak
import torch
from conftest import ROOT, small
from sample_flowers import draw_sample_flowers

import eval as evaluation
import train
from shufflenet.inference.classifier import Classifier
from shufflenet.reading.folders import find_images
from shufflenet.training.run_folder import RunFolder

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of NVIDIA"),
    pytest.mark.usefixtures("elsewhere"),
]
KINDS = {
    "bfloat16": ["--amp", "--random-erase", 0.5],
    "float32": ["--no-amp"],
    "v1": ["--model", "shufflenet_v1_x0_25_g3"],
    "folded": ["--weights", "FILE", "--no-fc-first", "--freeze-bn", "--lr", 1e-3],
    "fc first": ["--weights", "FILE", "--fc-first"],
    "cached features": ["--weights", "FILE", "--freeze-layers", "--lr", 1e-3],
}


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return draw_sample_flowers(tmp_path_factory.mktemp("data") / "flowers", per_class=20, size=64)


def words(flowers, folder, file, kind):
    more = [file if word == "FILE" else word for word in KINDS[kind]]
    return small(flowers, folder, "--device", DEVICE, "--epochs", 8, "-j", 2, *more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_is_resumed_to_the_bit(
    flowers, torchvision_file, tmp_path, monkeypatch, kind
):
    train.main(words(flowers, tmp_path / "whole", torchvision_file, kind))
    history = torch.load(tmp_path / "whole" / "last.pth", weights_only=True)["history"]
    assert history[-1]["train_loss"] < history[-8]["train_loss"]
    record = RunFolder.record

    def end_after_the_first(run, figures, *rest):
        assert figures["epoch"] < 2
        return record(run, figures, *rest)

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(RunFolder, "record", end_after_the_first)
        train.main(words(flowers, tmp_path / "parts", torchvision_file, kind))
    train.main(["--resume", tmp_path / "parts"])
    soak.compare(tmp_path / "whole", tmp_path / "parts")


def test_eval_repeats_the_validation_and_the_cpu_agrees(flowers, torchvision_file, tmp_path):
    """With TF32 logits would be off by 1e-3 of the largest."""
    run = tmp_path / "run"
    summary = train.main(words(flowers, run, torchvision_file, "fc first"))
    for device in (DEVICE, "cpu"):
        options = ["--weights", run / "best.pth", "--device", device, "--output-dir", device]
        assert evaluation.main(options)["accuracy"] == summary["best_accuracy"]
    paths = [path for found in find_images(flowers).values() for path in found]
    on_gpu, on_cpu = (Classifier(run / "best.pth", device) for device in (DEVICE, "cpu"))
    found, expected = (
        np.stack([row for _, row in classifier.stream(paths, threads=4)])
        for classifier in (on_gpu, on_cpu)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())
    for classifier in (on_gpu, on_cpu):
        pixels, places = classifier.explain(paths[0], "tulips")
        logit = expected[0, classifier.classes.index("tulips")]
        assert pixels.shape == (224, 224, 3)
        assert places.mean() == pytest.approx(logit, abs=1e-4 * float(abs(expected).max()))


def test_one_process_of_torchrun_trains_as_none(flowers, torchvision_file, tmp_path):
    """With nccl and DistributedDataParallel."""
    alone = train.main(words(flowers, tmp_path / "alone", torchvision_file, "folded"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 1]
    command += [ROOT / "train.py", *words(flowers, tmp_path / "run", torchvision_file, "folded")]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["best_accuracy"] == pytest.approx(alone["best_accuracy"], abs=0.05)
    losses = []
    for folder in ("alone", "run"):
        state = torch.load(tmp_path / folder / "last.pth", weights_only=True)
        losses.append([row["train_loss"] for row in state["history"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)

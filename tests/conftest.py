import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sample_flowers import draw_sample_flowers

# Before torch is imported: two test processes share two cores. Scripts that they start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import export
import train

ROOT = Path(__file__).parents[1]


def noise(width, height, seed=0):
    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels)


def small(flowers, folder, *more):
    """Options of a run that takes a second or two."""
    words = ["--data-path", flowers, "--model", "shufflenet_v2_x0_5", "--output-dir", folder]
    if not {"--freeze-layers", "--resume"} & set(more):  # cached features are of whole images
        words += ["--train-size", 64]
    return [*words, "-j", 0, *more]


@pytest.fixture(scope="session", autouse=True)
def _compiled_by_openvino():
    """Keep what OpenVINO compiles: models freed out of order take a stack of the process's signals
    with them, and the next process that is started from here crashes."""
    import openvino

    kept, compile_model = [], openvino.Core.compile_model

    def keep(self, *args):
        kept.append(compile_model(self, *args))
        return kept[-1]

    openvino.Core.compile_model = keep
    yield
    openvino.Core.compile_model = compile_model


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shufflenet.training.features.CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def flowers(tmp_path_factory):
    """A small data set: five classes of eight drawn images."""
    return draw_sample_flowers(tmp_path_factory.mktemp("data") / "flowers", per_class=8, size=64)


@pytest.fixture(scope="session")
def run_dir(flowers, tmp_path_factory):
    """The output folder of two epochs on `flowers`."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main(small(flowers, folder, "--epochs", 2, "--batch-size", 4))
    return folder


@pytest.fixture(scope="session")
def torchvision_file(tmp_path_factory):
    """A state dict as torchvision publishes them: bare, 1000 classes; its values are random."""
    import torch
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "shufflenetv2_x0.5.pth"
    torch.save(shufflenet_v2_x0_5().state_dict(), path)
    return path


@pytest.fixture
def imagenet_file(tmp_path, monkeypatch):
    """The like for x1.0, where torch would keep what `--weights imagenet` downloads."""
    import torch
    from torchvision.models import shufflenet_v2_x1_0

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x1-5666bf0f80.pth"
    path.parent.mkdir(parents=True)
    torch.save(shufflenet_v2_x1_0().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def onnx_file(run_dir, tmp_path_factory):
    """The best network of `run_dir`, exported."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export.main(["--weights", run_dir / "best.pth", "--output", path])
    return path


@pytest.fixture
def shell(tmp_path):
    """Run a script of the repository in an empty folder: shell("train.py", "--help")."""

    def run(script, *args, env=None):
        words = [sys.executable, ROOT / script, *map(str, args)]
        result = {"capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(words, cwd=tmp_path, env=os.environ | (env or {}), **result)

    return run

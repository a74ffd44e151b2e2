import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch: tests share the cores with each other and with workers.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in its background has its children ignore this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]


def run_train(*args):
    import train

    return train.main(train.build_parser().parse_args([*map(str, args)]))


def small(flowers, folder, *more):
    """Options of a run that takes a second or two."""
    words = ["--data-path", flowers, "--model", "shufflenet_v2_x0_5", "--output-dir", folder]
    if not {"--freeze-layers", "--resume"} & set(more):  # cached features are of whole pictures
        words += ["--train-size", 64]
    return [*words, "-j", 0, *more]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, with an empty cache."""
    import features

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def flowers(tmp_path_factory):
    """A small data set: five classes of eight drawn pictures."""
    from sample_flowers import draw_sample_flowers

    return draw_sample_flowers(tmp_path_factory.mktemp("data") / "flowers", per_class=8, size=64)


@pytest.fixture(scope="session")
def run_dir(flowers, tmp_path_factory):
    """The output folder of two epochs on `flowers`."""
    import train

    folder = tmp_path_factory.mktemp("runs") / "run"
    args = ["--data-path", str(flowers), "--model", "shufflenet_v2_x0_5", "--epochs", "2"]
    train.main(train.build_parser().parse_args([*args, "--output-dir", str(folder)]))
    return folder


@pytest.fixture(scope="session")
def onnx_file(run_dir, flowers, tmp_path_factory):
    """The best network of `run_dir`, exported."""
    import export

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    words = ["--weights", run_dir / "best.pth", "--output", path, "--check-on", flowers]
    export.main(export.build_parser().parse_args([*map(str, words)]))
    return path


@pytest.fixture
def shell(tmp_path):
    """Run a script of the repository in an empty folder: shell("train.py", "--help")."""

    def run(script, *args, env=None, timeout=120):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            cwd=tmp_path,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run

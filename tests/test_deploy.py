"""The clients in docs/deploy.md answer as predict.py does; that of OpenCV, which resizes in its own
way, on images that need no resizing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import predict

PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
PYTHON, OPENCV = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
(JAVASCRIPT,) = re.findall(r"^```javascript\n(.*?)^```", PAGE, re.M | re.S)
NODE = ROOT / ".cache" / "node"


@pytest.fixture
def images(onnx_file, flowers, tmp_path, monkeypatch):
    """Work beside model.onnx and model.json, with images: three of 256 pixels on the shorter side,
    and two that are to be resized."""
    monkeypatch.chdir(tmp_path)
    for file in (onnx_file, onnx_file.with_suffix(".json")):
        shutil.copy(file, tmp_path / f"model{file.suffix}")
    shutil.copy(ROOT / "shufflenet" / "inference" / "preprocess.mjs", tmp_path)
    for number, size in enumerate([(256, 256), (256, 300), (310, 256), (301, 511), (500, 333)]):
        Image.open(flowers / "roses" / f"roses_00{number}.jpg").resize(size).save(f"{number}.png")
    return [f"{number}.png" for number in range(5)]


def check(images, command):
    done = subprocess.run([*command, *images], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    expected = predict.main([*images, "--weights", "model.onnx"])
    for answer, theirs in zip(answers, expected, strict=True):
        assert answer["path"] == theirs["path"]
        probs = {guess["class"]: guess["prob"] for guess in theirs["predictions"]}
        assert answer["classes"] == pytest.approx(probs, abs=1e-4)


def test_python(images):
    check(images, [sys.executable, "-c", PYTHON])


def test_opencv(images):
    check(images[:3], [sys.executable, "-c", OPENCV])


def test_javascript(images):
    if not shutil.which("npm"):
        pytest.skip("needs node and npm")
    if not (NODE / "node_modules" / "sharp").exists():
        # Scripts of packages would download more, for GPUs.
        words = ["npm", "install", "--ignore-scripts", "--no-audit", "--prefix", NODE]
        done = subprocess.run([*words, "onnxruntime-node", "sharp"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install the packages: {done.stderr[-200:]}")
    Path("node_modules").symlink_to(NODE / "node_modules")
    Path("client.mjs").write_text(JAVASCRIPT)
    check(images, ["node", "client.mjs"])

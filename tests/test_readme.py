"""The READMEs and docs: every command in them is run, every file they name exists."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ROOT

import features

READMES = ["README.md", "README.zh-CN.md"]
PAGES = [*READMES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def newcomer(flowers, tmp_path, monkeypatch):
    """Work in a folder with what the pages take for granted, ImageNet weights in torch's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    place = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x1-5666bf0f80.pth"
    place.parent.mkdir(parents=True)
    torch.save(torchvision.models.shufflenet_v2_x1_0().state_dict(), place)
    for name in ("data/flower_photos", "my_images"):
        shutil.copytree(flowers, tmp_path / name)
    shutil.copy(flowers / "roses" / "roses_000.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    """Run a command of a page, made shorter, in this process: imports take seconds."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "tools/sample_flowers.py"]:
        script = [sys.executable, ROOT / words[1], *words[2:], "--per-class", "8", "--size", "64"]
        subprocess.run(script, check=True)
    elif words[0] == "python":
        short = ["--epochs", "1", "-j", "0"] if words[1] == "train.py" else []
        importlib.import_module(words[1].removesuffix(".py")).main([*words[2:], *short])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    else:
        assert words[0] in ("git", "pip", "python3"), line
    return " ".join(words[:2])


def test_every_command_of_the_readme_works_in_the_order_it_is_read(newcomer, capsys):
    lines = "".join(blocks("README.md", "bash")).splitlines()
    ran = {run(line) for line in lines}
    assert ran >= {f"python {name}.py" for name in ("train", "eval", "predict", "export")}
    assert (newcomer / "result.png").exists()

    (code,) = blocks("README.md", "python")
    best = next(newcomer.glob("runs/*-shufflenet*/best.pth"))
    capsys.readouterr()
    exec(compile(code.replace("runs/RUN", str(best.parent)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in {path.name for path in newcomer.glob("my_images/*")}


def test_every_command_of_the_docs_works(newcomer):
    for page in sorted(PAGES[2:]):
        for line in "".join(blocks(page, "bash")).splitlines():
            if (
                "benchmark.py" not in line and "soak.py" not in line
            ):  # minutes, and tested elsewhere
                run(line)
    for command in re.findall(r"`(python train.py [^`]*my_images[^`]*)`", training_page()):
        run(command)


def training_page():
    return (ROOT / "docs/training.md").read_text(encoding="utf-8")


def test_the_chinese_readme_has_the_same_commands():
    for language in ("bash", "python"):
        assert blocks(READMES[0], language) == blocks(READMES[1], language)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" in link or (folder / link).exists(), link

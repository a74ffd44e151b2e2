"""The READMEs and docs: every command in them is run, every file they name exists."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

READMES = ["README.md", "README.zh-CN.md"]
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
# These take minutes or write into docs/, and are tested elsewhere.
LONG = [f"tools/{name}.py" for name in ("benchmark", "baseline", "papers", "draw_networks")]
LONG += ["tests/soak.py"]


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.M | re.S)


def commands(page):
    """Lines of the bash blocks, then commands of the text."""
    inline = re.findall(r"`(python [^`]+)`", read(page))
    return [*"".join(blocks(page, "bash")).splitlines(), *inline]


@pytest.fixture
def newcomer(flowers, torchvision_file, imagenet_file, elsewhere, tmp_path):
    """Work in a folder with what the pages take for granted, ImageNet weights in torch's cache."""
    shutil.copy(torchvision_file, "FILE")
    for name in ("data/flower_photos", "data/cifar10", "my_images", "PHOTOS"):
        shutil.copytree(flowers, name)
    for name in ("photo.jpg", "IMAGE"):
        shutil.copy(flowers / "roses" / "roses_000.jpg", name)
    return tmp_path


def run(line):
    """Run a command of a page, made shorter, in this process: imports take seconds."""
    words = shlex.split(line.replace("--seed N", "--seed 0"), comments=True)
    if words[0] != "python":
        known = ("git", "pip", "python3", ".venv/bin/pip", "torchrun")
        assert words[0] in known or f"\n{words[1]}:" in read("Makefile"), line
    elif words[1] == "tools/sample_flowers.py":
        script = [sys.executable, ROOT / words[1], *words[2:], "--per-class", "8", "--size", "64"]
        subprocess.run(script, check=True)
    elif words[1] in LONG:
        assert (ROOT / words[1]).exists()
    else:
        short = ["--epochs", "1", "-j", "0"] if words[1] == "train.py" else []
        importlib.import_module(words[1].removesuffix(".py")).main([*words[2:], *short])
    return " ".join(words[:2])


def test_every_command_of_the_readme_works_in_the_order_it_is_read(newcomer, capsys):
    ran = {run(line) for line in commands("README.md")}
    assert ran >= {f"python {name}.py" for name in ("train", "eval", "predict", "export")}
    assert (newcomer / "result.png").exists()

    (code,) = blocks("README.md", "python")
    best = next(newcomer.glob("runs/*-quick/best.pth"))
    capsys.readouterr()
    exec(compile(code.replace("runs/RUN", str(best.parent)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in {path.name for path in newcomer.glob("my_images/*")}


@pytest.mark.usefixtures("newcomer")
def test_every_command_of_the_docs_works():
    readme = commands("README.md")
    ran = {run(line) for page in DOCS for line in commands(page) if line not in readme}
    assert ran >= {"python train.py", "python tools/sample_flowers.py"}


def test_the_chinese_readme_has_the_same_commands():
    for language in ("bash", "python"):
        assert blocks(READMES[0], language) == blocks(READMES[1], language)


@pytest.mark.parametrize("page", [*READMES, *DOCS])
def test_every_file_named_exists(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", read(page)):
        assert "://" in link or (folder / link).exists(), link

"""The READMEs: every command in them is run, every file they name exists."""

import importlib
import re
import shlex
import shutil

import pytest
import torch
import torchvision
from conftest import ROOT

import features

READMES = ["README.md", "README.zh-CN.md"]


def blocks(readme, language):
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def newcomer(flowers, tmp_path, monkeypatch):
    """A folder with what the READMEs take for granted, ImageNet weights in torch's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x1-5666bf0f80.pth"
    place.parent.mkdir(parents=True)
    torch.save(torchvision.models.shufflenet_v2_x1_0().state_dict(), place)
    for name in ("data/flower_photos", "my_pictures"):
        shutil.copytree(flowers, tmp_path / name)
    shutil.copy(flowers / "roses" / "roses_000.jpg", tmp_path / "photo.jpg")
    return tmp_path


def test_every_command_works_in_the_order_it_is_read(newcomer, monkeypatch, capsys):
    """In one process: imports alone would take most of a minute."""
    monkeypatch.chdir(newcomer)
    monkeypatch.setattr(features, "CACHE", newcomer / "cache")
    ran = []
    for line in "".join(blocks("README.md", "bash")).splitlines():
        words = shlex.split(line)
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
            continue
        assert words[0] == "python", line
        script = importlib.import_module(words[1].removesuffix(".py"))
        short = ["--epochs", "1", "-j", "0"] if words[1] == "train.py" else []
        script.main(script.build_parser().parse_args([*words[2:], *short]))
        ran.append(words[1])
    assert set(ran) == {"train.py", "eval.py", "predict.py", "export.py"}
    assert (newcomer / "result.png").exists()

    (code,) = blocks("README.md", "python")
    run = next(newcomer.glob("runs/*/best.pth")).parent
    capsys.readouterr()
    exec(compile(code.replace("runs/RUN", str(run)), "README.md", "exec"), {})
    answer = capsys.readouterr().out.strip()
    assert answer in {path.name for path in (newcomer / "my_pictures").iterdir()}


def test_the_chinese_readme_has_the_same_commands():
    for language in ("bash", "python"):
        assert blocks(READMES[0], language) == blocks(READMES[1], language)


@pytest.mark.parametrize("readme", READMES)
def test_every_file_named_exists(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 15
    for link in links:
        assert (ROOT / link).exists(), link

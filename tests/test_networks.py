"""docs/networks.md and docs/networks.zh-CN.md: what they run prints what they say, and what
tools/draw_networks.py draws is what the papers describe."""

import ast
import contextlib
import inspect
import io
import re

import draw_networks
import pytest
import torch
from conftest import ROOT

import model
from model import build_model

PAGES = ["docs/networks.md", "docs/networks.zh-CN.md"]
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def snippets(page):
    """(code, what it prints) of each block of Python."""
    return SNIPPET.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_prints_what_follows_it(page):
    names = {}
    for code, said in snippets(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, page, "exec"), names)
        assert out.getvalue() == said, code


def test_both_pages_run_the_same_code():
    english, chinese = (
        [(ast.dump(ast.parse(code)), said) for code, said in snippets(page)] for page in PAGES
    )
    assert len(english) > 5
    assert english == chinese  # but for comments


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_of_model_py_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(.+?)` \|", text, re.M)
    unit = inspect.getsource(model.InvertedResidual)
    assert len(explained) == 14
    assert [line for line in explained if line not in unit] == []
    rows = re.findall(r"^\| (?:stage.|conv5 1x1) \| \d+x\d+ \| \d* ?\| (.+) \|$", text, re.M)
    rows = [[int(channels) for channels in row.split(" | ")] for row in rows]
    first = [channels[1.0][1] for channels in model._V1_CHANNELS.values()]
    v1 = [[2**stage * channels for channels in first] for stage in range(3)]
    v2 = [list(row) for row in zip(*model._V2_CHANNELS.values(), strict=True)]
    assert rows == v1 + v2[1:]


# v1, figure 2 b and c, and v2, figure 3 c and d, in stage 3: operation, output, what it reads.
UNITS = {
    ("v1_x1_0_g3", 1): [
        ("input", "480x14x14", []),
        ("1x1 conv, g=3; BN; ReLU", "120x14x14", [0]),
        ("shuffle, g=3", "120x14x14", [1]),
        ("3x3 depthwise; BN", "120x14x14", [2]),
        ("1x1 conv, g=3; BN", "480x14x14", [3]),
        ("add; ReLU", "480x14x14", [0, 4]),
    ],
    ("v1_x1_0_g3", 2): [
        ("input", "240x28x28", []),
        ("1x1 conv, g=3; BN; ReLU", "120x28x28", [0]),
        ("shuffle, g=3", "120x28x28", [1]),
        ("3x3 depthwise, /2; BN", "120x14x14", [2]),
        ("1x1 conv, g=3; BN", "240x14x14", [3]),
        ("3x3 avg pool, /2", "240x14x14", [0]),
        ("concat; ReLU", "480x14x14", [5, 4]),
    ],
    ("v2_x1_0", 1): [
        ("input", "232x14x14", []),
        ("split", "116 | 116x14x14", [0]),
        ("1x1 conv; BN; ReLU", "116x14x14", [1]),
        ("3x3 depthwise; BN", "116x14x14", [2]),
        ("1x1 conv; BN; ReLU", "116x14x14", [3]),
        ("concat", "232x14x14", [1, 4]),
        ("shuffle, g=2", "232x14x14", [5]),
    ],
    ("v2_x1_0", 2): [
        ("input", "116x28x28", []),
        ("3x3 depthwise, /2; BN", "116x14x14", [0]),
        ("1x1 conv; BN; ReLU", "116x14x14", [1]),
        ("1x1 conv; BN; ReLU", "116x28x28", [0]),
        ("3x3 depthwise, /2; BN", "116x14x14", [3]),
        ("1x1 conv; BN; ReLU", "116x14x14", [4]),
        ("concat", "232x14x14", [2, 5]),
        ("shuffle, g=2", "232x14x14", [6]),
    ],
}


@pytest.mark.parametrize(("name", "stride"), UNITS)
def test_a_drawn_unit_is_that_of_the_paper(name, stride):
    with torch.device("meta"):
        unit = build_model(f"shufflenet_{name}").stage3[2 - stride]
    shape = map(int, UNITS[name, stride][0][1].split("x"))
    boxes = draw_networks.trace_unit(unit, *shape)
    assert [("; ".join(lines), *others) for lines, *others in boxes] == UNITS[name, stride]
    # What joins comes from the left and from the right; a bare line keeps the lane of its start.
    lanes = draw_networks.lay_out(boxes)
    (join,) = (box for box in boxes if len(box.sources) == 2)
    start = draw_networks.MIDDLE if stride == 1 else draw_networks.LEFT
    assert [lanes[source] for source in join.sources] == [start, draw_networks.RIGHT]


def test_the_drawn_stages_are_those_of_the_network():
    stages = draw_networks.list_stages("shufflenet_v2_x1_0")
    assert " ".join(stages) == "input conv1 maxpool stage2 stage3 stage4 conv5 fc"
    assert stages["maxpool"] == (1, [24, 56, 56], 0)
    assert stages["stage3"][:2] == (8, [232, 14, 14])
    assert stages["conv5"].cost == pytest.approx(464 * 1024 * 49 / 1e6)


def test_the_shuffle_is_drawn_as_it_mixes():
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert draw_networks.reached(shuffled=False).equal(blocks)
    assert draw_networks.reached(shuffled=True).all()


def test_the_pictures_can_be_drawn(tmp_path):
    draw_networks.main(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"channel_shuffle.png", "units.png", "networks.png"}
    assert max(sizes.values()) < 150_000

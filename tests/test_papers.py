"""What tools/papers.py counts agrees with the papers and with counts by hand; what it times is what
the tables of the paper describe. Speeds are for people."""

from functools import partial

import numpy as np
import papers
import pytest
import torch
from test_model import COSTS
from torch import nn

# v2: the paper's figures, multiply-adds by hand of its authors' split and of torchvision's.
SPLITS = {
    "x0_5": (41, 40.48, 40.48),
    "x1_0": (146, 145.81, 144.91),
    "x1_5": (299, 298.97, 295.76),
    "x2_0": (591, 590.78, 583.25),
}
FIRST = {table: next(iter(rows)) for table, (_, rows) in papers.TABLES.items()}
CASES = [(table, row) for table, (_, rows) in papers.TABLES.items() for row in rows]


def test_every_network_costs_what_the_papers_and_torchvision_say(capsys):
    rows = papers.main(["complexity"])
    for groups, millions, *_ in COSTS:
        row = rows[f"shufflenet_v1_x1_0_g{groups}"]
        assert row["without fc"] == pytest.approx(millions, abs=0.005)
        assert row["paper, M"] == round(row["without fc"])
    for width, (paper, authors, torchvision) in SPLITS.items():
        row, split = rows[f"shufflenet_v2_{width}"], f"shufflenet_v2_{width}, authors' split"
        assert row["paper, M"] == paper
        assert row["multiply-adds, M"] == pytest.approx(torchvision, abs=0.005)
        assert rows[split]["multiply-adds, M"] == pytest.approx(authors, abs=0.005)
        assert row["parameters"] == row["torchvision"]
    assert rows["shufflenet_v2_x1_0, authors' split"]["parameters"] == 2278760 + 1000  # fc's bias
    assert rows["shufflenet_v1_x2_0_g3"]["multiply-adds, M"] == pytest.approx(524.05, abs=0.005)
    # conv1 of 24 channels: 112 * 112 * 24 * 27 = 8.13 M; 3 * 224 * 224 + 24 * 112 * 112 + 648
    assert rows["shufflenet_v2_x1_0"]["conv1"] == "8.13; 0.45; 24x112x112"
    *_, share = capsys.readouterr().out.splitlines()
    assert "93.43%" in share


def test_memory_access_is_what_the_paper_defines():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(6, 8, 1, groups=2, device="meta"), nn.ReLU()))
    # hw(c1 + c2) + c1 c2 / g = 25 * 14 + 24 elements, and hw c1 c2 / g = 600 multiply-adds
    *figures, output = papers.count(network, 6, 5, 5)["0"]
    assert figures == pytest.approx([600e-6, 374e-6])
    assert output == "8x5x5"


@pytest.mark.parametrize("gpu", [False, True])
def test_the_rows_of_a_table_have_equal_multiply_adds(gpu):
    costs, channels = {}, {}
    for case in CASES:
        with torch.device("meta"):
            network, channels[case] = papers.build(*case, gpu, scale=2)
        costs[case] = papers.count(network, channels[case][0], 56, 56)[""][0]
        assert costs[case] == pytest.approx(costs[case[0], FIRST[case[0]]], rel=0.055), case
    assert channels["G1: equal widths (in:out)", "1:12"] == ([72, 864] if gpu else [18, 216])
    assert channels["G2: few groups", "8"] == ([720] if gpu else [368])


def test_blocks_do_what_their_names_say():
    x = torch.ones(1, 32, 2, 2)
    assert papers.Parallel(*[nn.Identity()] * 3)(x).unique() == 3
    assert papers.Residual(*[nn.Identity()] * 3)(x).unique() == 2
    lowest = {
        row: papers.build("G4: few element-wise operations", row, False)[0](x).min()
        for row in ("none", "ReLU", "shortcut", "both")
    }
    assert {row for row, value in lowest.items() if value >= 0} == {"ReLU", "both"}


def test_guidelines_are_timed_compared_and_drawn(tmp_path, monkeypatch, capsys):
    speeds, measure = {}, partial(papers.measure, scales=(1, 2), seconds=1e-3)
    monkeypatch.setattr(papers, "measure", lambda *args: speeds.update(measure(*args)) or speeds)
    words = ["guidelines", "--quick", "--device", "cpu", "--plot", tmp_path / "bars.svg"]
    results = papers.main(words)
    assert [(table, row) for table, lines in results.items() for row in lines] == CASES
    for rounds in speeds.values():
        assert rounds.shape == (3, 2)
        assert (rounds > 0).all()
    assert all(results[table][row]["here"] == 1 for table, row in FIRST.items())
    assert "G4: few element-wise operations: " in capsys.readouterr().out
    assert "2 in series" in (tmp_path / "bars.svg").read_text()


def test_a_guideline_holds_against_the_rows_that_are_slower(capsys):
    speeds = {case: np.array([[10, 10], [20, 5], [1, 1]]) for case in CASES}
    speeds["G1: equal widths (in:out)", "1:12"] = np.array([[4, 9], [8, 4.5], [1, 1]])
    for row in ("ReLU", "shortcut", "both"):
        speeds["G4: few element-wise operations", row] = np.array([[9, 9], [9, 9], [1, 1]])
    results = papers.compare(speeds, gpu=False)
    line = results["G1: equal widths (in:out)"]["1:12"]
    assert line["here"] == pytest.approx(0.6)  # the root of 0.4 * 0.9, in two rounds of three
    # The roots of 748/1480 * 392/723 * 163/232 and of 57.6/76.2 * 15.1/21.7 * 4.4/5.3
    assert (line["paper, GPU"], line["paper, ARM"]) == pytest.approx((0.5775, 0.7587), abs=1e-4)
    out = capsys.readouterr().out
    assert "(in:out): holds in part here; slower than the first: 1:12." in out
    assert "G2: few groups: fails here; slower than the first: none." in out
    assert "G4: few element-wise operations: holds here; slower" in out

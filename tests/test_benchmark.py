"""The benchmark runs both loops and reports what they did; its figures are for people."""

import json

import torch
import torchvision

import benchmark


def test_train_runs_both_loops_and_reports_them(flowers, tmp_path, capsys):
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "w.pth")
    words = ["train", flowers, "--weights", tmp_path / "w.pth", "--epochs", 1, "--seeds", 1]
    args = benchmark.build_parser().parse_args([*map(str, words), "-j", "0", "--json"])
    report = benchmark.main(args)
    assert json.loads(capsys.readouterr().out) == report
    names = [row["name"] for row in report["rows"]]
    assert names == ["plain loop", "cached features, first run", "cached features, again"]
    first, again = report["rows"][1:]
    assert first["accuracy"] == again["accuracy"]
    assert all(row["seconds"] > 0 and row["peak_megabytes"] > 100 for row in report["rows"])
    benchmark._print_table(report)
    table = capsys.readouterr().out.splitlines()
    assert table[2].count("|") == table[3].count("|") == table[4].count("|") == 6

"""The benchmarks run what they say, compare the answers and report; figures are for people."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import benchmark
from cli import RunError, UsageError


def run_benchmark(*words):
    return benchmark.main(benchmark.build_parser().parse_args([*map(str, words)]))


def test_train_runs_both_loops_and_reports_them(flowers, tmp_path, capsys, monkeypatch):
    """The plain loop, a first run on cached features, and one of all layers."""
    monkeypatch.setitem(benchmark.OURS["fc"], ", again", benchmark.RECIPE)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "w.pth")
    words = ["train", flowers, "--weights", tmp_path / "w.pth", "--model", "shufflenet_v2_x0_5"]
    words += ["--layers", "fc", "--epochs", 1, "--seeds", 1, "-j", 0, "--json"]
    report = run_benchmark(*words)
    assert json.loads(capsys.readouterr().out) == report
    names = ["fc: plain.py", "fc: train.py, first run", "fc: train.py, again"]
    assert [row["name"] for row in report["rows"]] == names
    plain, first, again = report["rows"]
    assert first["img/s"] > 0  # of computing features
    assert min(plain["img/s"], again["img/s"]) > 0
    assert plain["times faster"] == 1
    assert all(row["seconds"] > 0 and row["peak MB"] > 100 for row in report["rows"])


def test_weights_of_another_model_are_refused_at_once(flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_run", None)  # nothing is run
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="w.pth does not fit the model"):
        run_benchmark("train", flowers, "--weights", tmp_path / "w.pth")


def test_the_recipe_is_that_of_the_readme():
    command = f"--weights imagenet {benchmark.RECIPE} --epochs"
    assert command in (benchmark.ROOT / "README.md").read_text()


def test_inference_measures_every_runtime_and_draws_it(shell, tmp_path):
    """In a process of its own, to which the threads of three runtimes remain."""
    words = ["inference", "--model", "shufflenet_v2_x0_5", "--batch-sizes", 1, 3, "--rounds", 1]
    words += ["--seconds", 0, "--no-compile", "--plot", "bars.png", "--json"]
    result = shell("benchmark.py", *words)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    names = {row["name"] for row in report["rows"]}
    runtimes = ("PyTorch", "ONNX Runtime", "OpenVINO")
    assert names == (
        {f"torchvision, {runtime}" for runtime in runtimes}
        | {f"ours, {runtime}" for runtime in runtimes}
        | {f"ours, {runtime}, a batch a core" for runtime in runtimes}
    )
    for row in report["rows"]:
        assert row["img/s, batch 3"] > 0
        assert 0 < row["ms, batch 1"] <= row["95 %, batch 1"]
    assert " threads, 1 rounds in turns" in report["options"]
    Image.open(tmp_path / "bars.png").verify()
    table = benchmark._table(report["rows"]).splitlines()
    assert len(table) == 2 + len(names)
    assert len({line.count("|") for line in table}) == 1


def test_a_fast_wrong_answer_is_an_error():
    right = np.ones((2, 5), np.float32)
    benchmark._check("x", right + 1e-6, right)
    benchmark._check("x bfloat16", right + 1e-2, right)
    for name, wrong in (("x", right + 1e-2), ("x bfloat16", right * 2), ("x", right * np.nan)):
        with pytest.raises(RunError, match="computes other logits"):
            benchmark._check(name, wrong, right)


def test_candidates_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = benchmark._take_turns(calls, rounds=3, seconds=0)
    assert order == ["a", "b"] * 4  # a round to warm up
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_startup_compares_scripts_and_their_answers(flowers, tmp_path):
    picture = flowers / "roses" / "roses_000.jpg"
    report = run_benchmark("startup", picture, "--model", "shufflenet_v2_x0_5", "--rounds", 1)
    plain, checkpoint, *exported = report["rows"]
    assert (plain["name"], checkpoint["name"]) == ("plain.py", "predict.py, .pth")
    names = [row["name"] for row in exported]
    assert names == ["predict.py, .onnx, onnxruntime", "predict.py, .onnx, openvino"]
    assert all(row["same class, %"] == 100 for row in (checkpoint, *exported))
    assert all(row["peak MB"] < plain["peak MB"] for row in exported)


def test_pipeline_wants_a_folder_and_startup_a_picture(flowers):
    with pytest.raises(UsageError, match="not a folder"):
        run_benchmark("pipeline", flowers / "roses" / "roses_000.jpg")
    with pytest.raises(UsageError, match="not a file"):
        run_benchmark("startup", flowers)


def test_other_answers_are_refused(tmp_path):
    table = tmp_path / "t.jsonl"
    guesses = [
        {"class": name, "prob": prob}
        for name, prob in zip("abcde", [0.6, 0.4, 0, 0, 0], strict=True)
    ]
    table.write_text(json.dumps({"path": "x", "predictions": guesses}))
    same = {"same class, %": 100.0, "largest difference": 0.0}
    assert benchmark._compare("predict.py", table, {"x": [0.6, 0.4, 0, 0, 0]}) == same
    with pytest.raises(RunError, match="0.0% the same classes"):
        benchmark._compare("predict.py", table, {"x": [0.4, 0.6, 0, 0, 0]})
    with pytest.raises(RunError, match="probabilities off by 0.02"):
        benchmark._compare("predict.py", table, {"x": [0.62, 0.38, 0, 0, 0]})
    with pytest.raises(RunError, match="answered for 1 of 2 pictures"):
        benchmark._compare("predict.py", table, {"x": [1], "y": [1]})

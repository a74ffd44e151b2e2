"""The benchmarks run what they say and compare the answers; figures are for people."""

import importlib
import json
import subprocess
import sys

import baseline
import benchmark
import numpy as np
import onnx
import openvino
import processes
import pytest

import checkpoint
import train
from cli import RunError, UsageError

X0_5 = ("--model", "shufflenet_v2_x0_5")


@pytest.fixture
def exported(run_dir, onnx_file, monkeypatch):
    """Measure a network that is exported already, since an export takes ten seconds."""
    theirs, ours = processes.same_networks("shufflenet_v2_x0_5", 5)
    for network in (theirs, ours):
        network.load_state_dict(checkpoint.load(run_dir / "best.pth")["model"])
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    monkeypatch.setattr("export.to_onnx", lambda network, crop: model)
    # One for both: of two, the one freed last leaves a stale signal stack, and a signal crashes.
    compiled = openvino.compile_model(onnx_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    monkeypatch.setattr(openvino, "compile_model", lambda *args: compiled)
    for module in (benchmark, processes):
        monkeypatch.setattr(module, "same_networks", lambda name, classes: (theirs, ours))


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Run here what would be a process of its own, whose imports take seconds."""

    def run(script, *words):
        if script == "-c":
            train.main(words[2:])
        elif script == processes.BASELINE:
            print(json.dumps(getattr(baseline, words[0])(*map(str, words[1:]))))
        else:
            importlib.import_module(script.stem).main(words)
        return *capsys.readouterr(), {"seconds": 2.0, "peak MB": 3.0}

    monkeypatch.setattr(processes, "run_python", run)


def test_inference_measures_every_network_and_draws_them(exported, tmp_path, capsys):
    words = ["inference", "--batch-sizes", 1, 3, "--rounds", 2, "--seconds", 0]
    rows = benchmark.main([*words, "--plot", tmp_path / "bars.svg"])["rows"]
    for row in rows.values():
        assert list(row) == ["img/s, batch 1", "ms, batch 1", "img/s, batch 3"]
        assert all(len(figures) == 2 and min(figures) > 0 for figures in row.values())
    assert "ours, OpenVINO" in (tmp_path / "bars.svg").read_text()
    head, _, *table = capsys.readouterr().out.splitlines()
    assert " cores, Python " in head
    assert [line.count("|") for line in table] == [5] * (2 + 2 * 3)  # a head, networks, runtimes


def test_scripts_compares_answers_and_speed(flowers, exported, in_process, capsys):
    report = benchmark.main(["scripts", flowers, *X0_5, "--rounds", 2, "--json"])
    assert json.loads(capsys.readouterr().out) == report
    assert [name.split(",")[0] for name in report["rows"]] == ["baseline.py"] + ["predict.py"] * 3
    assert all(row["img/s"] == [20, 20] for row in report["rows"].values())


def test_train_says_what_differs(flowers, torchvision_file, in_process, elsewhere, monkeypatch):
    assert processes.RECIPE in (processes.ROOT / "README.md").read_text()
    monkeypatch.setitem(processes.OURS, "all", {processes.RECIPE: "much"})
    words = ["train", flowers, *X0_5, "--weights", torchvision_file, "--epochs", 1, "--seeds", 1]
    rows = benchmark.main([*words, "-j", 0])["rows"]
    assert [name.partition(":")[0] for name in rows] == ["fc", "fc", "fc", "all", "all"]
    for name, row in rows.items():
        assert ("img/s" in row) == (not name.endswith("again"))  # nothing is computed
        assert ("differs besides speed" in row) == (not name.endswith("baseline.py"))


def test_processes_get_the_environment_of_the_user():
    """What is set after the start, or by importing what is ours, reaches no process."""
    code = """import os, benchmark, processes, predict, train
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
print(processes.run_python("-c", "import json, os; print(json.dumps(dict(os.environ)))")[0])"""
    environment = {"PYTHONPATH": str(processes.ROOT / "tools"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert json.loads(done.stdout) == environment


def test_train_is_run_and_measured_as_a_process(tmp_path):
    *_, figures = processes.run_python("-c", processes.TRAIN, tmp_path, "--help")
    assert figures["peak MB"] > 100  # of torch


def test_wrong_answers_failures_and_paths_are_errors():
    right = np.eye(2)
    for wrong in (right + 1e-4, right * np.nan, right[::-1]):
        with pytest.raises(RunError, match="it answers otherwise"):
            processes.check("it", wrong, right, np.max, 1e-5)
    with pytest.raises(RunError, match="train.py failed: why"):
        processes.run_python("-c", "raise SystemExit('why')")
    with pytest.raises(UsageError, match="PATH nowhere"):
        benchmark.main(["scripts", "nowhere"])

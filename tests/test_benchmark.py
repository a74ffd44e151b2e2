"""The benchmarks run what they say and compare the answers; figures are for people."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import benchmark
import onnx
import pytest

from shufflenet.common.messages import RunError
from shufflenet.inference import checkpoint

ROOT, X0_5 = benchmark.ROOT, ("--model", "shufflenet_v2_x0_5")


@pytest.fixture
def networks(run_dir, onnx_file, monkeypatch):
    """Measure a network that is exported already, since an export takes ten seconds."""
    networks = benchmark.same_networks("shufflenet_v2_x0_5", 5)
    for network in networks:
        network.load_state_dict(checkpoint.load(run_dir / "best.pth")["model"])
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    for place in ("benchmark.to_onnx", "export.to_onnx"):
        monkeypatch.setattr(place, lambda network, crop: model)
    monkeypatch.setattr(benchmark, "same_networks", lambda name, classes: networks)
    monkeypatch.setattr(benchmark, "TURN", 1)
    return networks


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Run here what would be a process of its own, whose imports take seconds."""

    def run(script, *words):
        if script == "tools/baseline.py":
            monkeypatch.setattr(sys, "argv", [script, *words])
            runpy.run_path(ROOT / script, run_name="__main__")
        else:
            importlib.import_module(Path(script).stem).main(words)
        return capsys.readouterr().out

    monkeypatch.setattr(benchmark, "output_of", run)


def test_inference_measures_every_network_and_draws_them(networks, tmp_path, capsys):
    words = ["inference", "--batch-sizes", 1, 3, "--rounds", 2]
    for row in benchmark.main([*words, "--plot", tmp_path / "bars.svg"]).values():
        assert list(row) == ["img/s, batch 1", "img/s, batch 3"]
        assert all(len(figures) == 2 and min(figures) > 0 for figures in row.values())
    assert "ours, OpenVINO" in (tmp_path / "bars.svg").read_text()
    head, _, *table = capsys.readouterr().out.splitlines()
    assert " cores, Python " in head
    assert [line.count("|") for line in table] == [4] * 10  # a head of 2, 2 networks x 3, 8 bits
    networks[1].fc.bias.data[0] += 0.1
    with pytest.raises(AssertionError, match="ours, PyTorch"):
        benchmark.main(words)


def test_scripts_compares_speed_and_answers(flowers, networks, in_process, monkeypatch):
    words = ["scripts", flowers, *X0_5, "--rounds", 1]
    rows = benchmark.main(words)
    assert [name.split(",")[0] for name in rows] == ["baseline.py"] + ["predict.py"] * 3
    (base,) = rows["baseline.py"]["seconds"]
    assert all(row["times faster"] == [base / row["seconds"][0]] for row in rows.values())
    monkeypatch.setattr("export.TOLERANCE", 9)  # let pass what differs
    networks[0].fc.bias.data[0] += 0.1
    with pytest.raises(AssertionError, match="predict.py, .onnx"):
        benchmark.main(words)


def test_train_says_what_differs(flowers, torchvision_file, in_process, elsewhere, monkeypatch):
    monkeypatch.setitem(benchmark.OURS, "all", {benchmark.RECIPE: "much"})
    words = ["train", flowers, *X0_5, "--weights", torchvision_file, "--epochs", 1, "--seeds", 1]
    words += ["--beside", 1]
    rows = benchmark.main([*words, "--workers", 0, "--layers", "all"])
    assert len(rows) == 2
    for name, row in rows.items():
        assert list(row)[2:] == ["seconds an epoch", "times faster an epoch", "accuracy"]
        assert row["seconds an epoch"][0] < row["seconds"][0]
        assert ("differs: " in name) == (not name.endswith("baseline.py"))


def test_processes_get_the_environment_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "show.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as by the benchmark, for itself
    environment = json.loads(benchmark.output_of(tmp_path / "show.py"))
    assert "PATH" in environment
    assert "OMP_WAIT_POLICY" not in environment


def test_a_script_that_fails_is_an_error():
    with pytest.raises(RunError, match="export.py left with exit code 2"):
        benchmark.output_of("export.py", "--weights", "nowhere")

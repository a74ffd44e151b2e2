"""docs/change.md: each of its changes is made in a copy of the repository, which is then used."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small

PAGE = (ROOT / "docs" / "change.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"In `(\S+\.py)`(?:, above `(.+?)`)?:\n\n```\w+\n(.*?)^```$", re.M | re.S)
CHANGES = {
    section.partition("\n")[0]: BLOCK.findall(section) for section in PAGE.split("\n## ")[1:]
}
NETWORK, AUGMENTATION, COMPOSE, OPTIMIZER, METRIC, DATA_SET = CHANGES
# The mains of scripts in one process: imports take seconds.
CALL = "import sys, json, importlib\nfor name, *words in json.loads(sys.argv[1]):\n"
CALL += "    importlib.import_module(name).main(words)\n    print(end='\\f')"


@pytest.fixture
def copy(tmp_path):
    """A folder with the scripts and rooms of the repository."""
    for path in [*ROOT.glob("*.py"), ROOT / "class_indices.json"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "shufflenet", tmp_path / "shufflenet")
    return tmp_path


def change(folder, title):
    """Make a change of the page in a copy; returns the files."""
    for name, above, code in CHANGES[title]:
        if above:
            pairs = [("\n" + above, f"\n{code}\n\n{above}")]
        else:
            pairs = [old_and_new(hunk) for hunk in re.split(r"^@@\n", code, flags=re.M)]
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in pairs:
            places = text.count(old)
            assert places == 1, f"docs/change.md, {title}: {name} has {places} places like\n{old}"
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name, _, _ in CHANGES[title]]


def old_and_new(hunk):
    lines = hunk.splitlines(keepends=True)
    return ["".join(line[1:] for line in lines if line[0] in (" ", mark)) for mark in "-+"]


def run(folder, *commands):
    """Run commands, ("train", "--epochs", 1) and so on, in a copy; returns what each printed."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    program = [sys.executable, "-c", CALL, words]  # with one thread, as conftest.py says
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.split("\f")[:-1]


def last_of(folder):
    return torch.load(folder / "last.pth", weights_only=True)


@pytest.mark.parametrize("title", CHANGES)
def test_each_change_fits_alone_and_is_clean(copy, title):
    assert sum(map(len, CHANGES.values())) == PAGE.count("\n```") / 2, "a block without its place"
    files = change(copy, title)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", *files]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_network_and_a_compose_train_evaluate_classify_and_export(copy, flowers):
    change(copy, NETWORK)
    change(copy, COMPOSE)
    words, best = ["--epochs", 1, "--model", "preact_16"], ["--weights", "fc/best.pth"]
    frozen = ["--freeze-layers", "--weights", "all/best.pth"]
    *_, trained, measured, classified, _ = run(
        copy,
        ["train", *small(flowers, "all"), *words],
        ["train", *small(flowers, "bn", "--freeze-bn"), *words],
        ["train", *small(flowers, "fc", *frozen), *words],
        ["eval", *best],
        ["predict", flowers / "roses" / "roses_000.jpg", *best, "--explain"],
        ["export", *best, "--output", "model.onnx"],
    )
    everything, bn, fc = (last_of(copy / name)["model"] for name in ("all", "bn", "fc"))
    assert everything["bn.running_mean"].any()
    assert not bn["bn.running_mean"].any()  # as it was made
    changed = {name for name in fc if not torch.equal(fc[name], everything[name])}
    assert changed == {"fc.weight", "fc.bias"}
    summaries = [json.loads(out.splitlines()[-1]) for out in (trained, measured)]
    assert summaries[0]["best_accuracy"] == summaries[1]["accuracy"]
    assert "class: " in classified
    assert (copy / "explain.png").exists()


def test_an_augmentation_an_optimizer_a_metric_and_a_data_set_do(copy):
    for title in (AUGMENTATION, OPTIMIZER, METRIC, DATA_SET):
        change(copy, title)
    words = [*small("data/colours", "a"), "--epochs", 1, "--batch-size", 4, "--opt", "radam"]
    best = ["--weights", "a/best.pth"]
    trained, _, measured, classified, _ = run(
        copy,
        ["train", *words],
        ["train", *words, "-j", 2, "--output-dir", "b"],
        ["eval", *best, "--split", "all", "--output-dir", "e"],
        ["predict", "data/colours/red/0.png", *best],
        ["export", *best, "--output", "model.onnx"],
    )
    a, b = last_of(copy / "a"), last_of(copy / "b")
    assert a["classes"] == ["blue", "green", "red"]
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    assert "exp_avg" in a["learning"]["optimizer"]["state"][0]
    assert re.search(r"^epoch 1/1 .* worst_recall [01]\.", trained, re.M)
    assert ",val_worst_recall" in (copy / "a" / "metrics.csv").read_text()
    *_, figures, summary = measured.splitlines()
    recalls = [float(row["recall"]) for row in csv.DictReader((copy / "e/per_class.csv").open())]
    assert json.loads(summary)["worst_recall"] == pytest.approx(min(recalls))
    assert "worst_recall" in figures
    assert "class: " in classified

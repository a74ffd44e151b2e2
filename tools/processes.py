"""Whole processes for benchmark.py: predict.py and train.py against baseline.py.

Each gets the environment of the user and an empty working folder, and nothing else from here.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # taken before anything of ours could add to it
ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "tools" / "baseline.py"
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from cli import RunError  # noqa: E402

CLASSES = "abcde"  # of the network of `scripts`
# Runs of train.py by what is trained: options (up to a comma), and what differs besides speed.
FAST = "--freeze-bn --train-size 176"
RECIPE = f"--fc-first {FAST} --random-erase 0.25"
SMALL = "batch norm frozen, crops of 176 pixels (not 224)"
CACHED = (
    "no augmentation, batch norm frozen, features standardised, learning rate 0.03 (not 0.01), "
    "batch size 64 (not 16), weight decay 0.1 (not 4e-5)"
)
OURS = {
    "fc": {"--freeze-layers, first run": CACHED, "--freeze-layers, again": CACHED},
    "all": {
        "": "random draws only",
        "--freeze-bn": "batch norm frozen",
        FAST: SMALL,
        RECIPE: f"{SMALL}, random erasing, fc trained first, learning rate 0.001 (not 0.01)",
    },
}
# train.py with a feature cache of its own, so that a first run finds none.
TRAIN = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import cli, features, train
features.CACHE = pathlib.Path(sys.argv.pop(1))
cli.run(train.main)
"""
# The peak memory of a process includes what its parent had, so a small one starts what is measured.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print(code, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure_scripts(args: Namespace) -> Iterator[tuple[str, dict]]:
    """Classify the same images with the same network; yields names and figures, turn by turn."""
    import numpy as np
    import torch

    is_folder = os.path.isdir(args.path)
    cli.require_path(args.path, "PATH", folder=is_folder)
    path = os.path.realpath(args.path)
    with tempfile.TemporaryDirectory() as scratch:
        pth, onnx = f"{scratch}/model.pth", f"{scratch}/model.onnx"
        torch.save(same_networks(args.model, len(CLASSES))[0].state_dict(), pth)
        Path(scratch, "class_indices.json").write_text(json.dumps(dict(enumerate(CLASSES))))
        run_python(ROOT / "export.py", "--weights", pth, "--output", onnx)
        plain = [BASELINE, "classify", path, pth, args.model, cli.cores() if is_folder else 0]
        ours = {
            "predict.py, .pth": [pth, "--device", "cpu"],
            "predict.py, .onnx by ONNX Runtime": [onnx],
            "predict.py, .onnx by OpenVINO": [onnx, "--runtime", "openvino"],
        }
        read_files(path)
        for _ in range(args.rounds):
            output, _, base = run_python(*plain)
            expected = json.loads(output)
            count = len(expected)
            yield "baseline.py", compare(base, base) | {"img/s": count / base["seconds"]}
            for name, words in ours.items():
                words = [ROOT / "predict.py", path, "--json", "--weights", *words]
                output, _, figures = run_python(*words)
                found = dict(map(_probabilities, output.splitlines()))
                if found.keys() != expected.keys():
                    raise RunError(f"{name} answers for other images than baseline.py")
                pair = np.array([(found[path], expected[path]) for path in expected])  # (N,2,5)
                # On average: a pixel may differ by 1 of 255, to which random weights are sensitive.
                check(name, pair[:, 0], pair[:, 1], np.mean, 2e-3)
                yield name, compare(base, figures) | {"img/s": count / figures["seconds"]}


def _probabilities(line: str) -> tuple[str, list[float]]:
    """Path and probabilities, in the order of the classes, of a line of `predict.py --json`."""
    answer = json.loads(line)
    by_class = {guess["class"]: guess["prob"] for guess in answer["predictions"]}
    return answer["path"], [by_class[name] for name in CLASSES]


def measure_training(args: Namespace) -> Iterator[tuple[str, dict]]:
    """Train with the same images, epochs and seeds; yields names and figures, turn by turn."""
    cli.require_path(args.path, "PATH", folder=True)
    if args.weights:
        cli.require_path(args.weights, "--weights")
    path, weights = (place and os.path.realpath(place) for place in (args.path, args.weights))
    read_files(path)
    with tempfile.TemporaryDirectory() as scratch:
        for seed, layers in itertools.product(range(args.seeds), args.layers):
            words = [path, weights, args.model, layers, args.epochs, seed, args.workers]
            output, _, base = run_python(BASELINE, "train", *words)
            yield f"{layers}: baseline.py", compare(base, base) | json.loads(output)
            common = ["-c", TRAIN, f"{scratch}/features, {layers}, {seed}", "--device", "cpu"]
            common += ["--data-path", path, "--weights", weights, "--model", args.model]
            common += ["--epochs", args.epochs, "--seed", seed, "--workers", args.workers]
            for name, differs in OURS[layers].items():
                options = name.partition(",")[0].split()
                if "--fc-first" in options and not weights:
                    continue  # there is nothing that fc could learn from
                options += ["--output-dir", tempfile.mkdtemp(dir=scratch)]
                output, notices, figures = run_python(*common, *options)
                figures["accuracy"] = float(re.findall(r"val loss \S+ acc (\S+)", output)[-1])
                if rates := re.findall(r"(\d+) img/s", notices + output):
                    figures["img/s"] = float(rates[-1])  # of the last epoch, else of features
                figures["differs besides speed"] = differs
                yield f"{layers}: train.py {name}".strip(), compare(base, figures)


def run_python(*words: object) -> tuple[str, str, dict]:
    """Run Python with these words; returns stdout, stderr, and its seconds and peak megabytes. A
    process that fails raises RunError."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, words)]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, env=ENVIRONMENT, cwd=empty, capture_output=True, text=True)
    output, _, measured = done.stdout.rstrip().rpartition("\n")
    code, seconds, peak = map(float, measured.split())
    if code:
        script = "train.py" if words[0] == "-c" else Path(words[0]).name
        reason = done.stderr.rstrip().rpartition("\n")[2].strip()
        raise RunError(f"{script} failed: {reason or f'exit code {code:.0f}'}")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return output, done.stderr, {"seconds": seconds, "peak MB": peak * unit / 1e6}


def compare(base: dict, figures: dict) -> dict:
    """Figures of a process with the speed-up over the baseline in the same turn."""
    faster = base["seconds"] / figures["seconds"]
    return {"seconds": figures["seconds"], "times faster": faster} | figures


def read_files(path: str) -> None:
    """Read every image once, so that the first process finds the disk no colder than the next."""
    for file in Path(path).rglob("*.*"):
        if file.is_file():
            file.read_bytes()


def same_networks(model_name: str, classes: int) -> tuple:
    """torchvision's network and ours with the same random weights, batch norm as if trained."""
    import torch
    import torchvision

    from model import build_model

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, model_name)(num_classes=classes)
    theirs.apply(lambda module: setattr(module, "momentum", None))  # statistics are plain means
    with torch.no_grad():
        theirs(torch.randn(32, 3, 224, 224))
    ours = build_model(model_name, classes)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def check(name: str, found, expected, measure: Callable, tolerance: float) -> None:
    """Raise RunError unless two arrays (N, classes) agree, since a fast wrong answer is an error:
    `measure` (np.max, np.mean) of the differences within the tolerance, 99 % the same class."""
    difference = measure(abs(found - expected))
    same = (found.argmax(1) == expected.argmax(1)).mean()
    if not (difference <= tolerance and same >= 0.99):
        raise RunError(f"{name} answers otherwise: off by {difference:.2g}, {same:.1%} same class")

"""Measure this repository against torchvision and the plain way (baseline.py), on the CPU.

    python tools/benchmark.py inference                     networks alone, in one process
    python tools/benchmark.py scripts FOLDER                predict.py, whole processes
    python tools/benchmark.py train FOLDER --weights FILE   train.py, whole processes

Candidates take turns, so that a busy machine slows them alike, and their answers are compared.
Prints a Markdown table: median (smallest to largest). FOLDER holds a folder per class.
"""

# ruff: noqa: E402
import contextlib
import csv
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

ENVIRONMENT = dict(os.environ)  # of the user, before any import could add to it
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import onnxruntime
import openvino
import torch
import torchvision
from matplotlib.figure import Figure

from model import build_model
from shufflenet.common.messages import RunError, notice, say
from shufflenet.common.options import Parser, Words, cores, number, run_script
from shufflenet.inference.onnx_file import to_onnx
from shufflenet.inference.quantize import quantize
from shufflenet.inference.rewrite import rewrite_for_inference

MODELS = [f"shufflenet_v2_{width}" for width in ("x0_5", "x1_0", "x1_5", "x2_0")]
EXTENSIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "amx_tile": "AMX"}
EXTENSIONS |= {"avx512_bf16": "bfloat16"}
TURN = 128  # images of a turn of `inference`, or one batch if that has more
# Commands by what is trained (up to a comma), and what differs from baseline.py besides speed.
CACHED = "standardised features, no augmentation, batch norm frozen, lr 0.03, batch 64, decay 0.1"
RECIPE = "train.py"
OURS = {
    "fc": {"train.py --freeze-layers": CACHED, "train.py --freeze-layers, again": CACHED},
    "all": {
        "train.py --no-fc-first": "random draws",
        "train.py --no-fc-first --freeze-bn": "batch norm frozen",
        RECIPE: "fc trained first, batch norm frozen, smaller crops, average, lr 0.003, lrf 0.01",
    },
}


def build_parser() -> Parser:
    parser = Parser(description="Measure this repository against the plain way.")
    kinds = parser.add_subparsers(dest="what", required=True)
    count, place = {"type": number(int, 1), "metavar": "N"}, {"type": os.path.abspath}
    for what in MEASURES:
        add = kinds.add_parser(what).add_argument
        add("--model", choices=MODELS, default=MODELS[1], help="network")
        if what != "inference":
            add("folder", metavar="FOLDER", help="holds a folder per class", **place)
        if what != "train":
            add("--rounds", default=5, help="turns of every candidate", **count)
        if what == "inference":
            add("--batch-sizes", nargs="+", default=[1, 8, 64], help="images per call", **count)
            add("--plot", metavar="FILE", help="draw the largest batch size as bars", **place)
        if what == "train":
            add("--weights", required=True, help="state dict to start from", **place)
            add("--layers", nargs="+", choices=OURS, default=list(OURS), help="what is trained")
            add("--epochs", default=30, help="of every run", **count)
            add("--seeds", default=3, help="turns of every candidate, from seed 0 on", **count)
            add("--beside", type=int, default=0, metavar="N", help="busy processes beside all")
            add("--workers", type=int, default=cores() - 1, help="that read images")
    return parser


def main(args: Words = None) -> dict:
    """Measure as the options say; returns {candidate: {column: [figure of every turn]}}."""
    args = build_parser().parse_args(args)
    options = [f"{name} {value}" for name, value in vars(args).items() if name != "words"]
    head, rows = ", ".join([describe_machine(), *options]), {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for name, figures in MEASURES[args.what](args):
            notice(f"{name}: {figures}")  # a benchmark that is stopped has shown something
            for column, figure in figures.items():
                rows.setdefault(name, {}).setdefault(column, []).append(figure)
    columns = list(next(iter(rows.values())))
    table = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        cells = [f"{median(x):.4g} ({min(x):.4g} to {max(x):.4g})" for x in row.values()]
        table.append([name, *cells])
    say("\n".join([head, "", *(f"| {' | '.join(line)} |" for line in table)]))
    if args.what == "inference" and args.plot:
        draw_bars(rows, f"img/s, batch {max(args.batch_sizes)}", args.model, args.plot)
    return rows


def describe_machine() -> str:
    """Processor, vector extensions, cores, versions, and the commit of this repository."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    processor = re.findall("model name.*: (.*)", cpuinfo) or [platform.processor()]
    extensions = [name for flag, name in EXTENSIONS.items() if flag in cpuinfo.split()]
    packages = ("torch", "torchvision", "onnxruntime", "openvino")
    versions = [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    commit = subprocess.getoutput(f'git -C "{ROOT}" describe --always --dirty')
    facts = [processor[0], *extensions, f"{cores()} cores", *versions, f"commit {commit}"]
    return ", ".join(facts)


def measure_inference(args: Namespace) -> Iterator[tuple[str, dict]]:
    """Run networks on the same images; yields names and figures, turn by turn."""
    theirs, ours = same_networks(args.model, 1000)
    networks = {}
    for name, network in (("torchvision", theirs), ("ours", rewrite_for_inference(ours))):
        networks[f"{name}, PyTorch"] = in_pytorch(network)
        onnx = to_onnx(getattr(network, "network", network), 224).SerializeToString()
        networks |= in_runtimes(name, onnx)
    small = quantize(onnx, torch.randn(8, 1, 3, 224, 224).numpy())
    networks |= in_runtimes("ours, int8", small)
    for batch in args.batch_sizes:
        x = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), np.float32)
        expected = networks["torchvision, PyTorch"](x)
        largest, calls = abs(expected).max(), max(1, TURN // batch)
        for name, run in [*networks.items()] * args.rounds:
            # A fast wrong answer is an error; this call warms up, too. 8 bits are not exact.
            atol = (0.3 if "int8" in name else 1e-4) * largest
            np.testing.assert_allclose(run(x), expected, rtol=0, atol=atol, err_msg=name)
            start = time.perf_counter()
            for _ in range(calls):
                run(x)
            yield name, {f"img/s, batch {batch}": calls * batch / (time.perf_counter() - start)}


def in_pytorch(network) -> Callable:
    """A function of normalised images (N, 3, 224, 224) that returns logits (N, 1000)."""
    forward = torch.inference_mode()(network.forward)
    return lambda x: forward(torch.from_numpy(x)).numpy()


def in_runtimes(name: str, onnx: bytes) -> dict[str, Callable]:
    """The like of a file, by the name of the runtime."""
    session = onnxruntime.InferenceSession(onnx)
    model = openvino.Core().read_model(onnx)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {
        f"{name}, ONNX Runtime": lambda x: session.run(None, {"input": x})[0],
        f"{name}, OpenVINO": lambda x: compiled(x)["logits"],
    }


def same_networks(model_name: str, classes: int) -> tuple:
    """torchvision's network and ours with the same random weights, batch norm as if trained."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(model_name, num_classes=classes)
    theirs.apply(lambda module: setattr(module, "momentum", None))  # statistics are plain means
    with torch.no_grad():
        theirs(torch.randn(32, 3, 224, 224))
    ours = build_model(model_name, classes)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def measure_scripts(args: Namespace) -> Iterator[tuple[str, dict]]:
    """Classify the same images with the same network; yields names and figures, turn by turn."""
    shutil.copytree(args.folder, "images")  # to be in memory for all alike
    torch.save(same_networks(args.model, 5)[0].state_dict(), "model.pth")
    Path("class_indices.json").write_text(json.dumps(dict(enumerate("01234"))))
    output_of("export.py", "--weights", "model.pth", "--output", "model.onnx")
    predict = "predict.py images --json --weights"
    commands = {
        "baseline.py": f"tools/baseline.py classify images model.pth {args.model} {cores()}",
        "predict.py, .pth": f"{predict} model.pth --device cpu",
        "predict.py, .onnx by ONNX Runtime": f"{predict} model.onnx",
        "predict.py, .onnx by OpenVINO": f"{predict} model.onnx --runtime openvino",
    }
    for _ in range(args.rounds):
        expected = None
        for name, output, figures in take_turn(commands):
            answers = [json.loads(line) for line in output.splitlines()]
            found = {(a["path"], g["class"]): g["prob"] for a in answers for g in a["predictions"]}
            expected = expected or found
            # On average: a pixel may differ by 1 of 255, to which random weights are sensitive.
            difference = mean(abs(expected[guess] - found[guess]) for guess in expected)
            np.testing.assert_allclose(difference, 0, atol=2e-3, err_msg=name)
            yield name, figures


def measure_training(args: Namespace) -> Iterator[tuple[str, dict]]:
    """Train with the same images, epochs and seeds; yields names and figures, turn by turn."""
    with busy_processes(args.beside):
        yield from train_in_turns(args)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other work for the machine: so many processes that use a core each, as far as they get it."""
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train_in_turns(args: Namespace) -> Iterator[tuple[str, dict]]:
    shutil.copy(args.weights, "weights.pth")
    for seed, layers in itertools.product(range(args.seeds), args.layers):
        # In memory for all alike, and at a new place: no features of it are cached.
        images = shutil.copytree(args.folder, f"images-{layers}-{seed}")
        plain = f"{images} weights.pth {args.model} {layers} {args.epochs} {seed} {args.workers}"
        commands = {f"{layers}: baseline.py": f"tools/baseline.py train {plain}"}
        common = f"--data-path {images} --weights weights.pth --model {args.model} --device cpu"
        common += f" --epochs {args.epochs} --seed {seed} --workers {args.workers}"
        for name, differs in OURS[layers].items():
            row = f"{layers}: {name} (differs: {differs})"
            commands[row] = f"{name.partition(',')[0]} {common}"
        base = None
        for name, output, figures in take_turn(commands):
            summary = json.loads(output.splitlines()[-1])
            epoch = median(summary.get("epoch_seconds") or epoch_seconds(summary["output_dir"]))
            base = base or epoch
            figures |= {"seconds an epoch": epoch, "times faster an epoch": base / epoch}
            yield name, figures | {"accuracy": summary["best_accuracy"]}
        shutil.rmtree(images)


def epoch_seconds(run: str) -> list[float]:
    """What each epoch of a run took with its validation, but for epoch 0, `fc` alone."""
    with open(Path(run, "metrics.csv"), newline="") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file) if row["epoch"] != "0"]


def take_turn(commands: dict[str, str]) -> Iterator[tuple[str, str, dict]]:
    """Run commands, the baseline first; yields name, stdout and figures of each."""
    base = None
    for name, command in commands.items():
        start = time.perf_counter()
        output = output_of(*command.split())
        seconds = time.perf_counter() - start
        base = base or seconds
        yield name, output, {"seconds": seconds, "times faster": base / seconds}


def output_of(script: str, *words: str) -> str:
    """Run a script of this repository as the user would; returns stdout. RunError if it fails."""
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{script} left with exit code {done.returncode}, see above")
    return done.stdout


def draw_bars(rows: dict, column: str, model_name: str, path: str) -> None:
    figure = Figure(figsize=(8, 3), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = ["C0" if name.startswith("ours") else "0.7" for name in rows]
    bars = axes.barh(list(rows), [median(row[column]) for row in rows.values()], color=colours)
    axes.bar_label(bars, fmt="{:.0f}", padding=3)
    axes.invert_yaxis()  # the first on top
    axes.margins(x=0.1)
    axes.set_title(f"{model_name}, {column}")
    figure.savefig(path)


MEASURES = {"inference": measure_inference, "scripts": measure_scripts, "train": measure_training}

if __name__ == "__main__":
    run_script(main)

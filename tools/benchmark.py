"""Measure this repository against torchvision and the plain way (baseline.py), on the CPU.

    python tools/benchmark.py inference                     networks alone, in one process
    python tools/benchmark.py scripts FOLDER_OR_IMAGE       predict.py, whole processes
    python tools/benchmark.py train FOLDER --weights FILE   train.py, whole processes

Candidates take turns, so that a busy machine slows them alike, and their answers are compared.
Prints a Markdown table of medians and ranges, or one JSON object with the figures of every turn.
"""

import json
import platform
import re
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev

# Before anything else of ours, which could add to the environment that it notes.
from processes import OURS, ROOT, check, measure_scripts, measure_training, same_networks

import cli

MODELS = [f"shufflenet_v2_{width}" for width in ("x0_5", "x1_0", "x1_5", "x2_0")]
EXTENSIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "amx_tile": "AMX", "avx512_bf16": "bfloat16"}


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure this repository against the plain way.")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    inference = kinds.add_parser("inference", help="networks alone, in one process")
    scripts = kinds.add_parser("scripts", help="predict.py, whole processes")
    train = kinds.add_parser("train", help="train.py, whole processes")
    count = {"type": cli.number(int, 1), "metavar": "N"}
    scripts.add_argument("path", metavar="PATH", help="folder of class folders, or an image")
    train.add_argument("path", metavar="PATH", help="folder of class folders")
    for kind in (inference, scripts, train):
        kind.add_argument("--model", choices=MODELS, default=MODELS[1], help="network")
        kind.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for kind in (inference, scripts):
        kind.add_argument("--rounds", default=5, help="turns of every candidate", **count)
    add = inference.add_argument
    add("--batch-sizes", nargs="+", default=[1, 8, 64], help="images per call", **count)
    add("--seconds", type=cli.number(float, 0), default=0.5, metavar="S", help="length of a turn")
    add("--plot", metavar="FILE", help="draw the largest batch size as bars")
    add = train.add_argument
    add("--weights", default="", metavar="FILE", help="state dict to start from; '' is none")
    add("--layers", nargs="+", choices=OURS, default=list(OURS), help="what is trained")
    add("--epochs", default=30, help="of every run", **count)
    add("--seeds", default=3, help="turns of every candidate, with seeds 0 to N - 1", **count)
    add("-j", "--workers", type=cli.number(int, 0, 256), default=max(1, cli.cores() - 1),
        metavar="N", help="processes that read images")  # fmt: skip
    return parser


def main(args: Namespace | Sequence | None = None) -> dict:
    """Measure as the options say; returns {"machine": text, "options": text, "rows": {candidate:
    {column: [figure of every turn]}}}."""
    args = cli.parse(build_parser(), args)
    if plot := getattr(args, "plot", None):
        cli.check_file("--plot", plot, cli.PLOTS)
    options = [f"{k} {v}" for k, v in vars(args).items() if k not in ("words", "json", "plot")]
    report = {"machine": describe_machine(), "options": ", ".join(options), "rows": {}}
    for name, figures in MEASURES[args.what](args):
        for column, figure in figures.items():
            report["rows"].setdefault(name, {}).setdefault(column, []).append(figure)
    cli.say(json.dumps(report) if args.json else as_markdown(report))
    if plot:
        _draw_bars(report["rows"], f"img/s, batch {max(args.batch_sizes)}", args.model, plot)
    return report


def measure_inference(args: Namespace) -> Iterator[tuple[str, dict]]:
    """Run networks on the same images; yields names and figures, turn by turn."""
    import numpy as np

    networks = open_networks(args.model)
    for batch in args.batch_sizes:
        x = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
        expected = networks["torchvision, PyTorch"](x)
        for turn in range(args.rounds + 1):
            for name, network in networks.items():
                check(name, network(x), expected, np.max, 1e-4 * abs(expected).max())
                calls, start = 0, time.perf_counter()
                while not calls or time.perf_counter() - start < args.seconds:
                    network(x)
                    calls += 1
                seconds = (time.perf_counter() - start) / calls
                if turn:  # the first warms up
                    latency = {"ms, batch 1": 1000 * seconds} if batch == 1 else {}
                    yield name, {f"img/s, batch {batch}": batch / seconds} | latency


def open_networks(model_name: str) -> dict[str, Callable]:
    """Functions of normalised images (N, 3, 224, 224) that return logits (N, 1000), by name."""
    import onnxruntime
    import openvino
    import torch

    from export import to_onnx
    from optimize import optimize_for_inference

    theirs, ours = same_networks(model_name, 1000)
    optimized = optimize_for_inference(ours)
    networks = {}
    for name, network, exported in (
        ("torchvision", theirs, theirs),
        ("ours", optimized, optimized.network),
    ):
        onnx = to_onnx(exported, 224).SerializeToString()
        session = onnxruntime.InferenceSession(onnx)
        model = openvino.Core().read_model(onnx)
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        forward = torch.inference_mode()(network.forward)
        networks |= {
            f"{name}, PyTorch": lambda x, run=forward: run(torch.from_numpy(x)).numpy(),
            f"{name}, ONNX Runtime": lambda x, run=session.run: run(None, {"input": x})[0],
            f"{name}, OpenVINO": lambda x, run=compiled: run(x)["logits"],
        }
    return networks


def describe_machine() -> str:
    """Processor, vector extensions, cores, versions, and the commit of this repository."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    known = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    if flags := known.get("flags", "").split():
        extensions = [name for flag, name in EXTENSIONS.items() if flag in flags]
    else:
        import torch

        extensions = [torch.backends.cpu.get_cpu_capability()]
    packages = ("torch", "torchvision", "onnxruntime", "openvino")
    versions = [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    processor = known.get("model name") or platform.processor() or platform.machine()
    describe = "git describe --always --exclude='*' --dirty=+changes"
    git = subprocess.run(describe, shell=True, cwd=ROOT, capture_output=True, text=True)
    commit = f"commit {git.stdout.strip() or 'unknown'}"
    return ", ".join([processor, *extensions, f"{cli.cores()} cores", *versions, commit])


def as_markdown(report: dict) -> str:
    """The machine, the options, and a table of medians and ranges."""
    rows = report["rows"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_cell(c, row.get(c)) for c in columns)] for name, row in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{report['machine']}; {report['options']}\n\n{table}"


def _cell(column: str, figures: list | None) -> str:
    if not figures or isinstance(figures[0], str):
        return figures[0] if figures else ""
    if column == "accuracy" and len(figures) > 1:
        return f"{mean(figures):.3f} ± {stdev(figures):.3f}"
    shown = (median(figures), min(figures), max(figures))
    middle, low, high = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in shown)
    return middle if low == high else f"{middle} ({low} to {high})"


def _draw_bars(rows: dict, column: str, model_name: str, path: str) -> None:
    from matplotlib.figure import Figure

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
    cli.run(main)

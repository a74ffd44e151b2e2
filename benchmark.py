"""Measure this repository against the plain way, on the machine at hand.

    python benchmark.py inference
    python benchmark.py pipeline DIR
    python benchmark.py startup IMAGE
    python benchmark.py train DIR --weights FILE --model shufflenet_v2_x0_5

`inference` measures networks alone, in one process, in turns; the others measure whole processes,
which take turns too. plain.py is what they are compared with. Outputs are compared in the same
run: a fast wrong answer is an error. Prints a Markdown table, or with --json one JSON object.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from cli import RunError, notice
from runtime import OPEN, installed_runtimes

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

ROOT = Path(__file__).parent
# How far logits may be from torchvision's, over the largest.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
MODELS = [f"shufflenet_v2_{width}" for width in ("x0_5", "x1_0", "x1_5", "x2_0")]
PARALLEL = ", a batch a core"
SCRIPTS = ("plain.py", "predict.py", "export.py")
# Runs of train.py by what is trained: what is added to the name of the row, and the options.
FASTER = "--freeze-bn --train-size 176"
RECIPE = f"--fc-first {FASTER} --random-erase 0.25"
OURS = {
    "fc": {", first run": "--freeze-layers", ", again": "--freeze-layers"},
    "all": {"": "", f" {FASTER}": FASTER, f" {RECIPE}": RECIPE},
}
# train.py with a cache of features at the place named first.
OUR_TRAINING = """
import pathlib, sys, cli, features, train
features.CACHE = pathlib.Path(sys.argv.pop(1))
cli.run(train.build_parser(), train.main)
"""


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure this repository against the plain way.")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    inference = kinds.add_parser("inference", help="networks alone, by every runtime")
    inference.add_argument(
        "--batch-sizes", nargs="+", type=cli.number(int, 1), default=[1, 8, 64], metavar="N"
    )
    inference.add_argument(
        "--seconds", type=cli.number(float, 0), default=0.5, metavar="S",
        help="each candidate computes so long in a round",
    )  # fmt: skip
    inference.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    inference.add_argument("--plot", metavar="FILE", help="draw the table as bars")
    inference.set_defaults(run=measure_inference)

    pipeline = kinds.add_parser("pipeline", help="from picture files to classes")
    pipeline.add_argument("pictures", metavar="DIR", help="folder with one folder per class")
    pipeline.set_defaults(run=measure_scripts)

    startup = kinds.add_parser("startup", help="one picture from the shell")
    startup.add_argument("pictures", metavar="IMAGE", help="a picture")
    startup.set_defaults(run=measure_scripts)

    train = kinds.add_parser("train", help="train.py and the plain loop, whole processes")
    train.add_argument("data_path", metavar="DIR", help="folder with one folder per class")
    train.add_argument(
        "--weights", default="", metavar="FILE", help="state dict to start from; '' is none"
    )
    train.add_argument(
        "--layers", nargs="+", choices=OURS, default=list(OURS), help="what is trained"
    )
    train.add_argument(
        "--epochs", type=cli.number(int, 1), default=30, metavar="N", help="epochs of every run"
    )
    train.add_argument(
        "--seeds", type=cli.number(int, 1), default=3, metavar="N", help="runs, seeds 0 to N - 1"
    )
    cli.add_workers(train)
    train.set_defaults(run=measure_training)

    for kind in (inference, pipeline, startup, train):
        kind.add_argument(
            "--model",
            choices=MODELS,
            default="shufflenet_v2_x1_0",
            metavar="NAME",
            help=", ".join(MODELS),
        )
        kind.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if kind is not train:
            kind.add_argument("--amp", action="store_true", help="bfloat16 too")
            kind.add_argument(
                "--rounds", type=cli.number(int, 1), default=5, metavar="N",
                help="turns that every candidate takes",
            )  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> dict:
    """Run the benchmark; returns {"machine": text, "options": text, "rows": [{"name", figures...},
    ...]}."""
    plot = getattr(args, "plot", None)
    if plot:
        cli.check_file("--plot", plot, cli.PLOTS)
    report = {"machine": _machine()} | args.run(args)
    if args.json:
        cli.say(json.dumps(report))
    else:
        cli.say(f"{report['machine']}; {report['options']}\n\n{_table(report['rows'])}")
    if plot:
        import plots

        best = max(args.batch_sizes)
        column = f"img/s, batch {best}"
        bars = {row["name"]: row[column] for row in report["rows"]}
        plots.save_figure(plots.draw_bars(bars, column), plot)
    return report


# -- networks alone ------------------------------------------------------------------------------


def measure_inference(args: argparse.Namespace) -> dict:
    """Images a second and latency of the same network by torchvision and by us, by every runtime.

    Rows named "a batch a core" compute as many batches at once as there are cores, as
    `pipeline.stream` does; the others one batch on all cores.
    """
    import numpy as np
    import torch

    threads = cli.cores()
    torch.set_num_threads(threads)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        candidates = _candidates(args, Path(folder), threads)
        for batch in args.batch_sizes:
            torch._dynamo.reset()  # compile for this size, not for any
            x = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
            expected = candidates["torchvision, PyTorch"](x)
            calls: dict[str, Callable[[], object]] = {}
            for name, run in list(candidates.items()):
                try:
                    _check(name, run(x), expected)
                except RuntimeError as error:
                    if isinstance(error, RunError) or "torch.compile" not in name:
                        raise
                    notice(f"{name} is left out, it needs a C++ compiler: {error}".split("\n")[0])
                    del candidates[name]
                    continue
                calls[name] = lambda run=run, x=x: run(x)
                if name.endswith(PARALLEL):
                    calls[name] = lambda run=run, x=x: list(pool.map(run, [x] * threads))
            seconds = _take_turns(calls, args.rounds, args.seconds)
            for name, times in seconds.items():
                images = batch * (threads if name.endswith(PARALLEL) else 1)
                middle = statistics.median(times)
                row = rows.setdefault(name, {"name": name})
                row[f"img/s, batch {batch}"] = round(images / middle, 1)
                row[f"ms, batch {batch}"] = round(1e3 * middle, 2)
                row[f"95 %, batch {batch}"] = round(1e3 * float(np.percentile(times, 95)), 2)
    options = f"{args.model}, 224 pixels, {threads} threads, {args.rounds} rounds in turns"
    return {"options": options, "rows": list(rows.values())}


def _candidates(
    args: argparse.Namespace, folder: Path, threads: int
) -> dict[str, Callable[["np.ndarray"], "np.ndarray"]]:
    """What computes logits (N, classes) of normalised pictures (N, 3, 224, 224), by name."""
    import torch

    from export import to_onnx
    from inference import optimize_for_inference

    theirs, ours = _same_networks(args.model, 1000)
    optimized = optimize_for_inference(ours)

    def eager(model: torch.nn.Module, threads: int = threads) -> Callable:
        @torch.inference_mode()
        def run(x: "np.ndarray") -> "np.ndarray":
            torch.set_num_threads(threads)
            return model(torch.from_numpy(x)).numpy()

        return run

    found = {"torchvision, PyTorch": eager(theirs), "ours, PyTorch": eager(optimized)}
    if args.amp:
        found["ours, PyTorch bfloat16"] = eager(optimize_for_inference(ours, torch.bfloat16))
    if not args.no_compile:
        found["torchvision, torch.compile"] = eager(torch.compile(theirs))
    files = {"torchvision": folder / "theirs.onnx", "ours": folder / "ours.onnx"}
    for name, network in (("torchvision", theirs), ("ours", optimized.network)):
        files[name].write_bytes(to_onnx(network, 224).SerializeToString())
    titles = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    installed = installed_runtimes()
    for kind in installed:
        for name, file in files.items():
            run, _ = OPEN[kind](file, 1, False, threads)
            found[f"{name}, {titles[kind]}"] = run
        if args.amp and kind == "openvino":
            for name, file in files.items():
                run, _ = OPEN[kind](file, 1, True, threads)
                found[f"{name}, {titles[kind]} bfloat16"] = run
    found[f"ours, PyTorch{PARALLEL}"] = eager(optimized, 1)
    for kind in installed:
        run, _ = OPEN[kind](files["ours"], threads, False)
        found[f"ours, {titles[kind]}{PARALLEL}"] = run
    return found


def _same_networks(model_name: str, classes: int) -> tuple["nn.Module", "nn.Module"]:
    """torchvision's network and ours, weights random but the same, batch norms as if trained."""
    import torch
    import torchvision

    from model import build_model

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, model_name)(num_classes=classes)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # plain means over what it sees
    with torch.no_grad():
        for _ in range(4):
            theirs(torch.randn(16, 3, 224, 224))
    ours = build_model(model_name, classes)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def _check(name: str, found: "np.ndarray", expected: "np.ndarray") -> None:
    difference = float(abs(found - expected).max() / abs(expected).max())
    if not difference <= TOLERANCE["bfloat16" if "bfloat16" in name else "float32"]:
        raise RunError(f"{name} computes other logits, by {difference:.2g} of the largest")


def _take_turns(
    calls: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every call: each round lets every candidate compute for a while, in turn; the
    round before the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            end = time.perf_counter() + seconds
            while True:
                start = time.perf_counter()
                call()
                if turn:
                    times[name].append(time.perf_counter() - start)
                if time.perf_counter() > end:
                    break
    return times


# -- whole processes -----------------------------------------------------------------------------


def measure_scripts(args: argparse.Namespace) -> dict:
    """Whole processes that classify the same pictures with the same network: from a folder to
    classes, or one picture from the shell, nearly all of which is imports."""
    folder_of_pictures = args.what == "pipeline"
    cli.require_path(args.pictures, "PICTURES", folder=folder_of_pictures)
    pictures = str(Path(args.pictures).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        weights, exported = Path(scratch, "best.pth"), Path(scratch, "best.onnx")
        _write_checkpoint(args.model, weights)
        _run(["export.py", "--weights", weights, "--output", exported, "--check-on", pictures])
        ours = {"predict.py, .pth": ["--weights", weights]}
        if args.amp:
            ours["predict.py, .pth, --amp"] = ["--weights", weights, "--amp"]
        for name in installed_runtimes():
            options = ["--weights", exported, "--runtime", name]
            ours[f"predict.py, .onnx, {name}"] = options
            if args.amp and name == "openvino":
                ours[f"predict.py, .onnx, {name}, --amp"] = [*options, "--amp"]
        table = Path(scratch, "result.jsonl")

        runs: dict[str, list[dict]] = {}
        agreement = {}
        for _ in range(args.rounds):
            command = ["plain.py", "classify", pictures, weights, args.model, cli.cores()]
            result = _run(command)
            runs.setdefault("plain.py", []).append(result)
            expected = json.loads(result["output"])
            for name, options in ours.items():
                result = _run(["predict.py", pictures, *options, "--output", table])
                runs.setdefault(name, []).append(result)
                agreement[name] = _compare(name, table, expected)
    rows = _rows(runs)
    for row in rows:
        if folder_of_pictures:
            row["img/s"] = round(len(expected) / row["seconds"], 1)
        row |= agreement.get(row["name"], {})
    options = f"{args.model}, pictures: {len(expected)}, {args.rounds} rounds in turns"
    return {"options": options, "rows": rows}


def _write_checkpoint(model_name: str, path: Path) -> None:
    """A checkpoint of five classes as train.py writes it."""
    import checkpoint
    from image import default_preprocessing

    _, model = _same_networks(model_name, 5)
    about = {"model_name": model_name, "classes": list("abcde"), "args": {}}
    about["preprocessing"] = default_preprocessing(model_name)
    checkpoint.save({"model": model.state_dict()} | about, path)


def _compare(name: str, table: Path, expected: dict[str, list[float]]) -> dict:
    """How far the probabilities that predict.py wrote are from the plain ones."""
    same, largest, lines = 0, 0.0, table.read_text().splitlines()
    if len(lines) != len(expected):
        raise RunError(f"{name}: answered for {len(lines)} of {len(expected)} pictures")
    for line in lines:
        result = json.loads(line)
        theirs = dict(zip("abcde", expected[result["path"]], strict=True))
        same += result["predictions"][0]["class"] == max(theirs, key=theirs.get)
        differences = (abs(g["prob"] - theirs[g["class"]]) for g in result["predictions"])
        largest = max(largest, *differences)
    share = same / len(lines)
    if share < 0.99 or ("--amp" not in name and largest > 1e-3):
        raise RunError(f"{name}: {share:.1%} the same classes, probabilities off by {largest:.2g}")
    return {"same class, %": round(100 * share, 2), "largest difference": float(f"{largest:.1g}")}


def measure_training(args: argparse.Namespace) -> dict:
    """train.py and the plain loop, whole processes: `fc` alone, by us on cached features, and all
    layers."""
    cli.require_path(args.data_path, "DIR", folder=True)
    if args.weights:
        cli.require_path(args.weights, "--weights")
        _check_weights(args.model, args.weights)
    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            for layers in args.layers:
                words = ["plain.py", "train", args.data_path, args.weights, args.model]
                plain = _run([*words, layers, args.epochs, seed, args.workers])
                plain |= json.loads(plain.pop("output"))
                runs.setdefault(f"{layers}: plain.py", []).append(plain)
                for name, options in OURS[layers].items():
                    if "--fc-first" in options and not args.weights:
                        continue  # there is nothing that fc could learn from
                    # A cache of its own for each seed: cold at first, then warm.
                    folder = Path(scratch, f"{seed}, {layers}{name}")
                    cache = f"{scratch}/cache, {seed}, {layers}"
                    ours = _train(args, options, seed, cache, folder)
                    runs.setdefault(f"{layers}: train.py{name}", []).append(ours)
            notice(f"seed {seed} is done")
    rows = []
    for layers in args.layers:
        rows += _rows({name: runs[name] for name in runs if name.startswith(f"{layers}:")})
    for row in rows:
        accuracy = [run["accuracy"] for run in runs[row["name"]]]
        row["accuracy, last epoch"] = round(statistics.mean(accuracy), 4)
        row["spread"] = round(statistics.stdev(accuracy), 4) if len(accuracy) > 1 else 0.0
        rates = [run["images_per_second"] for run in runs[row["name"]]]
        row["img/s"] = round(statistics.median(rates), 1) if all(rates) else ""
    options = f"{args.model}, {args.epochs} epochs, {args.seeds} seeds"
    return {"options": f"{options}, {args.workers} worker processes", "rows": rows}


def _check_weights(model_name: str, path: str) -> None:
    """Raise UsageError unless they fit but for the head: plain.py would leave out what does not."""
    import checkpoint
    from model import build_model

    state = checkpoint.state_dict_of(checkpoint.load(path), path)
    checkpoint.load_weights(build_model(model_name, 1), state, path, new_head=True)


def _train(args: argparse.Namespace, options: str, seed: int, cache: str, folder: Path) -> dict:
    """Run train.py once; what `_run` returns, the accuracy of the last epoch, and the pictures a
    second in that epoch, or in computing features, or None where neither was done."""
    words = ["-c", OUR_TRAINING, cache, "--data-path", args.data_path, "--weights", args.weights]
    words += ["--model", args.model, "--epochs", args.epochs, "--seed", seed]
    words += ["--workers", args.workers, *options.split(), "--output-dir", folder]
    done = _run(words)
    last = (folder / "metrics.csv").read_text().splitlines()[-1]
    rates = re.findall(r" (\d+) img/s", done["output"])
    rates = rates or re.findall(r"computed, (\d+) img/s", done["notices"])
    return done | {
        "accuracy": float(last.split(",")[-1]),
        "images_per_second": float(rates[-1]) if rates else None,
    }


# A process's peak memory counts what its parent had when it started it, so a small one starts it.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
seconds = time.perf_counter() - start
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def _run(words: list) -> dict:
    """Run Python on a script of this folder, or on `-c CODE`, to its end."""
    words = [str(ROOT / word) if word in SCRIPTS else str(word) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    output, _, measured = done.stdout.rstrip().rpartition("\n")
    code, seconds, peak = json.loads(measured)
    if code != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        script = "train.py" if words[0] == "-c" else " ".join(words)
        raise RunError(f"{script} failed: {last}")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return {
        "output": output,
        "notices": done.stderr,
        "seconds": seconds,
        "megabytes": peak * unit / 1e6,
    }


def _rows(runs: dict[str, list[dict]]) -> list[dict]:
    """Name, median seconds, their range, how many times faster than the first, peak memory."""
    seconds = {name: [run["seconds"] for run in results] for name, results in runs.items()}
    base = statistics.median(next(iter(seconds.values())))
    return [
        {
            "name": name,
            "seconds": round(statistics.median(times), 3),
            "range": f"{min(times):.2f} to {max(times):.2f}",
            "times faster": round(base / statistics.median(times), 2),
            "peak MB": round(max(run["megabytes"] for run in runs[name])),
        }
        for name, times in seconds.items()
    ]


def _machine() -> str:
    from importlib.metadata import version

    import torch

    names = ("torch", "torchvision", "onnxruntime", "openvino")
    versions = [f"{name} {version(name)}" for name in names if importlib.util.find_spec(name)]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {cli.cores()} cores, {capability}, {', '.join(versions)}"


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli.run(build_parser(), main)

"""Measure this repository against the plain loop, on the machine at hand.

    python benchmark.py train FOLDER --weights FILE --model shufflenet_v2_x0_5

The plain loop is what most tutorials do: torchvision's network, transforms on PIL pictures, a
DataLoader, float32, batch norm in train mode everywhere. Every run is a process of its own, timed
from start to end; the two take turns. Prints a Markdown table, or with --json one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cli
from cli import RunError, notice

ROOT = Path(__file__).parent


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure this repository against the plain loop.")
    parser.add_argument("what", choices=("train",), help="what is measured")
    parser.add_argument("data_path", metavar="DIR", help="folder with one folder per class")
    parser.add_argument("--weights", required=True, metavar="FILE", help="state dict to start from")
    parser.add_argument("--model", default="shufflenet_v2_x0_5", metavar="NAME", help="of the file")
    parser.add_argument(
        "--epochs", type=cli.number(int, 1), default=30, metavar="N", help="epochs of every run"
    )
    parser.add_argument(
        "--seeds", type=cli.number(int, 1), default=3, metavar="N", help="runs, seeds 0 to N - 1"
    )
    cli.add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(args: argparse.Namespace) -> dict:
    """Run the benchmark; returns {"machine": text, "rows": [{"name", figures...}, ...]}."""
    cli.require_path(args.data_path, "DIR", folder=True)
    cli.require_path(args.weights, "--weights")
    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            # A cache of its own for each seed: cold at first, then warm.
            steps = {
                "plain loop": _plain_command(args, seed),
                "cached features, first run": _our_command(args, seed, scratch, "first"),
                "cached features, again": _our_command(args, seed, scratch, "again"),
            }
            for name, command in steps.items():
                result = _run(command)
                notice(f"seed {seed}, {name}: {result}")
                runs.setdefault(name, []).append(result)

    base = statistics.median(run["seconds"] for run in runs["plain loop"])
    rows = []
    for name, results in runs.items():
        seconds = [run["seconds"] for run in results]
        accuracy = [run["accuracy"] for run in results]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(seconds),
                "seconds_range": [min(seconds), max(seconds)],
                "times_faster": base / statistics.median(seconds),
                "peak_megabytes": max(run["peak_megabytes"] for run in results),
                "accuracy": statistics.mean(accuracy),
                "accuracy_spread": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
            }
        )
    report = {"machine": _machine(), "options": _options(args), "rows": rows}
    if args.json:
        print(json.dumps(report))
    else:
        _print_table(report)
    return report


def _plain_command(args: argparse.Namespace, seed: int) -> list[str]:
    words = [args.data_path, args.weights, args.model, args.epochs, seed, args.workers]
    return [sys.executable, "-c", "import benchmark; benchmark.plain_loop()", *map(str, words)]


def _our_command(args: argparse.Namespace, seed: int, scratch: str, name: str) -> list[str]:
    code = (
        "import pathlib, sys, cli, features, train\n"
        "features.CACHE = pathlib.Path(sys.argv.pop(1))\n"
        "cli.run(train.build_parser(), train.main)"
    )
    words = [f"{scratch}/cache{seed}", "--data-path", args.data_path, "--weights", args.weights]
    words += ["--model", args.model, "--freeze-layers", "--epochs", args.epochs, "--seed", seed]
    words += ["--workers", args.workers, "--output-dir", f"{scratch}/run{seed}{name}"]
    return [sys.executable, "-c", code, *map(str, words)]


def _run(command: list[str]) -> dict:
    """Run a process to its end; its last line is JSON with the accuracy of its last epoch or the
    folder where that stands."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise RunError(f"a run failed: {' '.join(command[3:])}")
    result = json.loads(output.splitlines()[-1])
    if "output_dir" in result:
        last = Path(result["output_dir"], "metrics.csv").read_text().splitlines()[-1]
        result = {"accuracy": float(last.split(",")[-1])}
    # The largest of the process and its workers; Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "accuracy": result["accuracy"],
        "seconds": seconds,
        "peak_megabytes": usage.ru_maxrss * unit / 1e6,
    }


def plain_loop() -> None:
    """Train `fc` alone in the plain way; the words of the command line say on what."""
    data_path, weights, model_name, epochs, seed, workers = sys.argv[1:]
    epochs, seed, workers = int(epochs), int(seed), int(workers)

    import torch
    import torchvision
    from PIL import Image
    from torchvision import transforms

    from utils import cosine_lr, read_split_data

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, paths, labels, transform):
            self.paths, self.labels, self.transform = paths, labels, transform

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            picture = Image.open(self.paths[index]).convert("RGB")
            return self.transform(picture), self.labels[index]

    torch.manual_seed(seed)
    train_paths, train_labels, val_paths, val_labels = read_split_data(data_path, seed=seed)
    published = torchvision.models.get_model_weights(model_name).IMAGENET1K_V1.transforms()
    end = [transforms.ToTensor(), transforms.Normalize(published.mean, published.std)]
    augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *end]
    centre = [transforms.Resize(published.resize_size), transforms.CenterCrop(224), *end]
    options = {"batch_size": 16, "num_workers": workers}
    train_loader = torch.utils.data.DataLoader(
        Pictures(train_paths, train_labels, transforms.Compose(augment)), shuffle=True, **options
    )
    val_loader = torch.utils.data.DataLoader(
        Pictures(val_paths, val_labels, transforms.Compose(centre)), **options
    )

    classes = len(set(train_labels))
    model = getattr(torchvision.models, model_name)(num_classes=classes)
    state = torch.load(weights, weights_only=True)
    own = model.state_dict()
    state = {k: v for k, v in state.items() if v.shape == own[k].shape}
    model.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    optimizer = torch.optim.SGD(model.fc.parameters(), 0.01, momentum=0.9, weight_decay=4e-5)

    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(0.01, 0.1, epoch, epochs)
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                correct += (model(images).argmax(1) == labels).sum().item()
    print(json.dumps({"accuracy": correct / len(val_paths)}))


def _machine() -> str:
    import torch
    import torchvision

    try:
        cpu = (
            Path("/proc/cpuinfo")
            .read_text()
            .partition("model name")[2]
            .split("\n")[0]
            .strip("\t :")
        )
    except OSError:
        cpu = ""
    return (
        f"{cpu or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )


def _options(args: argparse.Namespace) -> str:
    return (
        f"{args.model}, fc alone, {args.epochs} epochs, {args.seeds} seeds, "
        f"{args.workers} worker processes"
    )


def _print_table(report: dict) -> None:
    print(f"{report['machine']}; {report['options']}\n")
    print("| run | seconds, median (range) | times faster | peak MB | accuracy, last epoch |")
    print("|---|---|---|---|---|")
    for row in report["rows"]:
        low, high = row["seconds_range"]
        print(
            f"| {row['name']} | {row['seconds']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {row['times_faster']:.1f} | {row['peak_megabytes']:.0f} "
            f"| {row['accuracy']:.3f} ± {row['accuracy_spread']:.3f} |"
        )


if __name__ == "__main__":
    cli.run(build_parser(), main)

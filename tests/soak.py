"""Kill training again and again, and see that nothing is lost.

    python tests/soak.py --kills 100

Trains on drawn flowers, once undisturbed and then killed at random moments (by SIGKILL mostly, some
of the time while a checkpoint is being written; by SIGTERM and SIGINT too) and resumed until it is
done. What it leaves must then be the same to the bit: weights, optimizer, history, best checkpoint,
metrics.csv. The last line is one JSON object; the exit code is 1 if anything differs.
"""

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from sample_flowers import draw_sample_flowers  # noqa: E402

from model import build_model  # noqa: E402
from shufflenet.common.messages import RunError, notice, say  # noqa: E402
from shufflenet.common.options import Parser, Words, run_script  # noqa: E402

WEIGHTS, SMALL = ["--weights", "weights.pth"], ["--train-size", 64]
KINDS = {
    "all layers": SMALL,
    "two threads": [*SMALL, "--workers", 2],
    "amp": [*SMALL, "--amp"],
    "more options": [*SMALL, *WEIGHTS, "--freeze-bn", "--random-erase", 0.5, "--patience", 4],
    "average": [
        *SMALL,
        *["--ema", "0.9", "--opt", "adamw", "--augment", "trivial", "--class-weights"],
    ],
    "cached features": [*WEIGHTS, "--freeze-layers", "--batch-size", 8],
    "fc first": [*SMALL, *WEIGHTS, "--fc-first", "--freeze-bn"],
    "small images": ["--small-images", "--batch-size", 8, "--workers", 2],
}
EPOCHS = 5
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGINT]


def build_parser() -> Parser:
    parser = Parser(description="Kill training again and again; see that nothing is lost.")
    # fmt: off
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how many at least")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
        help=f"ways of training: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    # fmt: on
    return parser


def main(args: Words = None) -> dict:
    """Kill as the options say; returns what the last line prints."""
    args = build_parser().parse_args(args)
    rng, start = random.Random(args.seed), time.perf_counter()
    counts = {"kills": 0, "in_a_write": 0, "runs": 0}
    with tempfile.TemporaryDirectory() as scratch:
        scratch, seconds = Path(scratch), {}
        draw_sample_flowers(scratch / "flowers", per_class=8, size=64)
        torch.save(build_model("shufflenet_v2_x0_5").state_dict(), scratch / "weights.pth")
        while counts["kills"] < args.kills:
            kind = args.kinds[counts["runs"] % len(args.kinds)]
            whole = scratch / f"whole, {kind}"
            if kind not in seconds:
                begun = time.perf_counter()
                finish(begin(kind, whole), whole)
                seconds[kind] = time.perf_counter() - begun
            killed = scratch / f"killed {counts['runs']}, {kind}"
            train_under_fire(kind, killed, seconds[kind], rng, counts, args.kills)
            compare(whole, killed)
            counts["runs"] += 1
            notice(f"{counts['kills']} kills, {counts['runs']} runs, none differs")
    summary = counts | {"differences": 0, "seconds": round(time.perf_counter() - start)}
    say(json.dumps(summary))
    return summary


def train_under_fire(kind, folder, seconds, rng, counts, most) -> None:
    """Train to the end, killed on the way and resumed each time."""
    done = False
    while not done:
        process = begin(kind, folder)
        moment = time.perf_counter() + rng.uniform(0, 0.7 * seconds)
        in_a_write = rng.random() < 0.3  # from that moment on, wait for a checkpoint to be written
        while process.poll() is None and counts["kills"] < most:
            time.sleep(0.0005 if in_a_write else 0.01)
            writes = in_a_write and any(folder.glob(".*.pth.*.tmp"))
            if time.perf_counter() > moment and writes == in_a_write:
                process.send_signal(signal.SIGKILL if in_a_write else rng.choice(SIGNALS))
                counts["kills"] += 1
                counts["in_a_write"] += in_a_write
                break
        done = finish(process, folder)


def begin(kind: str, folder: Path) -> subprocess.Popen:
    """Start a run, or go on with it."""
    code = folder.with_suffix(".code")  # its own, since .cache/ lies beside it
    if not code.exists():
        shutil.copytree(ROOT / "shufflenet", code / "shufflenet")
        for script in ROOT.glob("*.py"):
            shutil.copy(script, code)
    words = [sys.executable, code / "train.py", "--output-dir", folder]
    if (folder / "last.pth").exists():
        words += ["--resume"]
    else:
        words += ["--data-path", "flowers", "--model", "shufflenet_v2_x0_5", "--epochs", EPOCHS]
        words += ["--workers", 0, *KINDS[kind]]
    with open(folder.with_suffix(".err"), "wb") as log:  # a pipe that nobody reads would block
        return subprocess.Popen([*map(str, words)], cwd=folder.parent, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path) -> bool:
    """Wait for the end; whether it is that of the training."""
    code = process.wait()
    # While Python itself starts, SIGTERM and SIGINT end it in its own way.
    if code and code not in {128 + s for s in SIGNALS} | {-s for s in SIGNALS}:
        last = folder.with_suffix(".err").read_text(errors="replace").splitlines()[-1]
        raise RunError(f"{folder.name}: exit code {code}: {last}")
    return code == 0


def compare(one: Path, two: Path) -> None:
    """Raise RunError unless two runs left the same, to the bit, but for their options."""
    for name in ("last.pth", "best.pth", "metrics.csv"):
        read = read_metrics if name == "metrics.csv" else torch.load
        a, b = read(one / name), read(two / name)
        for each in (a, b):  # neither their options nor their seconds
            if name != "metrics.csv":
                each["args"] = each["seconds"] = None
        if where := difference(a, b, name):
            raise RunError(f"{two.name} differs in {where}")


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.csv without their seconds."""
    with open(path, newline="", encoding="utf-8") as file:
        return [row | {"seconds": None} for row in csv.DictReader(file)]


def difference(a: object, b: object, where: str) -> str:
    """Where two trees of dicts and lists first differ; nothing if they do not."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        keys = a
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        keys = range(len(a))
    else:
        same = type(a) is type(b) and (a.equal(b) if hasattr(a, "equal") else a == b)
        return "" if same else where
    return next(filter(None, (difference(a[k], b[k], f"{where}, {k}") for k in keys)), "")


if __name__ == "__main__":
    run_script(main)

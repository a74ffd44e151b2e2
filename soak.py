"""Kill training again and again, and see that nothing is lost.

    python soak.py --kills 200

Trains on drawn flowers, once undisturbed and then killed at random moments (by SIGKILL mostly, some
of the time while a checkpoint is being written; by SIGTERM and SIGINT too) and resumed until it is
done. What it leaves must then be the same to the bit: weights, optimizer, history, best checkpoint,
metrics.csv. The last line is one JSON object; the exit code is 1 if anything differs.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from cli import RunError, notice

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent
KINDS = {
    "all layers": [],
    "all layers, two workers": ["--workers", "2"],
    "all layers, --amp": ["--amp"],
    "all layers, more options": ["--freeze-bn", "--train-size", "96", "--patience", "4"],
    "cached features": ["--freeze-layers", "--batch-size", "8"],
}
EPOCHS = 5
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGINT]


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Kill training again and again; see that nothing is lost.")
    parser.add_argument(
        "--kills", type=cli.number(int, 1), default=200, metavar="N", help="how many at least"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
        help="ways of training",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    return parser


def main(args: argparse.Namespace) -> dict:
    """Kill as the options say; returns what the last line prints."""
    from sample_flowers import draw_sample_flowers

    rng = random.Random(args.seed)
    start = time.perf_counter()
    counts = {"kills": 0, "in_a_write": 0, "runs": 0}
    with tempfile.TemporaryDirectory() as scratch:
        data = draw_sample_flowers(Path(scratch, "flowers"), per_class=8, size=64)
        references = {}
        while counts["kills"] < args.kills:
            kind = args.kinds[counts["runs"] % len(args.kinds)]
            if kind not in references:
                folder = Path(scratch, f"whole {kind}")
                begun = time.perf_counter()
                _finish(_start(kind, data, folder), folder)
                references[kind] = folder, time.perf_counter() - begun
            whole, seconds = references[kind]
            folder = Path(scratch, f"killed {counts['runs']}")
            _train_under_fire(kind, data, folder, seconds, rng, counts, args.kills)
            compare(whole, folder)
            counts["runs"] += 1
            notice(f"{counts['kills']} kills, {counts['runs']} runs, none differs")
    summary = counts | {"bytes_lost": 0, "seconds": round(time.perf_counter() - start)}
    cli.say(json.dumps(summary))
    return summary


def _train_under_fire(
    kind: str, data: Path, folder: Path, seconds: float, rng: random.Random, counts: dict, most: int
) -> None:
    """Train to the end, killed on the way and resumed each time."""
    while True:
        process = _start(kind, data, folder)
        moment = time.perf_counter() + rng.uniform(0, 0.7 * seconds)
        in_a_write = rng.random() < 0.3  # from that moment on, wait for a checkpoint to be written
        while process.poll() is None and counts["kills"] < most:
            if time.perf_counter() > moment and (
                not in_a_write or list(folder.glob(f".*.pth.{process.pid}.*"))
            ):
                process.send_signal(signal.SIGKILL if in_a_write else rng.choice(SIGNALS))
                counts["kills"] += 1
                counts["in_a_write"] += in_a_write
                break
            time.sleep(0.0005 if in_a_write else 0.01)
        if _finish(process, folder):
            return


def _start(kind: str, data: Path, folder: Path) -> subprocess.Popen:
    code = folder.with_suffix(".code")  # its own, since .cache/ lies beside it
    if not code.exists():
        code.mkdir()
        for script in ROOT.glob("*.py"):
            shutil.copy(script, code)
    words = [sys.executable, str(code / "train.py"), "--output-dir", str(folder)]
    if (folder / "last.pth").exists():
        words += ["--resume"]
    else:
        words += ["--data-path", str(data), "--model", "shufflenet_v2_x0_5", "--workers", "0"]
        words += ["--epochs", str(EPOCHS), *KINDS[kind]]
    with open(folder.with_suffix(".err"), "wb") as errors:  # a pipe that nobody reads would block
        return subprocess.Popen(words, stdout=errors, stderr=errors)


def _finish(process: subprocess.Popen, folder: Path) -> bool:
    """Wait for the end; whether it is that of the training."""
    code = process.wait()
    # While Python itself starts, SIGTERM and SIGINT end it in its own way.
    killed = {128 + signum for signum in SIGNALS} | {-signum for signum in SIGNALS}
    if code != 0 and code not in killed:
        last = folder.with_suffix(".err").read_text(errors="replace").splitlines()[-1]
        raise RunError(f"{folder.name}: exit code {code}: {last}")
    return code == 0


def compare(one: Path, two: Path) -> None:
    """Raise RunError unless two runs left the same, to the bit, but for their options."""
    import torch

    for name in ("last.pth", "best.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, two))
        del a["args"], b["args"]
        if different := next(_differences(a, b, name), None):
            raise RunError(f"{two.name} differs in {different}")
    if (one / "metrics.csv").read_bytes() != (two / "metrics.csv").read_bytes():
        raise RunError(f"{two.name} differs in metrics.csv")


def _differences(a: object, b: object, where: str) -> "Iterator[str]":
    import torch

    if type(a) is not type(b):
        yield where
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            yield where
        else:
            for key in a:
                yield from _differences(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, list):
        if len(a) != len(b):
            yield where
        else:
            for x, y in zip(a, b, strict=True):
                yield from _differences(x, y, where)
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
        yield where


if __name__ == "__main__":
    cli.run(build_parser(), main)

"""Classify pictures with a trained network.

    python predict.py PICTURE
    python predict.py FOLDER --weights runs/RUN/best.pth --json
    python predict.py FOLDER --weights model.onnx --output result.csv
    python predict.py PICTURE --save-plot result.png

Prints for each picture its path and the most probable classes, best first. A picture that cannot
be read is named on stderr, the others are classified, and the exit code is 1.
"""

import argparse
import contextlib
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from cli import RunError, UsageError, notice, printable

if TYPE_CHECKING:
    import numpy as np

PANELS = 32  # pictures in a plot
TABLES = (".csv", ".jsonl")
MANY = 64  # pictures from which on a progress bar is worth its import


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Classify pictures with a trained network.")
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="pictures, and folders in which to look for them, also below",
    )
    cli.add_inference(parser.add_argument_group("network"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--topk", type=cli.number(int, 1), default=5, metavar="K",
        help="classes per picture, at most as many as there are",
    )  # fmt: skip
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument(
        "--output",
        metavar="FILE",
        help="write results there (.csv, or .jsonl with one JSON object a line), not to the screen",
    )
    output.add_argument(
        "--save-plot", metavar="FILE", help="draw the pictures with their classes (PNG, PDF, SVG)"
    )
    output.add_argument("--show", action="store_true", help="draw them in a window")
    return parser


def main(args: argparse.Namespace) -> list[dict]:
    """Classify as the options say; returns what `--json` prints, with `--output` at most as many
    of the first results as a plot shows."""
    paths = _find(args.pictures)
    weights = args.weights or cli.newest_run("best.pth")
    cli.require_path(weights, "--weights")
    for flag, path, suffixes in (
        ("--save-plot", args.save_plot, cli.PLOTS),
        ("--output", args.output, TABLES),
    ):
        if path:
            cli.check_file(flag, path, suffixes)

    # Imports that take a while, so not before the paths are known to be right.
    from image import ImageError
    from pipeline import stream
    from runtime import open_network

    threads = max(1, args.workers)
    network = open_network(
        weights, device=args.device, runtime=args.runtime, amp=args.amp, pictures=len(paths),
        threads=threads,
    )  # fmt: skip
    topk = min(args.topk, len(network.classes))
    results, failed = [], 0
    with _writer(args, topk) as write, _progress(args, len(paths)) as step:
        for path, answer in stream(paths, network.run, network.preprocessing, threads=threads):
            step()
            if isinstance(answer, ImageError):
                failed += 1
                notice(f"error: {answer}")
                continue
            result = {"path": path, "predictions": best_classes(answer, network.classes, topk)}
            write(result)
            if not args.output or len(results) < PANELS:
                results.append(result)

    if results and (args.save_plot or args.show):
        _plot(results, args)
    if args.output:
        notice(f"{len(paths) - failed} pictures, {network.computed_by}, written to {args.output}")
    if failed:
        raise RunError(f"{failed} of {len(paths)} pictures could not be read, named above")
    return results


def best_classes(logits: "np.ndarray", classes: list[str], topk: int) -> list[dict]:
    """[{"class": name, "prob": 0 to 1}, ...], the `topk` best first, of logits (classes,)."""
    from metrics import softmax

    probabilities = softmax(logits[None])[0]
    order = (-probabilities).argsort(kind="stable")[:topk]
    return [{"class": classes[i], "prob": float(probabilities[i])} for i in order]


@contextlib.contextmanager
def _writer(args: argparse.Namespace, topk: int) -> Iterator[Callable[[dict], None]]:
    """What takes each result as soon as it is there, so that Ctrl-C loses none."""
    if not args.output:
        form = json.dumps if args.json else _text
        # When nobody reads on (`| head`) a plot is drawn all the same, else there is no more to do.
        say = cli.say if args.save_plot or args.show else partial(print, flush=True)
        yield lambda result: say(form(result))
        return
    from files import UTF8, cells

    # Not renamed at the end: whoever interrupts keeps the whole lines written so far.
    with open(args.output, "w", buffering=1, **UTF8) as file:
        if args.output.lower().endswith(".jsonl"):
            yield lambda result: print(json.dumps(result), file=file)
            return
        table = csv.writer(file)
        columns = [f"{kind}_{rank + 1}" for rank in range(topk) for kind in ("class", "prob")]
        table.writerow(["path", *columns])

        def write(result: dict) -> None:
            guesses = ((g["class"], round(g["prob"], 6)) for g in result["predictions"])
            table.writerow(cells([result["path"], *(c for guess in guesses for c in guess)]))

        yield write


def _text(result: dict) -> str:
    guesses = ((printable(g["class"]), g["prob"]) for g in result["predictions"])
    lines = (f"class: {name:<10}   prob: {prob:.3f}" for name, prob in guesses)
    return "\n".join([printable(result["path"]), *lines])


@contextlib.contextmanager
def _progress(args: argparse.Namespace, count: int) -> Iterator[Callable[[], None]]:
    """A bar for many pictures, unless it would run through the results on a terminal."""
    if count < MANY or (sys.stdout.isatty() and not args.output):
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=count, desc="classifying", unit="img", leave=False) as bar:
        yield bar.update


def _find(places: list[str]) -> list[str]:
    """The pictures named, and those in and below the folders named, in the order given."""
    for place in places:
        if not os.path.isdir(place):
            cli.require_path(place, "picture")

    from folders import pictures_below

    paths = []
    for place in places:
        found = pictures_below(place, Counter()) if os.path.isdir(place) else [place]
        if not found:
            raise UsageError(f"{place}: no pictures in it, by their suffix")
        paths += found
    return paths


def _plot(results: list[dict], args: argparse.Namespace) -> None:
    import plots
    from image import load_rgb

    if len(results) > PANELS:
        notice(f"the plot shows the first {PANELS} of {len(results)} pictures")
    pictures = [
        (
            load_rgb(result["path"]),
            "\n".join(
                [plots.short(Path(result["path"]).name, 34)]
                + [f"{plots.short(g['class'])}  {g['prob']:.3f}" for g in result["predictions"]]
            ),
        )
        for result in results[:PANELS]
    ]
    if args.save_plot:
        plots.save_figure(plots.draw_pictures(pictures), args.save_plot)
    if args.show:
        plots.show_pictures(pictures)


if __name__ == "__main__":
    cli.run(build_parser(), main)

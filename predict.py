"""Classify pictures with a trained network.

    python predict.py PICTURE
    python predict.py FOLDER --weights runs/RUN/best.pth --json
    python predict.py PICTURE --save-plot result.png

Prints for each picture its path and the most probable classes, best first. A picture that cannot
be read is named on stderr, the others are classified, and the exit code is 1.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from cli import RunError, UsageError, notice, printable

if TYPE_CHECKING:
    import torch

    from checkpoint import Classifier

BATCH = 32  # pictures per step
PANELS = 32  # pictures in a plot
PLOTS = (".png", ".jpg", ".pdf", ".svg")


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Classify pictures with a trained network.")
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="pictures, and folders in which to look for them, also below",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--weights",
        metavar="FILE",
        help="best.pth of a run, or a bare state dict (when not said: the newest runs/*/best.pth)",
    )
    cli.add_device(network)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--topk", type=cli.number(int, 1), default=5, metavar="K",
        help="classes per picture, at most as many as there are",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help="one JSON object a line")
    output.add_argument(
        "--save-plot", metavar="FILE", help="draw the pictures with their classes (PNG, PDF, SVG)"
    )
    output.add_argument("--show", action="store_true", help="draw them in a window")
    return parser


def main(args: argparse.Namespace) -> list[dict]:
    """Classify as the options say; returns the objects that `--json` prints."""
    paths = _find(args.pictures)
    weights = args.weights or cli.newest_run("best.pth")
    cli.require_path(weights, "--weights")
    if args.save_plot:
        _check_plot(Path(args.save_plot))

    # Seconds of imports, so not before the paths are known to be right.
    import checkpoint
    from utils import choose_device

    classifier = checkpoint.load_classifier(weights)
    device = choose_device(args.device)
    classifier.model.to(device)

    results, failed = [], 0
    for path, answer in classify(paths, classifier, device, args.topk):
        if isinstance(answer, Exception):
            failed += 1
            notice(f"error: {answer}")
            continue
        results.append({"path": path, "predictions": answer})
        if args.json:
            cli.say(json.dumps(results[-1]))
        else:
            cli.say(printable(path))
            for guess in answer:
                cli.say(f"class: {printable(guess['class']):<10}   prob: {guess['prob']:.3f}")

    if results and (args.save_plot or args.show):
        _plot(results, args)
    if failed:
        raise RunError(f"{failed} of {len(paths)} pictures could not be read, named above")
    return results


def classify(
    paths: list[str], classifier: "Classifier", device: "torch.device", topk: int
) -> Iterator[tuple[str, list[dict] | Exception]]:
    """Classify pictures in batches, in order.

    Args:
        paths: picture files.
        classifier: what `checkpoint.load_classifier` returned, its model on `device`.
        device: where the model is.
        topk: answers per picture, at most one per class.

    Yields:
        path and [{"class": name, "prob": 0 to 1}, ...], best first, or the error that says why
        the picture could not be read.
    """
    import torch

    from image import ImageError, load_rgb
    from my_dataset import eval_transform, normalize

    transform = eval_transform(classifier.preprocessing)
    for first in range(0, len(paths), BATCH):
        batch, errors, tensors = paths[first : first + BATCH], {}, []
        for path in batch:
            try:
                tensors.append(transform(load_rgb(path)))
            except ImageError as error:
                errors[path] = error
        answers = iter([])
        if tensors:
            with torch.inference_mode():
                images = normalize(torch.stack(tensors).to(device), classifier.preprocessing)
                probabilities = classifier.model(images).softmax(1)  # (N, classes)
                best = probabilities.topk(min(topk, len(classifier.classes)))  # 2 x (N, topk)
            answers = iter(zip(best.values.tolist(), best.indices.tolist(), strict=True))
        for path in batch:
            if path in errors:
                yield path, errors[path]
                continue
            yield (
                path,
                [
                    {"class": classifier.classes[index], "prob": prob}
                    for prob, index in zip(*next(answers), strict=True)
                ],
            )


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


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in PLOTS:
        raise UsageError(f"--save-plot {path}: the suffix must be one of {' '.join(PLOTS)}")
    cli.require_path(path.parent, "--save-plot", folder=True)


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

"""Classify images with a trained network.

    python predict.py IMAGE
    python predict.py FOLDER --weights runs/RUN/best.pth --json
    python predict.py FOLDER --weights model.onnx --output result.csv
    python predict.py IMAGE --save-plot result.png

Prints for each image its path and the most probable classes, best first. An image that cannot be
read is named on stderr, the others are classified, and the exit code is 1.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

import cli
from cli import RunError, UsageError, notice, printable

PANELS = 32  # images in a plot


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Classify images with a trained network.")
    # fmt: off
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR",
        help="images, and folders in which to look for them, also below")
    cli.add_inference(parser.add_argument_group("network"))
    add = parser.add_argument_group("output").add_argument
    add("--topk", type=cli.number(int, 1), default=5, metavar="K",
        help="classes per image, at most as many as there are")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--output", metavar="FILE.csv", help="write a table, print nothing")
    add("--save-plot", metavar="FILE", help="draw the images with their classes")
    add("--show", action="store_true", help="draw them in a window")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> list[dict]:
    """Classify as the options say; returns what `--json` prints."""
    args = cli.parse(build_parser(), args)
    for place in args.images:
        cli.require_path(place, "image", folder=os.path.isdir(place))
    weights = cli.require_weights(args.weights)
    if args.save_plot:
        cli.check_file("--save-plot", args.save_plot, cli.PLOTS)
    if args.output:
        cli.check_file("--output", args.output, (".csv",))

    # Imports that take a while, so not before the paths are known to be right.
    from image import ImageError
    from inference import open_network, stream

    paths = _find(args.images)
    # Class names come from the file, too.
    network = open_network(weights, args.device, args.runtime, args.workers)
    results, failed = [], 0
    # An answer is logits float32 (classes,), or an ImageError.
    for path, answer in stream(paths, network.run, network.preprocessing, args.workers):
        if isinstance(answer, ImageError):
            failed += 1
            notice(f"error: {answer}")
            continue
        guesses = best_classes(answer, network.classes, args.topk)
        results.append({"path": path, "predictions": guesses})
        if not args.output:
            cli.say(json.dumps(results[-1]) if args.json else _text(results[-1]))
    if args.output:
        from files import save_rows

        save_rows([_row(**result) for result in results], args.output)
        notice(f"{len(results)} images, {network.computed_by}, written to {args.output}")
    if results and (args.save_plot or args.show):
        _plot(results, args)
    if failed:
        raise RunError(f"{failed} of {len(paths)} images could not be read, named above")
    return results


def best_classes(logits, classes: list[str], topk: int) -> list[dict]:
    """[{"class": name, "prob": 0 to 1}, ...], the `topk` best first, of logits (classes,)."""
    from metrics import softmax

    probabilities = softmax(logits[None])[0]
    order = (-probabilities).argsort(kind="stable")[:topk]
    return [{"class": classes[i], "prob": float(probabilities[i])} for i in order]


def _find(places: list[str]) -> list[str]:
    """The images named, and those in and below the folders named, in the order given."""
    from folders import images_below

    paths = []
    for place in places:
        found = images_below(place, Counter()) if os.path.isdir(place) else [place]
        if not found:
            raise UsageError(f"{place}: no images in it, by their suffix")
        paths += found
    return paths


def _text(result: dict) -> str:
    guesses = ((printable(g["class"]), g["prob"]) for g in result["predictions"])
    lines = (f"class: {name:<10}   prob: {prob:.3f}" for name, prob in guesses)
    return "\n".join([printable(result["path"]), *lines])


def _row(path: str, predictions: list[dict]) -> dict:
    cells = {"path": path}
    for rank, guess in enumerate(predictions, 1):
        cells |= {f"class_{rank}": guess["class"], f"prob_{rank}": round(guess["prob"], 6)}
    return cells


def _plot(results: list[dict], args: argparse.Namespace) -> None:
    import plots

    if len(results) > PANELS:
        notice(f"the plot shows the first {PANELS} of {len(results)} images")
    panels = []
    for result in results[:PANELS]:
        guesses = [f"{plots.short(g['class'])}  {g['prob']:.3f}" for g in result["predictions"]]
        name = plots.short(Path(result["path"]).name, 34)
        panels.append((result["path"], "\n".join([name, *guesses])))
    if args.save_plot:
        plots.save_figure(plots.draw_images(panels), args.save_plot)
    if args.show:
        plots.show_images(panels)


if __name__ == "__main__":
    cli.run(main)

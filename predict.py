"""Classify images with a trained network.

    python predict.py IMAGE
    python predict.py FOLDER --weights runs/RUN/best.pth --json
    python predict.py FOLDER --weights model.onnx --output result.csv
    python predict.py IMAGE --save-plot result.png
    python predict.py IMAGE --explain

Prints the path of an image and its most probable classes, best first; of several images, a line
each and a summary. An image that cannot be read is named on stderr, the others are classified, and
the exit code is 1. From Python: inference.Classifier.
"""

import argparse
import json
import os
import time
from collections import Counter

import cli
from cli import RunError, UsageError, notice, printable

PANELS = 32  # images in a plot


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Classify images with a trained network.")
    # fmt: off
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR",
        help="images, or folders that are searched for images")
    cli.add_inference(parser.add_argument_group("network"))
    add = parser.add_argument_group("output").add_argument
    add("--topk", type=cli.number(int, 1), metavar="K",
        help="classes per image (if omitted: 5; 1 if there are several images)")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--output", metavar="FILE.csv", help="write a table, print nothing")
    add("--save-plot", metavar="FILE", 
        help="draw the images with their classes; right or wrong in blue or orange where the "
        "folder of an image is called as a class")
    add("--explain", action="store_true",
        help="draw beside each image which places speak for its class (if --save-plot and --show "
        "are omitted: to explain.png)")
    add("--show", action="store_true", help="draw them in a window")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> list[dict]:
    """Classify as the options say; returns what `--json` prints."""
    args = build_parser().parse_args(args)
    for place in args.images:
        if not os.path.isdir(place):
            cli.require_path(place, "image")
    weights = cli.require_weights(args.weights)
    if args.explain and weights.suffix.lower() == ".onnx":
        raise UsageError(f"--explain: use a .pth file, which has feature maps; {weights} has none")
    if args.explain and not args.show:
        args.save_plot = args.save_plot or "explain.png"
    if args.save_plot:
        cli.check_file("--save-plot", args.save_plot, cli.PLOTS)
    if args.output:
        cli.check_file("--output", args.output, (".csv",))

    # Imports that take a while, so not before the paths are known to be right.
    from image import ImageError
    from inference import Classifier

    paths = _find(args.images)
    # The names of the classes come from the file; of a bare state dict: checkpoint.load_trained.
    classifier = Classifier(weights, args.device, args.runtime, args.workers)
    cli.introduce(weights, classifier, f"; {classifier.computed_by}")
    results, failed, start = [], 0, time.perf_counter()
    # An answer is logits float32 (classes,), or an ImageError.
    answers = classifier.stream(paths, args.workers)
    for path, answer in (
        cli.progress(answers, "classifying", len(paths)) if args.output else answers
    ):
        if isinstance(answer, ImageError):
            failed += 1
            notice(f"error: {answer}")
            continue
        guesses = classifier.best_classes(answer, args.topk or 5)
        results.append({"path": path, "predictions": guesses, "weights": str(weights)})
        if not args.output:
            text = _text(results[-1], args.topk, alone=len(paths) == 1)
            cli.say(json.dumps(results[-1]) if args.json else text)
    if args.output:
        from files import save_rows

        save_rows([_row(**result) for result in results], args.output)
    if len(paths) > 1:
        counts = Counter(result["predictions"][0]["class"] for result in results)
        parts = ", ".join(f"{name} {count}" for name, count in counts.most_common(20))
        notice(f"{len(results)} images in {time.perf_counter() - start:.1f} s: {parts}")
    if results and (args.save_plot or args.show):
        _plot(results, classifier, args)
    if failed:
        raise RunError(f"{failed} of {len(paths)} images could not be read, named above")
    return results


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


def _text(result: dict, topk: int | None, alone: bool) -> str:
    guesses = [(printable(g["class"]), g["prob"]) for g in result["predictions"]]
    if alone:
        lines = [f"class: {name:<10}   prob: {prob:.3f}" for name, prob in guesses]
        return "\n".join([printable(result["path"]), *lines])
    answers = "  ".join(f"{name} {prob:.3f}" for name, prob in guesses[: topk or 1])
    return f"{printable(result['path'])}  {answers}"


def _row(path: str, predictions: list[dict], weights: str) -> dict:
    cells = {"path": path}
    for rank, guess in enumerate(predictions, 1):
        cells |= {f"class_{rank}": guess["class"], f"prob_{rank}": round(guess["prob"], 6)}
    return cells


def _plot(results: list[dict], classifier, args: argparse.Namespace) -> None:
    """Where the folder of an image is called as a class, that is taken for its truth."""
    import plots

    if len(results) > PANELS:
        notice(f"the plot shows the first {PANELS} of {len(results)} images")
    panels = []
    for result in results[:PANELS]:
        first, *others = (
            f"{plots.short(g['class'])} {g['prob']:.3f}" for g in result["predictions"]
        )
        truth = os.path.basename(os.path.dirname(result["path"]))
        best = result["predictions"][0]["class"]
        right = truth == best if truth in classifier.classes else None
        heat = classifier.explain(result["path"], best) if args.explain else None
        panels.append(plots.Panel(result["path"], first, right, others, heat))
    if args.save_plot:
        plots.save_figure(plots.draw_images(panels), args.save_plot)
    if args.show:
        plots.show_images(panels)


if __name__ == "__main__":
    cli.run(main)

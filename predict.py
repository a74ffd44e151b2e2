"""Classify images with a trained network.

    python predict.py IMAGE
    python predict.py FOLDER --weights runs/RUN/best.pth --json
    python predict.py FOLDER --weights model.onnx --output result.csv
    python predict.py IMAGE --save-plot result.png
    python predict.py IMAGE --explain

Prints the path of an image and its most probable classes, best first; of several images, a line
each and a summary. An image that cannot be read is named on stderr, the others are classified, and
the exit code is 1. From Python: `from shufflenet import Classifier`.
"""

import glob
import itertools
import os
import time
from collections import Counter

from shufflenet import Classifier
from shufflenet.common import options
from shufflenet.common.files import save_rows
from shufflenet.common.messages import (
    RunError,
    UsageError,
    listed,
    notice,
    printable,
    progress,
    say,
    say_json,
)
from shufflenet.reading.folders import images_below, is_image, nfc
from shufflenet.reading.image import ImageError

PANELS = 32  # images in a plot


def build_parser() -> options.Parser:
    parser = options.Parser(description="Classify images with a trained network.")
    # fmt: off
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR",
        help="images, or folders that are searched for images")
    options.add_inference(parser.add_argument_group("network"))
    add = parser.add_argument_group("output").add_argument
    add("--topk", type=options.number(int, 1), metavar="K",
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


def main(words: options.Words = None) -> list[dict]:
    """Classify as the args say; returns what `--json` prints."""
    args = build_parser().parse_args(words)
    paths = find_paths(args.images)
    weights = options.require_weights(args.weights)
    if args.explain and weights.suffix.lower() == ".onnx":
        raise UsageError(f"--explain: {weights} has no feature maps; use a .pth file")
    plot = args.save_plot or ("explain.png" if args.explain and not args.show else None)
    if plot:
        options.check_file("--save-plot", plot, options.PLOTS)
    if args.output:
        options.check_file("--output", args.output, (".csv",))

    # The names of the classes come from the file; of a bare state dict: checkpoint.load_trained.
    classifier = Classifier(weights, args.device, args.runtime, args.workers)
    notice(f"{weights}: {classifier.metadata}; {classifier.computed_by}")
    results, failed, start = [], 0, time.perf_counter()
    # An answer is logits float32 (classes,), or an ImageError.
    answers = classifier.stream(paths, args.workers)
    if args.output:
        answers = progress(answers, "classifying", len(paths))
    for path, answer in answers:
        if isinstance(answer, ImageError):
            failed += 1
            notice(f"error: {answer}")
            continue
        guesses = classifier.best_classes(answer, args.topk or 5)
        results.append({"path": path, "predictions": guesses, "weights": str(weights)})
        if args.json and not args.output:
            say_json(results[-1])
        elif not args.output:
            say(text_of(results[-1], args.topk, alone=len(paths) == 1))
    if args.output:
        save_rows([row_of(result) for result in results], args.output)
        notice(f"wrote {args.output}")
    if len(paths) > 1:
        counts = Counter(result["predictions"][0]["class"] for result in results)
        parts = listed([f"{name} {count}" for name, count in counts.most_common()])
        notice(f"{len(results)} images in {time.perf_counter() - start:.1f} s: {parts}")
    if results and (plot or args.show):
        draw(results, classifier, args.explain, plot, args.show)
    if failed:
        raise RunError(f"{failed} of {len(paths)} images could not be read, named above")
    return results


def find_paths(places: list[str]) -> list[str]:
    """The images named, and those in and below the folders named, in the order given. A pattern
    that the shell left alone is expanded. UsageError if there is no such file, or no image."""
    paths, skipped = [], Counter()
    for place in places:
        found = [place]
        if not os.path.exists(place):  # a pattern, in a folder whose name may have brackets
            patterns = (place, place.replace("[", "[[]"))
            found = next(filter(None, (glob.glob(p, recursive=True) for p in patterns)), [])
            found = [p for p in sorted(found) if os.path.isdir(p) or is_image(p, skipped)]
        if not found:
            options.require_path(place, "image")
        below = [images_below(p, skipped) if os.path.isdir(p) else [p] for p in found]
        if not any(below):
            raise UsageError(f"{place}: no images in it, by their suffix")
        paths += itertools.chain(*below)
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        notice(f"skipped: {kinds}")
    return paths


def text_of(result: dict, topk: int | None, alone: bool) -> str:
    """What is printed of an image: of one `alone` a line per class."""
    guesses = [(printable(g["class"]), g["prob"]) for g in result["predictions"]]
    if alone:
        lines = [f"class: {name:<10}   prob: {prob:.3f}" for name, prob in guesses]
        return "\n".join([printable(result["path"]), *lines])
    answers = "  ".join(f"{name} {prob:.3f}" for name, prob in guesses[: topk or 1])
    return f"{printable(result['path'])}  {answers}"


def row_of(result: dict) -> dict:
    """A row of the table."""
    cells = {"path": result["path"]}
    for rank, guess in enumerate(result["predictions"], 1):
        cells |= {f"class_{rank}": guess["class"], f"prob_{rank}": round(guess["prob"], 6)}
    return cells


def draw(
    results: list[dict], classifier: Classifier, explain: bool, plot: str | None, show: bool
) -> None:
    """Draw the images with their classes. Where the folder of an image is called as a class, that
    is taken for its truth."""
    from shufflenet.inference import plots  # Matplotlib, which classifying does not need

    step = -(-len(results) // PANELS)
    if step > 1:
        notice(f"the plot shows one of {step} images, {len(results[::step])} of {len(results)}")
    panels = []
    for result in results[::step]:
        first, *others = (
            f"{plots.short(g['class'])} {g['prob']:.3f}" for g in result["predictions"]
        )
        truth = nfc(os.path.basename(os.path.dirname(result["path"])))
        best = result["predictions"][0]["class"]
        right = truth == best if truth in classifier.classes else None
        heat = classifier.explain(result["path"], best) if explain else None
        panels.append(plots.Panel(result["path"], first, right, others, heat))
    if plot:
        plots.save_figure(plots.draw_images(panels), plot)
        notice(f"wrote {plot}")
    if show:
        plots.show_images(panels)


if __name__ == "__main__":
    options.run_script(main)

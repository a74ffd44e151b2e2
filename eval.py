"""Measure a trained network on a folder of images.

    python eval.py --data-path FOLDER --weights runs/RUN/best.pth
    python eval.py --data-path FOLDER --split all

Prints a table of the classes and, last, one JSON object. Writes to the output folder:
confusion_matrix.png, mistakes.png (the wrong answers with the largest loss), mistakes.csv (all of
them) and per_class.csv.
"""

import json
import time

import cli
from cli import RunError, UsageError, notice, printable

MISTAKES = 16  # images in mistakes.png


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure a trained network on a folder of images.")
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR",
        help="a folder per class, or train/ and val/ (or test/) of such folders (if omitted: that "
        "of the run)")
    add("--split", choices=("val", "train", "all"), default="val",
        help="the part to measure: as the run split them, or everything")
    cli.add_inference(parser.add_argument_group("network"))
    parser.add_argument_group("output").add_argument("--output-dir", metavar="DIR",
        help="(if omitted: runs/DATE-eval-SPLIT)")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> dict:
    """Evaluate as the options say; returns what the last line prints, and "per_class"."""
    start = time.perf_counter()
    args = cli.parse(build_parser(), args)
    cli.refuse_torchrun()
    if args.data_path:
        cli.require_data(args.data_path)
    weights = cli.require_weights(args.weights)

    # Imports that take a while, so not before the paths are known to be right.
    import folders
    import metrics
    import plots
    from files import save_rows
    from inference import open_network

    network = open_network(weights, args.device, args.runtime, args.workers)
    classes = network.classes

    # The data and the split of the run; classes by the name of their folder.
    data_path = args.data_path or network.args.get("data_path")
    if not data_path:
        raise UsageError(f"add --data-path: {weights} does not say what it was trained on")
    root = folders.prepare_data(data_path)
    val_rate, seed = network.args.get("val_rate", 0.2), network.args.get("seed", 0)
    images = folders.images_of(root, args.split, val_rate, seed)
    if unknown := sorted(images.keys() - set(classes)):
        known = f"{', '.join(classes[:10])}{' …' if len(classes) > 10 else ''}"
        raise UsageError(f"{root}: {weights} knows no class called {unknown[0]}, only {known}")
    paths, labels = folders.with_labels(images, classes)
    part = f"{len(paths)} images of {root}, split {args.split}"
    notice(f"{network.model_name}, {part}, {network.computed_by}")
    output_dir = cli.make_folder(args.output_dir, f"eval-{args.split}")
    bad = folders.BadImages(len(paths))
    tally, mistakes = measure(network, paths, labels, bad, args.workers)
    if not tally.images:
        raise RunError(f"{root}: none of its images can be read")
    figures, report = tally.figures(), metrics.class_report(tally.confusion, classes)

    save_rows(report, output_dir / "per_class.csv")
    save_rows(mistakes, output_dir / "mistakes.csv")
    title = f"{args.split}, {tally.images} images, accuracy {figures['accuracy']:.3f}"
    figure = plots.draw_confusion_matrix(tally.confusion, classes, title)
    plots.save_figure(figure, output_dir / "confusion_matrix.png")
    if mistakes:
        panels = []
        for row in mistakes[:MISTAKES]:
            guess, truth = plots.short(row["prediction"]), plots.short(row["class"])
            panels.append((row["path"], f"{guess} {row['prob']:.2f}, is {truth}"))
        plots.save_figure(plots.draw_images(panels), output_dir / "mistakes.png")
    _print_table(report, figures)
    about = {"bad_images": len(bad.seen), "split": args.split, "weights": str(weights)}
    about |= {"seconds": round(time.perf_counter() - start, 2), "output_dir": str(output_dir)}
    summary = figures | about
    cli.say(json.dumps(summary))
    return summary | {"per_class": report}


def measure(network, paths: list[str], labels: list[int], bad, threads: int) -> tuple:
    """Run a network on images; returns a Tally, and the mistakes, largest loss first."""
    import numpy as np

    from image import ImageError
    from inference import stream
    from metrics import Tally, softmax

    tally, mistakes = Tally(len(network.classes)), []
    answers = stream(paths, network.run, network.preprocessing, threads)
    with cli.progress(len(paths), "evaluating") as bar:
        for label, (path, answer) in zip(labels, answers, strict=True):
            bar.update()
            if isinstance(answer, ImageError):
                bad.add(answer)
                continue
            (loss,) = tally.add(answer[None], np.array([label]))
            if (guess := answer.argmax()) != label:
                names = {"class": network.classes[label], "prediction": network.classes[guess]}
                sure = {"prob": float(softmax(answer[None]).max()), "loss": float(loss)}
                mistakes.append({"path": path} | names | sure)
    return tally, sorted(mistakes, key=lambda row: -row["loss"])


def _print_table(report: list[dict], figures: dict) -> None:
    width = max(len("class"), *(len(printable(row["class"])) for row in report))
    cli.say(f"{'class':{width}}  images  precision  recall      f1")
    for row in report:
        shares = (row[name] for name in ("precision", "recall", "f1"))
        precision, recall, f1 = ("-" if share is None else f"{share:.3f}" for share in shares)
        name = printable(row["class"])
        cli.say(f"{name:{width}}  {row['images']:6}  {precision:>9}  {recall:>6}  {f1:>6}")
    top5 = "" if figures["top5"] is None else f"  Acc@5 {100 * figures['top5']:.3f}"
    cli.say(f"* Acc@1 {100 * figures['accuracy']:.3f}{top5}  loss {figures['loss']:.4f}")


if __name__ == "__main__":
    cli.run(main)

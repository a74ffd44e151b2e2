"""Measure a trained network on a folder of images.

    python eval.py --data-path FOLDER --weights runs/RUN/best.pth
    python eval.py --data-path FOLDER --split all

Measures the validation part of the data that the run was trained on, or all of another folder, or
the val/ that lies in it, and says how many of these images the network was trained on. Prints a
table of the classes and, last, one JSON object. Writes to the output folder: confusion_matrix.png,
confusions.csv, mistakes.png (the wrong answers with the largest loss), mistakes.csv (all of them)
and per_class.csv.
"""

import argparse
import time
from pathlib import Path

from shufflenet import Classifier
from shufflenet.common import options
from shufflenet.common.files import if_possible, save_rows
from shufflenet.common.messages import UsageError, notice, printable, progress, say, say_json
from shufflenet.inference import plots
from shufflenet.inference.metadata import Metadata
from shufflenet.inference.metrics import class_report, confusions, measure
from shufflenet.reading import download, folders

MISTAKES = 16  # images in mistakes.png


def build_parser() -> options.Parser:
    parser = options.Parser(description="Measure a trained network on a folder of images.")
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR",
        help="a folder per class, or train/ and val/ of such (if omitted: that of the run)")
    add("--split", choices=("val", "test", "train", "all"),
        help="part to measure (if omitted: val if there is one or the run knows it, else all)")
    options.add_inference(parser.add_argument_group("network"))
    parser.add_argument_group("output").add_argument("--output-dir", metavar="DIR",
        help="folder for tables and drawings (if omitted: runs/DATE-eval-SPLIT)")
    # fmt: on
    return parser


def main(words: options.Words = None) -> dict:
    """Evaluate as the args say; returns what the last line prints, and "per_class"."""
    start = time.perf_counter()
    args = build_parser().parse_args(words)
    if args.data_path:
        download.require_data(args.data_path)
    weights = options.require_weights(args.weights)
    network = Classifier(weights, args.device, args.runtime, args.workers)
    notice(f"{weights}: {network.metadata}; {network.computed_by}")

    root, split, images = choose_part(network, args)
    classes = folders.names_of_folders(images, network.classes)
    folders.refuse_unknown(images, classes, root)
    paths, labels = folders.with_labels(images, classes)
    notice(f"{root}: {split}, {len(paths)} images; {say_trained_on(network.metadata, paths)}")

    folder = options.make_folder(args.output_dir, f"eval-{split}")
    bad = folders.BadImages(len(paths))
    answers = progress(network.stream(paths, args.workers), "evaluating", len(paths))
    tally, mistakes = measure(answers, labels, classes, bad)
    figures, report = tally.figures(), class_report(tally.confusion, classes)

    tables = {"per_class": report, "mistakes": mistakes}
    tables["confusions"] = confusions(tally.confusion, classes)
    for name, rows in tables.items():
        with if_possible():
            save_rows(rows, folder / f"{name}.csv")
    with if_possible():
        title = f"{split}, {tally.images} images, accuracy {figures['accuracy']:.3f}"
        figure = plots.draw_confusion_matrix(tally.confusion, classes, title)
        plots.save_figure(figure, folder / "confusion_matrix.png")
    with if_possible():
        (folder / "mistakes.png").unlink(missing_ok=True)  # of an earlier evaluation
        if mistakes:
            draw_mistakes(mistakes, folder / "mistakes.png")
    print_table(report, figures)
    summary = {"top5": None} | figures | {"images": tally.images, "bad_images": len(bad.seen)}
    summary |= {"split": split, "weights": str(weights)}
    summary |= {"seconds": round(time.perf_counter() - start, 2), "output_dir": str(folder)}
    say_json(summary)
    return summary | {"per_class": report}


def choose_part(network: Classifier, args: argparse.Namespace) -> tuple[Path, str, folders.Images]:
    """The folder, the name of a part of it, and the images of that; UsageError if nobody says where
    they are, or there is no such part."""
    run = network.metadata.args
    data_path = args.data_path or run.get("data_path")
    if not data_path:
        what = "does not say what it was trained on"
        raise UsageError(f"{network.weights} {what}: add --data-path")
    root = download.prepare_data(data_path)
    parts = folders.find_parts(root)
    known = folders.fingerprint(parts, root) == run.get("data")
    split = args.split or ("val" if known or "val" in parts else "all")
    if split == "all":
        return root, split, folders.all_images(parts)
    parts = folders.split_images(parts, run.get("val_rate") or 0.2, run.get("seed") or 0)
    if split not in parts:
        raise UsageError(f"--split {split}: {root} has no such part, but {' and '.join(parts)}")
    return root, split, parts[split]


def say_trained_on(metadata: Metadata, paths: list[str]) -> str:
    """How many of some images the network was trained on, by their names and sizes."""
    if not metadata.trained_on:
        return "the weights do not say which were trained on"
    known = set(metadata.trained_on)
    count = sum(not known.isdisjoint(folders.image_hashes([path])) for path in paths)
    least = "at least " * (len(known) == folders.MOST_HASHES)
    return f"{least}{count} of them were trained on, by name and size"


def draw_mistakes(mistakes: list[dict], path: Path) -> None:
    """Draw the mistakes with the largest loss."""
    panels = []
    for row in mistakes[:MISTAKES]:
        answer = f"{plots.short(row['prediction'])} {row['prob']:.3f}"
        truth = f"is {plots.short(row['class'])}, {row['prob_of_class']:.3f}"
        panels.append(plots.Panel(row["path"], answer, False, [truth]))
    plots.save_figure(plots.draw_images(panels), path)


def print_table(report: list[dict], figures: dict) -> None:
    """Print a line per class, and one of all."""
    width = max(len("class"), *(len(printable(row["class"])) for row in report))
    say(f"{'class':{width}}  images  precision  recall      f1")
    for row in report:
        shares = (row[name] for name in ("precision", "recall", "f1"))
        precision, recall, f1 = ("-" if share is None else f"{share:.3f}" for share in shares)
        name = printable(row["class"])
        say(f"{name:{width}}  {row['images']:6}  {precision:>9}  {recall:>6}  {f1:>6}")
    words = [f"* Acc@1 {100 * figures['accuracy']:.3f}"]
    words.append(f"balanced {100 * figures['balanced_accuracy']:.3f}")
    if "top5" in figures:
        words.append(f"Acc@5 {100 * figures['top5']:.3f}")
    for name, value in figures.items():
        if name not in ("accuracy", "balanced_accuracy", "top5"):
            words.append(f"{name} {value:.4f}")
    say("  ".join(words))


if __name__ == "__main__":
    options.run_script(main)

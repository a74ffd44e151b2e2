"""Measure a trained network on a folder of images.

    python eval.py --data-path FOLDER --weights runs/RUN/best.pth
    python eval.py --data-path FOLDER --split all

Measures the validation part of the data that the run was trained on, or all of another folder, or
the val/ that lies in it. Prints a table of the classes and, last, one JSON object. Writes to the
output folder: confusion_matrix.png, confusions.csv, mistakes.png (the wrong answers with the
largest loss), mistakes.csv (all of them) and per_class.csv.
"""

import json
import re
import time

import cli
from cli import UsageError, notice, printable

WORDNET = re.compile(r"n\d{8}")  # the name of a class folder of ImageNet
MISTAKES = 16  # images in mistakes.png


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure a trained network on a folder of images.")
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR",
        help="a folder per class, or train/ and val/ of such (if omitted: that of the run)")
    add("--split", choices=("val", "train", "all"),
        help="part to measure (if omitted: val if there is one or the run knows it, else all)")
    cli.add_inference(parser.add_argument_group("network"))
    parser.add_argument_group("output").add_argument("--output-dir", metavar="DIR",
        help="folder for tables and drawings (if omitted: runs/DATE-eval-SPLIT)")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> dict:
    """Evaluate as the options say; returns what the last line prints, and "per_class"."""
    start = time.perf_counter()
    args = build_parser().parse_args(args)
    if args.data_path:
        cli.require_data(args.data_path)
    weights = cli.require_weights(args.weights)

    # Imports that take a while, so not before the paths are known to be right.
    import folders
    import metrics
    import plots
    from files import save_rows
    from inference import Classifier, measure

    network = Classifier(weights, args.device, args.runtime, args.workers)
    cli.introduce(weights, network, f"; {network.computed_by}")
    classes = network.classes

    images, split, root, whose = _choose(network, weights, args)
    if len(images) == len(classes) == 1000 and all(map(WORDNET.fullmatch, images)):
        classes = list(images)  # folders of ImageNet, which are in the order of its classes
    folders.refuse_unknown(images, classes, root)
    paths, labels = folders.with_labels(images, classes)
    notice(f"{root}: {split}, {len(paths)} images; {whose}")
    bad = folders.BadImages(len(paths))
    output_dir = cli.make_folder(args.output_dir, f"eval-{split}")
    answers = cli.progress(network.stream(paths, args.workers), "evaluating", len(paths))
    tally, mistakes = measure(answers, labels, classes, bad)
    figures, report = tally.figures(), metrics.class_report(tally.confusion, classes)

    save_rows(report, output_dir / "per_class.csv")
    save_rows(mistakes, output_dir / "mistakes.csv")
    save_rows(metrics.confusions(tally.confusion, classes), output_dir / "confusions.csv")
    title = f"{split}, {figures['images']} images, accuracy {figures['accuracy']:.3f}"
    figure = plots.draw_confusion_matrix(tally.confusion, classes, title)
    plots.save_figure(figure, output_dir / "confusion_matrix.png")
    panels = []
    for row in mistakes[:MISTAKES]:
        truth = f"is {plots.short(row['class'])}, {row['prob_of_class']:.3f}"
        answer = f"{plots.short(row['prediction'])} {row['prob']:.3f}"
        panels.append(plots.Panel(row["path"], answer, False, [truth]))
    if panels:
        plots.save_figure(plots.draw_images(panels), output_dir / "mistakes.png")
    _print_table(report, figures)
    about = {"bad_images": len(bad.seen), "split": split, "weights": str(weights)}
    about |= {"seconds": round(time.perf_counter() - start, 2), "output_dir": str(output_dir)}
    summary = figures | about
    cli.say(json.dumps(summary))
    return summary | {"per_class": report}


def _choose(network, weights, args) -> tuple:
    """The images to measure by class, which part of the data they are, its folder, and what that
    is to the run."""
    import folders

    data_path = args.data_path or network.args.get("data_path")
    if not data_path:
        raise UsageError(f"add --data-path: {weights} does not say what it was trained on")
    root = folders.prepare_data(data_path)
    parts = folders.find_parts(root)
    data = folders.fingerprint(parts)
    trained_on = data == network.args.get("data")
    split = args.split or ("val" if trained_on or len(parts) == 2 else "all")
    if split == "all":
        images = folders.all_images(parts)
    else:
        images = folders.sides(root, parts, network.args)[split == "val"]
    whose = f"{'what' if trained_on else 'another set than'} the run was trained on"
    if not trained_on and str(root.resolve()) == network.args.get("data_path"):
        whose = "changed since the run learnt from it, which flatters accuracy"
    return images, split, root, whose


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

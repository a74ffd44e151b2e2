"""Measure a trained network on a folder of pictures.

    python eval.py --data-path FOLDER --weights runs/RUN/best.pth
    python eval.py --data-path FOLDER --split all

Prints a table of the classes and, last, one JSON object. Writes to the output folder:
confusion_matrix.png, mistakes.png (the most confident wrong answers), per_class.csv and
metrics.json.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import cli
from cli import UsageError, notice, printable

MISTAKES = 16  # pictures in mistakes.png


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure a trained network on a folder of pictures.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path",
        default="data/flower_photos",
        metavar="DIR",
        help="folder with one folder per class, or with train/ and val/ (or test/) of such folders",
    )
    data.add_argument(
        "--split",
        choices=("val", "train", "all"),
        default="val",
        help="the part to measure: the validation or the training part of the run, or everything",
    )
    data.add_argument(
        "--val-rate",
        type=cli.number(float, 0, 0.99, above=True),
        metavar="SHARE",
        help="share of every class in the validation part (when not said: the run's, or 0.2)",
    )
    data.add_argument(
        "--seed",
        type=cli.number(int, 0, 2**31),
        metavar="N",
        help="of the split (when not said: the run's, or 0)",
    )
    cli.add_workers(data)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--weights",
        metavar="FILE",
        help="best.pth of a run, or a bare state dict (when not said: the newest runs/*/best.pth)",
    )
    network.add_argument(
        "-b", "--batch-size", type=cli.number(int, 1), default=64, metavar="N",
        help="pictures per step",
    )  # fmt: skip
    cli.add_device(network)
    cli.add_amp(network)
    parser.add_argument_group("output").add_argument(
        "--output-dir", metavar="DIR", help="(when not said: runs/DATE-eval-SPLIT)"
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    """Evaluate as the options say; returns what the last line prints."""
    start = time.perf_counter()
    cli.require_path(args.data_path, "--data-path", folder=True)
    weights = args.weights or cli.newest_run("best.pth")
    cli.require_path(weights, "--weights")

    # Seconds of imports, so not before the paths are known to be right.
    import checkpoint
    import folders
    import plots
    import utils
    from image import load_rgb
    from my_dataset import DeviceLoader, MyDataSet, eval_transform

    device = utils.choose_device(args.device)
    classifier = checkpoint.load_classifier(weights)
    classes = classifier.classes

    # The same split as in training, classes by the name of their folder.
    val_rate = args.val_rate or classifier.args.get("val_rate", 0.2)
    seed = classifier.args.get("seed", 0) if args.seed is None else args.seed
    pictures = folders.pictures_of(args.data_path, args.split, val_rate, seed)
    if unknown := sorted(pictures.keys() - set(classes)):
        raise UsageError(
            f"{args.data_path}: {', '.join(unknown)} are no classes of {weights}, which knows "
            f"{', '.join(classes[:10])}{' …' if len(classes) > 10 else ''}"
        )
    paths, labels = folders.with_labels(pictures, classes)
    dataset = MyDataSet(paths, labels, eval_transform(classifier.preprocessing))
    loader = DeviceLoader(
        dataset,
        device,
        classifier.preprocessing,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    notice(f"{len(dataset)} pictures of {args.data_path}, split {args.split}, on {device}")

    model = classifier.model.to(device)
    result = utils.evaluate(model, loader, device, amp=utils.amp_dtype(device, args.amp))
    report = utils.class_report(result["confusion"], classes)

    summary = {
        "accuracy": result["accuracy"],
        "top5": result["top5"],
        "loss": result["loss"],
        "images": result["images"],
        "split": args.split,
        "weights": str(weights),
        "images_per_second": round(result["images_per_second"], 1),
    }
    output_dir = Path(args.output_dir or cli.fresh_folder(f"eval-{args.split}"))
    output_dir.mkdir(parents=True, exist_ok=True)
    title = f"{args.split}, {result['images']} pictures, accuracy {result['accuracy']:.3f}"
    figure = plots.draw_confusion_matrix(result["confusion"], classes, title)
    plots.save_figure(figure, output_dir / "confusion_matrix.png")
    mistakes = [
        (
            load_rgb(paths[i]),
            f"is {plots.short(classes[labels[i]])}\n"
            f"taken for {plots.short(classes[predicted])} ({confidence:.2f})",
        )
        for i, predicted, confidence in _worst(result, labels)
    ]
    if mistakes:
        plots.save_figure(plots.draw_pictures(mistakes), output_dir / "mistakes.png")
    with checkpoint.replacing(output_dir / "per_class.csv", "w") as file:
        rows = csv.DictWriter(file, report[0])
        rows.writeheader()
        rows.writerows(report)
    checkpoint.save_json(summary | {"per_class": report}, output_dir / "metrics.json")

    _print_table(report, result)
    summary |= {"seconds": round(time.perf_counter() - start, 2), "output_dir": str(output_dir)}
    print(json.dumps(summary))
    return summary | {"per_class": report}


def _worst(result: dict, labels: list[int]) -> list[tuple[int, int, float]]:
    """Index, predicted class and its probability of the wrong answers with the largest loss."""
    order = result["losses"].argsort(descending=True).tolist()
    predicted, confidence = result["predicted"].tolist(), result["confidence"].tolist()
    wrong = [(i, predicted[i], confidence[i]) for i in order if predicted[i] != labels[i]]
    return wrong[:MISTAKES]


def _print_table(report: list[dict], result: dict) -> None:
    width = max(len("class"), *(len(printable(row["class"])) for row in report))
    print(f"{'class':{width}}  images  precision  recall      f1")
    for row in report:
        figures = (row["precision"], row["recall"], row["f1"])
        precision, recall, f1 = ("-" if x is None else f"{x:.3f}" for x in figures)
        name = printable(row["class"])
        print(f"{name:{width}}  {row['images']:6}  {precision:>9}  {recall:>6}  {f1:>6}")
    top5 = "" if result["top5"] is None else f"  Acc@5 {100 * result['top5']:.3f}"
    print(f"* Acc@1 {100 * result['accuracy']:.3f}{top5}  loss {result['loss']:.4f}")


if __name__ == "__main__":
    cli.run(build_parser(), main)

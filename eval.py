"""Measure a trained network on a folder of pictures.

    python eval.py --data-path FOLDER --weights runs/RUN/best.pth
    python eval.py --data-path FOLDER --split all

Prints a table of the classes and, last, one JSON object. Writes to the output folder:
confusion_matrix.png, mistakes.png (the wrong answers with the largest loss), mistakes.csv (all of
them), per_class.csv and metrics.json.
"""

import argparse
import json
import time
from pathlib import Path

import cli
from cli import RunError, UsageError, notice, printable

MISTAKES = 16  # pictures in mistakes.png


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure a trained network on a folder of pictures.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path",
        metavar="DIR",
        help="folder with one folder per class, or with train/ and val/ (or test/) of such "
        "folders, or 'sample' (when not said: the run's, or data/flower_photos)",
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
    cli.add_bad_images(data)
    network = parser.add_argument_group("network")
    cli.add_inference(network)
    network.add_argument(
        "-b", "--batch-size", type=cli.number(int, 1), default=16, metavar="N",
        help="pictures at a time in each thread",
    )  # fmt: skip
    parser.add_argument_group("output").add_argument(
        "--output-dir", metavar="DIR", help="(when not said: runs/DATE-eval-SPLIT)"
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    """Evaluate as the options say; returns what the last line prints."""
    start = time.perf_counter()
    if args.data_path:
        cli.require_data(args.data_path)
    cli.check_output_dir(args.output_dir)
    weights = args.weights or cli.newest_run("best.pth")
    cli.require_path(weights, "--weights")

    # Imports that take a while, so not before the paths are known to be right.
    import numpy as np
    from tqdm import tqdm

    import folders
    import metrics
    import plots
    from files import save_json, save_rows
    from image import ImageError, load_rgb
    from pipeline import stream
    from runtime import open_network

    threads = max(1, args.workers)
    network = open_network(
        weights, device=args.device, runtime=args.runtime, amp=args.amp, threads=threads
    )
    classes = network.classes

    # The data and the split of the run unless said otherwise; classes by the name of their folder.
    saved = {name: network.args.get(name) for name in ("data_path", "val_rate", "seed")}
    of_run = cli.parse_saved(build_parser(), saved, weights)
    data_path = args.data_path or of_run.data_path or cli.FLOWER_PHOTOS
    cli.require_data(data_path)
    root = folders.prepare_data(data_path)
    val_rate = args.val_rate or of_run.val_rate or 0.2
    seed = (of_run.seed or 0) if args.seed is None else args.seed
    pictures = folders.pictures_of(root, args.split, val_rate, seed)
    if unknown := sorted(pictures.keys() - set(classes)):
        raise UsageError(
            f"{root}: {weights} knows no class called {', '.join(unknown)}, only "
            f"{', '.join(classes[:10])}{' …' if len(classes) > 10 else ''}"
        )
    paths, labels = folders.with_labels(pictures, classes)
    name = network.model_name
    notice(f"{name}, {len(paths)} pictures of {root}, split {args.split}, {network.computed_by}")

    bad = folders.BadPictures(len(paths), skip=args.on_bad_image == "skip")
    logits, rows = [], []
    with tqdm(total=len(paths), desc="evaluating", unit="img", leave=False) as bar:
        options = {"threads": threads, "batch_size": args.batch_size}
        answers = stream(paths, network.run, network.preprocessing, **options)
        for row, (_, answer) in enumerate(answers):
            bar.update()
            if isinstance(answer, ImageError):
                bad.add(answer)
            else:
                rows.append(row)
                logits.append(answer)
    if not rows:
        raise RunError(f"{root}: none of its pictures can be read")
    paths, labels = [paths[row] for row in rows], [labels[row] for row in rows]
    rate = len(paths) / bar.format_dict["elapsed"]
    result = metrics.measure(np.stack(logits), np.array(labels))
    report = metrics.class_report(result["confusion"], classes)

    summary = {
        "accuracy": result["accuracy"],
        "top5": result["top5"],
        "loss": result["loss"],
        "images": result["images"],
        "bad_images": len(bad.seen),
        "split": args.split,
        "weights": str(weights),
        "images_per_second": round(rate, 1),
    }
    output_dir = Path(args.output_dir or cli.fresh_folder(f"eval-{args.split}"))
    output_dir.mkdir(parents=True, exist_ok=True)
    title = f"{args.split}, {result['images']} pictures, accuracy {result['accuracy']:.3f}"
    figure = plots.draw_confusion_matrix(result["confusion"], classes, title)
    plots.save_figure(figure, output_dir / "confusion_matrix.png")
    mistakes = _mistakes(result, paths, labels, classes)
    save_rows(mistakes, output_dir / "mistakes.csv")
    if mistakes:
        shown = [(load_rgb(row["path"]), _caption(row)) for row in mistakes[:MISTAKES]]
        plots.save_figure(plots.draw_pictures(shown), output_dir / "mistakes.png")
    save_rows(report, output_dir / "per_class.csv")
    save_json(summary | {"per_class": report}, output_dir / "metrics.json")

    _print_table(report, result)
    summary |= {"seconds": round(time.perf_counter() - start, 2), "output_dir": str(output_dir)}
    cli.say(json.dumps(summary))
    return summary | {"per_class": report}


def _mistakes(result: dict, paths: list[str], labels: list[int], classes: list[str]) -> list[dict]:
    """The wrong answers, largest loss first."""
    columns = zip(
        paths,
        labels,
        result["predicted"].tolist(),
        result["confidence"].tolist(),
        result["losses"].tolist(),
        strict=True,
    )
    rows = [
        {
            "path": path,
            "class": classes[label],
            "prediction": classes[predicted],
            "prob": confidence,
            "loss": loss,
        }
        for path, label, predicted, confidence, loss in columns
        if predicted != label
    ]
    return sorted(rows, key=lambda row: -row["loss"])


def _caption(row: dict) -> str:
    from plots import short

    name = short(Path(row["path"]).name, 34)
    return (
        f"{name}\nis {short(row['class'])}\ntaken for {short(row['prediction'])} {row['prob']:.2f}"
    )


def _print_table(report: list[dict], result: dict) -> None:
    width = max(len("class"), *(len(printable(row["class"])) for row in report))
    cli.say(f"{'class':{width}}  images  precision  recall      f1")
    for row in report:
        figures = (row["precision"], row["recall"], row["f1"])
        precision, recall, f1 = ("-" if x is None else f"{x:.3f}" for x in figures)
        name = printable(row["class"])
        cli.say(f"{name:{width}}  {row['images']:6}  {precision:>9}  {recall:>6}  {f1:>6}")
    top5 = "" if result["top5"] is None else f"  Acc@5 {100 * result['top5']:.3f}"
    cli.say(f"* Acc@1 {100 * result['accuracy']:.3f}{top5}  loss {result['loss']:.4f}")


if __name__ == "__main__":
    cli.run(build_parser(), main)

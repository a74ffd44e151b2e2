"""Train or fine-tune a ShuffleNet on a folder of pictures.

    python train.py --data-path sample --model shufflenet_v2_x0_5
    python train.py --data-path FOLDER --weights imagenet --freeze-layers

Writes to the output folder: last.pth (to resume), best.pth (to use), metrics.csv, curves.png,
confusion_matrix.png, class_indices.json, args.json and TensorBoard events. Prints a line an epoch
and, last, one JSON object.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import cli
from cli import UsageError, notice

FLOWER_PHOTOS = "data/flower_photos"
SAMPLE = "data/sample"


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Train or fine-tune a ShuffleNet on a folder of pictures.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path",
        default=FLOWER_PHOTOS,
        metavar="DIR",
        help="folder with one folder per class, or with train/ and val/ (or test/) of such "
        "folders; the default is downloaded when absent; 'sample' draws flowers to try things on",
    )
    data.add_argument(
        "--val-rate",
        type=cli.number(float, 0, 0.99, above=True),
        default=0.2,
        metavar="SHARE",
        help="share of every class that goes to validation",
    )
    cli.add_workers(data)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--model",
        default="shufflenet_v2_x1_0",
        metavar="NAME",
        help="shufflenet_v2_ x0_5, x1_0, x1_5, x2_0, or shufflenet_v1_ x0_25 to x2_0 _g1 to _g8, "
        "such as shufflenet_v1_x1_0_g3",
    )
    network.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="start from a file, or from torchvision's ImageNet weights ('imagenet', downloaded); "
        "'' starts from nothing",
    )
    cli.add_switch(network, "freeze-layers", False, "train the last layer, fc, alone")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=cli.number(int, 1), default=30, metavar="N", help="passes over the data"
    )
    training.add_argument(
        "-b", "--batch-size", type=cli.number(int, 1), default=16, metavar="N",
        help="pictures per step",
    )  # fmt: skip
    training.add_argument(
        "--lr",
        type=cli.number(float, 0, 1e6, above=True),
        default=0.01,
        metavar="RATE",
        help="learning rate of the first epoch",
    )
    training.add_argument(
        "--lrf",
        type=cli.number(float, 0, 1),
        default=0.1,
        metavar="SHARE",
        help="the cosine ends at lr * lrf",
    )
    training.add_argument(
        "--seed", type=cli.number(int, 0, 2**31), default=0, metavar="N",
        help="decides split, order, augmentation and fresh weights",
    )  # fmt: skip
    cli.add_device(training)
    cli.add_amp(training)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder of this run (when not said: runs/DATE-MODEL)",
    )
    output.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on with a run from its last.pth, with its options; without FILE the one in "
        "--output-dir, else of the newest run",
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train as the options say; returns what the last line prints."""
    start = time.perf_counter()
    resume_from = _check_paths(args)

    # Seconds of imports, so not before the paths are known to be right.
    import torch
    from torch.utils.tensorboard import SummaryWriter

    import checkpoint
    import folders
    import utils
    from image import default_preprocessing
    from model import build_model
    from my_dataset import DeviceLoader, MyDataSet, eval_transform, train_transform

    # Options of the run, and its state if it goes on.
    state = checkpoint.load(resume_from) if resume_from else None
    if state:
        args = _options_of_run(args, state, resume_from)
    device = utils.choose_device(args.device)
    amp = utils.amp_dtype(device, args.amp)

    # Network.
    try:
        build_model(args.model, num_classes=1)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None
    preprocessing = default_preprocessing(args.model)

    # Data.
    root = _prepare_data(args.data_path)
    train_pictures, val_pictures = folders.split_pictures(root, args.val_rate, args.seed)
    classes = list(train_pictures)
    train_set = MyDataSet(
        *folders.with_labels(train_pictures, classes), train_transform(preprocessing), args.seed
    )
    val_set = MyDataSet(*folders.with_labels(val_pictures, classes), eval_transform(preprocessing))
    options = {"batch_size": args.batch_size, "workers": args.workers}
    train_loader = DeviceLoader(train_set, device, preprocessing, shuffle=True, **options)
    val_loader = DeviceLoader(val_set, device, preprocessing, **options)
    counts = f"{len(train_set)} pictures to train, {len(val_set)} to validate"
    notice(f"{counts}, in {len(classes)} classes")

    utils.set_seed(args.seed)
    model = build_model(args.model, len(classes))
    if state:
        if state.get("classes") != classes:
            raise UsageError(f"{resume_from} was trained on {state.get('classes')}, not {classes}")
        checkpoint.load_weights(model, checkpoint.state_dict_of(state, resume_from), resume_from)
    elif args.weights:
        _load_start(model, args.weights, args.model, classes)
    if args.freeze_layers:
        utils.freeze_layers(model)
        if not args.weights:
            notice("--freeze-layers without --weights: the frozen layers hold random weights")
    model.to(device)

    # Optimizer.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=4e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    history, best = [], None
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history, best = state["history"], state["best"]

    # Output folder.
    output_dir = Path(args.output_dir or cli.fresh_folder(args.model))
    output_dir.mkdir(parents=True, exist_ok=True)
    saved_args = {name: value for name, value in vars(args).items() if name not in _NOT_SAVED}
    saved_args["output_dir"] = str(output_dir)
    checkpoint.save_json(saved_args, output_dir / "args.json")
    names = {str(index): name for index, name in enumerate(classes)}
    checkpoint.save_json(names, output_dir / "class_indices.json")
    writer = SummaryWriter(output_dir, purge_step=len(history) + 1)
    notice(f"writing to {output_dir}, training on {device}{f' in {amp}' if amp else ''}")

    for epoch in range(len(history), args.epochs):
        # Each epoch has its own seed, so a run that goes on draws what it would have drawn.
        utils.set_seed(args.seed + epoch)
        lr = utils.cosine_lr(args.lr, args.lrf, epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        trained_for = utils.train_one_epoch(
            model, optimizer, train_loader, device, epoch, amp=amp, scaler=scaler
        )
        result = utils.evaluate(
            model, val_loader, device, amp=amp, title=f"epoch {epoch + 1} validation"
        )

        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": trained_for["loss"],
            "train_accuracy": trained_for["accuracy"],
            "val_loss": result["loss"],
            "val_accuracy": result["accuracy"],
        }
        history.append(row)
        improved = best is None or row["val_accuracy"] > best["accuracy"]
        if improved:
            best = {
                "accuracy": row["val_accuracy"],
                "epoch": epoch + 1,
                "confusion": result["confusion"],
            }
        usable = {
            "model": {name: value.cpu() for name, value in model.state_dict().items()},
            "model_name": args.model,
            "classes": classes,
            "preprocessing": preprocessing,
            "epoch": epoch + 1,
            "metrics": row,
            "args": saved_args,
        }
        if improved:  # before last.pth: killed between the two, the epoch is done again
            checkpoint.save(usable, output_dir / "best.pth")
        to_resume = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "history": history,
            "best": best,
        }
        checkpoint.save(usable | to_resume, output_dir / "last.pth")
        _write_metrics(history, output_dir / "metrics.csv")
        for side in ("train", "val"):
            for name in ("loss", "accuracy"):
                writer.add_scalar(f"{name}/{side}", row[f"{side}_{name}"], epoch + 1)
        writer.add_scalar("learning_rate", lr, epoch + 1)
        writer.flush()
        print(
            f"epoch {epoch + 1}/{args.epochs}  lr {lr:.4g}  "
            f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f}  "
            f"val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.4f}  "
            f"{trained_for['images_per_second']:.0f} img/s{'  best' if improved else ''}",
            flush=True,
        )
    writer.close()

    import plots

    plots.save_figure(plots.draw_curves(history), output_dir / "curves.png")
    title = f"validation, epoch {best['epoch']}, accuracy {best['accuracy']:.3f}"
    figure = plots.draw_confusion_matrix(best["confusion"], classes, title)
    plots.save_figure(figure, output_dir / "confusion_matrix.png")

    summary = {
        "best_accuracy": best["accuracy"],
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "train_images": len(train_set),
        "val_images": len(val_set),
        "seconds": round(time.perf_counter() - start, 2),
        "output_dir": str(output_dir),
    }
    print(json.dumps(summary))
    return summary


# Options that say where and how fast a run goes, not what it computes: a resumed run may change
# them. All others stay as the run began.
_FREE = {"data_path", "workers", "device", "output_dir", "epochs"}
_NOT_SAVED = {"given", "resume"}


def _check_paths(args: argparse.Namespace) -> Path | None:
    """Refuse what cannot work; returns the last.pth to go on from."""
    if args.data_path not in (FLOWER_PHOTOS, "sample"):
        cli.require_path(args.data_path, "--data-path", folder=True)
    if args.resume is not None:
        if args.resume:
            resume_from = Path(args.resume)
        elif args.output_dir:
            resume_from = Path(args.output_dir, "last.pth")
        else:
            resume_from = cli.newest_run("last.pth")
        cli.require_path(resume_from, "--resume")
        return resume_from
    if args.weights not in ("", "imagenet"):
        cli.require_path(args.weights, "--weights")
    if args.output_dir and Path(args.output_dir, "last.pth").exists():
        raise UsageError(
            f"--output-dir {args.output_dir}: holds a run; add --resume to go on with it, or name "
            "another folder"
        )
    return None


def _options_of_run(args: argparse.Namespace, state: dict, path: Path) -> argparse.Namespace:
    """The options a run began with, changed by those typed now where that changes no result."""
    old = state.get("args")
    if not isinstance(old, dict) or not {"optimizer", "scaler", "history", "best"} <= state.keys():
        raise UsageError(f"--resume {path}: not the last.pth of a run")
    now = vars(args)
    for name in sorted(args.given - _FREE - {"resume"}):
        if now[name] != old.get(name):
            raise UsageError(
                f"--{name.replace('_', '-')} {now[name]}: the run of {path} began with "
                f"{old.get(name)} and goes on with it; leave the option out, or start a new run"
            )
    merged = now | old | {name: now[name] for name in args.given}
    merged["output_dir"] = args.output_dir or str(path.parent)
    return argparse.Namespace(**merged)


def _prepare_data(data_path: str) -> str:
    if data_path == "sample":
        from sample_flowers import draw_sample_flowers

        return str(draw_sample_flowers(SAMPLE))
    if data_path == FLOWER_PHOTOS:
        from flower_photos import download_flower_photos

        return str(download_flower_photos(FLOWER_PHOTOS))
    return data_path


def _load_start(model, weights: str, model_name: str, classes: list[str]) -> None:
    """Load ImageNet weights or those of a file, with a new head unless the classes are the same."""
    import checkpoint

    if weights == "imagenet":
        state, source = checkpoint.imagenet_weights(model_name)
        trained_on = None
    else:
        file, source = checkpoint.load(weights), weights
        state, trained_on = checkpoint.state_dict_of(file, weights), file.get("classes")
    new_head = not checkpoint.head_fits(model, state) or trained_on not in (None, classes)
    keys = checkpoint.load_weights(model, state, source, new_head=new_head)
    notice(
        f"loaded {source}{', but for its head' if new_head else ''}: "
        f"missing keys {keys.missing_keys}, unexpected keys {keys.unexpected_keys}"
    )


def _write_metrics(history: list[dict], path: Path) -> None:
    import checkpoint

    with checkpoint.replacing(path, "w") as file:
        rows = csv.DictWriter(file, history[0])
        rows.writeheader()
        rows.writerows(history)


if __name__ == "__main__":
    cli.run(build_parser(), main)

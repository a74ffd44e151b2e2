"""Train or fine-tune a ShuffleNet on a folder of pictures.

    python train.py --data-path sample --model shufflenet_v2_x0_5
    python train.py --data-path FOLDER --weights imagenet --freeze-layers

Writes to the output folder: last.pth (to resume), best.pth (to use), metrics.csv, curves.png,
confusion_matrix.png, class_indices.json, args.json and TensorBoard events. Prints a line an epoch
and, last, one JSON object.
"""

import argparse
import json
import math
import reprlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cli
import resume
from cli import RunError, UsageError, notice

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.tensorboard import SummaryWriter

    from features import FeatureLoader


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Train or fine-tune a ShuffleNet on a folder of pictures.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path",
        default=cli.FLOWER_PHOTOS,
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
    cli.add_bad_images(data)
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
    network.add_argument(
        "--cache-features",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --freeze-layers: compute what fc sees of each picture once, without "
        "augmentation, and keep it in .cache/; other defaults then hold for --lr, --batch-size and "
        "--weight-decay: 0.03, 64, 0.1",
    )
    cli.add_switch(
        network, "fc-first", False,
        "train fc alone on cached features, with their defaults, before all layers, which a fresh "
        "fc would spoil; the default of --lr is then 0.001",
    )  # fmt: skip
    cli.add_switch(
        network, "freeze-bn", False,
        "leave batch norm as the weights have it: its statistics, scale and shift",
    )  # fmt: skip
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
        "--wd",
        "--weight-decay",
        dest="weight_decay",
        type=cli.number(float, 0, 1e3),
        default=4e-5,
        metavar="DECAY",
        help="weight decay of SGD",
    )
    training.add_argument(
        "--train-size", type=cli.number(int, 64, 1024), metavar="PIXELS",
        help="side of the crops to train on, smaller is faster (when not said: 224, on which the "
        "network is evaluated)",
    )  # fmt: skip
    training.add_argument(
        "--random-erase", type=cli.number(float, 0, 1), default=0.0, metavar="SHARE",
        help="share of the pictures to train on in which a random rectangle is hidden",
    )  # fmt: skip
    training.add_argument(
        "--patience", type=cli.number(int, 1), metavar="N",
        help="stop when so many epochs have brought nothing better",
    )  # fmt: skip
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
    resume_from, named = _check_paths(args)

    # Seconds of imports, so not before the paths are known to be right.
    import torch
    from torch.utils.tensorboard import SummaryWriter

    import checkpoint
    import features
    import folders
    import utils
    from files import locked, save_json
    from image import default_preprocessing
    from model import build_model
    from my_dataset import DeviceLoader, MyDataSet, eval_transform, train_transform

    # Options of the run, and its state if it goes on.
    state = None
    if resume_from:
        state, resume_from = resume.load(resume_from, named)
        args = resume.options_of_run(build_parser(), args, state, resume_from)
    cached = args.freeze_layers and args.cache_features
    if not state:  # what the user typed wins
        defaults = features.RECIPE if cached else {"lr": 0.001} if args.fc_first else {}
        vars(args).update({k: v for k, v in defaults.items() if k not in args.given})
    device = utils.choose_device(args.device)
    amp = utils.amp_dtype(device, args.amp)
    preprocessing = default_preprocessing(args.model)
    weights = _read_weights(args.model, "" if state else args.weights)

    # Data.
    root = folders.prepare_data(args.data_path)
    train_pictures, val_pictures = folders.split_pictures(root, args.val_rate, args.seed)
    classes = list(train_pictures)
    train = folders.with_labels(train_pictures, classes)
    val = folders.with_labels(val_pictures, classes)
    bad = folders.BadPictures(len(train[0]) + len(val[0]), skip=args.on_bad_image == "skip")
    train, val = bad.scan(*train), bad.scan(*val)
    fingerprint = folders.fingerprint(root, train[0] + val[0])
    counts = f"{len(train[0])} pictures to train, {len(val[0])} to validate"
    notice(f"{counts}, in {len(classes)} classes")

    # Network.
    utils.set_seed(args.seed)
    model = build_model(args.model, len(classes))
    if state:
        if state.get("classes") != classes:
            was = reprlib.repr(state.get("classes"))
            raise UsageError(f"{resume_from} was trained on {was}, not {classes}")
        checkpoint.load_weights(model, checkpoint.state_dict_of(state, resume_from), resume_from)
    elif weights:
        _load_weights(model, weights, classes)
    if args.freeze_layers:
        utils.freeze_layers(model)
        if not args.weights:
            notice("--freeze-layers without --weights: the frozen layers hold random weights")
    if args.freeze_bn:
        utils.freeze_batch_norm(model)
        if not args.weights:
            notice("--freeze-bn without --weights: batch norm stays without effect")
    # As convolutions prefer it: on a CPU a step alone takes a quarter less.
    model.to(device, memory_format=torch.channels_last)

    # What is trained, and on what.
    for_head = {"threads": args.workers + 1, "seed": args.seed, "bad": bad, "amp": amp}
    fc_alone = None
    if args.fc_first and not state:
        fc_alone = features.train_head(model, train, val, preprocessing, device, **for_head)
        notice(f"fc alone reaches {fc_alone['accuracy']:.4f}; now all layers")
    if cached:
        learner, train_loader, val_loader = features.head_and_loaders(
            model, train, val, preprocessing, device, batch_size=args.batch_size, **for_head
        )
        amp = None  # the head is a single small layer
    else:
        learner = model
        options = {"batch_size": args.batch_size, "workers": args.workers, "bad": bad}
        size = args.train_size or preprocessing["crop"]
        train_set = MyDataSet(*train, train_transform(size, args.random_erase), args.seed)
        val_set = MyDataSet(*val, eval_transform(preprocessing))
        train_loader = DeviceLoader(train_set, device, preprocessing, shuffle=True, **options)
        val_loader = DeviceLoader(val_set, device, preprocessing, **options)

    # Optimizer.
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    history, best, position = [], None, None

    def to_resume(position: dict | None) -> dict:
        return {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "history": history,
            "best": best,
            "position": position,
            "head": _state_of_head(learner, train_loader) if cached else None,
            "pictures": fingerprint,
        }

    if state:
        shapes = [parameter.shape for parameter in trained]
        resume.check(state, to_resume(None), shapes, len(classes), resume_from)
        if state["pictures"] != fingerprint:
            notice(
                "the pictures are not those the run began with: it goes on, but not as if it had "
                "never been stopped"
            )
        groups = optimizer.state_dict()["param_groups"]  # as the options say
        optimizer.load_state_dict({"state": resume.momenta(state), "param_groups": groups})
        if state["scaler"] != {}:
            scaler.load_state_dict(state["scaler"])
        history, best, position = state["history"], state["best"], state["position"]
        if cached:
            head = state["head"]
            learner.load_state_dict(dict(head["weights"]))  # without attributes of the file
            for loader in (train_loader, val_loader):  # the scales that the head was trained on
                loader.mean, loader.std = (head[name].to(device) for name in ("mean", "std"))

    # Output folder.
    output_dir = Path(args.output_dir or cli.fresh_folder(args.model))
    output_dir.mkdir(parents=True, exist_ok=True)
    saved_args = {name: value for name, value in vars(args).items() if name not in resume.NOT_SAVED}
    saved_args["output_dir"] = str(output_dir)

    def usable() -> dict:
        return {
            "model": {k: v.cpu().contiguous() for k, v in model.state_dict().items()},
            "model_name": args.model,
            "classes": classes,
            "preprocessing": preprocessing,
            "epoch": len(history),
            "metrics": history[-1] if history else {},
            "args": saved_args,
        }

    with locked(output_dir), cli.deferred_signals() as stopped:
        if not state and resume.holds_run(output_dir):  # of a run that was faster
            raise UsageError(_HOLDS_A_RUN.format(output_dir))
        save_json(saved_args, output_dir / "args.json")
        names = {str(index): name for index, name in enumerate(classes)}
        save_json(names, output_dir / "class_indices.json")
        if resume_from:
            resume.bring(resume_from, output_dir, history)
        if fc_alone:
            best = _best(fc_alone, 0)
            figures = {"val_loss": fc_alone["loss"], "val_accuracy": fc_alone["accuracy"]}
            checkpoint.save(usable() | {"metrics": figures}, output_dir / "best.pth")
            resume.save_last(output_dir, usable() | to_resume(None))
        writer = SummaryWriter(output_dir, purge_step=len(history) + 1)
        notice(f"writing to {output_dir}, training on {device}{f' in {amp}' if amp else ''}")
        if len(history) >= args.epochs:
            notice(f"all {args.epochs} epochs are done; --epochs N with a larger N trains on")

        for epoch in range(len(history), args.epochs):
            if args.patience and best and epoch - best["epoch"] >= args.patience:
                notice(f"stopped: nothing better for {args.patience} epochs (--patience)")
                break
            # Each epoch has its own seed, so a run that goes on draws what it would have drawn.
            utils.set_seed(args.seed + epoch)
            lr = utils.cosine_lr(args.lr, args.lrf, epoch, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            common = {"amp": amp, "stop": stopped}
            try:
                trained_for = utils.train_one_epoch(
                    learner, optimizer, train_loader, device, epoch,
                    scaler=scaler, position=position, **common,
                )  # fmt: skip
                position = trained_for["position"]
                title = f"epoch {epoch + 1} validation"
                result = utils.evaluate(learner, val_loader, device, title=title, **common)
            except utils.Stopped as stop:
                if cached:
                    features.fold(learner, train_loader.mean, train_loader.std, model.fc)
                resume.save_last(output_dir, usable() | to_resume(stop.position or position))
                raise cli.Interrupted(stopped(), _stopped_text(epoch, output_dir)) from None
            position = None
            if not math.isfinite(result["loss"]):
                raise RunError(
                    f"the validation loss is {result['loss']} after epoch {epoch + 1}; use a "
                    f"smaller --lr (now {lr:.3g})"
                )
            if cached:
                features.fold(learner, train_loader.mean, train_loader.std, model.fc)

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
                best = _best(result, epoch + 1)
                # Before last.pth: killed between the two, the epoch is done again.
                checkpoint.save(usable(), output_dir / "best.pth")
            resume.save_last(output_dir, usable() | to_resume(None))
            _save_metrics(output_dir, history, writer)
            # On cached features it would not be pictures that are counted.
            rate = "" if cached else f"  {trained_for['images_per_second']:.0f} img/s"
            cli.say(
                f"epoch {epoch + 1}/{args.epochs}  lr {lr:.4g}  "
                f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f}  "
                f"val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.4f}{rate}"
                f"{'  best' if improved else ''}"
            )
            if stopped() and epoch + 1 < args.epochs:
                raise cli.Interrupted(stopped(), _stopped_text(epoch + 1, output_dir))
        writer.close()

    _draw(output_dir, history, best, classes)
    summary = {
        "best_accuracy": best["accuracy"],
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "train_images": len(train[0]),
        "val_images": len(val[0]),
        "seconds": round(time.perf_counter() - start, 2),
        "output_dir": str(output_dir),
    }
    cli.say(json.dumps(summary))
    return summary


_HOLDS_A_RUN = "--output-dir {}: holds a run; add --resume to go on with it, or name another folder"


def _check_paths(args: argparse.Namespace) -> tuple[Path | None, bool]:
    """Refuse what cannot work; returns the last.pth to go on from, and whether the user named this
    very file."""
    if args.output_dir or args.resume is None:  # else the folder is that of the run
        cli.check_output_dir(args.output_dir)
    if args.resume is not None:
        return resume.find(args.resume, args.output_dir)
    cli.require_data(args.data_path)
    if args.weights not in ("", "imagenet"):
        cli.require_path(args.weights, "--weights")
    for name in ("train_size", "random_erase"):
        if args.freeze_layers and args.cache_features and getattr(args, name):
            raise UsageError(
                f"--{name.replace('_', '-')}: cached features are of whole pictures; leave it "
                "out, or add --no-cache-features"
            )
    if args.fc_first and not args.cache_features:
        raise UsageError("--fc-first: needs cached features; leave out --no-cache-features")
    if args.fc_first and args.freeze_layers:
        raise UsageError("--fc-first: with --freeze-layers fc is all there is; leave one out")
    if args.fc_first and not args.weights:
        raise UsageError("--fc-first: fc would learn what random layers see; add --weights")
    if args.output_dir and resume.holds_run(args.output_dir):
        raise UsageError(_HOLDS_A_RUN.format(args.output_dir))
    return None, False


def _read_weights(model_name: str, weights: str) -> tuple[dict, str, list | None] | None:
    """The state dict to start from, its source and the classes it was made for, if it says so;
    None for no weights. Refuses an unknown model, and weights that do not fit it but for the head.
    """
    import checkpoint
    from model import build_model

    try:
        probe = build_model(model_name, num_classes=1)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from None
    if not weights:
        return None
    if weights == "imagenet":
        state, source = checkpoint.imagenet_weights(model_name)
        trained_on = None
    else:
        file, source = checkpoint.load(weights), weights
        state, trained_on = checkpoint.state_dict_of(file, weights), file.get("classes")
    checkpoint.load_weights(probe, state, source, new_head=True)
    return state, source, trained_on


def _load_weights(model: "nn.Module", weights: tuple, classes: list[str]) -> None:
    """Load what `_read_weights` returned, with a new head unless the classes are the same."""
    import checkpoint

    state, source, trained_on = weights
    new_head = not checkpoint.head_fits(model, state) or trained_on not in (None, classes)
    keys = checkpoint.load_weights(model, state, source, new_head=new_head)
    notice(
        f"loaded {source}{', but for its head' if new_head else ''}: "
        f"missing keys {keys.missing_keys}, unexpected keys {keys.unexpected_keys}"
    )


def _state_of_head(head: "nn.Module", loader: "FeatureLoader") -> dict:
    return {"weights": head.state_dict(), "mean": loader.mean, "std": loader.std}


def _best(result: dict, epoch: int) -> dict:
    import torch

    confusion = torch.from_numpy(result["confusion"])
    return {"accuracy": result["accuracy"], "epoch": epoch, "confusion": confusion}


def _stopped_text(epochs: int, output_dir: Path) -> str:
    return f"stopped after {epochs} epochs, all is saved; go on with --resume {output_dir}"


def _save_metrics(output_dir: Path, history: list[dict], writer: "SummaryWriter") -> None:
    """Write metrics.csv and the TensorBoard events of the last epoch."""
    from files import save_rows

    save_rows(history, output_dir / "metrics.csv")
    row = history[-1]
    for name in ("loss", "accuracy"):
        for side in ("train", "val"):
            writer.add_scalar(f"{name}/{side}", row[f"{side}_{name}"], row["epoch"])
    writer.add_scalar("learning_rate", row["lr"], row["epoch"])
    writer.flush()


def _draw(output_dir: Path, history: list[dict], best: dict, classes: list[str]) -> None:
    import plots

    plots.save_figure(plots.draw_curves(history, best), output_dir / "curves.png")
    title = f"validation, epoch {best['epoch']}, accuracy {best['accuracy']:.3f}"
    figure = plots.draw_confusion_matrix(best["confusion"].numpy(), classes, title)
    plots.save_figure(figure, output_dir / "confusion_matrix.png")


if __name__ == "__main__":
    cli.run(build_parser(), main)

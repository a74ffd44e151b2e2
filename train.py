"""Train or fine-tune a ShuffleNet on a folder of images.

    python train.py --data-path FOLDER --weights imagenet
    python train.py --data-path FOLDER --weights imagenet --freeze-layers
    python train.py --resume

Writes to the output folder: last.pth (to resume), best.pth (to use), metrics.csv, curves.png,
samples.png, confusion_matrix.png, confusions.csv, class_indices.json, args.json, TensorBoard
events. Prints a line per epoch and, last, one JSON object.
"""

import argparse
import json
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import cli
import distributed
from cli import RunError, UsageError, notice


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Train or fine-tune a ShuffleNet on a folder of images.")
    count, share = cli.number(int, 1), cli.number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default=cli.FLOWER_PHOTOS, metavar="DIR",
        help="a folder per class, or train/ and val/ of such; the default is downloaded if absent")
    add("--val-rate", type=cli.number(float, 1e-6, 0.99), default=0.2, metavar="SHARE",
        help="share of every class that is drawn for validation")
    add("-j", "--workers", type=cli.number(int, 0), default=min(max(1, cli.cores() - 1), 8),
        metavar="N", help="threads that read images beside training; 0 reads between the steps")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="shufflenet_v2_x1_0", metavar="NAME",
        help="shufflenet_v2_ x0_5, x1_0, x1_5, x2_0, or shufflenet_v1_ x0_25 to x2_0 _g1 to _g8")
    add("--weights", default="", metavar="FILE",
        help="weights to start from: a file, or 'imagenet' for torchvision's (downloaded)")
    add("--freeze-layers", nargs="?", const=True, default=False, type=cli.true_or_false,
        metavar="true|false", help="train only the last layer, fc")
    add("--no-freeze-layers", dest="freeze_layers", action="store_false", help=argparse.SUPPRESS)
    add("--cache-features", action=argparse.BooleanOptionalAction, default=True,
        help="with --freeze-layers, --fc-first: compute what fc sees of each image once, and "
        "keep it in .cache")
    add("--fc-first", action=argparse.BooleanOptionalAction,
        help="train fc alone first, then every layer: the gradients of a new fc would spoil them "
        "(if omitted: when --weights leaves fc new, without --no-cache-features)")
    add("--freeze-bn", action=argparse.BooleanOptionalAction,
        help="keep batch norm's statistics, scale and shift (if omitted: as --fc-first)")
    add("--small-images", action=argparse.BooleanOptionalAction,
        help="a network for 32 pixels, whose first layers shrink nothing, by default with --lr 0.1 "
        "--lrf 0.01 --wd 5e-4 -b 128 (if omitted: without --weights where the first image has at "
        "most 48)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, metavar="N",
        help="passes over the data (default: 30; after --fc-first 16)")
    add("-b", "--batch-size", type=count, metavar="N", 
        help="images per step, of each process (default: 16; with cached features 64)")
    add("--lr", type=cli.number(float, 1e-30), metavar="RATE",
        help="first learning rate (default: 0.01; cached features 0.03; after --fc-first 0.003); "
        "with N processes multiply it by N, since a step sees N times the images")
    add("--lrf", type=share, metavar="SHARE",
        help="the rate falls towards lr * lrf (default: 0.1; after --fc-first 0.01)")
    add("--wd", "--weight-decay", dest="weight_decay", type=cli.number(float, 0), metavar="DECAY",
        help="weight decay of SGD (default: 4e-5; cached features 0.1)")
    add("--sync-bn", action="store_true",
        help="of several processes: batch norm over the images of all (CUDA)")
    add("--train-size", type=cli.number(int, 64, 1024), metavar="PIXELS",
        help="side of the crops to train on; smaller is faster (if omitted: 224)")
    add("--random-erase", type=share, default=0.0, metavar="SHARE",
        help="share of the training images in which a random rectangle is hidden")
    add("--patience", type=count, metavar="N", help="stop after N epochs without improvement")
    add("--seed", type=cli.number(int, 0), default=0, metavar="N",
        help="decides split, order, augmentation and fresh weights")
    add("--device", **cli.DEVICE)
    add("--amp", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (if omitted: on NVIDIA's GPUs that have it)")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", help="folder of the run (if omitted: runs/DATE-NAME)")
    add("--name", metavar="NAME", help="name of the run (if omitted: the model)")
    add("--resume", nargs="?", const="", metavar="FILE",
        help="resume from last.pth: FILE, or that of --output-dir, or of the newest run")
    # fmt: on
    return parser


def main(args: cli.Words = None) -> dict:
    """Train as the options say; returns what the last line prints."""
    start = time.perf_counter()
    args = build_parser().parse_args(args)
    last = check(args)

    # Imports that take seconds, so not before the paths are known to be right.
    import torch

    import features
    import folders
    import my_dataset
    import run as run_folder
    import utils
    from files import locked
    from image import default_preprocessing
    from inference import validate_network
    from model import VARIANTS
    from my_dataset import DeviceLoader, MyDataSet
    from optimize import rewrite_for_training

    state = None
    if last:
        again = args.resume == "" and "--resume" not in args.words
        state, args = run_folder.load(last, build_parser(), args)
        if again and state["args"]["typed"] != shlex.join(args.words):
            raise UsageError(f"add --resume, or name another --output-dir: {last} is another run's")
    if args.model not in VARIANTS:
        raise UsageError(
            f"--model {args.model}: use shufflenet_v2_x0_5, _x1_0, _x1_5 or _x2_0, or one of "
            "shufflenet_v1_x0_25_g1 to shufflenet_v1_x2_0_g8"
        )
    device = utils.choose_device(args.device)
    distributed.join(device)
    if args.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: omit it; batch norm is shared between GPUs only")
    cached = args.freeze_layers and args.cache_features
    amp = not cached and utils.use_bfloat16(device, args.amp)
    threads = min(torch.get_num_threads(), cli.cores())
    torch.set_num_threads(1)  # a head is too small to be shared: threads would wait for each other

    # Data.
    with distributed.first_on_its_machine():
        root = fetch(args, wanted=args.weights == "imagenet" and not state)
    parts = folders.find_parts(root)
    # As utils.read_split_data, with the names of the classes kept.
    train_images, val_images = folders.split_images(root, args.val_rate, args.seed, parts)
    data = folders.fingerprint(parts)
    distributed.require_same(data, f"{args.data_path} holds other images than rank 0 sees")
    done = state and len(state["history"])
    distributed.require_same(done, "name an --output-dir that all processes see")
    classes = list(train_images)  # {class: [paths]} -> [paths], [class indices]
    train = folders.with_labels(train_images, classes)
    val = folders.with_labels(val_images, classes)
    bad = folders.BadImages(len(train[0]) + len(val[0]))
    if len(train[0]) < distributed.WORLD:
        raise UsageError(f"start fewer processes: there are {len(train[0])} images to train on")
    notice(f"{len(train[0])} images to train, {len(val[0])} to validate, {len(classes)} classes")

    # Network.
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # CUDA's convolutions repeat their results
    model = build_network(args, classes, state, train[0][0])
    model.to(device, memory_format=utils.memory_format(device))
    preprocessing = default_preprocessing(args.model, args.small_images)
    if args.batch_size > len(train[0]):
        notice(f"use a smaller --batch-size: {args.batch_size} images are more than there are")

    # Output.
    output_dir = cli.make_folder(args.output_dir, args.name or args.model)
    args.output_dir, args.data_path = str(output_dir), str(root.resolve())
    about = {"model_name": args.model, "classes": classes, "preprocessing": preprocessing}
    about["args"] = describe(args, data, state)
    with nullcontext() if distributed.RANK else locked(output_dir):
        run = run_folder.Run(output_dir, about, state)
        notice(f"writing to {output_dir}, training on {device}{' in bfloat16' if amp else ''}")
        transform = my_dataset.choose_transform(args, cached, preprocessing)
        train_set = MyDataSet(*train, transform, args.seed)
        if not state:
            run.save_last(model, None)  # so that there always is something to resume
            run.draw_samples(train_set)

        common = (model, train, val, preprocessing, device, args.seed, bad)
        if args.fc_first and not run.history:  # as epoch 0
            with distributed.first_on_its_machine():
                head, *rest = features.head_and_data(*common, features.RECIPE.batch_size)
            *_, (row, confusion, _) = fit(head, *rest, device, features.RECIPE)
            head.fold_into(model.fc)
            run.record(row | {"epoch": 0}, confusion, model, None)
            notice(f"fc alone reaches {row['val_accuracy']:.4f}; now all layers")

        # What learns, and from what; with --no-cache-features fc learns as in my_dataset.py, too.
        learning = state and state["learning"]
        if cached:
            with distributed.first_on_its_machine():
                learner, loader, validate = features.head_and_data(*common, args.batch_size)
            if learning:
                learner.load_state_dict(learning["head"])
        else:
            torch.set_num_threads(threads)
            learner = rewrite_for_training(model) if args.freeze_bn else model
            learner = distributed.wrap(learner, device, args.sync_bn)
            rest = (device, preprocessing, args.batch_size, args.workers, bad)
            loader = DeviceLoader(train_set, *rest)
            validate = partial(validate_network, model, *val, device, preprocessing, bad)

        if run.stalled(args.patience):  # as the run was before it was resumed
            args.epochs = run.epoch
        # What fc learnt from few images is steep; gradients through it may not carry the rest off.
        clip = 5.0 if args.fc_first else None
        steps = fit(learner, loader, validate, device, args, amp, clip, run.epoch, learning)
        for row, confusion, learning in steps:
            if cached:
                learner.fold_into(model.fc)
                learning["head"] = learner.state_dict()
            better = run.record(row, confusion, model, learning)
            say_epoch(row, args.epochs, better)
            if run.stalled(args.patience):
                notice(f"stopped: nothing better for {args.patience} epochs (--patience)")
                break
        run.finish()

    torch.set_num_threads(threads)  # of whoever called this
    return report(run, len(train[0]), len(val[0]), start)


def report(run, train_images: int, val_images: int, start: float) -> dict:
    """Say what came of it, and what to do next; `start` is of time.perf_counter."""
    best_file = run.folder / "best.pth"
    next_step = f"python predict.py IMAGE --weights {best_file}, or python eval.py"
    notice(f"{best_file} holds epoch {run.best['epoch']}; next: {next_step}")
    summary = {"best_accuracy": run.best["accuracy"], "best_epoch": run.best["epoch"]}
    summary |= {"epochs": run.epoch, "train_images": train_images, "val_images": val_images}
    summary |= {"seconds": round(time.perf_counter() - start, 2), "output_dir": str(run.folder)}
    cli.say(json.dumps(summary))
    return summary


def build_network(args, classes: list[str], state: dict | None, first_image: str):
    """The network to start or to go on with, frozen as the options say; chooses those omitted."""
    import checkpoint
    import utils
    from image import is_small
    from model import build_model

    if args.small_images is None and args.weights not in ("", "imagenet"):
        args.small_images = checkpoint.is_of_small_images(args.weights)
    if args.small_images is None:
        args.small_images = not (args.weights or args.train_size) and is_small(first_image)
        if args.small_images:
            notice("--small-images: the first image is small (--no-small-images enlarges them)")

    if args.small_images and args.train_size:
        raise UsageError("--train-size: omit it; small images, as of --weights, are not resized")
    model, new_fc = build_model(args.model, len(classes), args.small_images), True
    if state:
        if state["classes"] != classes:
            raise UsageError(f"--data-path {args.data_path}: the run was trained on other classes")
        checkpoint.load_weights(model, state["model"], "last.pth")
    elif args.weights:
        new_fc = checkpoint.load_pretrained(model, args.model, args.weights, classes)
    settle(args, new_fc)
    if args.freeze_layers:
        utils.freeze_layers(model)
    if args.freeze_bn:
        utils.freeze_batch_norm(model)
    return model


def say_epoch(row: dict, epochs: int, better: bool) -> None:
    left = timedelta(seconds=round(row["seconds"] * (epochs - row["epoch"])))
    cli.say(
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f}  "
        f"val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.4f}  "
        f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} img/s  {left} left"
        f"{'  best' * better}"
    )


def fit(
    learner, loader, validate, device, options, amp=False, clip=None, first=0, learning=None
) -> Iterator[tuple]:
    """Train the network, or the head on cached features, and validate it, epoch after epoch.

    `validate` notes its figures in the dict `log`, as utils.evaluate does. `options` holds epochs,
    lr, lrf and weight_decay; `clip` is the largest norm of the gradients of a step. `first` epochs
    are done, and `learning` is the state given after them. Yields after every epoch its row of
    figures, the confusion matrix, and the state of what learns. RunError if the loss is not finite.
    """
    import torch

    from utils import cosine_lr, train_one_epoch

    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    decay = options.weight_decay
    optimizer = torch.optim.SGD(parameters, options.lr, momentum=0.9, weight_decay=decay)
    if learning:
        optimizer.load_state_dict(learning["optimizer"])
    for epoch in range(first, options.epochs):
        lr = cosine_lr(options.lr, options.lrf, epoch, options.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        row, start = {"epoch": epoch + 1, "lr": lr}, time.perf_counter()
        train_one_epoch(learner, optimizer, loader, device, epoch, amp=amp, clip=clip, log=row)
        row = distributed.meet(learner, row)
        validate(log=row)
        if not math.isfinite(row["val_loss"]):
            raise RunError(f"use a smaller --lr: the loss is {row['val_loss']} in validation")
        row["seconds"] = time.perf_counter() - start
        yield row, row.pop("confusion"), {"optimizer": optimizer.state_dict()}


def fetch(args: argparse.Namespace, wanted: bool) -> Path:
    """Download what is not there yet, ImageNet weights if `wanted`; returns the folder of the data.
    RunError says all that cannot be had."""
    from checkpoint import imagenet_file
    from folders import prepare_data

    errors = []
    for get, name in [(imagenet_file, args.model)] * wanted + [(prepare_data, args.data_path)]:
        try:
            get(name)
        except RunError as error:
            errors.append(str(error))
    if errors:
        raise RunError("; and ".join(errors))
    return Path(args.data_path)


def describe(args: argparse.Namespace, data: str, state: dict | None) -> dict:
    """The options as checkpoints keep them, with the fingerprint of the data, and date and words of
    the start."""
    options = {name: value for name, value in vars(args).items() if name not in ("words", "resume")}
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    began = state["args"] if state else {"data": data, "date": now, "typed": shlex.join(args.words)}
    if began["data"] != data:
        notice(f"{args.data_path} holds other images than when the run began")
    options["processes"] = distributed.WORLD
    return options | {name: began[name] for name in ("data", "date", "typed")}


def settle(args: argparse.Namespace, new_fc: bool) -> None:
    """Choose what was omitted, where it depends on what learns. A new `fc` on trained layers is
    trained first: the gradients that it sends through them mean nothing yet."""
    from features import RECIPE

    if args.fc_first is None:
        args.fc_first = bool(args.weights and new_fc and args.cache_features)
        args.fc_first &= not args.freeze_layers
    if args.freeze_bn is None:
        args.freeze_bn = args.fc_first
    values = {"epochs": 30, "lr": 0.01, "lrf": 0.1, "weight_decay": 4e-5, "batch_size": 16}
    if args.small_images:
        values |= {"lr": 0.1, "lrf": 0.01, "weight_decay": 5e-4, "batch_size": 128}
    if args.fc_first:
        values |= {"epochs": 16, "lr": 0.003, "lrf": 0.01}
    if args.freeze_layers and args.cache_features:
        values |= vars(RECIPE)
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check(args: argparse.Namespace) -> Path | None:
    """Refuse what cannot work, before torch is imported; returns the last.pth to resume from."""
    if distributed.WORLD > 1 and not args.output_dir and args.resume is None:
        raise UsageError(
            "add --output-dir: processes that are started again look for the run there"
        )
    again = distributed.WORLD > 1 and args.resume is None
    if again and Path(args.output_dir, "last.pth").exists():
        args.resume = ""  # if the same command began it: torchrun starts processes again
    if args.resume is not None:
        named = args.resume or args.output_dir
        last = Path(named or cli.newest_run("last.pth"))
        last = last / "last.pth" if last.is_dir() else last
        cli.require_path(last, "--resume")
        if last.suffix != ".pth":
            raise UsageError(f"--resume {last}: name the folder of a run, or its last.pth")
        if args.output_dir and Path(args.output_dir).resolve() != last.resolve().parent:
            raise UsageError(f"omit --output-dir {args.output_dir}: a run resumes in its folder")
        return last
    cli.require_data(args.data_path)
    if args.weights not in ("", "imagenet"):
        cli.require_path(args.weights, "--weights")
    if args.output_dir and Path(args.output_dir, "last.pth").exists():
        todo = "add --resume, or name another --output-dir"
        raise UsageError(f"{todo}: {args.output_dir} holds a run")
    if args.freeze_layers and args.cache_features and (args.train_size or args.random_erase):
        raise UsageError("--train-size, --random-erase: omit them, or add --no-cache-features")
    if args.fc_first and (args.freeze_layers or not (args.cache_features and args.weights)):
        raise UsageError("--fc-first: add --weights, omit --freeze-layers and --no-cache-features")
    if (args.freeze_layers or args.freeze_bn) and not args.weights:
        notice("add --weights: what is frozen holds random weights")
    return None


if __name__ == "__main__":
    cli.run(main)

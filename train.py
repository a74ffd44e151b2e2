"""Train or fine-tune a ShuffleNet on a folder of images.

    python train.py --data-path FOLDER --weights imagenet
    python train.py --data-path FOLDER --weights imagenet --freeze-layers
    python train.py --resume

Writes to the output folder: last.pth (to resume), best.pth (to use), metrics.csv, curves.png,
samples.png, confusion_matrix.png, confusions.csv, class_indices.json, args.json, TensorBoard
events. Prints a line per epoch and, last, one JSON object.
"""

import argparse
import math
import os
import shlex
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import VARIANTS, build_model, default_preprocessing, takes_small_images
from my_dataset import AUGMENTS, DeviceLoader, MyDataSet, evaluation_set, training_set
from shufflenet.common import files, options
from shufflenet.common.messages import RunError, UsageError, notice, say, say_json
from shufflenet.inference import checkpoint, pytorch, rewrite
from shufflenet.inference.metadata import Metadata
from shufflenet.inference.parallel import InParts
from shufflenet.reading import download, folders, image
from shufflenet.training import distributed, features
from shufflenet.training.run_folder import RunFolder, best_figure, load_run
from utils import (
    cosine_lr,
    freeze_batch_norm,
    freeze_layers,
    split_data,
    train_epoch,
    use_bfloat16,
    validate,
)

OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Recipe:
    """How something learns, where the options do not say otherwise."""

    epochs: int
    batch_size: int
    lr: float  # falls as a half cosine towards lr * lrf
    lrf: float
    weight_decay: float
    opt: str = "sgd"
    label_smoothing: float = 0.0
    ema: float = 0.0  # what a moving average of the weights keeps of itself in a step
    train_size: int = 0  # side of the crops to train on; 0: as in evaluation
    clip: float | None = None  # largest norm of the gradients of a step
    fc_first: bool = False  # train a new fc alone before all layers, as epoch 0
    freeze_bn: bool = False

    def __str__(self) -> str:
        values = {name: value for name, value in asdict(self).items() if value}
        return ", ".join(f"{name} {value}" for name, value in values.items())


RECIPES = {
    "scratch": Recipe(epochs=30, batch_size=16, lr=0.01, lrf=0.1, weight_decay=4e-5),
    # A freshly fitted fc sends large gradients: they are clipped. The average remembers some 100
    # steps: of few images it stays near what fc alone has reached. In random crops things look
    # larger than in evaluation: smaller crops make up for it (Touvron et al., arXiv 1906.06423).
    "finetune": Recipe(
        epochs=12, batch_size=16, lr=0.003, lrf=0.01, weight_decay=4e-5,
        ema=0.99, train_size=176, clip=5.0, freeze_bn=True,
    ),
    # fc on cached features. Of 3 batch sizes x 5 rates x 3 decays, 30 epochs, 5 splits, these were
    # at the top for 800 training images and for 200 (flower_photos, x0.5; the scale had no floor).
    "fc": Recipe(epochs=30, batch_size=64, lr=0.03, lrf=0.1, weight_decay=0.1),
    # Images of some 32 pixels; docs/training.md has what was measured.
    "small": Recipe(epochs=30, batch_size=128, lr=0.1, lrf=0.01, weight_decay=5e-4),
}  # fmt: skip
RATES = {  # what another optimizer than SGD puts in their place
    "adamw": {
        "scratch": {"lr": 0.002, "weight_decay": 0.05},
        "finetune": {"lr": 0.0005, "weight_decay": 0.05},
        "fc": {"lr": 0.003, "weight_decay": 0.5},
        "small": {"lr": 0.003, "weight_decay": 0.05},
    }
}


def build_parser() -> options.Parser:
    parser = options.Parser(description="Train or fine-tune a ShuffleNet on a folder of images.")
    count, share = options.number(int, 1), options.number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="data/flower_photos", metavar="DIR",
        help="a folder per class, or train/ and val/ of such; the default is downloaded if absent")
    add("--val-rate", type=options.number(float, 1e-6, 0.99), default=0.2, metavar="SHARE",
        help="share of every class that is drawn for validation")
    add("-j", "--workers", type=options.number(int, 0), default=min(max(1, options.cores() - 1), 8),
        metavar="N", help="threads that read images beside training; 0 reads between the steps")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="shufflenet_v2_x1_0", metavar="NAME",
        help=f"one of {', '.join(VARIANTS)}")
    add("--weights", default="", type=options.weights_file, metavar="FILE",
        help="weights to start from: a file, or 'imagenet' for torchvision's (downloaded)")
    add("--freeze-layers", nargs="?", const=True, default=False, type=options.true_or_false,
        metavar="true|false", help="train only the last layer, fc")
    add("--no-freeze-layers", dest="freeze_layers", action="store_false", help=argparse.SUPPRESS)
    add("--cache-features", action=argparse.BooleanOptionalAction, default=True,
        help="with --freeze-layers, --fc-first: compute what fc sees of each image once, and "
        "keep it in .cache")
    add("--fc-first", action=argparse.BooleanOptionalAction,
        help="train fc alone first, then every layer: the gradients of a new fc would spoil them "
        "(if omitted: when --weights leaves fc new, without --no-cache-features)")
    add("--freeze-bn", action=argparse.BooleanOptionalAction,
        help="keep batch norm's statistics, scale and shift (if omitted: as the recipe says)")
    add("--small-images", action=argparse.BooleanOptionalAction,
        help="a network for 32 pixels, whose first layers shrink nothing (if omitted: without "
        "--weights where most of nine images have at most 48)")

    recipes = "; ".join(f"{kind}: {recipe}" for kind, recipe in RECIPES.items())
    add = parser.add_argument_group(
        "training", f"What is omitted here comes from a recipe. {recipes}").add_argument
    add("--epochs", type=count, metavar="N",
        help="passes over the data")
    add("-b", "--batch-size", type=count, metavar="N",
        help="images per step, of each process")
    add("--lr", type=options.number(float, 1e-30), metavar="RATE",
        help="first learning rate; with N processes multiply it by N, since a step sees N times "
        "the images")
    add("--lrf", type=share, metavar="SHARE",
        help="the rate falls towards lr * lrf")
    add("--wd", "--weight-decay", dest="weight_decay", type=options.number(float, 0),
        metavar="DECAY", help="weight decay")
    add("--opt", choices=OPTIMIZERS,
        help="optimizer; adamw, with rate and decay of its own, is for networks that sgd does not "
        "suit")
    add("--label-smoothing", type=options.number(float, 0, 0.99), metavar="SHARE",
        help="share of the target that is spread over all classes, for labels that may be wrong")
    add("--class-weights", action="store_true",
        help="weigh images by how rare their class is, where some have few; balanced accuracy, the "
        "mean recall of the classes, then chooses the best epoch")
    add("--ema", type=options.number(float, 0, 0.99999), metavar="DECAY",
        help="validate and save a moving average of the weights, which keeps DECAY of itself in "
        "every step (0: none): steadier where images are few; not of fc on cached features")
    add("--augment", choices=[name for name in AUGMENTS if name],
        help="also change colours (jitter), or one of fourteen things (trivial: TrivialAugment): "
        "for long training, or where light and cameras vary")
    add("--train-size", type=options.number(int, 64, 1024), metavar="PIXELS",
        help="side of the crops to train on; smaller is faster (if omitted: as the recipe says, "
        "else that of evaluation, 224)")
    add("--random-erase", type=share, default=0.0, metavar="SHARE",
        help="share of the training images in which a random rectangle is hidden")
    add("--patience", type=count, metavar="N", help="stop after N epochs without improvement")
    add("--seed", type=options.number(int, 0), default=0, metavar="N",
        help="decides split, order, augmentation and fresh weights")
    add("--device", **options.DEVICE)
    add("--amp", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (if omitted: on NVIDIA's GPUs that have it)")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", help="folder of the run (if omitted: runs/DATE-NAME)")
    add("--name", metavar="NAME", help="name of the run (if omitted: the model)")
    add("--resume", nargs="?", const="", metavar="FILE",
        help="resume from last.pth: FILE, or that of --output-dir, or of the newest run")
    # fmt: on
    return parser


@dataclass(frozen=True)
class Data:
    """Paths of images, and the index of the class of each, to train and to validate on."""

    classes: list[str]
    train: folders.Part
    val: folders.Part
    fingerprint: str
    bad: folders.BadImages

    def own_val(self) -> tuple[list[str], list[int]]:
        """What this process validates, of several."""
        paths, labels = self.val
        return distributed.share(paths), distributed.share(labels)


def main(words: options.Words = None) -> dict:
    """Train as the options say; returns what the last line prints."""
    start = time.perf_counter()
    parser = build_parser()
    typed = parser.parse_args(words)
    last = find_last(typed)
    state, args = load_run(last, parser, typed) if last else (None, typed)
    check(args, typed, state)
    device = pytorch.choose_device(args.device, distributed.LOCAL_RANK)
    distributed.join(device)

    # Data.
    with distributed.first_on_its_machine():
        root = download.prepare_data(args.data_path).resolve()
        if args.weights == "imagenet" and not state:
            checkpoint.imagenet_file(args.model)
    data = read_data(args, state)

    # Network, and how it is trained.
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # CUDA's convolutions repeat their results
    small_images = choose_small_images(args, data.train[0])
    model, fc_is_new = build_network(args, data.classes, small_images, state)
    model.to(device, memory_format=pytorch.memory_format(device))
    recipe = choose_recipe(args, fc_is_new, small_images)
    weights = balanced_weights(data) if args.class_weights else None
    # Of each image: torch's mean divides by the weights of the batch, which cancels part of them.
    criterion = nn.CrossEntropyLoss(
        weights, reduction="none", label_smoothing=recipe.label_smoothing
    ).to(device)
    if args.freeze_layers:
        freeze_layers(model)
    if recipe.freeze_bn:
        freeze_batch_norm(model)

    cached = args.freeze_layers and args.cache_features
    cores = max(1, options.cores() // distributed.LOCAL_WORLD)
    amp = not cached and use_bfloat16(device, args.amp)
    compute = pytorch.Compute(device, min(torch.get_num_threads(), cores), amp)

    # Output.
    folder = options.make_folder(args.output_dir, args.name or args.model)
    settings = describe(args, data, state) | asdict(recipe)
    settings |= {"small_images": small_images, "fc_is_new": fc_is_new}
    settings |= {"output_dir": str(folder), "data_path": str(root)}
    preprocessing = default_preprocessing(args.model, small_images)
    hashes = folders.image_hashes(data.train[0])
    metadata = Metadata(args.model, data.classes, preprocessing, settings, hashes)
    first = distributed.RANK == 0
    with files.locked(folder) if first else nullcontext():
        run = RunFolder(folder, model, metadata, state, writes=first)
        notice(f"writing to {folder}, training on {device}{' in bfloat16' if compute.amp else ''}")
        try:
            if cached:
                run.draw_samples(evaluation_set(*data.train, preprocessing))
                train_fc(model, data, metadata, recipe, criterion, compute, run)
            else:
                chosen = argparse.Namespace(**settings)
                train_set = training_set(*data.train, chosen, preprocessing, small_images)
                run.draw_samples(train_set)
                if recipe.fc_first and not run.history:  # as epoch 0
                    begun = time.perf_counter()
                    figures, confusion = train_fc(
                        model, data, metadata, RECIPES["fc"], criterion, compute
                    )
                    whole = {"epoch": 0, "seconds": time.perf_counter() - begun}
                    run.record(figures | whole, confusion)
                    notice(f"fc alone reaches {best_figure(settings, run.best)}; now all layers")
                train_layers(model, train_set, data, metadata, recipe, criterion, compute, run)
            run.finish()
        except KeyboardInterrupt:
            todo = f"python train.py --resume {folder} goes on after the last whole epoch"
            raise KeyboardInterrupt(f"interrupted: {todo}") from None
    return report(run, data, start)


def say_what_waits(batch_size: int, learner: nn.Module, compute: pytorch.Compute) -> None:
    """Tell, before the work, where cores would wait: see parallel.py."""
    threads = compute.threads
    if compute.device.type != "cpu" or threads == 1:
        return
    if isinstance(learner, InParts):
        parts = len(learner.cut(torch.empty(batch_size)))
        if parts < threads:
            todo = "a larger --batch-size is faster (multiply --lr alike)"
            notice(f"a batch of {batch_size} makes {parts} parts for {threads} cores: {todo}")
        return
    # The load is that of all cores, of which a container may have only some.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    waiting = os.environ.get("OMP_WAIT_POLICY") != "PASSIVE"
    if waiting and load > 0.5 and load + threads > (os.cpu_count() or 1):
        todo = "set OMP_WAIT_POLICY=PASSIVE in the environment"
        notice(f"the machine was busy (load {load:.1f}); other work slows torch's threads: {todo}")


def train_fc(
    model: nn.Module,
    data: Data,
    metadata: Metadata,
    recipe: Recipe,
    criterion: nn.Module,
    compute: pytorch.Compute,
    run: RunFolder | None = None,
) -> tuple[dict, np.ndarray]:
    """Train `fc` alone, as a head on features that are computed once: see features.py."""
    paths = [*data.train[0], *data.val[0]]
    with distributed.first_on_its_machine():
        cached = features.cached_features(
            model, paths, metadata.preprocessing, compute.device, data.bad
        )
    head, train_loader, val_loader = features.head_and_loaders(
        model.fc, cached, data.train, data.own_val(), recipe.batch_size, metadata.args["seed"]
    )
    with pytorch.torch_threads(1):  # a head is too small to be shared: threads would wait
        return fit(model, head, train_loader, val_loader, recipe, criterion, compute, run)


def train_layers(
    model: nn.Module,
    train_set: MyDataSet,
    data: Data,
    metadata: Metadata,
    recipe: Recipe,
    criterion: nn.Module,
    compute: pytorch.Compute,
    run: RunFolder,
) -> None:
    """Train what is not frozen of a network, on images."""
    learner = rewrite.rewrite_for_training(model, compute.threads, recipe.batch_size)
    say_what_waits(recipe.batch_size, learner, compute)
    threads = 1 if isinstance(learner, InParts) else compute.threads  # of torch
    learner = distributed.wrap(learner, compute.device)
    seed, workers = metadata.args["seed"], metadata.args["workers"]
    reading = (compute.device, metadata.preprocessing, recipe.batch_size, workers, data.bad)
    train_loader = DeviceLoader(train_set, *reading, seed, (distributed.RANK, distributed.WORLD))
    val_loader = DeviceLoader(evaluation_set(*data.own_val(), metadata.preprocessing), *reading)
    with pytorch.torch_threads(threads):
        fit(model, learner, train_loader, val_loader, recipe, criterion, compute, run)


def fit(
    model: nn.Module,
    learner: nn.Module,
    train_loader: Iterable,
    val_loader: Iterable,
    recipe: Recipe,
    criterion: nn.Module,
    compute: pytorch.Compute,
    run: RunFolder | None = None,
) -> tuple[dict, np.ndarray | None]:
    """Train and validate, epoch after epoch; returns figures and confusion matrix of the last.

    `learner` is what computes in place of `model` while it learns: itself, its rewrite, or a head
    on cached features. Validated and saved is the model or, with `recipe.ema`, its moving average.
    A `run` keeps every epoch, and goes on where it ended; weights whose `fc` fits are its epoch 0.
    RunError if the loss is not finite.
    """
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[recipe.opt](parameters, recipe.lr, weight_decay=recipe.weight_decay)
    average, network = None, model
    if recipe.ema:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True
        )
        optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
        network = average.module
    figures, confusion = {}, None
    if run:
        run.restore(learner, optimizer, average)
        if not run.history and not run.metadata.args["fc_is_new"]:
            start = time.perf_counter()
            figures, confusion = validated(network, learner, val_loader, compute)
            row = {"epoch": 0, "lr": 0.0} | figures | {"seconds": time.perf_counter() - start}
            run.record(row, confusion, learner, optimizer, average)
            notice(f"the loaded weights reach {best_figure(run.metadata.args, run.best)}")
    for epoch in range(run.epoch if run else 0, recipe.epochs):
        if run and run.stalled:
            notice("stopped: --patience epochs have brought nothing better")
            break
        start = time.perf_counter()
        lr = cosine_lr(recipe.lr, recipe.lrf, epoch, recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        trained = train_epoch(
            learner, optimizer, train_loader, compute.device, epoch,
            criterion=criterion, amp=compute.amp, clip=recipe.clip,
        )  # fmt: skip
        if isinstance(learner, features.Head):  # whose network stays as it is, but for fc
            learner.fold_into(model.fc)
        else:
            distributed.share_statistics(model, network)
        figures, confusion = validated(network, learner, val_loader, compute)
        figures = {"epoch": epoch + 1, "lr": lr} | distributed.mean(trained) | figures
        figures["seconds"] = time.perf_counter() - start
        if run:
            better = run.record(figures, confusion, learner, optimizer, average)
            if better or epoch + 1 == recipe.epochs or not isinstance(learner, features.Head):
                say_epoch(figures, recipe.epochs, better)
    return figures, confusion


def validated(
    network: nn.Module, learner: nn.Module, val_loader: Iterable, compute: pytorch.Compute
) -> tuple[dict[str, float], np.ndarray]:
    """Validate `learner` if it is a head, else the network that is saved: figures and confusion
    matrix of all processes. RunError if the loss is not finite."""
    if isinstance(learner, features.Head):
        network = learner
    else:
        network = rewrite.rewrite_for_inference(network, compute.threads)
    tally = distributed.total(validate(network, val_loader, compute.device))
    figures = {f"val_{name}": value for name, value in tally.figures().items()}
    if not math.isfinite(figures["val_loss"]):
        raise RunError(f"the loss is {figures['val_loss']} in validation: use a smaller --lr")
    return figures, tally.confusion


def say_epoch(figures: dict, epochs: int, better: bool) -> None:
    """Print the line of an epoch, with whatever figures it has."""
    left = timedelta(seconds=round(figures["seconds"] * (epochs - figures["epoch"])))
    words = [f"epoch {figures['epoch']}/{epochs}", f"lr {figures['lr']:.4g}"]
    for side in ("train", "val"):
        shown = [side]
        for name, value in figures.items():
            if name.startswith(f"{side}_"):
                name = name.removeprefix(f"{side}_")
                shown.append(f"{name.replace('accuracy', 'acc')} {value:.4f}")
        words.append(" ".join(shown))
    if figures["seconds"] > 0.1:  # else `fc` alone, on cached features
        words += [f"{figures['seconds']:.1f} s", f"{figures['images_per_second']:.0f} img/s"]
        words.append(f"{left} left")
    words += ["best"] if better else []
    say("  ".join(words))


def report(run: RunFolder, data: Data, start: float) -> dict:
    """Say what came of it, and what to do next; `start` is of time.perf_counter."""
    best_file = run.folder / "best.pth"
    if run.epoch and not run.best["epoch"]:
        notice("training brought nothing better than epoch 0, with which it began")
    next_step = f"python predict.py IMAGE --weights {best_file}, or python eval.py"
    notice(f"{best_file} holds epoch {run.best['epoch']}; next: {next_step}")
    summary = {
        "best_accuracy": run.best["accuracy"],
        "best_balanced_accuracy": run.best.get("balanced_accuracy"),
        "best_epoch": run.best["epoch"],
        "epochs": run.epoch,
        "train_images": len(data.train[0]),
        "val_images": len(data.val[0]),
        "seconds": round(time.perf_counter() - start, 2),
        "output_dir": str(run.folder),
    }
    say_json(summary)
    return summary


def balanced_weights(data: Data) -> torch.Tensor:
    """A weight for each class, (classes,), with which all classes weigh alike, and the mean image
    weighs 1; as in scikit-learn's class_weight="balanced"."""
    counts = torch.bincount(torch.tensor(data.train[1]), minlength=len(data.classes))
    return counts.sum() / (len(counts) * counts)


# -- what the options mean ----------------------------------------------------------------------


def find_last(args: argparse.Namespace) -> Path | None:
    """The last.pth to resume from; None for a new run. Processes that torchrun starts again resume
    the run in --output-dir by themselves."""
    if args.resume is None:
        last = Path(args.output_dir or "", "last.pth")
        return last if distributed.WORLD > 1 and args.output_dir and last.exists() else None
    last = Path(args.resume or args.output_dir or options.newest_run("last.pth"))
    if last.is_dir():
        last = last / "last.pth"
    options.require_path(last, "--resume")
    if last.suffix != ".pth":
        raise UsageError(f"--resume {last} is neither the folder of a run nor its last.pth")
    if args.output_dir and Path(args.output_dir).resolve() != last.resolve().parent:
        raise UsageError(f"--output-dir {args.output_dir}: a run resumes in its folder; omit it")
    return last


def check(args: argparse.Namespace, typed: argparse.Namespace, state: dict | None) -> None:
    """Refuse what cannot work, before the work; `state` is that of a run that goes on."""
    if distributed.WORLD > 1 and not args.output_dir:
        todo = "processes that are started again look for the run there; name one"
        raise UsageError(f"--output-dir is missing: {todo}")
    if args.name and Path(args.name).name != args.name:
        raise UsageError(f"--name {args.name}: no place but a name; --output-dir names a place")
    if args.model not in VARIANTS:
        first = ", ".join([*VARIANTS][:4])
        raise UsageError(f"--model {args.model} is not there: use {first}, or another of --help")
    if state:
        if (processes := state["args"].get("processes", 1)) != distributed.WORLD:
            raise UsageError(
                f"the run began with {processes} processes: start as many, not {distributed.WORLD}"
            )
        if typed.resume is None and state["args"]["typed"] != shlex.join(typed.words):
            todo = "add --resume, or name another --output-dir"
            raise UsageError(f"{args.output_dir} holds another run: {todo}")
        return
    download.require_data(args.data_path)
    if args.weights not in ("", "imagenet"):
        options.require_path(args.weights, "--weights")
    if args.output_dir and Path(args.output_dir, "last.pth").exists():
        todo = "add --resume, or name another --output-dir"
        raise UsageError(f"{args.output_dir} holds a run: {todo}")
    cached = args.freeze_layers and args.cache_features
    if cached and (args.train_size or args.random_erase or args.augment or args.ema):
        what = "cached features are of whole images, and fc on them needs no average"
        todo = "omit them, or add --no-cache-features"
        raise UsageError(f"--train-size, --random-erase, --augment, --ema: {what}; {todo}")
    if args.fc_first and (args.freeze_layers or not args.cache_features):
        todo = "omit --freeze-layers and --no-cache-features"
        raise UsageError(f"--fc-first trains all layers after fc on cached features: {todo}")
    if args.fc_first and not args.weights:
        raise UsageError(
            "--fc-first: there are no trained layers for fc to learn on; add --weights"
        )
    crop = default_preprocessing(args.model)["crop"]
    if (args.train_size or 0) > crop:
        notice(f"crops to train on are {args.train_size} pixels, evaluation stays at {crop}")
    if (args.freeze_layers or args.freeze_bn) and not args.weights:
        notice("what is frozen holds random weights: add --weights")


def read_data(args: argparse.Namespace, state: dict | None) -> Data:
    """List the images and split them."""
    root = args.data_path
    parts = folders.find_parts(root)
    fingerprint = folders.fingerprint(parts, root)
    if state and state["args"]["data"] != fingerprint:
        changed = f"{root} holds other images than when the run began"
        if "all" in parts:  # best_accuracy would be of images that were trained on
            todo = "restore them, or start a new run with --weights best.pth"
            raise UsageError(f"{changed}, of which another part would be drawn to validate: {todo}")
        notice(changed)
    classes, train, val = split_data(parts, root, args.val_rate, args.seed)
    if state and state["classes"] != classes:
        raise UsageError(f"--data-path {root}: the run was trained on other classes")
    distributed.require_same(fingerprint, f"{root} holds other images than rank 0 sees")
    done = state and len(state["history"])
    distributed.require_same(done, "not all processes see the run: name another --output-dir")
    count = len(train[0])
    if count < distributed.WORLD:
        raise UsageError(f"there are {count} images to train on: start fewer processes")
    notice(f"{count} images to train, {len(val[0])} to validate, {len(classes)} classes")
    return Data(classes, train, val, fingerprint, folders.BadImages(count + len(val[0])))


def choose_small_images(args: argparse.Namespace, paths: list[str]) -> bool:
    """Whether the network is made for images of some 32 pixels."""
    small, possible = args.small_images, takes_small_images(args.model)
    if small is None and args.weights not in ("", "imagenet"):
        small = checkpoint.is_of_small_images(args.weights)
    elif small is None:
        some = paths[:: -(-len(paths) // 9)]
        omitted = not (args.weights or args.train_size)
        small = possible and omitted and sum(map(image.is_small, some)) > len(some) / 2
        if small:
            notice("the images are small, and so is the network (--no-small-images enlarges them)")
    if small and not possible:
        raise UsageError(f"--small-images: {args.model} is not made for them; omit it")
    if small and args.train_size:
        raise UsageError("--train-size: small images, as of --weights, are not resized; omit it")
    return small


def build_network(
    args: argparse.Namespace, classes: list[str], small_images: bool, state: dict | None
) -> tuple[nn.Module, bool]:
    """The network to start or to go on with, and whether its `fc` is new."""
    model, fc_is_new = build_model(args.model, len(classes), small_images), True
    if state:
        checkpoint.load_weights(model, state["model"], "last.pth")
        fc_is_new = state["args"].get("fc_is_new", True)
    elif args.weights:
        fc_is_new = checkpoint.load_pretrained(model, args.model, args.weights, classes)
    return model, fc_is_new


def choose_recipe(args: argparse.Namespace, fc_is_new: bool, small_images: bool) -> Recipe:
    """The recipe for what learns, with what was typed in place of its values. A new `fc` on trained
    layers is trained first: the gradients that it sends through them mean nothing yet."""
    fc_first = args.fc_first
    if fc_first and not fc_is_new:
        raise UsageError("--fc-first: fc of these weights is trained; omit it")
    if fc_first is None:
        fc_first = bool(
            args.weights and fc_is_new and args.cache_features and not args.freeze_layers
        )
    if args.freeze_layers and args.cache_features:
        kind = "fc"
    elif fc_first or (args.weights and not fc_is_new):  # larger steps would undo what was learnt
        kind = "finetune"
    elif small_images:
        kind = "small"
    else:
        kind = "scratch"
    typed = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    typed = {name: value for name, value in typed.items() if value is not None}
    rates = RATES.get(args.opt, {}).get(kind, {})
    if small_images:
        typed["train_size"] = 0  # they are not resized
    recipe = replace(RECIPES[kind], **rates | typed | {"fc_first": fc_first})
    notice(f"recipe {kind}: {recipe}")
    return recipe


def describe(args: argparse.Namespace, data: Data, state: dict | None) -> dict:
    """The options as checkpoints keep them, with the fingerprint of the data, and the date and
    command line that the run began with."""
    began = {"data": data.fingerprint, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    began["typed"] = shlex.join(args.words)
    if state:
        began = {name: state["args"][name] for name in began}
    kept = {name: value for name, value in vars(args).items() if name not in ("words", "resume")}
    return kept | {"processes": distributed.WORLD} | began


if __name__ == "__main__":
    options.run_script(main)

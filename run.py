"""The folder of one training run: its checkpoints, tables, TensorBoard events and drawings.

`last.pth` holds beside what `best.pth` holds (checkpoint.py) what a run needs to be resumed:

    history     a row of figures per epoch; epoch 0 is `fc` alone, trained first
    seconds     what each of these epochs took
    best        accuracy, loss, epoch and confusion matrix of the best epoch; or None
    learning    state of the optimizer, and of the head on cached features; or None
"""

import argparse
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import checkpoint
import cli
import plots
from cli import UsageError, notice, printable
from distributed import RANK, WORLD
from files import replacing, save_json, save_rows
from image import ImageError
from metrics import confusions
from my_dataset import MyDataSet

# Options that say where and how fast a run goes, not what it computes.
FREE = {"data_path", "workers", "device", "output_dir", "name", "epochs", "patience"}


def load(path: Path, parser: cli.Parser, args: argparse.Namespace) -> tuple:
    """Read last.pth; returns its state, and the options of the run with those typed now. RunError
    if it is damaged, UsageError if it is another file, or an option would change the result."""
    state = checkpoint.load(path)
    if not state.keys() >= {"args", "history", "seconds", "best", "learning"}:
        raise UsageError(f"--resume {path}: name the last.pth of a run; this is another file")
    began = {name: value for name, value in state["args"].items() if name in vars(args)}
    parser.set_defaults(**began)
    args = parser.parse_args(args.words)
    args.output_dir = str(path.parent)
    if (processes := state["args"].get("processes", 1)) != WORLD:
        raise UsageError(f"--resume {path}: start {processes} processes, as it began, not {WORLD}")
    for name in sorted(began.keys() - FREE):
        if getattr(args, name) != began[name]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(f"omit {flag}, or start a new run: {path} began with {began[name]}")
    if args.epochs != began["epochs"]:
        notice(f"--epochs {args.epochs}, was {began['epochs']}: the rates ahead change, too")
    done = state["history"][-1]["epoch"] if state["history"] else 0
    best = state["best"] or {"accuracy": 0.0, "epoch": 0}
    record = f"best accuracy {best['accuracy']:.4f} in epoch {best['epoch']}"
    notice(f"resuming {path.parent}: {done} of {args.epochs} epochs are done, {record}")
    return state, args


class Run:
    """What a training run leaves in its folder, which the caller has locked.

    `about` holds model_name, classes, preprocessing and args, as every checkpoint does; `state` is
    that of last.pth, to go on, or None to begin. Of several processes the first writes; the others
    keep the same history.
    """

    def __init__(self, folder: Path, about: dict, state: dict | None) -> None:
        self.folder, self.about = folder, about
        self.history: list[dict] = state["history"] if state else []
        self.seconds: list[float] = state["seconds"] if state else []
        self.best: dict | None = state["best"] if state else None
        if RANK:
            return
        save_json(about["args"], folder / "args.json")
        save_json(dict(enumerate(about["classes"])), folder / "class_indices.json")
        self._save_metrics()  # a kill may have come before it
        self._writer = SummaryWriter(folder, purge_step=self.epoch + 1)

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.history[-1]["epoch"] if self.history else 0

    def save_last(self, model: nn.Module, learning: dict | None) -> None:
        """Write last.pth."""
        if RANK:
            return
        state = {"history": self.history, "seconds": self.seconds, "best": self.best}
        state["learning"] = learning
        checkpoint.save(self._usable(model) | state, self.folder / "last.pth")

    def record(self, row: dict, confusion, model: nn.Module, learning: dict | None) -> bool:
        """Write what an epoch brought; `learning` is what optimizer and head need to go on.
        Returns whether it is the best so far."""
        row = dict(row)
        speed = row.pop("images_per_second")
        self.seconds.append(row.pop("seconds"))  # apart, since no two runs have the same
        self.history.append(row)
        accuracy, loss = row["val_accuracy"], row["val_loss"]
        better = not self.best or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"])
        if better:
            self.best = {"accuracy": accuracy, "loss": loss, "epoch": row["epoch"]}
            self.best["confusion"] = torch.from_numpy(confusion)
        if RANK:
            return better
        if better:  # before last.pth: killed between the two, the epoch is done again
            checkpoint.save(self._usable(model), self.folder / "best.pth")
        self.save_last(model, learning)
        self._save_metrics()
        for name in ("loss", "accuracy"):
            for side in ("train", "val"):
                self._writer.add_scalar(f"{name}/{side}", row[f"{side}_{name}"], row["epoch"])
        self._writer.add_scalar("learning_rate", row["lr"], row["epoch"])
        self._writer.add_scalar("images_per_second", speed, row["epoch"])
        self._writer.flush()
        if self.seconds[-1] > 10:  # beside a shorter epoch drawing would take long
            self._draw()
        return better

    def _save_metrics(self) -> None:
        pairs = zip(self.history, self.seconds, strict=True)
        rows = [row | {"seconds": round(seconds, 2)} for row, seconds in pairs]
        save_rows(rows, self.folder / "metrics.csv")

    def _usable(self, model: nn.Module) -> dict:
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        about = {"epoch": self.epoch, "metrics": dict((self.history or [{}])[-1])}
        return {"model": weights} | self.about | about

    def stalled(self, patience: int | None) -> bool:
        """Whether `patience` epochs have brought nothing better."""
        return bool(patience and self.best and self.epoch - self.best["epoch"] >= patience)

    def draw_samples(self, dataset: MyDataSet) -> None:
        """Draw samples.png: images as they are trained on, with their classes."""
        if RANK:
            return
        cells = []
        for index in _spread(len(dataset)):
            with suppress(ImageError):
                pixels, label = dataset[index]
                cells.append((pixels, self.about["classes"][label]))
        if cells:
            with replacing(self.folder / "samples.png") as file:
                plots.draw_sheet(cells).save(file, "PNG")

    def finish(self) -> None:
        """Draw, and complete the events: options beside the best figures, and confusion matrix."""
        if RANK:
            return
        self._draw()
        matrix = np.asarray(Image.open(self.folder / "confusion_matrix.png").convert("RGB"))
        self._writer.add_image("confusion matrix", matrix, self.best["epoch"], dataformats="HWC")
        options = {
            name: printable(value) if isinstance(value, str) else value  # paths may be any bytes
            for name, value in self.about["args"].items()
            if value is not None and name not in ("data", "date", "typed", "output_dir")
        }
        best = {f"best/{name}": self.best[name] for name in ("accuracy", "loss", "epoch")}
        for name, value in best.items():
            self._writer.add_scalar(name, value)
        for part in hparams(options, best):  # the tab HPARAMS compares runs by these
            self._writer.file_writer.add_summary(part)
        rows = "".join(f"| {name} | {value} |\n" for name, value in options.items())
        self._writer.add_text("options", f"| option | value |\n|---|---|\n{rows}")
        self._writer.close()

    def _draw(self) -> None:
        """Draw the curves, and the confusion matrix of the best epoch; list its confusions."""
        plots.save_figure(plots.draw_curves(self.history, self.best), self.folder / "curves.png")
        title = f"validation, epoch {self.best['epoch']}, accuracy {self.best['accuracy']:.3f}"
        counts, classes = self.best["confusion"].numpy(), self.about["classes"]
        save_rows(confusions(counts, classes), self.folder / "confusions.csv")
        figure = plots.draw_confusion_matrix(counts, classes, title)
        plots.save_figure(figure, self.folder / "confusion_matrix.png")


def _spread(length: int) -> range:
    """At most 16 of the numbers below `length`, evenly spread: some of many classes."""
    return range(0, length, -(-length // 16))

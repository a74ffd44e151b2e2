"""The folder of one training run: its checkpoints, tables, TensorBoard events and drawings.

`last.pth` holds beside what `best.pth` holds (checkpoint.py) what a run needs to be resumed:

    history     a row of figures per epoch; epoch 0 is `fc` alone, trained first
    seconds     what each of these epochs took
    best        accuracy, balanced accuracy, loss, epoch and confusion matrix of the best epoch; or
                None
    learning    state of the optimizer, of the head on cached features, and, where "model" is a
                moving average (--ema), what it averages, and steps so far; or None
"""

import argparse
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from shufflenet.common.files import if_possible, replacing, save_json, save_rows
from shufflenet.common.messages import UsageError, notice, printable
from shufflenet.common.options import Parser
from shufflenet.inference import checkpoint, plots
from shufflenet.inference.metadata import Metadata
from shufflenet.inference.metrics import confusions
from shufflenet.reading.image import ImageError
from shufflenet.training.features import Head

# Options that say where and how fast a run goes, not what it computes.
FREE = {"data_path", "workers", "device", "output_dir", "name", "epochs", "patience"}
# Options that TensorBoard compares, in this order.
COMPARED = ("model", "weights", "opt", "lr", "lrf", "weight_decay", "batch_size", "epochs", "ema")
COMPARED += ("freeze_layers", "fc_first", "freeze_bn", "label_smoothing", "class_weights", "seed")
COMPARED += ("augment", "train_size", "random_erase", "amp")
DRAW_AFTER = 10  # seconds of an epoch beside which drawing takes no time


def load_run(last: Path, parser: Parser, options: argparse.Namespace) -> tuple:
    """Read last.pth; returns its state, and the options of the run with those typed now. RunError
    if it is damaged, UsageError if it is another file, or an option would change the result."""
    state = checkpoint.load(last)
    if not state.keys() >= {"args", "history", "seconds", "best", "learning"}:
        raise UsageError(f"--resume {last} is not the last.pth of a run; name one")
    # A run may have begun before some options were there, or average and crops of its recipe.
    before = {"opt": "sgd", "label_smoothing": 0.0, "ema": 0.0}
    names = vars(options).keys() - {"words", "resume"}
    began = {name: parser.get_default(name) for name in names} | before
    began |= {name: value for name, value in state["args"].items() if name in names}
    began["train_size"] = began["train_size"] or 0
    parser.set_defaults(**began)
    options = parser.parse_args(options.words)
    options.output_dir = str(last.parent)
    for name in sorted(began.keys() - FREE):
        if (value := getattr(options, name)) != began[name]:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            flag += "" if isinstance(value, bool) else f" {value}"
            off = not began[name] and name != "seed"
            how = "without it" if off else "with it" if value is False else f"with {began[name]}"
            raise UsageError(f"{last} began {how}: omit {flag}, or start a new run")
    if state["best"] and not (last.parent / "best.pth").exists():
        todo = f"put it back, or start a new run with --weights {last}"
        raise UsageError(f"{last.parent} lacks best.pth: {todo}")
    if options.epochs != began["epochs"]:
        notice(f"--epochs {options.epochs}, was {began['epochs']}: the rates ahead change, too")
    done = state["history"][-1]["epoch"] if state["history"] else 0
    best = state["best"] or {judged_by(began): 0.0, "epoch": 0}
    record = f"best {best_figure(began, best)} in epoch {best['epoch']}"
    notice(f"resuming {last.parent}: {done} of {options.epochs} epochs are done, {record}")
    if done >= options.epochs:
        notice("nothing is left to train, but for more epochs than these")
    return state, options


def judged_by(args: dict) -> str:
    """The figure that chooses the best epoch of a run with these options."""
    return "balanced_accuracy" if args.get("class_weights") else "accuracy"


def best_figure(args: dict, best: dict) -> str:
    """That figure of the best epoch, with its name."""
    name = judged_by(args)
    return f"{name.replace('_', ' ')} {best[name]:.4f}"


class RunFolder:
    """What a training run leaves in its folder, which the caller has locked.

    `model` is what is saved; `state` is that of last.pth, to go on, or None to begin. Of several
    processes one `writes`; the others keep the same history.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        metadata: Metadata,
        state: dict | None = None,
        writes: bool = True,
    ) -> None:
        self.folder, self.model, self.metadata = folder, model, metadata
        self.history: list[dict] = state["history"] if state else []
        self.seconds: list[float] = state["seconds"] if state else []
        self.best: dict | None = state["best"] if state else None
        self._learning: dict | None = state["learning"] if state else None
        self._writer = SummaryWriter(folder, purge_step=self.epoch + 1) if writes else None
        if writes:
            save_json(metadata.args, folder / "args.json")
            save_json(dict(enumerate(metadata.classes)), folder / "class_indices.json")
            self._save_metrics()  # a kill may have come before it
        if writes and not state:
            self._save_last(model)  # so that there always is something to resume

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def stalled(self) -> bool:
        """Whether `--patience` epochs have brought nothing better."""
        patience = self.metadata.args.get("patience")
        return bool(patience and self.best and self.epoch - self.best["epoch"] >= patience)

    def restore(
        self,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedModel | None = None,
    ) -> None:
        """Load what the last epoch left of the optimizer, of a head on cached features, and of what
        is averaged; what was saved as the network is loaded when that is built."""
        if self._learning:
            optimizer.load_state_dict(self._learning["optimizer"])
            if isinstance(learner, Head):
                learner.load_state_dict(self._learning["head"])
            if average:
                average.n_averaged.copy_(self._learning["steps"])
                self.model.load_state_dict(self._learning["averaged"])

    def record(
        self,
        figures: dict[str, float],
        confusion: np.ndarray,
        learner: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        average: AveragedModel | None = None,
    ) -> bool:
        """Keep what an epoch brought: its figures, among them "epoch" and "seconds", and the state
        of what learns. If there is an `average`, it is saved as the network. Returns whether it is
        the best so far."""
        row = dict(figures)
        speed = row.pop("images_per_second", None)
        self.seconds.append(row.pop("seconds"))  # apart, since no two runs have the same
        self.history.append(row)
        self._learning = {"optimizer": optimizer.state_dict()} if optimizer else None
        if isinstance(learner, Head):
            self._learning["head"] = learner.state_dict()
        if average:
            steps = average.n_averaged
            self._learning |= {"averaged": self.model.state_dict(), "steps": steps}
        saved = average.module if average else self.model
        judged = judged_by(self.metadata.args)
        new = {name: row[f"val_{name}"] for name in ("accuracy", "balanced_accuracy", "loss")}

        def rank(figures: dict) -> tuple[float, float]:
            return figures[judged], -figures["loss"]

        better = not self.best or rank(new) > rank(self.best)
        if better:
            self.best = new | {"epoch": row["epoch"], "confusion": torch.from_numpy(confusion)}
        if self._writer:
            if better:  # before last.pth: killed between the two, the epoch is done again
                checkpoint.save(self._usable(saved), self.folder / "best.pth")
            self._save_last(saved)
            self._save_metrics()
            self._log(row, speed)
            if self.seconds[-1] > DRAW_AFTER:
                self._draw()
        return better

    def _usable(self, network: nn.Module) -> dict:
        state = network.state_dict()
        weights = {name: value.cpu().contiguous() for name, value in state.items()}
        metrics = dict(self.history[-1]) if self.history else {}
        epoch = {"epoch": self.epoch, "metrics": metrics}
        return {"model": weights} | asdict(self.metadata) | epoch

    def _save_last(self, network: nn.Module) -> None:
        state = {"history": self.history, "seconds": self.seconds, "best": self.best}
        state["learning"] = self._learning
        checkpoint.save(self._usable(network) | state, self.folder / "last.pth")

    @if_possible()
    def _save_metrics(self) -> None:
        pairs = zip(self.history, self.seconds, strict=True)
        rows = [row | {"seconds": round(seconds, 2)} for row, seconds in pairs]
        save_rows(rows, self.folder / "metrics.csv")

    def _log(self, row: dict, images_per_second: float | None) -> None:
        """Add an epoch to TensorBoard's events: train_loss as loss/train, and so on."""
        for name, value in row.items():
            side, _, figure = name.partition("_")
            if side in ("train", "val"):
                self._writer.add_scalar(f"{figure}/{side}", value, row["epoch"])
        self._writer.add_scalar("learning_rate", row["lr"], row["epoch"])
        if images_per_second:
            self._writer.add_scalar("images_per_second", images_per_second, row["epoch"])
        self._writer.flush()

    @if_possible()
    def draw_samples(self, dataset: Dataset) -> None:
        """Draw samples.png: some of the images that are trained on, evenly spread, with their
        classes."""
        cells = []
        for index in range(0, len(dataset), -(-len(dataset) // 16)):
            with suppress(ImageError):
                image, label = dataset[index]
                if not torch.is_tensor(image):  # else it is normalised, no picture any more
                    cells.append((np.asarray(image), self.metadata.classes[label]))
        if cells and self._writer:
            with replacing(self.folder / "samples.png") as file:
                plots.draw_sheet(cells).save(file, "PNG")

    def finish(self) -> None:
        """Draw, and complete TensorBoard's events, whose tab HPARAMS compares options and
        best figures."""
        if not self._writer:
            return
        self._draw()
        options = {
            name: printable(value) if isinstance(value, str) else value  # paths may be any bytes
            for name in COMPARED
            if (value := self.metadata.args.get(name)) is not None
        }
        kept = [name for name in self.best if name != "confusion"]
        best = {f"best/{name}": self.best[name] for name in kept}
        for name, value in best.items():
            self._writer.add_scalar(name, value)
        for part in hparams(options, best):  # add_hparams would begin another run for them
            self._writer.file_writer.add_summary(part)
        self._writer.close()

    def _draw(self) -> None:
        """Draw the curves, and the confusion matrix of the best epoch; list its confusions."""
        with if_possible():
            plots.save_figure(
                plots.draw_curves(self.history, self.best), self.folder / "curves.png"
            )
        title = f"validation, epoch {self.best['epoch']}, accuracy {self.best['accuracy']:.3f}"
        counts, classes = self.best["confusion"].numpy(), self.metadata.classes
        with if_possible():
            save_rows(confusions(counts, classes), self.folder / "confusions.csv")
        with if_possible():
            figure = plots.draw_confusion_matrix(counts, classes, title)
            plots.save_figure(figure, self.folder / "confusion_matrix.png")

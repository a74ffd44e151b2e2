"""Go on with a run: find its last checkpoint, take nothing in it on trust, save the next one.

`last.pth` holds, beside what `best.pth` holds (checkpoint.py), what a run needs to go on:

    optimizer   its momentum
    scaler      that of float16, {} without
    history     a row of figures for each epoch that is done
    best        accuracy, epoch and confusion matrix of the best one (0 is `--fc-first`); None
                before the first
    position    where the epoch under way was stopped, see `utils.train_one_epoch`; None between two
    head        on cached features: the head, mean and scale; else None
    pictures    `folders.fingerprint` of the data
"""

import argparse
import math
import reprlib
from pathlib import Path

import cli
from cli import RunError, UsageError, notice

FIGURES = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")

# Options that say where and how fast a run goes, not what it computes: a resumed run may change
# them. All others stay as the run began.
FREE = {"data_path", "workers", "device", "output_dir", "epochs"}
NOT_SAVED = {"given", "resume"}

PARTS = {"optimizer", "scaler", "history", "best", "position", "head", "pictures"}


def holds_run(folder: str | Path) -> bool:
    """Whether there is a run in the folder to go on with."""
    return any(Path(folder, name).exists() for name in ("last.pth", "previous.pth"))


def find(resume: str, output_dir: str | None) -> tuple[Path, bool]:
    """The last.pth that `--resume` means, and whether the user named this very file.

    Raises:
        UsageError: there is none, or `output_dir` holds another run.
    """
    if resume or output_dir:
        path = Path(resume or output_dir)
        named = not path.is_dir() and bool(resume)
        if not named:
            path /= "last.pth"
    else:
        path, named = cli.newest_run("last.pth", "previous.pth").with_name("last.pth"), False
    if named or not holds_run(path.parent):
        cli.require_path(path, "--resume")
    if output_dir and holds_run(output_dir) and Path(output_dir).resolve() != path.parent.resolve():
        raise UsageError(f"--output-dir {output_dir}: holds another run than {path}")
    return path, named


def load(path: Path, named: bool) -> tuple[dict, Path]:
    """The state of a run and its file; the one before where the last is damaged or gone, unless it
    was `named`.

    Raises:
        RunError: it is damaged.
        UsageError: it is not the last.pth of a run.
    """
    import checkpoint

    previous = path.with_name("previous.pth")
    try:
        state = checkpoint.load(path)
    except (RunError, FileNotFoundError) as error:
        if named or not previous.exists():
            raise
        gone = isinstance(error, FileNotFoundError)
        notice(f"{f'{path} is gone' if gone else error}; going on from {previous}")
        state, path = checkpoint.load(previous), previous
    if not state.keys() >= PARTS | {"args"} or not isinstance(state["history"], list):
        raise UsageError(f"--resume {path}: not the last.pth of a run, or of another version")
    return state, path


def options_of_run(
    parser: cli.Parser, args: argparse.Namespace, state: dict, path: Path
) -> argparse.Namespace:
    """The options a run began with, changed by those typed now where that changes no result.

    Raises:
        UsageError: the typed ones would change it, or those in the file are none.
    """
    began, now = vars(cli.parse_saved(parser, state["args"], path)), vars(args)
    for name in sorted(args.given - FREE - NOT_SAVED):
        if now[name] != began[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} {now[name]}: the run of {path} began with "
                f"{reprlib.repr(began[name])} and goes on with it; leave the option out, or "
                "start a new run"
            )
    merged = began | {name: now[name] for name in args.given} | {"given": args.given}
    merged["output_dir"] = args.output_dir or str(path.parent)
    if merged["epochs"] < len(state["history"]):
        raise UsageError(f"--epochs {merged['epochs']}: {path} has {len(state['history'])} already")
    cli.require_data(merged["data_path"])
    return argparse.Namespace(**merged)


def check(state: dict, now: dict, shapes: list[tuple], classes: int, path: Path) -> None:
    """Raise RunError unless the state of a run is what such a run saves.

    Args:
        state: from a file.
        now: the same parts of the run as it is set up.
        shapes: of the parameters that are trained, in order.
        classes: how many.
        path: of the file.
    """
    import torch

    row = dict.fromkeys(FIGURES, 0.0) | {"epoch": 0}
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    began = state["history"] or state["best"] is not None
    examples = {
        "history": [row],
        "best": {"accuracy": 0.0, "epoch": 0, "confusion": confusion} if began else None,
        "head": now["head"],
        "pictures": "",
    }
    if now["scaler"] and state["scaler"] != {}:  # else it is not loaded: another device
        examples["scaler"] = now["scaler"]
    if state["position"] is not None:
        examples["position"] = {"step": 0, "seen": 0, "sums": torch.zeros(2)}
    for name, example in examples.items():
        if not _alike(state[name], example):
            raise RunError(f"{path}: {name} is not that of such a run; start a new run")
    momenta = state["optimizer"].get("state") if isinstance(state["optimizer"], dict) else None
    if not isinstance(momenta, dict) or not all(
        type(index) is int
        and 0 <= index < len(shapes)
        and _alike(value, {"momentum_buffer": torch.zeros(shapes[index])})
        for index, value in momenta.items()
    ):
        raise RunError(f"{path}: optimizer is not that of such a run; start a new run")


def _alike(value: object, example: object) -> bool:
    """Whether a value has the structure, types and shapes of an example; a list in an example
    stands for any number of its one item."""
    import torch

    if type(value) is not type(example):
        return False
    if isinstance(example, dict):
        return value.keys() == example.keys() and all(_alike(value[k], example[k]) for k in example)
    if isinstance(example, list):
        return all(_alike(item, example[0]) for item in value)
    if isinstance(example, torch.Tensor):
        from checkpoint import is_plain

        same = is_plain(value) and (value.shape, value.dtype) == (example.shape, example.dtype)
        return same and bool(value.isfinite().all())
    if isinstance(example, float):
        return math.isfinite(value)
    return not isinstance(example, int) or 0 <= value < 2**31


def momenta(state: dict) -> dict:
    """Those of a checked state, each in memory of its own: in a file they may overlap."""
    return {
        index: {name: value.detach().clone() for name, value in buffers.items()}
        for index, buffers in state["optimizer"]["state"].items()
    }


def bring(resumed: Path, output_dir: Path, history: list[dict]) -> None:
    """Make the folder of a resumed run what it was after its last epoch."""
    from files import keep_previous, replacing, save_rows

    if resumed.name == "previous.pth":  # last.pth is damaged: it must not become the previous one
        keep_previous(resumed, output_dir / "last.pth")
    save_rows(history, output_dir / "metrics.csv")
    best = resumed.with_name("best.pth")
    if best.exists() and not (output_dir / "best.pth").exists():  # the run moves here
        with replacing(output_dir / "best.pth") as file:
            file.write(best.read_bytes())


def save_last(output_dir: Path, state: dict) -> None:
    """Write last.pth; what it was becomes previous.pth."""
    import checkpoint

    checkpoint.save(state, output_dir / "last.pth", previous=output_dir / "previous.pth")

"""The command line that the scripts share: parser, options, checks, exit codes."""

import argparse
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from shufflenet.common.messages import RunError, UsageError, notice

PLOTS = (".png", ".jpg", ".pdf", ".svg")
Words = argparse.Namespace | Sequence | None  # what `main` of a script takes


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError and remembers the words it parsed."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        if re.match("unrecognized arguments: --num[_-]classes", message):  # of the tutorial
            raise UsageError(
                "--num-classes: the folders, or the weights, tell the classes; omit it"
            )
        alone = re.match(r"unrecognized arguments: ([^-]\S*)", message)
        if alone and "--data-path" in self._option_string_actions:
            raise UsageError(f"{alone[1]} stands alone: write --data-path {alone[1]}")
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, words: Words = None, namespace=None) -> argparse.Namespace:
        """Of a list of words, None for those of sys.argv, or options that are parsed already."""
        if isinstance(words, argparse.Namespace):
            return words
        words = sys.argv[1:] if words is None else [str(word) for word in words]
        args = super().parse_args(words, namespace)
        args.words = words  # `--resume` parses them again, with the defaults of the run
        return args


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def true_or_false(text: str) -> bool:
    """An argparse type, for readers of the tutorial, who write `--freeze-layers False`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def number(kind: type, low: float, high: float = 1e9) -> Callable:
    """An argparse type: an int or float from `low` to `high`."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low:g} to {high:g}")

    return convert


# fmt: off
DEVICE = {
    "default": "auto", "metavar": "NAME",
    "help": "auto (CUDA, else Apple's GPU, else the CPU), cpu, cuda, cuda:INDEX or mps",
}


def add_inference(group: argparse._ActionsContainer) -> None:
    """Add what eval.py and predict.py ask about the network."""
    add = group.add_argument
    add("--weights", type=weights_file, metavar="FILE",
        help="best.pth of a run or the run's folder, a bare state dict, an .onnx file of "
        "export.py, or 'imagenet' for torchvision's of x1.0 (if omitted: the newest "
        "runs/*/best.pth)")
    add("--device", **DEVICE)
    add("--runtime", choices=("onnxruntime", "openvino"),
        help="what computes an .onnx file (if omitted: onnxruntime)")
    add("-j", "--workers", type=number(int, 1, 256), default=cores(), metavar="N",
        help="threads that read and classify, one core each")
# fmt: on


def cores() -> int:
    """How many cores this process may use, by its affinity and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # no quota ("max"), or no cgroup v2
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return count or 1


def require_path(path: str | Path, flag: str) -> None:
    """Raise UsageError unless the file exists."""
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: {'not a' if os.path.exists(path) else 'no such'} file")


def weights_file(path: str | Path) -> str:
    """An argparse type: a weight file; best.pth of the folder of a run."""
    is_run = os.path.isdir(path) and str(path) != "imagenet"
    return str(Path(path, "best.pth")) if is_run else str(path)


def require_weights(path: str | Path | None) -> Path:
    """The file that --weights names, or best.pth of the newest run; UsageError if there is none."""
    path = Path(weights_file(path) if path else newest_run("best.pth"))
    if str(path) != "imagenet":  # of torchvision, downloaded
        require_path(path, "--weights")
    return path


def newest_run(name: str) -> Path:
    """The newest file `runs/*/NAME` below the working folder; UsageError if there is none."""
    found = sorted(Path("runs").glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        raise UsageError(f"no runs/*/{name} here: run train.py first, or name a file")
    return found[-1]


def make_folder(path: str | None, name: str, flag: str = "--output-dir") -> Path:
    """Make the folder for results, before any work: the one named, or a fresh `runs/DATE-NAME`."""
    folder = Path(path or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{name}")
    while not path and folder.exists():
        folder = folder.with_name(folder.name + "+")  # of a run in the same second
    try:
        folder.mkdir(parents=True, exist_ok=bool(path))
        (probe := folder / f".{os.getpid()}").touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: {error.strerror}; name another") from None
    return folder


def check_file(flag: str, path: str, suffixes: Sequence[str]) -> Path:
    """Raise UsageError, before any work, unless a file of such a name can be written."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{flag} {path}: the suffix must be {' or '.join(suffixes)}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{flag} {path}: cannot be written; name a file in a folder that exists")
    return path


def run_script(main: Callable[[], object]) -> None:
    """Call the `main` of a script and leave as Python does, with 0, 1, 2 or 130, or at once with
    143 where it is terminated; only a bug shows more than a line. The process may be that of a
    notebook or a profiler, and is left as it was."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a Windows pipe lacks letters
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if ours else None
    try:
        _run(main)
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: of no Python


def _run(main: Callable[[], object]) -> None:
    code = 1
    try:
        main()
        return
    except KeyboardInterrupt as error:
        code, text = 130, str(error) or "interrupted"
    except UsageError as error:
        code, text = 2, str(error)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RunError as error:
        text = str(error)
    except OSError as error:
        text = ": ".join(filter(None, (error.strerror or str(error), error.filename)))
    except ImportError as error:
        deploy = "-deploy" if (error.name or "").startswith(("onnx", "openvino")) else ""
        code, text = 2, f"{error}: run pip install -r requirements{deploy}.txt"
    except (MemoryError, RuntimeError) as error:
        lack = "out of memory|can't allocate|not enough memory|ALLOC_FAILED"  # of any device
        if isinstance(error, MemoryError) or re.search(lack, str(error)):
            text = "out of memory: use a smaller --batch-size or fewer --workers"
        elif re.search("peer|[Gg]loo|NCCL", str(error)):  # of torchrun
            text = "another process ended, or cannot be reached"
        else:
            raise
    notice(f"error: {text}", everywhere=True)
    sys.exit(code)


def _terminate(signum: int, frame: object) -> NoReturn:
    """End at once, as a kill does: every file that has its name on the disk is whole."""
    if sys.stderr:  # else another file may have its number
        os.write(2, b"error: terminated\n")
    os._exit(128 + signum)

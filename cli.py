"""What the scripts share at the command line: parser, switches, notices, exit codes.

Standard library only, so that `--help` and a wrong path answer before torch is imported.
"""

import argparse
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

# How threads of one process wait for each other; torch reads it when it is imported. Asleep, not
# spinning: beside any other busy process, spinning made training here ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


FLOWER_PHOTOS = "data/flower_photos"  # downloaded when absent
SAMPLE = "sample"  # drawn to data/sample
PLOTS = (".png", ".jpg", ".pdf", ".svg")


class UsageError(ValueError):
    """A mistake of the caller found before the work starts (exit code 2)."""


class RunError(RuntimeError):
    """A failure during the work (exit code 1)."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM ends the work (exit code 130 or 143). As KeyboardInterrupt no Exception,
    or an import that tries alternatives would swallow it."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Within the block SIGINT and SIGTERM only make the function it gives return their number
    (before: 0), so that a step can be finished and saved. A second one ends the process at once."""
    came = 0

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = signum
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        notice("stopping after this step; once more to stop at once")

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield lambda: came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def printable(text: object) -> str:
    """Text from a file name or a file, safe to print: control characters and lone surrogates
    are written as escapes, so that no name moves the cursor or starts a second line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def notice(text: str) -> None:
    """One line for the reader, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints defaults in `--help`, raises UsageError for a mistake, and
    notes in `args.given` which options the user typed."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        # What stays unset in a parse that starts from marks instead of defaults was not typed.
        unset = object()
        marks = argparse.Namespace(**dict.fromkeys(vars(parsed), unset))
        typed = super().parse_args(args, marks)
        parsed.given = {name for name, value in vars(typed).items() if value is not unset}
        return parsed


def parse_saved(parser: Parser, options: object, source: str | Path) -> argparse.Namespace:
    """What the parser makes of options that a file holds, {name: value}.

    Raises:
        UsageError: one is unknown, or its value would not do at the command line.
    """
    known = vars(parser.parse_args([])).keys() - {"given"}
    words = []
    try:
        for name, value in options.items() if isinstance(options, dict) else [("args", options)]:
            if name not in known or not isinstance(value, str | int | float | None):
                raise UsageError(f"{reprlib.repr(name)} is {reprlib.repr(value)}")
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words.append(f"--{flag}={value}")
        return parser.parse_args(words)
    except ValueError as error:
        reason = printable(error)[:200]
        raise UsageError(f"{source}: its options are not those of a run: {reason}") from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help  # a default of nothing says nothing
        return super()._get_help_string(action)


def add_switch(group: argparse._ActionsContainer, name: str, default: bool, help: str) -> None:
    """Add `--NAME`, `--NAME true|false` (as the tutorial's readers write it) and `--no-NAME`."""
    group.add_argument(
        f"--{name}", nargs="?", const=True, default=default, type=_switch, help=help,
        metavar="true|false",
    )  # fmt: skip
    dest = name.replace("-", "_")
    group.add_argument(
        f"--no-{name}", dest=dest, action="store_false", default=default, help=argparse.SUPPRESS
    )


def _switch(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable:
    """An argparse type: an int or float from `low` (`above`: greater than it) to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value if above else low <= value) or not value <= high:
            rule = f"greater than {low}" if above else f"at least {low}"
            rule += "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {rule}")
        return value

    return convert


def add_device(group: argparse._ActionsContainer) -> None:
    """Add `--device`."""
    group.add_argument(
        "--device",
        type=_device_name,
        default="auto",
        metavar="NAME",
        help="auto (CUDA, else Apple's GPU, else the CPU), cpu, cuda, cuda:INDEX or mps",
    )


def _device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:INDEX, mps")
    return text


def add_workers(group: argparse._ActionsContainer) -> None:
    """Add `--workers`; the default leaves one core to the network and is at most 8."""
    group.add_argument(
        "-j",
        "--workers",
        type=number(int, 0, 256),
        default=min(max(1, cores() - 1), 8),
        metavar="N",
        help="processes that read pictures; 0 reads in the main process",
    )


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_inference(group: argparse._ActionsContainer) -> None:
    """Add what eval.py and predict.py ask about the network: weights, device, runtime, speed."""
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="best.pth of a run, a bare state dict, or an .onnx file of export.py (when not said: "
        "the newest runs/*/best.pth)",
    )
    add_device(group)
    group.add_argument(
        "--runtime",
        choices=("onnxruntime", "openvino"),
        help="what computes an .onnx file (when not said: ONNX Runtime for few pictures, which "
        "starts faster, OpenVINO for many)",
    )
    group.add_argument(
        "--amp",
        action="store_true",
        help="compute in bfloat16: faster where the device has it, slower elsewhere",
    )
    group.add_argument(
        "-j", "--workers", type=number(int, 0, 256), default=cores(), metavar="N",
        help="threads that read and classify, each on one core; 0 is one",
    )  # fmt: skip


def add_bad_images(group: argparse._ActionsContainer) -> None:
    """Add `--on-bad-image`."""
    group.add_argument(
        "--on-bad-image",
        choices=("skip", "fail"),
        default="skip",
        help="what to do with pictures that cannot be read: name and pass over a few (at most a "
        "tenth), or stop at the first",
    )


def add_amp(group: argparse._ActionsContainer) -> None:
    """Add `--amp` and `--no-amp`; None when neither is said."""
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision (when neither is said: on CUDA only)",
    )


def require_data(path: str) -> None:
    """Raise UsageError unless the folder exists or is one that is made when absent."""
    if path not in (FLOWER_PHOTOS, SAMPLE):
        require_path(path, "--data-path", folder=True)


def check_output_dir(path: str | None) -> None:
    """Raise UsageError if results cannot go there."""
    if path and os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"--output-dir {path}: not a folder")
    place = Path(path or "runs").absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        folder = f"--output-dir {path}" if path else "runs"
        raise UsageError(f"{folder}: cannot be made in {place}; name another --output-dir")


def say(text: str) -> None:
    """A result line on stdout; work goes on when nobody reads it any more (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _close_stdout()


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fresh_folder(name: str) -> Path:
    """Make a folder `runs/DATE-NAME` that no other run has."""
    stem, count = f"{datetime.now():%Y%m%d-%H%M%S}-{name}", 1
    folder = Path("runs", stem)
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1
            folder = Path("runs", f"{stem}-{count}")


def newest_run(*names: str) -> Path:
    """The newest file `runs/*/NAME` below the working folder, of any of the names."""
    found = [path for name in names for path in Path("runs").glob(f"*/{name}")]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"there is no runs/*/{names[0]} here; run train.py first, or name a file")
    return found[-1]


def require_path(path: str | Path, flag: str, *, folder: bool = False) -> None:
    """Raise UsageError unless the file (or folder) exists."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such {'folder' if folder else 'file'}")
    if path.is_dir() != folder:
        raise UsageError(f"{flag} {path}: not a {'folder' if folder else 'file'}")


def check_file(flag: str, path: str, suffixes: Sequence[str]) -> Path:
    """Raise UsageError unless a file of such a name can be written."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{flag} {path}: the suffix must be {' or '.join(suffixes)}")
    require_path(path.parent, flag, folder=True)
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder")
    return path


def run(parser: Parser, main: Callable[[argparse.Namespace], object]) -> NoReturn:
    """Parse, call `main`, and leave with 0, 1, 2, 130 or 143; a foreseen error is one line, only
    an unforeseen one (a bug) shows a traceback."""
    with suppress(ValueError):  # in another thread than the main one there are no signals
        signal.signal(signal.SIGTERM, _terminate)
    try:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the caller (`>&-`)
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
        sys.stderr = _Unread(sys.stderr)
        main(parser.parse_args())
        sys.stdout.flush()
        code = 0
    except UsageError as error:
        code = _fail(error, 2)
    except BrokenPipeError:  # of stdout: `| head` has read enough
        _close_stdout()
        code = 0
    except OSError as error:
        code = _fail(_os_error(error), 1)
    except (RunError, MemoryError) as error:
        code = _fail(str(error) or "out of memory: use a smaller --batch-size", 1)
    except ModuleNotFoundError as error:
        code = _fail(f"{error.name} is not installed: pip install -r requirements.txt", 1)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except Interrupted as error:
        code = _fail(error, 128 + error.signum)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            code = _fail("out of memory on the device: use a smaller --batch-size", 1)
        elif str(error).startswith("DataLoader worker"):
            code = _fail(
                "a process that loads pictures was killed, most often for lack of memory or of "
                "/dev/shm: use a smaller --workers (0 loads in the main process)", 1,
            )  # fmt: skip
        else:
            raise
    if code > 128:
        # Nobody who interrupts waits for threads at work, nor for a runtime to be taken down, which
        # has been seen to hang then.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


class _Unread:
    """A text stream that may break: its reader may leave, or its disk be full. What comes after is
    lost, the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    while frame:
        # An error that meets C++ while it is imported aborts the process with a message of its own.
        if "importlib" in frame.f_code.co_filename:
            os._exit(_fail("terminated", 128 + signum))
        frame = frame.f_back
    raise Interrupted(signum, "terminated")


def _fail(message: object, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _os_error(error: OSError) -> str:
    if error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # An exception from a DataLoader worker arrives with the worker's traceback around it.
    return str(error).strip().rpartition("\n")[2].removeprefix("image.ImageError: ")

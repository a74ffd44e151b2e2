"""The command line: options, notices, exit codes."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import cli


@pytest.fixture(autouse=True)
def _signals():
    """What `cli.run` does with signals ends with the test."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def parse(*words):
    parser = cli.Parser()
    cli.add_switch(parser, "freeze-layers", "help")
    parser.add_argument("--device", **cli.DEVICE)
    parser.add_argument("--lr", type=cli.number(float, 0, 10), default=0.01)
    parser.add_argument("--epochs", type=cli.number(int, 1), default=3)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),
        (["--freeze-layers"], True),
        (["--freeze-layers", "True"], True),
        (["--freeze-layers", "False"], False),
        (["--freeze-layers=false"], False),
        (["--no-freeze-layers"], False),
        (["--freeze-layers", "--no-freeze-layers"], False),
    ],
)
def test_a_switch_means_what_it_says(words, value):
    assert parse(*words).freeze_layers is value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--freeze-layers", "maybe"], "'maybe' is neither true nor false"),
        (["--lr", "-1"], "'-1' is no float from 0 to 10"),
        (["--lr", "nan"], "'nan' is no float"),
        (["--lr", "11"], "'11' is no float from 0 to 10"),
        (["--lr", "fast"], "'fast' is no float"),
        (["--epochs", "0"], "'0' is no int from 1"),
        (["--epochs", "1.5"], "'1.5' is no int"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["a\x1b[31m\nb"], r"a\x1b[31m\nb"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: parse(*words))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err


def test_help_prints_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "(default: auto)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (cli.UsageError("no such thing"), 2, "error: no such thing\n"),
        (cli.RunError("it broke\nbadly"), 1, r"error: it broke\nbadly" + "\n"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: No space left on device: a/b\n"),
        (MemoryError(), 1, "error: use a smaller --batch-size: out of memory\n"),
        (RuntimeError("DataLoader worker (pid 1) is killed"), 1, "error: use a smaller --workers"),
        (ModuleNotFoundError(name="x"), 1, "error: pip install -r requirements.txt: x is not"),
    ],
)
def test_errors_become_one_line_and_their_exit_code(error, code, line, capsys):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == bool(error)


def test_a_bug_shows_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def run(code, **options):
    """Start Python on code in which main is to be defined."""
    command = [sys.executable, "-c", f"import os, sys, time, cli\n{code}\ncli.run(main)"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "termi")],
)
def test_a_signal_ends_everything_at_once_in_one_line(signum, code, word):
    """Also while a thread works, and with a child that takes no notice."""
    process = run(
        """
import multiprocessing, signal, threading

def sleep():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)

def main():
    threading.Thread(target=time.sleep, args=[60]).start()
    child = multiprocessing.get_context("fork").Process(target=sleep)
    child.start()
    cli.say(child.pid)
    time.sleep(60)
""",
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)  # until the child, too, has closed its streams
    assert process.returncode == code
    assert err.startswith(f"error: {word}")
    assert err.count("\n") == 1


def test_a_reader_that_leaves_ends_the_work_in_peace():
    process = run(
        "def main():\n    for line in range(10**5): cli.say(line)", stdout=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 0


def test_a_pipe_that_lacks_letters_gets_escapes():
    process = run(
        "def main():\n    cli.say('向日葵')",
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "\\u5411\\u65e5\\u8475\n", "")


def test_printable_leaves_letters_and_escapes_the_rest():
    assert cli.printable("Tulpe gelb 郁金香") == "Tulpe gelb 郁金香"
    assert cli.printable("a\nb\x1b[2J\u202e\udcff") == r"a\nb\x1b[2J\u202e\udcff"


def test_the_quota_of_a_container_bounds_the_cores(monkeypatch):
    for text, count in (("150000 100000", 2), ("max 100000", 8), ("50000 100000", 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
        monkeypatch.setattr(cli.Path, "read_text", lambda path, text=text: text)
        assert cli.cores() == count


def test_runs_have_folders_of_their_own_and_the_newest_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError, match=r"^run train.py first, .* no runs/\*/best.pth here"):
        cli.require_weights(None)
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pth").touch()
        os.utime(tmp_path / "runs" / name / "best.pth", (1000 - age, 1000 - age))
    assert cli.require_weights(None) == cli.Path("runs/b/best.pth")

    first, second = cli.make_folder(None, "x"), cli.make_folder(None, "x")
    assert first.is_dir()
    assert second.is_dir()
    assert first != second
    (tmp_path / "file").touch()
    with pytest.raises(cli.UsageError, match="^name another --output-dir: file/below: Not a dir"):
        cli.make_folder("file/below", "x")

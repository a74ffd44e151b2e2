"""The command line: options, notices, exit codes."""

import argparse
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import cli


def parse(*words):
    parser = cli.Parser()
    cli.add_switch(parser, "freeze-layers", False, "help")
    cli.add_device(parser)
    parser.add_argument("--lr", type=cli.number(float, 0, 10, above=True), default=0.01)
    parser.add_argument("--epochs", type=cli.number(int, 1), default=3)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),
        (["--freeze-layers"], True),
        (["--freeze-layers", "True"], True),
        (["--freeze-layers", "true"], True),
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
        (["--lr", "0"], "0 must be greater than 0"),
        (["--lr", "nan"], "nan must be"),
        (["--lr", "11"], "at most 10"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--epochs", "0"], "0 must be at least 1"),
        (["--epochs", "1.5"], "'1.5' is not a number"),
        (["--device", "gpu"], "'gpu' is none of"),
        (["--device", "cuda:x"], "'cuda:x' is none of"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["a\x1b[31m\nb"], r"a\x1b[31m\nb"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(argparse.ArgumentParser(), lambda args: parse(*words))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_given_names_what_was_typed_even_where_it_is_the_default():
    assert parse().given == set()
    assert parse("--lr", "0.01", "--no-freeze-layers").given == {"lr", "freeze_layers"}


def test_saved_options_are_those_of_the_command_line():
    parser = cli.Parser()
    cli.add_switch(parser, "freeze-layers", False, "help")
    cli.add_amp(parser)
    parser.add_argument("--lr", type=cli.number(float, 0, 10, above=True), default=0.01)
    parser.add_argument("--data-path", default="x")
    for words in (
        [],
        ["--lr=0.1", "--amp", "--data-path=-- a\nb"],
        ["--freeze-layers", "--no-amp"],
    ):
        typed = parser.parse_args(words)
        saved = {name: value for name, value in vars(typed).items() if name != "given"}
        again = vars(cli.parse_saved(parser, saved, "f"))
        assert {name: again[name] for name in saved} == saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"lr": 0.0}, "f: its options are not those of a run: argument --lr: 0.0 must be greater"),
        ({"lr": 10**5000}, "f: its options are not those of a run"),
        ({"lr": [0.1]}, r"not those of a run: 'lr' is \[0.1\]"),
        ({"help": True}, "not those of a run: 'help' is True"),
        ({5: 5}, "not those of a run: 5 is 5"),
        ({"device": "x" * 10_000}, "^f.{200,300}$"),
        (None, "not those of a run: 'args' is None"),
    ],
)
def test_saved_options_are_data(saved, message):
    parser = cli.Parser()
    cli.add_device(parser)
    parser.add_argument("--lr", type=cli.number(float, 0, 10, above=True), default=0.01)
    with pytest.raises(cli.UsageError, match=message):
        cli.parse_saved(parser, saved, "f")


def test_help_prints_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "(default: auto)" in capsys.readouterr().out


def leave(error):
    def main(args):
        if error:
            raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(argparse.ArgumentParser(), main)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (cli.UsageError("no such thing"), 2, "error: no such thing\n"),
        (cli.RunError("it broke\nbadly"), 1, r"error: it broke\nbadly" + "\n"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: No space left on device: a/b\n"),
        (MemoryError(), 1, "error: out of memory: use a smaller --batch-size\n"),
        (RuntimeError("DataLoader worker (pid 1) is killed"), 1, None),
    ],
)
def test_errors_become_one_line_and_their_exit_code(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    assert leave(error) == code
    err = capsys.readouterr().err
    if line is None:
        assert "--workers" in err
        assert err.count("\n") == 1
    else:
        assert err == line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("KeyboardInterrupt", 130, "error: interrupted\n"),
        ("cli.Interrupted(15, 'terminated')", 143, "error: terminated\n"),
    ],
)
def test_an_interrupted_script_waits_for_no_thread(error, code, line):
    script = f"""
import argparse, threading, time, cli
def main(args):
    threading.Thread(target=time.sleep, args=[60]).start()
    print("so far", end="")
    raise {error}
cli.run(argparse.ArgumentParser(), main)
"""
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (code, "so far", line)


@pytest.mark.parametrize(("stream", "code"), [("stdout", 0), ("stderr", 1)])
def test_a_reader_that_leaves_hides_no_failure(stream, code):
    """Of stdout, it ends the work; of stderr, the work goes on and its own end counts."""
    script = """
import argparse, sys, cli
def main(args):
    sys.stdin.read()
    for line in range(3):
        cli.notice("working")
        print("working", file=sys.stderr)
    print("result", flush=True)
    raise cli.RunError("it failed")
cli.run(argparse.ArgumentParser(), main)
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes)
    getattr(process, stream).close()
    process.stdin.close()
    out = process.stdout.read() if stream == "stderr" else b""
    assert process.wait(timeout=30) == code
    assert out == (b"result\n" if stream == "stderr" else b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_below_stderr_ends_no_work():
    script = """
import argparse, cli
cli.run(argparse.ArgumentParser(), lambda args: [cli.notice("working"), print("result")])
"""
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", script]
        result = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, timeout=30)
    assert (result.returncode, result.stdout) == (0, b"result\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_nowhere(closed, tmp_path):
    script = """
import argparse, os, sys, cli
def main(args):
    with open("x", "w") as file:
        cli.notice("no result")
        os.system("echo from below; echo from below >&2")
        print("result")
cli.run(argparse.ArgumentParser(), main)
"""
    command = f'"{sys.executable}" -c "$0" {closed}'
    result = subprocess.run(
        ["bash", "-c", command, script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert result.returncode == 0
    assert (tmp_path / "x").read_bytes() == b""
    assert "no result" not in result.stdout


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script"])

    def main(args):
        import no_such_package

        return no_such_package

    with pytest.raises(SystemExit) as info:
        cli.run(argparse.ArgumentParser(), main)
    assert info.value.code == 1
    expected = "error: no_such_package is not installed: pip install -r requirements.txt\n"
    assert capsys.readouterr().err == expected


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(
            argparse.ArgumentParser(), lambda args: (_ for _ in ()).throw(RuntimeError("a bug"))
        )


def test_printable_leaves_letters_and_escapes_the_rest():
    assert cli.printable("Tulpe gelb 郁金香") == "Tulpe gelb 郁金香"
    assert cli.printable("a\nb\x1b[2J\u202e\udcff") == r"a\nb\x1b[2J\u202e\udcff"


def test_newest_run_and_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError, match=r"no runs/\*/best.pth here; run train.py first"):
        cli.newest_run("best.pth")
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pth").touch()
        os.utime(tmp_path / "runs" / name / "best.pth", (1000 - age, 1000 - age))
    assert str(cli.newest_run("best.pth")) == os.path.join("runs", "b", "best.pth")

    first = cli.fresh_folder("x")
    assert first.is_dir()
    assert cli.fresh_folder("x") != first

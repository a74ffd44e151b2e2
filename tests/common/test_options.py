"""The command line: options, notices, exit codes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import train
from shufflenet.common import messages, options


def leave(main):
    """The exit code of a script; the process is left as it was."""
    handlers = {number: signal.getsignal(number) for number in (2, 15)}
    with pytest.raises(SystemExit) as stop:
        options.run_script(main)
    assert handlers == {number: signal.getsignal(number) for number in (2, 15)}
    return stop.value.code


SWITCHES = {"": False, "--freeze-layers": True, "--freeze-layers True": True}
SWITCHES |= {"--freeze-layers=false": False, "--freeze-layers --no-freeze-layers": False}


@pytest.mark.parametrize(("words", "value"), SWITCHES.items())
def test_a_switch_means_what_it_says(words, value):
    args = train.build_parser().parse_args(words.split())
    assert args.freeze_layers is value
    assert args.words == words.split()


MISTAKES = {
    "--freeze-layers maybe": "'maybe' is neither true nor false (see --help)",
    "--lr 0": "argument --lr: '0' is not a number from 1e-30 to 1e+09 (see --help)",
    "--lr nan": "'nan' is not a number from 1e-30 to 1e+09 (see --help)",
    "--epochs 1.5": "'1.5' is not a whole number from 1 to 1e+09 (see --help)",
    "--num_classes 5": "--num-classes: the folders, or the weights, tell the classes; omit it",
    "--zzz": "unrecognized arguments: --zzz (see --help)",
    "my_images": "my_images stands alone: write --data-path my_images",
    "--é郁\n\x1b[2J\u2028\u202e\udcff": r": --é郁\n\x1b[2J\u2028\u202e\udcff (see --help)",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items())
def test_a_mistake_is_one_line_and_exit_code_2(capsys, words, message):
    assert leave(lambda: train.main(words.split(" "))) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
    assert err.endswith(f"{message}\n")


OUTCOMES = [
    (messages.UsageError("no such thing"), 2, "error: no such thing\n"),
    (messages.RunError("it broke\nbadly"), 1, "error: it broke\\nbadly\n"),
    (OSError(28, "No space left on device", "a/b"), 1, "error: No space left on device: a/b\n"),
    (RuntimeError("can't allocate memory"), 1, "error: out of memory: use a smaller"),
    (MemoryError(), 1, "error: out of memory: use a smaller --batch-size or fewer --workers\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (
        ImportError("no tqdm", name="tqdm"),
        2,
        "error: no tqdm: run pip install -r requirements.txt\n",
    ),
    (
        ImportError("no", name="openvino"),
        2,
        "error: no: run pip install -r requirements-deploy.txt\n",
    ),
]


@pytest.mark.parametrize(("error", "code", "line"), OUTCOMES)
def test_errors_become_one_line_and_their_exit_code(capsys, error, code, line):
    assert leave(lambda: (_ for _ in ()).throw(error)) == code
    out, err = capsys.readouterr()
    assert (out, err[: len(line)], err.count("\n")) == ("", line, 1)


def test_progress_in_a_log_is_a_line_every_ten_seconds(capsys, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(messages.time, "monotonic", lambda: next(clock))
    assert list(messages.progress(iter(range(11)), "reading", 11)) == list(range(11))
    assert capsys.readouterr().err == "reading: 3 of 11\nreading: 7 of 11\n"


def run(code, **options):
    imports = "from shufflenet.common.messages import notice, say\n"
    imports += "from shufflenet.common.options import run_script\n"
    words = [sys.executable, "-c", f"{imports}{code}\nrun_script(main)"]
    return subprocess.Popen(words, cwd=ROOT, stdout=-1, stderr=-1, **options)


BUSY = """
import signal, time
from shufflenet.reading.ahead import ahead
signal.signal(2, signal.default_int_handler)  # whoever started this may ignore it
def main():
    for _ in ahead(time.sleep, [0.1] * 1000, 2):
        say("busy")
"""


@pytest.mark.parametrize(("signum", "word"), [(2, b"interrupted"), (15, b"terminated")])
def test_a_signal_ends_the_process_and_its_threads_at_once_in_one_line(signum, word):
    with run(BUSY) as process:
        assert process.stdout.readline() == b"busy\n"
        process.send_signal(signum)
        assert process.communicate(timeout=30)[1] == b"error: " + word + b"\n"
    assert process.returncode == 128 + signum


GUEST = """
import cProfile, io, sys, threading
from shufflenet.common.options import run_script
sys.stdout = io.StringIO()  # as a notebook's, which cannot be reconfigured
profile = cProfile.Profile()
profile.runcall(run_script, lambda: print("result"))  # returns
thread = threading.Thread(target=run_script, args=[lambda: print("again")])
thread.start(), thread.join()
profile.create_stats()
sys.__stdout__.write(sys.stdout.getvalue() + str(len(profile.stats) > 1))
main = lambda: None
"""


def test_a_script_is_a_guest_in_a_notebook_a_thread_or_a_profiler():
    with run(GUEST) as process:
        assert process.communicate(timeout=30) == (b"result\nagain\nTrue", b"")
    assert process.returncode == 0


def test_with_stderr_closed_only_results_are_on_stdout():
    code = "main = lambda: (notice('a notice'), say('a result'))"
    with run(code, preexec_fn=lambda: os.close(2)) as process:
        assert process.communicate(timeout=30) == (b"a result\n", b"")
    assert process.returncode == 0


def test_with_stdout_closed_the_work_is_done_all_the_same():
    code = "from shufflenet.common.messages import say_json\nmain = lambda: say_json({'a': 1})"
    with run(code, preexec_fn=lambda: os.close(1)) as process:
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0


def test_letters_that_a_pipe_lacks_are_escaped():
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    with run("main = lambda: (say('ä 郁'), notice('ä 郁'))", env=environment) as process:
        assert process.communicate(timeout=30) == (b"\xe4 \\u90c1\n", b"\xe4 \\u90c1\n")
    assert process.returncode == 0


def test_a_reader_that_leaves_ends_the_work_without_a_word_and_a_bug_shows_its_traceback():
    with run("main = lambda: [say(line) for line in iter(int, 1)]") as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    with run("main = lambda: 1 / 0") as process:
        assert process.communicate(timeout=30)[1].endswith(b"ZeroDivisionError: division by zero\n")


def test_cores_are_those_of_the_affinity_and_of_the_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for quota, count in (("150000 100000\n", 2), ("max 100000\n", 64), ("", 64)):
        files = {Path("/sys/fs/cgroup/cpu.max"): quota}
        monkeypatch.setattr(Path, "read_text", lambda path, files=files: files[path])
        assert options.cores() == count


def test_newest_run_and_fresh_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(messages.UsageError, match=r"^no runs/\*/best.pth here: run train.py first"):
        options.newest_run("best.pth")
    for age, name in enumerate(("b", "c", "a")):
        path = options.make_folder(f"runs/{name}", "") / "best.pth"
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert (
        options.newest_run("best.pth") == options.require_weights(None) == Path("runs/b/best.pth")
    )
    assert len({options.make_folder(None, "x") for _ in range(3)}) == 3
    with pytest.raises(
        messages.UsageError, match="^--output-dir runs/b/best.pth/x: .*; name another"
    ):
        options.make_folder("runs/b/best.pth/x", "")

"""Files that are there whole or not at all, and the lock of a folder."""

import csv
import errno
import fcntl
import json
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from shufflenet.common.files import UTF8, if_possible, locked, replacing, save_json, save_rows
from shufflenet.common.messages import UsageError


@pytest.fixture
def path(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    return tmp_path / "x"


def test_a_file_takes_its_name_when_it_is_on_the_disk(path, monkeypatch):
    did = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=real: (did.append(n), f(*args)))
    (link := path.with_name("link")).symlink_to("x")
    with replacing(link) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), os.readlink(link)) == (b"new", "x")
    assert did == ["fsync", "replace"]  # the file, then its name


@pytest.mark.parametrize("error", [TypeError, OSError])
def test_what_fails_while_it_is_written_leaves_the_file_before(path, error):
    """Of a full disk, for which the limit on the size of files stands, the message says where."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(error) as caught:
            save_json(["x" * 100_000 if error is OSError else object()], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error is TypeError or caught.value.filename == str(path)
    assert (path.read_bytes(), os.listdir(path.parent)) == (b"old", ["x"])


@pytest.mark.parametrize("system", ["nt", "posix"])
def test_a_file_that_is_open_elsewhere_under_windows(path, monkeypatch, capsys, system):
    """A scanner lets go at once, a spreadsheet does not; a table is then left as it was."""
    replace, refusals = os.replace, ["the scanner"]

    def refuse(*names):
        if refusals:
            refusals.pop()
            raise PermissionError(13, "Permission denied")
        replace(*names)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("shufflenet.common.files.WINDOWS", system == "nt")
    with if_possible():
        save_json(1, path)
    assert path.read_text() == {"nt": "1\n", "posix": "old"}[system]
    refusals += ["the spreadsheet"] * 99
    with if_possible():
        save_json(2, path)
    assert f"{path} stays as it was: Permission denied" in capsys.readouterr().err
    assert os.listdir(path.parent) == ["x"]


HOLD = """
import pathlib, sys
from shufflenet.common import files
with files.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_until_its_process_ends_however_it_does(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"a run writes to {tmp_path}"), locked(tmp_path):
            pass
        other.kill()
    (tmp_path / ".best.pth.123.tmp").write_bytes(b"half")  # as a kill in a write leaves it
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_where_nothing_can_be_locked_a_notice_says_so(tmp_path, monkeypatch, capsys):
    """As on Lustre, some NFS and FUSE."""
    error = OSError(errno.ENOSYS, "not there")
    monkeypatch.setattr(fcntl, "lockf", lambda *args: (_ for _ in ()).throw(error))
    with locked(tmp_path):
        said = f"{tmp_path} cannot be locked (not there): start no second run there\n"
        assert capsys.readouterr().err == said


def test_json_and_tables_keep_any_name_and_value(path):
    name = 'line\nbreak, "quote" ; 郁金香 ' + os.fsdecode(b"\xff")
    save_json([1, None, name], path)
    assert json.loads(path.read_bytes()) == [1, None, name]
    for rows in ([{"class": name, "loss": 0.1}, {"class": "=1+1", "loss": None}], []):
        save_rows(rows, path)
        with open(path, **UTF8) as file:
            found = list(csv.reader(file))
        assert found == ([["class", "loss"], [name, "0.1"], ["=1+1", ""]] if rows else [])


def test_rows_with_other_keys_stand_under_their_own_header(tmp_path):
    save_rows([{"a": 1, "b": 2}, {"a": 3, "c": 4, "b": 5}], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().split() == ["a,b,c", "1,2,", "3,5,4"]

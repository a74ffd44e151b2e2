"""The download of flower_photos, of a small archive from this machine."""

import hashlib
import io
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shufflenet.common.messages import RunError, UsageError
from shufflenet.reading import download

FILES = {
    "flower_photos/LICENSE.txt": b"CC BY 2.0",
    "flower_photos/daisy/1.jpg": np.random.default_rng(0).bytes(60_000),
    "flower_photos/roses/2.jpg": np.random.default_rng(1).bytes(60_000),
}
NOWHERE = "http://127.0.0.1:9/flower_photos.tgz"


def archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


GOOD = archive()
HASH = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "flower_photos.tgz"
    path.write_bytes(GOOD)
    return path.as_uri()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def contents(root):
    """The bytes of every file under root by its path there."""
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """What train.py does for the --data-path data/flowers, of an address, expecting a sha256."""
    monkeypatch.chdir(tmp_path)

    def fetch(url, sha256=HASH):
        flowers = partial(download.download_flower_photos, url=url, sha256=sha256)
        monkeypatch.setitem(download.DATASETS, "data/flowers", flowers)
        return download.prepare_data("data/flowers")

    return fetch


@pytest.mark.parametrize("before", [[], ["flowers"]])
def test_the_archive_becomes_the_folder_and_nothing_else_is_left(
    fetch, tmp_path, url, capsys, before
):
    """Where there is nothing, or an empty folder."""
    for name in before:
        (tmp_path / "data" / name).mkdir(parents=True)
    target = fetch(url)
    names = {name.replace("flower_photos", "data/flowers"): data for name, data in FILES.items()}
    assert contents(tmp_path) == names
    assert os.listdir(tmp_path / "data") == ["flowers"]
    assert f"{target} is not there: downloading {url}" in capsys.readouterr().err
    (target / "LICENSE.txt").write_bytes(b"mine")
    fetch(NOWHERE)  # the folder is left alone
    assert contents(target)["LICENSE.txt"] == b"mine"


def test_other_bytes_than_expected_are_not_kept(fetch, tmp_path, url):
    with pytest.raises(RunError, match=f'{url} .*expected "0{HASH}", got "{HASH}".*: fetch it'):
        fetch(url, f"0{HASH}")
    assert os.listdir(tmp_path / "data") == []


def test_without_network_one_line_says_what_to_put_where_and_that_is_checked(fetch, tmp_path):
    place = Path("data", "flowers.tgz")
    said = f"^{NOWHERE} cannot be had .*refused.*: fetch it and put it at {place}, or name another"
    with pytest.raises(RunError, match=said):
        fetch(NOWHERE)
    assert os.listdir(tmp_path / "data") == []
    place.write_bytes(GOOD[:-1])
    with pytest.raises(RunError, match=f"^{place}: its sha256 is .*; delete it, fetch it again"):
        fetch(NOWHERE)
    place.write_bytes(GOOD)
    fetch(NOWHERE)
    assert sorted(os.listdir(tmp_path / "data")) == ["flowers", "flowers.tgz"]


def test_two_first_starts_at_once_leave_one_whole_data_set(fetch, tmp_path, url, monkeypatch):
    """The second begins while the first unpacks, and ends first."""
    unpack, starts = shutil.unpack_archive, []

    def unpack_twice(archive, folder):
        starts.append(folder)
        if len(starts) == 1:
            fetch(url)
        unpack(archive, folder)

    monkeypatch.setattr(shutil, "unpack_archive", unpack_twice)
    target = fetch(url)
    assert len(set(starts)) == 2
    assert len(contents(target)) == len(FILES)
    assert os.listdir(tmp_path / "data") == ["flowers"]


def test_a_place_that_cannot_be_written_is_one_line(fetch, tmp_path, url):
    (tmp_path / "data").touch()
    with pytest.raises(UsageError, match="data/flowers cannot be made .*: name a folder of images"):
        fetch(url)


def test_any_other_path_has_to_be_a_folder(tmp_path):
    assert download.prepare_data(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="^--data-path nowhere: no such folder; name that of the"):
        download.prepare_data("nowhere")

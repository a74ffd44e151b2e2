"""The download of flower_photos, of a small archive from this machine."""

import hashlib
import io
import os
import tarfile

import numpy as np
import pytest

from cli import RunError
from flower_photos import download_flower_photos

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


@pytest.mark.parametrize("before", [[], ["flowers"], [".flowers/half"]])
def test_the_archive_becomes_the_folder_and_nothing_else_is_left(tmp_path, url, capsys, before):
    """Where there is nothing, an empty folder, or what a kill while unpacking left."""
    for name in before:
        (tmp_path / "data" / name).mkdir(parents=True)
    target = tmp_path / "data/flowers"
    download_flower_photos(target, url, HASH)
    names = {name.replace("flower_photos", "data/flowers"): data for name, data in FILES.items()}
    assert contents(tmp_path) == names
    assert os.listdir(tmp_path / "data") == ["flowers"]
    assert f"{target} is not there: downloading {url}" in capsys.readouterr().err
    (target / "LICENSE.txt").write_bytes(b"mine")
    download_flower_photos(target, NOWHERE, HASH)  # which is left alone
    assert contents(target)["LICENSE.txt"] == b"mine"


def test_other_bytes_than_expected_are_not_kept(tmp_path, url):
    with pytest.raises(RunError, match=f'fetch {url} .*expected "0{HASH}", got "{HASH}"'):
        download_flower_photos(tmp_path / "flowers", url, f"0{HASH}")
    assert os.listdir(tmp_path) == []


def test_without_network_one_line_says_what_to_put_where_and_that_is_checked(tmp_path):
    place = tmp_path / "flowers.tgz"
    with pytest.raises(RunError, match=f"^fetch {NOWHERE} and put it at {place}, .*refused"):
        download_flower_photos(tmp_path / "flowers", NOWHERE, HASH)
    assert os.listdir(tmp_path) == []
    place.write_bytes(GOOD[:-1])
    with pytest.raises(RunError, match=f"^delete {place} and fetch it again: its sha256 is "):
        download_flower_photos(tmp_path / "flowers", NOWHERE, HASH)
    place.write_bytes(GOOD)
    download_flower_photos(tmp_path / "flowers", NOWHERE, HASH)
    assert os.listdir(tmp_path) == ["flowers"]

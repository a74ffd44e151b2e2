"""The download of flower_photos, from a server on this machine."""

import functools
import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

import flower_photos
from cli import RunError
from flower_photos import SHA256, SIZE, TRIES, URL, download_flower_photos

FILES = {
    "flower_photos/LICENSE.txt": b"CC BY 2.0",
    "flower_photos/daisy/1.jpg": np.random.default_rng(0).bytes(60_000),
    "flower_photos/roses/2.jpg": np.random.default_rng(1).bytes(60_000),
}


def archive(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """Return a gzipped tar archive of symbolic links (name to target) and, after them, files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


GOOD = archive(FILES)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(flower_photos, "PAUSE", 0)


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves bytes and returns their URL and the list of requests.

    `sends` says how many bytes of each answer come before the connection breaks; those after the
    last are complete. The list gets the Range header of each request, None where there is none.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(data: bytes, *, sends=(), ranges=True, status=200) -> tuple[str, list[str | None]]:
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
                begin = begin if ranges else 0
                send = sends[len(requests)] if len(requests) < len(sends) else len(data)
                requests.append(asked)
                self.send_response(206 if begin and status == 200 else status)
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                self.wfile.write(data[begin : begin + send])

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=functools.partial(server.serve_forever, 0.01)).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/flower_photos.tgz", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def download(target: Path, url: str, data: bytes = GOOD) -> Path:
    """Download what should be `data`."""
    return download_flower_photos(target, url, len(data), hashlib.sha256(data).hexdigest())


def contents(root: Path) -> dict[str, bytes]:
    """Return the bytes of every file under root by its path there."""
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_the_defaults_are_the_published_archive():
    assert URL.endswith("/download.tensorflow.org/example_images/flower_photos.tgz")
    assert SIZE == 228_813_984
    assert SHA256 == "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"


def test_the_archive_becomes_the_folder_and_nothing_else_is_left(tmp_path, serve, capsys):
    url, requests = serve(GOOD)
    target = tmp_path / "data" / "flowers"
    assert download(target, url) == target
    assert contents(tmp_path) == {
        name.replace("flower_photos", "data/flowers"): data for name, data in FILES.items()
    }
    assert os.listdir(tmp_path / "data") == ["flowers"]
    assert requests == [None]
    progress = capsys.readouterr().err
    assert f"{target} is not there: downloading {url}" in progress
    assert "120k/120k" in progress  # the bar counts bytes


def test_a_folder_that_is_there_is_not_downloaded_again(tmp_path, serve):
    url, requests = serve(GOOD)
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers/mine.txt").write_text("mine")
    assert download(tmp_path / "flowers", str(url)) == tmp_path / "flowers"
    assert requests == []
    assert contents(tmp_path) == {"flowers/mine.txt": b"mine"}


@pytest.mark.parametrize("other", [GOOD[:-1] + b"x", GOOD + b"x"])
def test_other_bytes_than_expected_are_not_kept(tmp_path, serve, other):
    url, _ = serve(other)
    with pytest.raises(RunError, match=hashlib.sha256(other).hexdigest()) as caught:
        download(tmp_path / "flowers", url)
    assert hashlib.sha256(GOOD).hexdigest() in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_broken_connection_goes_on_where_it_stopped(tmp_path, serve, capsys):
    url, requests = serve(GOOD, sends=[50_000, 30_000])
    download(tmp_path / "flowers", url)
    assert requests == [None, "bytes=50000-", "bytes=80000-"]
    assert contents(tmp_path / "flowers")["roses/2.jpg"] == FILES["flower_photos/roses/2.jpg"]
    assert os.listdir(tmp_path) == ["flowers"]
    assert f"try 2 of {TRIES}" in capsys.readouterr().err


def test_a_server_without_ranges_is_asked_again_for_all(tmp_path, serve):
    url, requests = serve(GOOD, sends=[50_000], ranges=False)
    download(tmp_path / "flowers", url)
    assert requests == [None, "bytes=50000-"]
    assert contents(tmp_path / "flowers")["roses/2.jpg"] == FILES["flower_photos/roses/2.jpg"]


def test_a_download_cut_too_often_is_finished_by_the_next_call(tmp_path, serve):
    url, requests = serve(GOOD, sends=[1000] * TRIES)
    with pytest.raises(RunError, match=r"cannot download http://127.*--data-path sample"):
        download(tmp_path / "flowers", url)
    assert len(requests) == TRIES
    assert not (tmp_path / "flowers").exists()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [1000 * TRIES]

    download(tmp_path / "flowers", url)
    assert requests[TRIES:] == [f"bytes={1000 * TRIES}-"]
    assert os.listdir(tmp_path) == ["flowers"]
    assert contents(tmp_path / "flowers")["daisy/1.jpg"] == FILES["flower_photos/daisy/1.jpg"]


def test_a_complete_download_left_by_an_earlier_call_is_unpacked_without_the_network(
    tmp_path, serve
):
    url, requests = serve(GOOD, sends=[len(GOOD) - 1, 0, 0, 0])
    with pytest.raises(RunError):
        download(tmp_path / "flowers", url)
    (part,) = tmp_path.iterdir()
    part.write_bytes(GOOD)
    requests.clear()
    download(tmp_path / "flowers", url)
    assert requests == []
    assert os.listdir(tmp_path) == ["flowers"]


def test_without_network_one_line_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}/flower_photos.tgz"
    with pytest.raises(RunError) as caught:
        download(tmp_path / "flowers", url)
    message = str(caught.value)
    assert f"cannot download {url}" in message
    assert "refused" in message
    assert f"{tmp_path}/flowers/daisy" in message
    assert "\n" not in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("status", "words", "tries"), [(404, "Not Found", 1), (503, "", TRIES)])
def test_a_server_that_refuses_is_asked_once_a_failing_one_again(
    tmp_path, serve, status, words, tries
):
    url, requests = serve(b"no such file", status=status)
    with pytest.raises(RunError, match=f"cannot download {url}.*{words}"):
        download(tmp_path / "flowers", url)
    assert len(requests) == tries
    assert os.listdir(tmp_path) == []


def test_a_part_that_is_no_part_of_the_file_is_dropped(tmp_path, serve):
    (tmp_path / "flowers.tgz.part").write_bytes(b"something else")
    url, _ = serve(b"", status=416)
    with pytest.raises(RunError, match="cannot download"):
        download(tmp_path / "flowers", url)
    assert os.listdir(tmp_path) == []


def escaping(outside: Path) -> dict[str, bytes]:
    """Return archives that would write to `outside`, or let a later member do so."""
    return {
        "dots": archive({**FILES, "flower_photos/../../outside/evil.txt": b"evil"}),
        "absolute": archive({**FILES, f"{outside}/evil.txt": b"evil"}),
        "link": archive(FILES, links={"flower_photos/link": "../../outside"}),
        "absolute link": archive(FILES, links={"flower_photos/link": str(outside)}),
        "through a link": archive(
            {**FILES, "flower_photos/link/evil.txt": b"evil"},
            links={"flower_photos/link": "../../outside"},
        ),
    }


@pytest.mark.parametrize("python", ["this Python", "before 3.11.4"])
@pytest.mark.parametrize("how", escaping(Path("/")))
def test_an_archive_that_reaches_outside_is_refused(tmp_path, serve, monkeypatch, how, python):
    if python == "before 3.11.4":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "outside").mkdir()
    data = escaping(tmp_path / "outside")[how]
    url, _ = serve(data)
    with pytest.raises(RunError):
        download(tmp_path / "data/flowers", url, data)
    assert os.listdir(tmp_path / "outside") == []
    assert not list(tmp_path.rglob("evil.txt"))
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


BAD = {
    "cut": GOOD[:60_000],
    "overwritten": GOOD[:40_000] + b"\xff" * 40_000 + GOOD[80_000:],
    "no archive": b"<html>please sign in</html>",
    "empty": archive({}),
    "two folders": archive({"one/a.txt": b"a", "two/a.txt": b"a"}),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_an_archive_that_cannot_be_used_leaves_nothing_to_trip_over(tmp_path, serve, data):
    url, _ = serve(data)
    with pytest.raises(RunError, match="flowers"):
        download(tmp_path / "flowers", url, data)
    assert os.listdir(tmp_path) == []

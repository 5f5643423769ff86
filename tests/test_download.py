"""Downloads of archives, from a server of our own that can behave badly."""

import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
from tiny_archives import tiny_archive

from hsee_jax import cli
from hsee_jax.core.errors import UserError
from hsee_jax.data import archives
from hsee_jax.data import download as downloads

CONTENT = bytes(range(256)) * 2000  # half a megabyte


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the server's content, or the part of it that is asked for."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers["Range"]))
        start = 0
        if self.headers["Range"] and server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        status = 416 if start >= len(server.content) else server.status
        if status != 200:
            self.send_error(status)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.send_header("Content-Encoding", "x-gzip")  # as some do: not to be undone
        self.end_headers()
        self.wfile.write(server.content[start : server.breaks_at])
        if server.stalls:
            time.sleep(1)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of an archive in one file, ``a.tar.gz``."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.status, server.requests = CONTENT, 200, []
        server.ranges, server.breaks_at, server.stalls = True, None, False
        server.url = f"http://127.0.0.1:{server.server_port}/data/"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive_at(url):
    md5 = {"a.tar.gz": hashlib.md5(CONTENT).hexdigest()}
    return archives.ARCHIVES["cifar10"]._replace(url=url, files=md5)


def download(server, folder):
    heard = []
    downloads.download_archive(
        archive_at(server.url), folder, lambda *progress: heard.append(progress)
    )
    return heard


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_download_is_checked_and_told_of(server, tmp_path):
    heard = download(server, tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder" / "a.tar.gz"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["a.tar.gz"]
    assert heard[-1] == ("a.tar.gz", len(CONTENT), len(CONTENT))
    assert server.requests == [("/data/a.tar.gz", None)]
    assert download(server, path.parent) == []  # it is there
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.breaks_at, server.ranges = 200_000, ranges
    with pytest.raises(UserError, match="it ended after 200000 of 512000") as error:
        download(server, tmp_path)
    assert "a.tar.gz.part is kept" in str(error.value)
    assert names(tmp_path) == ["a.tar.gz.part"]  # nothing that is taken for it
    server.breaks_at = None
    heard = download(server, tmp_path)
    assert server.requests[-1] == ("/data/a.tar.gz", "bytes=200000-")
    assert (heard[0][1] > 200_000) == ranges
    assert heard[-1][1:] == (len(CONTENT), len(CONTENT))
    assert (tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.tar.gz"]


def test_a_part_that_is_whole_is_only_checked(server, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT)
    assert download(server, tmp_path) == []
    assert (tmp_path / "a.tar.gz").read_bytes() == CONTENT


def test_wrong_content_is_refused_and_removed(server, tmp_path):
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match="not the published checksum"):
        download(server, tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "a.tar.gz.part").write_bytes(b"the start of something else")
    server.content = CONTENT
    with pytest.raises(UserError, match="not the published checksum"):
        download(server, tmp_path)
    download(server, tmp_path)
    assert names(tmp_path) == ["a.tar.gz"]


def test_a_server_that_falls_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_TIMEOUT_S", 0.2)
    server.breaks_at, server.stalls = 100_000, True
    with pytest.raises(UserError, match="timed out"):
        download(server, tmp_path)
    assert (tmp_path / "a.tar.gz.part").stat().st_size == 100_000


def test_an_error_of_the_server(tmp_path, server):
    server.status = 404
    with pytest.raises(UserError, match="Not Found"):
        download(server, tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_to(server):
    with pytest.raises(UserError, match="cannot be downloaded"):
        download(server, Path("/dev/null/folder"))


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_no_network_is_one_line_within_seconds(name, tmp_path, monkeypatch, capsys):
    """A port at which nobody listens; the line says which file to put where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    archive = archives.ARCHIVES[name]._replace(url=url)
    monkeypatch.setitem(archives.ARCHIVES, name, archive)
    start = time.perf_counter()
    assert cli.main(["data", name, "--data-dir", str(tmp_path)]) == 2
    assert time.perf_counter() - start < 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for part in ("refused", url, str(tmp_path), *archive.files):
        assert part in err
    assert names(tmp_path) == []


def test_the_command_downloads_once(server, tmp_path, monkeypatch, capsys):
    """A second call, and a call for the packaged dataset, ask no server."""
    archive, _ = tiny_archive("cifar10", tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    server.content = path.read_bytes()
    path.unlink()
    archive = archive._replace(url=server.url)
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", archive)
    what = "cifar10: 10 training and 4 test images of 32x32x3 in 10 classes, from"
    for how in ("downloaded", "there already"):
        assert cli.main(["data", "cifar10", "--data-dir", str(tmp_path)]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{how}: {what} {path}")
        assert out.count("\n") == 1
        assert err == ""
    assert len(server.requests) == 1
    assert cli.main(["data", "fashion_mnist_small"]) == 0
    assert "6,000 training" in capsys.readouterr().out

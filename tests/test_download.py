"""fetch_file and fetch_clip against a real HTTP server on this machine that misbehaves in the ways servers do."""

import hashlib
import http.server
import multiprocessing
import os
import resource
import threading
from pathlib import Path

import pytest

from checkpoints import download
from checkpoints.download import BASE_URL, OPENAI_CLIP, DownloadError, fetch_clip, fetch_file
from checkpoints.whole import file_sha256

CONTENT = bytes(range(256)) * 4000  # about 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        if server.refusal:
            self.send_error(server.refusal)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: server.cut])
        server.may_end.wait(10)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.content, running.cut, running.refusal, running.requests = CONTENT, None, None, []
    running.may_end = threading.Event()
    running.may_end.set()
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.may_end.set()
    running.shutdown()
    running.server_close()
    thread.join()


def fetch(server, target):
    return fetch_file(f"{server.url}/w.pt", SHA256, target)


def left_in(folder):
    """Names of all files but the lock, which some versions of filelock remove and others keep."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_fetches_once(server, tmp_path, capfd):
    target = tmp_path / "new" / "folder" / "w.pt"
    assert fetch(server, target) == target
    assert target.read_bytes() == CONTENT
    assert capfd.readouterr().err == f"downloading {server.url}/w.pt to {target}\n"
    assert fetch(server, target) == target
    assert server.requests == ["/w.pt"]
    assert left_in(target.parent) == ["w.pt"]


def test_a_cut_connection_puts_nothing_in_place_and_the_next_call_starts_over(server, tmp_path):
    server.cut = 300_000
    with pytest.raises(DownloadError, match="connection was cut.*try again"):
        fetch(server, tmp_path / "w.pt")
    assert left_in(tmp_path) == []
    server.cut = None
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SILENCE_S", 0.2)
    server.cut = 300_000
    server.may_end.clear()
    with pytest.raises(DownloadError, match="timed out.*under the name w.pt"):
        fetch(server, tmp_path / "w.pt")
    assert left_in(tmp_path) == []


def test_what_a_killed_process_left_is_removed(server, tmp_path):
    (tmp_path / "w.pt.0123abcd.partial").write_bytes(CONTENT[:1000])
    fetch(server, tmp_path / "w.pt")
    assert left_in(tmp_path) == ["w.pt"]


def test_a_file_that_the_server_does_not_have(server, tmp_path):
    server.refusal = 404
    with pytest.raises(DownloadError, match="404.*under the name w.pt"):
        fetch(server, tmp_path / "w.pt")


def test_a_wrong_file_is_never_put_in_place(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "w.pt")
    for part in (SHA256, hashlib.sha256(server.content).hexdigest(), "login page", "--cache_dir"):
        assert part in str(caught.value)
    assert left_in(tmp_path) == []


def test_a_wrong_file_in_the_cache_is_moved_aside_and_replaced(server, tmp_path, capfd):
    (tmp_path / "w.pt").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert (tmp_path / "w.pt.wrong").read_bytes() == CONTENT[:1000]
    said = capfd.readouterr().err
    for part in (SHA256, hashlib.sha256(CONTENT[:1000]).hexdigest(), str(tmp_path / "w.pt.wrong")):
        assert part in said


def test_a_file_put_there_by_hand_is_used_and_a_later_change_noticed(server, tmp_path):
    (tmp_path / "w.pt").write_bytes(CONTENT)
    fetch(server, tmp_path / "w.pt")
    assert server.requests == []
    assert os.listdir(tmp_path) == ["w.pt"]  # nothing is written, so the folder may be read-only
    (tmp_path / "w.pt").write_bytes(CONTENT[::-1])
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_offline_says_what_to_do_by_hand(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "w.pt")
    for part in (f"{server.url}/w.pt", str(tmp_path), "--cache_dir", "under the name w.pt", "refused"):
        assert part in str(caught.value)


def test_full_disk(server, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DownloadError, match=r"cannot keep w\.pt in .*File too large.*--cache_dir"):
            fetch(server, tmp_path / "w.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DownloadError, match=r"cannot keep w\.pt in the weights folder .*--cache_dir"):
        fetch(server, tmp_path / "file" / "w.pt")


def _in_process(url, target):
    fetch_file(url, SHA256, Path(target))


def test_processes_take_turns(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_in_process, args=(f"{server.url}/w.pt", str(tmp_path / "w.pt"))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0, 0, 0]
    assert file_sha256(tmp_path / "w.pt") == SHA256
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", OPENAI_CLIP)
def test_fetch_clip_asks_openais_address_and_checks_its_sha(server, tmp_path, name):
    file_name, sha256 = OPENAI_CLIP[name]
    with pytest.raises(DownloadError, match=sha256):
        fetch_clip(name, tmp_path, base_url=server.url)
    assert server.requests == [f"/{sha256}/{file_name}"]
    assert BASE_URL == "https://openaipublic.azureedge.net/clip/models"

"""fetch_file and fetch_clip against a real HTTP server on this machine that misbehaves in the ways servers do."""

import hashlib
import http.server
import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from checkpoints.download import BASE_URL, OPENAI_CLIP, DownloadError, fetch_clip, fetch_file, file_sha256

CONTENT = bytes(range(256)) * 4000  # about 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.refusals:
            self.send_error(server.refusals.pop(0))
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.knows_ranges else 0
        if start >= len(server.content) > 0 and asked and server.knows_ranges:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if asked and server.knows_ranges else 200)
        if asked and server.knows_ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[:cut])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.content, running.knows_ranges, running.cuts, running.refusals, running.requests = CONTENT, True, [], [], []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def fetch(server, target, **options):
    return fetch_file(f"{server.url}/w.pt", SHA256, target, **{"wait_s": 0.01} | options)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetches_once(server, tmp_path):
    target = tmp_path / "new" / "folder" / "w.pt"
    assert fetch(server, target) == target
    assert target.read_bytes() == CONTENT
    assert fetch(server, target) == target
    assert server.requests == [("/w.pt", None)]
    assert leftovers(target.parent) == ["w.pt", "w.pt.lock", "w.pt.verified.json"]


def test_resumes_a_cut_connection(server, tmp_path, capfd):
    server.cuts = [300_000, 200_000]
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=300000-", "bytes=500000-"]
    said = capfd.readouterr().err
    assert "connection closed after 300,000 of 1,024,000 bytes; 300,000 bytes so far, trying again" in said


def test_resumes_what_an_earlier_run_left(server, tmp_path):
    server.cuts = [400_000, 0, 0]
    with pytest.raises(DownloadError, match="connection closed"):
        fetch(server, tmp_path / "w.pt", attempts=2)
    assert not (tmp_path / "w.pt").exists()
    assert (tmp_path / "w.pt.part").stat().st_size == 400_000
    server.requests.clear()
    server.cuts.clear()
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=400000-"]


def test_starts_over_where_the_server_ignores_range(server, tmp_path):
    server.knows_ranges, server.cuts = False, [300_000]
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=300000-"]


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        (CONTENT, ["bytes=1024000-"]),  # whole but never moved into place
        (CONTENT + b"more", ["bytes=1024004-", None]),
        (b"from another file", ["bytes=17-", None]),
    ],
    ids=["whole", "too_long", "other_file"],
)
def test_part_files_of_every_kind(server, tmp_path, left, asked):
    (tmp_path / "w.pt.part").write_bytes(left)
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert [header for _, header in server.requests] == asked


def test_retries_a_busy_server_but_not_a_missing_file(server, tmp_path):
    server.refusals = [503, 429]
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    server.refusals = [404]
    server.requests.clear()
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path / "other.pt")
    assert len(server.requests) == 1


def test_a_wrong_file_is_never_put_in_place(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "w.pt")
    found = hashlib.sha256(server.content).hexdigest()
    for part in (SHA256, found, str(tmp_path / "w.pt.wrong"), "login page"):
        assert part in str(caught.value)
    assert leftovers(tmp_path) == ["w.pt.lock", "w.pt.wrong"]


def test_a_wrong_file_in_the_cache_is_moved_aside_and_replaced(server, tmp_path, capfd):
    (tmp_path / "w.pt").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert (tmp_path / "w.pt.wrong").read_bytes() == CONTENT[:1000]
    said = capfd.readouterr().err
    assert SHA256 in said
    assert hashlib.sha256(CONTENT[:1000]).hexdigest() in said


def test_a_file_put_there_by_hand_is_used_and_a_later_change_noticed(server, tmp_path):
    (tmp_path / "w.pt").write_bytes(CONTENT)
    fetch(server, tmp_path / "w.pt")
    assert server.requests == []
    receipt = json.loads((tmp_path / "w.pt.verified.json").read_text())
    assert (receipt["sha256"], receipt["size"]) == (SHA256, len(CONTENT))
    (tmp_path / "w.pt").write_bytes(CONTENT[::-1])
    os.utime(tmp_path / "w.pt", ns=(0, 0))
    assert fetch(server, tmp_path / "w.pt").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_offline_says_what_to_do_by_hand(server, tmp_path):
    closed = f"{server.url}/w.pt"
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError) as caught:
        fetch_file(closed, SHA256, tmp_path / "w.pt", attempts=2, wait_s=0.01)
    for part in (closed, str(tmp_path), "--cache_dir", "under the name w.pt", "refused"):
        assert part in str(caught.value)


def test_full_disk(server, tmp_path):
    (tmp_path / "w.pt.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="No space left.*--cache_dir"):
        fetch(server, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DownloadError, match=r"cannot keep w\.pt in the weights folder .*--cache_dir"):
        fetch(server, tmp_path / "file" / "w.pt")


def _in_process(url, target):
    fetch_file(url, SHA256, Path(target), wait_s=0.01)


def test_processes_take_turns(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_in_process, args=(f"{server.url}/w.pt", str(tmp_path / "w.pt"))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert [job.exitcode for job in jobs] == [0, 0, 0, 0]
    assert file_sha256(tmp_path / "w.pt") == SHA256
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", OPENAI_CLIP)
def test_fetch_clip_asks_openais_address_and_checks_its_sha(server, tmp_path, name):
    file_name, sha256 = OPENAI_CLIP[name]
    with pytest.raises(DownloadError, match=sha256):
        fetch_clip(name, tmp_path, base_url=server.url)
    assert server.requests == [(f"/{sha256}/{file_name}", None)]
    assert BASE_URL == "https://openaipublic.azureedge.net/clip/models"


def test_fetch_clip_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="--pretrained_clip_name must be one of ViT-B/32.*'RN50'"):
        fetch_clip("RN50", tmp_path)

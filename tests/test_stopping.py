"""Runs whose data stop coming, whose folder is taken, or that are asked to stop meanwhile: an end, and a way on."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LIMIT, ROOT, finish, processes_of, start

from engine.lock import LOCK, machine, process_start
from engine.resume import load_last
from main_task_retrieval import main

MAIN = str(ROOT / "main_task_retrieval.py")
TRAIN = ["--do_train", "--epochs", "2", "--batch_size", "12", "--n_display", "1", "--save_steps", "0"]


def with_flags(flags: list[str], **values: object) -> list[str]:
    return [*flags, *(str(x) for name, value in values.items() for x in (f"--{name}", value))]


@pytest.fixture
def own_videos(sample, msrvtt_flags, tmp_path) -> tuple[list[str], Path]:
    """Flags of a training run, and the folder of videos that is its own."""
    videos = tmp_path / "videos"
    shutil.copytree(sample / "msrvtt" / "videos" / "all", videos)
    return [*TRAIN, *with_flags(msrvtt_flags, features_path=videos)], videos


def in_place_of(path: Path) -> None:
    """A named pipe that nobody writes to: whoever opens it waits, as on a disk that hangs."""
    path.unlink()
    os.mkfifo(path)


def wait_for(process: subprocess.Popen, log: Path, pattern: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not (log.exists() and re.search(pattern, log.read_text())):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def torchrun(*command: str) -> subprocess.Popen:
    return start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_waits_for_suspended_workers(own_videos, tmp_path, number):
    flags, _ = own_videos
    process = start([MAIN, *with_flags(flags, num_thread_reader=1, epochs=500)])
    wait_for(process, tmp_path / "out" / "log.txt", "epoch 1 step 3/")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGSTOP)
    time.sleep(1)
    asked = time.monotonic()
    process.send_signal(number)
    if number == signal.SIGTERM:  # a second signal ends the wait, which has an end by itself, too
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(number)
    message = process.communicate(timeout=LIMIT)[1]
    assert time.monotonic() - asked < 30  # torchrun's patience
    assert process.returncode == 128 + number
    assert message == f"stopped by {number.name}; training goes on from its last checkpoint with --resume_model auto\n"
    assert not processes_of(tmp_path)
    progress = load_last(tmp_path / "out" / "checkpoint_last.pt")["progress"]
    assert progress["epoch"] or progress["step"]
    assert not (tmp_path / "out" / LOCK).exists()


def test_two_ranks_end_together_when_one_waits_for_a_file_that_hangs(own_videos, tmp_path):
    """The clip is named once, nothing is left running, and the run goes on once the file is back."""
    flags, videos = own_videos
    in_place_of(videos / "video7.mp4")
    flags = with_flags(flags, num_thread_reader=1, data_timeout=2, epochs=1)
    [(status, errors)] = finish([torchrun(MAIN, *flags)], tmp_path)
    assert status != 0
    [told] = re.findall("error: .*", errors)
    assert re.search(r"rank [01]: loader worker 0 .* does not get on with video7 \(.*--resume_model auto", told)
    assert "[rank" not in errors  # no traceback
    assert "terminate called" not in errors
    assert not processes_of(tmp_path)
    steps = load_last(tmp_path / "out" / "checkpoint_last.pt")["progress"]["step"]
    (videos / "video7.mp4").unlink()
    shutil.copy(videos / "video8.mp4", videos / "video7.mp4")
    assert main(with_flags(flags, num_thread_reader=0, resume_model="auto")) == 0
    [line] = map(json.loads, (tmp_path / "out" / "history.jsonl").read_text().splitlines())
    assert (line["steps"], line["dropped_steps"], line["clips"], line["dropped_clips"]) == (4, 0, 48, 0)
    assert f"epoch 1, step {steps}" in (tmp_path / "out" / "log.txt").read_text()


def test_a_signal_to_torchrun_ends_ranks_whose_workers_are_suspended(own_videos, tmp_path):
    flags, _ = own_videos
    process = torchrun(MAIN, *with_flags(flags, num_thread_reader=1, epochs=500))
    wait_for(process, tmp_path / "out" / "log.txt", "epoch 1 step 3/")
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for r in ranks for c in Path(f"/proc/{r}/task/{r}/children").read_text().split()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGSTOP)  # of one rank; the other waits for it in a collective
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    [(status, errors)] = finish([process], tmp_path / "nothing is killed")
    assert status != 0
    assert time.monotonic() - asked < 25, errors
    assert "stopped by SIGTERM" in errors
    assert "SIGKILL" not in errors
    assert "terminate called" not in errors
    assert not processes_of(tmp_path)
    progress = load_last(tmp_path / "out" / "checkpoint_last.pt")["progress"]
    assert progress["epoch"] or progress["step"]


def test_a_killed_worker_ends_the_run_with_one_line(own_videos, tmp_path):
    flags, videos = own_videos
    in_place_of(videos / "video7.mp4")
    process = start([MAIN, *with_flags(flags, num_thread_reader=1)])
    wait_for(process, tmp_path / "out" / "log.txt", "training: ")
    deadline, writer = time.monotonic() + LIMIT, None
    while writer is None:  # a pipe opens for writing once somebody reads
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            writer = os.open(videos / "video7.mp4", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    message = process.communicate(timeout=LIMIT)[1]
    os.close(writer)
    assert process.returncode == 1
    assert len(message.splitlines()) == 1
    assert re.match(r"error: loader worker 0 \(process \d+\), at video7 \(.*\), was killed \(SIGKILL\)", message)
    for word in ("memory", "--num_thread_reader", "--resume_model auto"):
        assert word in message
    assert (tmp_path / "out" / "checkpoint_last.pt").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting needs root")
def test_the_size_of_dev_shm_does_not_matter(own_videos, tmp_path):
    """64 KiB of it; a batch has 12 clips of 3 x 3 x 32 x 32 bytes, 324 KiB."""
    flags, _ = own_videos
    command = ["-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh", sys.executable, MAIN]
    command += with_flags(flags, num_thread_reader=2, epochs=1)
    done = subprocess.run(["unshare", "-m", "sh", *command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["training"]["clips"] == 48


def test_more_unreadable_videos_than_allowed_end_the_run(own_videos, tmp_path, capsys):
    flags, videos = own_videos
    for number in range(6):
        (videos / f"video{number}.mp4").write_text("no video")
    flags = with_flags(flags, epochs=1)
    assert main(flags) == 1
    told = capsys.readouterr().err
    assert re.match(r"error: \d training videos cannot be read, such as 'video0'.*--max_dropped allows \(5\)", told)
    assert main(with_flags(flags, max_dropped=0.2, resume_model="auto")) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["training"]
    assert found == {
        "epochs": 1,
        "steps": 4,
        "dropped_steps": 0,
        "clips": 42,
        "dropped_clips": 6,
        "dropped_videos": [f"video{number}" for number in range(6)],
    }
    beside = json.loads((tmp_path / "out" / "pytorch_model.bin.json").read_text())
    assert beside["training"] == found


def test_a_broken_test_video_is_found_before_training(own_videos, tmp_path, capsys):
    """And --allow_missing, which the error names, lets the same command pass."""
    flags, videos = own_videos
    broken = videos / "video7010.mp4"
    broken.write_bytes(broken.read_bytes()[:3000])
    assert main(flags) == 1
    told = capsys.readouterr().err
    assert "1 of 12 videos of msrvtt test cannot be read" in told
    assert "video7010.mp4" in told
    assert "--allow_missing" in told
    assert not (tmp_path / "out" / "checkpoint_last.pt").exists()
    assert main(with_flags(flags, epochs=1, allow_missing="true")) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["missing_videos"] == ["video7010"]


def lock_of(folder: Path, **other: object) -> Path:
    """A lock as this process would leave it, but for `other`."""
    folder.mkdir(exist_ok=True)
    content = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
    content |= {"since": "2024-01-01 00:00:00", "command": "python main_task_retrieval.py --do_train"}
    (folder / LOCK).write_text(json.dumps(content | other))
    return folder / LOCK


def test_a_folder_in_use_is_refused_to_training_and_evaluation(msrvtt_flags, tmp_path, capsys):
    lock = lock_of(tmp_path / "out")
    before = lock.read_bytes()
    for action in ("--do_train", "--do_eval"):
        assert main([action, *msrvtt_flags]) == 1
        told = capsys.readouterr().err
        assert f"process {os.getpid()} on {socket.gethostname()}, since 2024-01-01 00:00:00: python main" in told
        assert len(told.splitlines()) == 1
    assert lock.read_bytes() == before
    assert os.listdir(tmp_path / "out") == [LOCK]


def test_whose_lock_is_passed_over(msrvtt_flags, tmp_path, capsys):
    """Of a dead process, also where another one has its number now; of another machine only when silent for long."""
    finished = subprocess.Popen(["true"])
    finished.wait()
    stale = [{"pid": finished.pid, "start": "1"}, {"start": "1"}]
    for other in stale:
        lock = lock_of(tmp_path / "out", **other)
        assert main(["--do_eval", *msrvtt_flags]) == 0
        assert not lock.exists()
    lock = lock_of(tmp_path / "out", machine=["node7"])
    capsys.readouterr()
    assert main(["--do_eval", *msrvtt_flags]) == 1
    told = capsys.readouterr().err
    assert "on node7" in told
    assert "Without a sign of life for 5 minutes it will be passed over" in told
    assert f"rm {lock}" in told
    os.utime(lock, (time.time() - 301,) * 2)
    assert main(["--do_eval", *msrvtt_flags]) == 0
    assert not lock.exists()


def test_a_folder_in_use_is_refused_to_two_ranks_in_one_line(msrvtt_flags, tmp_path):
    lock_of(tmp_path / "out")
    [(status, errors)] = finish([torchrun(MAIN, "--do_eval", *msrvtt_flags)], tmp_path / "nothing is killed")
    assert status != 0
    assert len(re.findall("error: --output_dir .* a run is writing to it", errors)) == 1
    assert "[rank" not in errors
    assert os.listdir(tmp_path / "out") == [LOCK]


CONTEST = """
import os, sys, time
from pathlib import Path
from engine.lock import take
folder, stale = Path(sys.argv[1]), sys.argv[2]
for number in range(20):
    (folder / ".running").write_text(stale)
    gate, (said, say), (over, end) = time.time() + 0.1, os.pipe(), os.pipe()
    for _ in range(4):
        if os.fork() == 0:
            time.sleep(max(0, gate - time.time()))
            try:
                take(folder, ["x"])
                os.write(say, b"+")
            except ValueError:
                os.write(say, b"-")
            except BaseException as error:
                os.write(say, b"!")
                print(error, file=sys.stderr)
            os.close(end)
            os.read(over, 1)  # the winner lives until all have looked
            os._exit(0)
    answers = "".join(sorted(os.read(said, 1).decode() for _ in range(4)))
    os.close(end)
    for _ in range(4):
        os.wait()
    print(answers, os.listdir(folder))
"""


def test_of_four_that_find_a_stale_lock_one_takes_it(tmp_path):
    """Twenty times."""
    stale = lock_of(tmp_path, start="1").read_text()
    command = [sys.executable, "-c", CONTEST, tmp_path, stale]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.splitlines() == [f"+--- ['{LOCK}']"] * 20, done.stderr

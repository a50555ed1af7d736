"""Clips from worker processes: the same batches as without, an end to every wait, outages told from bad files."""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders.datasets import Collate, PairDataset, VideoSource
from dataloaders.feed import Feed, FeedError, Reading
from dataloaders.loaders import pair_loader, probe_loader, video_loader
from dataloaders.machine import default_workers, free_memory, usable_cores
from dataloaders.msrvtt import Options
from dataloaders.outage import Outage, look
from dataloaders.registry import AnnotationFiles, load_split
from dataloaders.split import RetrievalSplit
from dataloaders.video import FrameSampling, FrameTransform
from dataloaders.video.decode import VideoFiles

SOURCE = VideoSource(FrameSampling("stride", 1, 3, 2), FrameTransform(32), frame_order=2)


@pytest.fixture
def train(sample, tmp_path) -> RetrievalSplit:
    """The training split on a copy of its videos."""
    data, videos = sample / "msrvtt", tmp_path / "videos"
    shutil.copytree(data / "videos" / "all", videos)
    lists = Options(train_csv=data / "MSRVTT_train.9k.csv", val_csv=data / "MSRVTT_JSFUSION_test.csv")
    return load_split("msrvtt", "train", AnnotationFiles(data / "MSRVTT_data.json", lists), videos)


def tokenize(captions):
    """A caption's length and the number of its words."""
    ids = torch.tensor([[len(caption), len(caption.split())] for caption in captions])
    return ids, ids > 0


def pairs(split: RetrievalSplit, workers: int, **limits) -> Feed:
    reading = Reading(workers, seed=3, **limits)
    return pair_loader(split, SOURCE, tokenize, reading, expand=False, batch_size=10)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def in_place_of(path: Path) -> None:
    """A named pipe that nobody writes to: whoever opens it waits, as on a disk that hangs."""
    path.unlink()
    os.mkfifo(path)


def test_batches_are_the_same_whatever_the_workers(train):
    """Also in the second epoch, from the same processes, and when the epoch is entered in its middle."""
    seen = []
    for workers in (0, 1, 3):
        with pairs(train, workers) as feed:
            first = list(feed)
            pids = list(feed._workers.pids.values()) if workers else []
            feed.batch_sampler.epoch, feed.batch_sampler.start = 1, 2
            seen.append([*first, *feed])
            assert not workers or list(feed._workers.pids.values()) == pids
            assert len(pids) == workers
        assert not any(map(alive, pids))
    assert len(seen[0]) == 4 + 2
    for other in seen[1:]:
        for mine, yours in zip(seen[0], other, strict=True):
            for name, value in vars(mine).items():
                theirs = getattr(yours, name)
                assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, name


def test_a_short_clip_after_a_long_one_in_the_same_memory(train):
    """More batches than there is room for, clips of 1 and 3 frames: padding is zero, frames are those read here."""
    split = replace(train, videos=tuple(replace(v, end=[None, 0.4][n % 2]) for n, v in enumerate(train.videos)))
    with video_loader(split, SOURCE, Reading(2), batch_size=5) as feed:
        batches = list(feed)
    here = list(video_loader(split, SOURCE, Reading(0), batch_size=5))
    assert {length for batch in here for length in batch.frame_mask.sum(1).tolist()} >= {1, 3}
    for mine, yours in zip(batches, here, strict=True):
        assert torch.equal(mine.frames, yours.frames)
        assert torch.equal(mine.frame_mask, yours.frame_mask)


def test_a_worker_that_hangs_is_named_with_its_clip(train):
    in_place_of(train.videos[7].path)
    began = time.monotonic()
    told = f"process [0-9]+, asleep\\) does not get on with {train.videos[7].video_id} .*--data_timeout 1"
    with pytest.raises(FeedError, match=told), pairs(train, 2, data_timeout=1) as feed:
        list(feed)
    assert time.monotonic() - began < 30
    assert feed._workers is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_named_with_its_clip_and_what_to_do(train, number):
    in_place_of(train.videos[7].path)
    feed = pairs(train, 1)

    def kill_at_the_pipe() -> None:
        writer = None
        while writer is None:  # a pipe opens for writing once somebody reads
            with suppress(OSError):
                writer = os.open(train.videos[7].path, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.05)
        os.kill(feed._workers.pids[0], number)

    threading.Thread(target=kill_at_the_pipe, daemon=True).start()
    with pytest.raises(FeedError) as error:
        list(feed)
    told = str(error.value)
    assert told.startswith("loader worker 0 (process ")
    for word in (f"at {train.videos[7].video_id} ", number.name, "memory", "--num_thread_reader"):
        assert word in told


@pytest.mark.parametrize("stopped", [False, True])
def test_a_request_to_stop_ends_the_wait_whatever_a_worker_does(train, stopped):
    """It hangs at a file, or is suspended before it takes a clip; neither is left behind."""
    in_place_of(train.videos[7].path)
    feed, asked = pairs(train, 2), threading.Event()
    feed.interrupted = asked.is_set
    batches = iter(feed)
    feed.workers()
    pids = list(feed._workers.pids.values())
    if stopped:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, asked.set).start()
    last = list(batches)[-1]
    assert len(last.index) == 0
    assert not last.failures
    assert {os.waitpid(pid, 0)[1] for pid in pids} == {signal.SIGKILL}  # nobody waited for them


def test_workers_that_are_suspended_before_they_take_a_clip_are_named(train):
    with pairs(train, 2, data_timeout=1) as feed:
        feed.workers()
        for pid in feed._workers.pids.values():
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(FeedError, match=r"no loader worker takes a clip.*0 \(process [0-9]+, stopped\), 1 \("):
            list(feed)


def test_an_error_in_a_worker_is_shown_with_its_traceback(train):
    feed = Feed(PairDataset(train, SOURCE, False), [[(0, 999)]], Collate(tokenize), Reading(1), SOURCE.shape, 1)
    feed.dataset.describe = lambda key: "no clip"
    with pytest.raises(RuntimeError, match=r"(?s)no clip failed.*in __getitem__.*IndexError"):
        list(feed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_is_away_for_a_while_costs_nothing(train, workers):
    whole = list(pairs(train, 0))
    folder = train.videos[0].path.parent
    with pairs(train, workers) as feed:
        found = []
        for batch in feed:
            found.append(batch)
            if len(found) == 1:
                folder.rename(folder.with_name("away"))
                threading.Timer(0.7, lambda: folder.with_name("away").rename(folder)).start()
    assert not [failure for batch in found for failure in batch.failures]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(whole, found, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_outage_that_lasts_ends_the_wait_and_names_the_place(train, workers):
    folder = train.videos[0].path.parent
    folder.rename(folder.with_name("away"))
    folder.mkdir()  # as a place where nothing is mounted
    with pytest.raises(FeedError, match=f"{folder}: the folder is empty; it was waited for 0.01 minutes"):
        list(pairs(train, workers, outage_minutes=0.01))


@pytest.mark.parametrize("workers", [0, 2])
def test_single_files_that_are_bad_or_gone_are_failures(train, workers):
    gone, cut, other = (video.path for video in train.videos[:3])
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:3000])
    other.write_text("no video")
    with video_loader(train, SOURCE, Reading(workers), batch_size=10) as feed:
        batches = list(feed)
    failed = {failure.video_id for batch in batches for failure in batch.failures}
    assert failed == {video.video_id for video in train.videos[:3]}
    assert sum(len(batch.index) for batch in batches) == 48 - 3


def test_opening_finds_what_cannot_be_opened(train):
    train.videos[4].path.write_text("no video")
    for workers in (0, 2):
        with probe_loader(train, VideoFiles(), Reading(workers)) as feed:
            failures = [failure for batch in feed for failure in batch.failures]
        assert [failure.video_id for failure in failures] == [train.videos[4].video_id]


def test_where_the_fault_lies(tmp_path):
    """A place: its folder is gone, or empty, or reading fails as of a broken disk (/proc/self/mem does: EIO)."""
    film, lonely = tmp_path / "films" / "a.mp4", tmp_path / "none" / "a.mp4"
    film.parent.mkdir()
    assert "the folder is empty" in str(look(film))
    film.write_bytes(b"any")
    assert look(film) is None
    assert look(film.with_name("b.mp4")) is None
    assert "No such file" in str(look(lonely))
    link = film.with_name("c.mp4")
    link.symlink_to(lonely)  # to a disk that is not there
    assert "No such file" in str(look(link))
    link.unlink()
    link.symlink_to("/proc/self/mem")
    assert isinstance(look(link), Outage)
    assert "Input/output error" in str(look(link))


def test_too_little_memory_is_said_before_a_worker_starts(train):
    room = int(free_memory() / 2 / 10**2)
    feed = Feed(PairDataset(train, SOURCE, False), [], Collate(tokenize), Reading(1), (room, 10, 10, 1), 2)
    with pytest.raises(FeedError, match=r"4 clips .* take [0-9,]+ MiB .* MiB are free. .*--num_thread_reader"):
        list(feed)


def test_workers_by_default():
    cores = usable_cores()
    assert 1 <= cores <= os.cpu_count()
    assert default_workers(1) == min(cores, 16)
    assert default_workers(10_000) == 1
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mask)})
    try:
        assert usable_cores() == default_workers(1) == 1
    finally:
        os.sched_setaffinity(0, mask)


def test_many_clips_in_flight_need_few_file_descriptors(train):
    before = len(os.listdir("/proc/self/fd"))
    reading = Reading(2, seed=1)
    feed = pair_loader(train, SOURCE, tokenize, reading, expand=True, batch_size=300)
    with feed:
        batch = next(iter(feed))
        assert len(os.listdir("/proc/self/fd")) - before < 10
    assert len(batch.index) == 300
    assert len(np.unique(batch.index)) > 1

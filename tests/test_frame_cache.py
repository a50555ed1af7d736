"""The frame cache: the same frames to the bit, nothing torn ever read, an end of the keeping that ends no run."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from launching import LIMIT, ROOT, small_disk
from test_resume import assert_same_outcome
from video_files import make_video

from dataloaders.datasets import VideoSource
from dataloaders.feed import Reading
from dataloaders.loaders import video_loader
from dataloaders.split import Expected, RetrievalSplit, VideoClip
from dataloaders.video import FrameSampling, FrameTransform, VideoReadError, probe_video, read_frames
from dataloaders.video import cache as cache_module
from dataloaders.video.cache import JPEG_QUALITY, FrameCache, info_of
from dataloaders.video.cache_files import LEFTOVER, files_below, read_entry
from dataloaders.video.decode import VideoFiles
from dataloaders.video.folders import FrameFolders
from dataloaders.video.rules import RULES, FrameRule
from dataloaders.video.rules.base import frames_within
from engine.progress import setup_logging
from main_task_retrieval import main
from plugins import flag
from preprocess import extract_frames

SAMPLING, TRANSFORM = FrameSampling("stride", 1, 4), FrameTransform(32)
TRAIN = "--do_train --epochs 3 --batch_size 12 --lr 1e-3 --coef_lr 1 --freeze_layer_num -1".split()
WHOLE = SAMPLING, None, None, None, TRANSFORM


@pytest.fixture
def videos(tmp_path) -> list[Path]:
    (tmp_path / "videos").mkdir()
    return [make_video(tmp_path / "videos" / f"v{number}.mp4", 60 + number) for number in range(4)]


@pytest.fixture
def cache(tmp_path) -> FrameCache:
    return FrameCache(tmp_path / "cache", tmp_path / "videos")


def frames_of(path: Path, sampling=SAMPLING, start=None, end=None, draw=None, transform=TRANSFORM) -> torch.Tensor:
    return VideoFiles().read(path, sampling, start, end, draw, transform, [])


def entries(folder: Path, what: str = "frames") -> list[Path]:
    return sorted(Path(path) for path, _ in files_below(folder / what) if not path.endswith(LEFTOVER))


def rubbish(path: Path) -> None:
    """The file becomes unreadable, and looks as before."""
    state = path.stat()
    path.write_bytes(b"?" * state.st_size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_clip_is_decoded_once(videos, cache):
    """What is read later comes from the cache alone: the video could not give it any more."""
    wanted = {path: frames_of(path) for path in videos}
    for path in videos:
        assert torch.equal(cache.read(path, *WHOLE, []), wanted[path])
        rubbish(path)
        with pytest.raises(VideoReadError):
            read_frames(path, SAMPLING)
        assert torch.equal(cache.read(path, *WHOLE, []), wanted[path])
    assert len(entries(cache.folder)) == 4


def test_a_second_choice_reads_no_packets_again(videos, cache):
    first, other = cache.read(videos[0], *WHOLE, []), replace(SAMPLING, framerate=3, max_frames=2)
    info = probe_video(videos[0])
    assert torch.equal(cache.read(videos[0], other, *WHOLE[1:], []), frames_of(videos[0], other))
    assert len(first) == 2
    assert len(entries(cache.folder, "packets")) == 1
    rubbish(videos[0])
    assert cache.probe(videos[0]).frame_count == info.frame_count == 60


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.mp4", {}), ("a.avi", {}), ("a.webm", {"codec": "libvpx-vp9"}), ("a.ts", {}), ("a.mkv", {"gop": 7})],
)
def test_what_a_file_holds_comes_back_as_it_was(tmp_path, name, options):
    path = make_video(tmp_path / name, 40, **options)
    info = probe_video(path)
    back = info_of(cache_module.entry_of(info), str(path))
    for field, value in vars(info).items():
        mine = getattr(back, field)
        same = (
            np.array_equal(mine, value) and mine.dtype == value.dtype
            if isinstance(value, np.ndarray)
            else mine == value
        )
        assert same, field
    folder = FrameCache(tmp_path / "cache", tmp_path)
    for sampling in (SAMPLING, replace(SAMPLING, framerate=5)):  # the second with what is known from the first
        assert torch.equal(folder.read(path, sampling, *WHOLE[1:], []), frames_of(path, sampling))


def test_notes_of_a_file_survive(tmp_path, cache):
    path = make_video(tmp_path / "slow.mp4", 6, pts_of=lambda number: number * 2000)
    for _ in range(2):
        notes: list[str] = []
        cache.read(path, *WHOLE, notes)
        assert any("less than a frame a second" in note for note in notes)


def test_every_choice_has_an_entry_of_its_own(videos, cache):
    """Frames of one setting are never given for another."""
    ways = [
        WHOLE,
        (replace(SAMPLING, max_frames=1), *WHOLE[1:]),
        (FrameSampling("second", 1, 4), *WHOLE[1:]),
        (FrameSampling("second", 1, 1, slice_framepos=0), *WHOLE[1:]),
        (FrameSampling("second", 1, 1, slice_framepos=1), *WHOLE[1:]),
        (SAMPLING, 1.0, 2.0, None, TRANSFORM),
        (*WHOLE[:3], np.random.default_rng(0), TRANSFORM),
        (*WHOLE[:4], FrameTransform(24)),
        (*WHOLE[:4], FrameTransform(32, "longest")),
        (*WHOLE[:4], FrameTransform(32, "longest", fill_color=(9, 9, 9))),
        (*WHOLE[:4], FrameTransform(32, interpolation="bilinear")),
    ]
    for _ in range(2):
        for way in ways:
            assert torch.equal(cache.read(videos[0], *way, []), frames_of(videos[0], *way))
    assert len(entries(cache.folder)) == len(ways)


def test_a_changed_video_is_read_anew(videos, cache):
    before = cache.read(videos[0], *WHOLE, [])
    make_video(videos[0], 60, colour=None, gop=10, draw=lambda n, w, h: np.full((h, w, 3), 3 * n, np.uint8))
    after = cache.read(videos[0], *WHOLE, [])
    assert torch.equal(after, frames_of(videos[0]))
    assert not torch.equal(before, after)


def test_the_folder_of_videos_may_move(videos, cache, tmp_path):
    """Mounted elsewhere, on another machine: the same files are found in the cache."""
    wanted = cache.read(videos[0], *WHOLE, [])
    shutil.copytree(tmp_path / "videos", tmp_path / "elsewhere")  # keeps times
    there = FrameCache(cache.folder, tmp_path / "elsewhere")
    rubbish(tmp_path / "elsewhere" / "v0.mp4")
    assert torch.equal(there.read(tmp_path / "elsewhere" / "v0.mp4", *WHOLE, []), wanted)


def test_torn_and_damaged_entries_are_made_anew(videos, cache):
    wanted = cache.read(videos[0], *WHOLE, [])
    for what in ("frames", "packets"):
        (entry,) = entries(cache.folder, what)
        whole = entry.read_bytes()
        generator = random.Random(0)
        lengths = [0, 1, 20, 100, len(whole) // 2, len(whole) - 1]
        damaged = [whole[:length] for length in lengths] + [whole + b"\0", whole[:-4096] + bytes(4096)]
        for place in [0, 8, 12, 16, 24, *(generator.randrange(len(whole)) for _ in range(20))]:
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :])
        for content in damaged:
            entry.write_bytes(content)
            assert read_entry(entry) is None
            if what == "packets":
                entries(cache.folder)[0].unlink()
            assert torch.equal(cache.read(videos[0], *WHOLE, []), wanted)
            assert read_entry(entry) is not None


def test_jpeg_gives_the_same_frames_first_and_later(videos, tmp_path):
    """Lossy, but what a run computes does not depend on what the cache held."""
    lossy = FrameCache(tmp_path / "cache", tmp_path / "videos", "jpeg")
    for path in videos:
        first, again, exact = lossy.read(path, *WHOLE, []), lossy.read(path, *WHOLE, []), frames_of(path)
        assert torch.equal(first, again)
        assert 0 < (first.float() - exact.float()).abs().mean() < 12
        one = exact[0].permute(1, 2, 0).numpy()[..., ::-1].copy()
        coded = cv2.imencode(".jpg", one, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        assert np.array_equal(cv2.imdecode(coded, 1)[..., ::-1], first[0].permute(1, 2, 0).numpy())
    raw = FrameCache(tmp_path / "cache", tmp_path / "videos")
    assert torch.equal(raw.read(videos[0], *WHOLE, []), frames_of(videos[0]))


def test_readers_that_give_other_frames_have_other_names(tmp_path):
    """The names of kept features go by them."""
    raw, lossy = (FrameCache(tmp_path / kind, tmp_path, kind) for kind in ("raw", "jpeg"))
    assert repr(raw) == repr(VideoFiles()) == "VideoFiles()"
    assert repr(lossy) == f"FrameCache(jpeg {JPEG_QUALITY})"
    assert repr(FrameFolders(3.0)) == "FrameFolders(fps=3.0)"


class Drawing(FrameRule):
    """One frame, drawn in training."""

    @dataclass(frozen=True)
    class Options:
        never: bool = flag(False, "draw nothing")

    def choose(self, fps, frame_count, start, end, generator):
        frames = frames_within(fps, frame_count, start, end)
        return [frames[0 if generator is None or self.options.never else int(generator.integers(len(frames)))]]


def test_a_rule_that_draws_is_kept_in_evaluation_only(videos, cache, monkeypatch):
    monkeypatch.setitem(RULES, "drawing", Drawing)
    sampling = FrameSampling("drawing", 1, 4)
    for _ in range(2):
        assert torch.equal(cache.read(videos[0], sampling, *WHOLE[1:], []), frames_of(videos[0], sampling))
    assert len(entries(cache.folder)) == 1
    drawn = [cache.read(videos[0], sampling, None, None, np.random.default_rng(n), TRANSFORM, []) for n in range(5)]
    assert len(entries(cache.folder)) == 1
    plain = [frames_of(videos[0], sampling, draw=np.random.default_rng(n)) for n in range(5)]
    assert all(map(torch.equal, drawn, plain))
    assert not torch.equal(drawn[0], drawn[1])
    never = replace(sampling, options=Drawing.Options(never=True))
    generator = np.random.default_rng(0)
    cache.read(videos[0], never, None, None, generator, TRANSFORM, [])
    assert len(entries(cache.folder)) == 2
    assert generator.integers(100) == np.random.default_rng(0).integers(100)


def fill_for_ever(folder: Path, videos: list[Path], seed: int) -> None:
    """Keep clips, and take entries away again, so that there is always one to write."""
    torch.set_num_threads(1)
    mine, generator = FrameCache(folder, videos[0].parent), random.Random(seed)
    while True:
        size = generator.choice((200, 224))
        path = generator.choice(videos)
        mine.read(path, SAMPLING, None, None, None, FrameTransform(size), [])
        for entry in generator.sample(held := entries(folder), len(held) // 2):
            entry.unlink(missing_ok=True)


def test_kills_leave_nothing_torn(videos, cache):
    """Three processes fill one cache; 20 of them are killed while they do; every entry in place is whole and right."""
    wanted = {(p, s): frames_of(p, transform=FrameTransform(s)) for p in videos for s in (200, 224)}
    children: list[int] = []
    generator = random.Random(1)
    looked, right = 0, 0
    for seed in range(20 + 3):
        if (pid := os.fork()) == 0:
            try:
                fill_for_ever(cache.folder, videos, seed)
            finally:
                os._exit(1)
        children.append(pid)
        if len(children) < 3:
            continue
        time.sleep(generator.uniform(0.02, 0.25))
        victim = children.pop(generator.randrange(3))
        os.kill(victim, signal.SIGKILL)
        assert os.waitpid(victim, 0)[1] == signal.SIGKILL
        for entry in (*entries(cache.folder), *entries(cache.folder, "packets")):
            looked += entry.exists()
            assert read_entry(entry) is not None or not entry.exists(), entry
        for (path, size), frames in wanted.items():
            found = cache.find(path, SAMPLING, None, None, False, FrameTransform(size))
            right += found is not None
            assert found is None or torch.equal(cache_module.unpack(found), frames)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert looked > 50
    assert right > 20
    for (path, size), frames in wanted.items():
        assert torch.equal(cache.read(path, SAMPLING, None, None, None, FrameTransform(size), []), frames)


def in_a_fork(body) -> int:
    """The exit status of `body` in a process of its own: 0 where it raises nothing."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_write_that_fails_ends_the_keeping_only(videos, cache, tmp_path):
    """By the largest size that a file may have, which needs no privileges: 20 kB, where a clip takes more."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for path in videos:
            large = SAMPLING, None, None, None, FrameTransform(200)
            assert torch.equal(cache.read(path, *large, []), frames_of(path, transform=FrameTransform(200)))
        assert cache.full

    setup_logging(tmp_path, is_main=True)
    assert in_a_fork(limited) == 0
    assert (tmp_path / "log.txt").read_text().count(
        "nothing more is kept, its disk or quota is full (File too large)"
    ) == 1
    assert not entries(cache.folder)
    assert not [path for path, _ in files_below(cache.folder) if LEFTOVER in path]


def test_a_run_on_a_full_disk_and_in_a_cache_gives_the_same_weights(msrvtt_flags, tmp_path):
    """Without a cache, while one is filled, from it, and with one on a disk of 1 MB; two workers each."""

    def flags(name: str, *more: object) -> list[str]:
        flags = [*TRAIN, *msrvtt_flags, *map(str, more)]
        flags[flags.index("--output_dir") + 1] = str(tmp_path / name)
        flags[flags.index("--num_thread_reader") + 1] = "2"
        return flags

    runs = {"plain": (), "cold": ("--frame_cache", tmp_path / "cache"), "warm": ("--frame_cache", tmp_path / "cache")}
    for name, more in runs.items():
        assert main(flags(name, *more)) == 0
        assert len(entries(tmp_path / "cache")) == (60 if more else 0)
        assert_same_outcome(tmp_path / name, tmp_path / "plain")
    disk = tmp_path / "disk"
    with small_disk(disk, 1) as mounted:
        bound = () if mounted else ("--frame_cache_gb", 0.0004)
        (disk / "taken").write_bytes(bytes(600_000 if mounted else 0))
        command = [sys.executable, "main_task_retrieval.py", *flags("full", "--frame_cache", disk / "cache", *bound)]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("nothing more is kept") == 1
        kept = entries(disk / "cache")
        assert 0 < len(kept) < 60
        assert all(read_entry(entry) for entry in kept)
    assert_same_outcome(tmp_path / "full", tmp_path / "plain")


def test_the_bound_holds_with_workers(videos, tmp_path):
    """Room for 5 of 16 clips: two workers keep no more, and all clips come."""
    bound = 5 * 4 * 3 * 32 * 32 / 1e9
    keeping = FrameCache(tmp_path / "cache", tmp_path / "videos", "raw", bound, writers=2)
    paths = [shutil.copy(videos[n % 4], tmp_path / "videos" / f"copy{n}.mp4") for n in range(16)]
    clips = tuple(VideoClip(f"c{n}", Path(path)) for n, path in enumerate(paths))
    split = RetrievalSplit("t", "test", clips, ("a",) * 16, np.arange(16), Expected(None, None))
    source = VideoSource(SAMPLING, TRANSFORM, reader=keeping)
    setup_logging(tmp_path, is_main=True)
    with video_loader(split, source, Reading(2), batch_size=4) as feed:
        batches = list(feed)
    read = [clip[mask] for batch in batches for clip, mask in zip(batch.frames, batch.frame_mask)]
    assert [torch.equal(clip, frames_of(videos[n % 4])) for n, clip in enumerate(read)] == [True] * 16
    held = sum(state.st_size for _, state in files_below(keeping.folder))
    assert 0 < held <= bound * 1e9
    assert (tmp_path / "log.txt").read_text().count("--frame_cache_gb") == 1


def extract(capsys, folder: Path, *flags: object) -> tuple[int, str]:
    status = extract_frames.main(["--frame_cache", str(folder), *map(str, flags)])
    return status, capsys.readouterr().out


def test_extract_fills_a_cache_that_a_run_then_reads(msrvtt_flags, tmp_path, capsys):
    """Killed or not, it goes on where it stopped; the run keeps nothing more. Status and prune tell what is there."""
    own = list(msrvtt_flags)
    videos = tmp_path / "videos"
    shutil.copytree(own[own.index("--features_path") + 1], videos)
    own[own.index("--features_path") + 1] = str(videos)
    folder = tmp_path / "cache"
    status, said = extract(capsys, folder, *own, "--splits", "test")
    assert (status, "12 clips kept, 0 were there already, 0 failed" in said) == (0, True)
    status, said = extract(capsys, folder, *own)
    assert (status, "48 clips kept, 12 were there already, 0 failed" in said) == (0, True)
    assert main([*TRAIN, *own, "--frame_cache", str(folder)]) == 0
    assert len(entries(folder)) == 60
    status, said = extract(capsys, folder, *own, "--splits", "test", "--frame_cache_format", "jpeg")
    assert status == 0
    assert f"JPEG, quality {JPEG_QUALITY}: PSNR " in said
    assert 25 < float(said.split("PSNR ")[1].split()[0]) < 60
    _, said = extract(capsys, folder, "--status")
    assert "132 entries, 60 clips, 60 videos" in said
    for line in ("raw, 32 px shortest bicubic, rule stride, 1 a second, at most 3, training: 48 entries", "drops"):
        assert (line in said) == (line != "drops")
    changed, gone = sorted(videos.glob("*"))[:2]
    os.utime(changed)
    gone.unlink()
    leftover = entries(folder)[0].with_name(".x.123.tmp")
    leftover.write_bytes(b"?" * 10)
    fresh = leftover.with_name(".y.123.tmp")  # somebody is writing it
    fresh.write_bytes(b"?" * 10)
    os.utime(leftover, (0, 0))
    entries(folder)[1].write_bytes(b"torn")
    _, said = extract(capsys, folder, "--prune")
    for line in ("its video is gone", "its video was changed", "left over by a killed process", "no whole entry"):
        assert line in said
    assert not leftover.exists()
    assert fresh.exists()
    _, said = extract(capsys, folder, "--prune")
    assert "nothing to drop" in said
    videos.rename(tmp_path / "unmounted")
    _, said = extract(capsys, folder, "--prune")
    assert "nothing to drop" in said


def test_what_another_version_made_is_not_read_and_pruned(videos, cache, capsys, monkeypatch):
    cache.read(videos[0], *WHOLE, [])
    for name, dropped in (("RESIZE_VERSION", 1), ("READER_VERSION", 3)):
        monkeypatch.setattr(cache_module, name, 2)
        for cached in (cache_module.packets_recipe, cache_module._frames_recipe):
            cached.cache_clear()
        assert cache.find(videos[0], *WHOLE[:3], False, TRANSFORM) is None
        cache.read(videos[0], *WHOLE, [])
        _, said = extract(capsys, cache.folder, "--prune")
        assert f"{1 if dropped == 1 else 2} files dropped" in said
        assert "made by another version" in said
    monkeypatch.undo()
    for cached in (cache_module.packets_recipe, cache_module._frames_recipe):
        cached.cache_clear()

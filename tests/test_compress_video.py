"""Re-encoding of small real videos: size, rate, resuming, what cannot be converted, and the worker pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from launching import LIMIT, ROOT
from video_files import copy_stream, cut_bytes, flip_bits, make_audio, make_video, number_of

from dataloaders.video import VideoReadError, decode_frames, probe_video
from preprocess.compress_video import Look, look_at, main, target_size, why_unfit
from preprocess.parallel import run_parallel


def compress(root: Path, *more: str) -> int:
    return main(["--input_root", str(root / "in"), "--output_root", str(root / "out"), "--num_workers", "1", *more])


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    """Decoded RGB frames and frames a second, read with PyAV itself."""
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return images, float(container.streams.video[0].average_rate)


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "in" / "movie").mkdir(parents=True)
    return tmp_path


def test_three_frames_a_second_short_side_224(root):
    make_video(root / "in" / "movie" / "clip.avi", 90, codec="mpeg4", size=(100, 64))
    assert compress(root) == 0
    images, rate = frames_of(root / "out" / "movie" / "clip.mp4")
    assert rate == 3
    assert images[0].shape == (224, 350, 3)  # 100 * 224 / 64
    numbers = [number_of(image) for image in images]
    assert len(numbers) == 9  # 3 s
    assert all(abs(number - 10 * n) <= 5 for n, number in enumerate(numbers))  # each within half a step of its time
    with av.open(str(root / "out" / "movie" / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((320, 240), (298, 224)), ((240, 320), (224, 298)), ((64, 64), (224, 224)), ((1920, 1080), (398, 224))],
)
def test_target_size_rounds_the_long_side_down_to_even(shape, expected):
    assert target_size(*shape, 224) == expected


def test_portrait_rotated_shifted_and_very_short_videos(root):
    upright = make_video(root / "in" / "portrait.mkv", 45, size=(64, 96))
    rotated = make_video(root / "in" / "rotated.mp4", 45, rotation=90)
    copy_stream(rotated, root / "in" / "late.mp4", shift=5.0)
    make_video(root / "in" / "short.mp4", 1)
    make_video(root / "in" / "10@N_a..mov", 30)
    make_video(root / "in" / "bare.mov", 30).rename(root / "in" / "bare.")
    assert compress(root) == 0
    for name in ("portrait", "rotated", "late"):
        images, _ = frames_of(root / "out" / f"{name}.mp4")
        assert (len(images), images[0].shape) == (5, (336, 224, 3))
    turned, stored = frames_of(root / "out" / "rotated.mp4")[0][0], frames_of(rotated)[0]
    # 90 degrees counter-clockwise to be shown: the turned picture, turned back, shows the number that was stored.
    small = np.rot90(turned, -1)
    assert any(number_of(small) == number_of(image) for image in stored[:6])
    assert len(frames_of(root / "out" / "short.mp4")[0]) == 1
    assert (root / "out" / "10@N_a..mp4").is_file()
    assert (root / "out" / "bare.mp4").is_file()
    assert upright.is_file()


def test_a_second_run_keeps_what_fits_and_redoes_what_does_not(root, capsys):
    for n in range(3):
        make_video(root / "in" / f"{n}.mp4", 60)
    assert compress(root) == 0
    assert "3 converted, 0 were there already, 0 failed" in capsys.readouterr().out
    cut_bytes(root / "in" / "0.mp4", root / "out" / "0.mp4", 0.3)  # a half-written file under the final name
    (root / "out" / "1.mp4").unlink()
    stamp = (root / "out" / "2.mp4").stat().st_mtime_ns
    assert compress(root) == 0
    assert "2 converted, 1 were there already" in capsys.readouterr().out
    assert (root / "out" / "2.mp4").stat().st_mtime_ns == stamp
    assert len(frames_of(root / "out" / "0.mp4")[0]) == 6
    assert compress(root, "--fps", "2") == 0
    assert "3 converted, 0 were there already" in capsys.readouterr().out
    assert len(frames_of(root / "out" / "0.mp4")[0]) == 4
    assert not [path for path in (root / "out").iterdir() if "part" in path.name]


def test_what_cannot_be_converted_is_copied_and_listed(root, capsys):
    whole = make_video(root / "in" / "good.mp4", 60)
    cut_bytes(make_video(root / "whole.mkv", 90), root / "in" / "cut.mkv", 0.5)
    (root / "in" / "movie" / "bad.avi").write_bytes(b"no video")
    make_audio(root / "in" / "sound.mp4")
    (root / "in" / "notes.txt").write_text("not a video")
    assert compress(root) == 1
    assert "1 converted, 0 were there already, 3 failed, see " in capsys.readouterr().out
    listed = dict(line.split("\t") for line in (root / "out" / "compress_failures.txt").read_text().splitlines())
    assert "it is cut off" in listed[str(root / "in" / "cut.mkv")]
    assert "Invalid data" in listed[str(root / "in" / "movie" / "bad.avi")]
    assert "no video stream" in listed[str(root / "in" / "sound.mp4")]
    assert (root / "out" / "movie" / "bad.avi").read_bytes() == b"no video"
    assert (root / "out" / "cut.mkv").read_bytes() == (root / "in" / "cut.mkv").read_bytes()
    assert not (root / "out" / "notes.txt").exists()

    (root / "in" / "cut.mkv").write_bytes((root / "whole.mkv").read_bytes())
    (root / "in" / "movie" / "bad.avi").unlink()
    (root / "in" / "sound.mp4").unlink()
    assert compress(root) == 0
    assert not (root / "out" / "cut.mkv").exists()  # its copy made way for the conversion
    assert (root / "out" / "cut.mp4").is_file()
    assert not (root / "out" / "compress_failures.txt").exists()
    assert whole.is_file()


def test_workers_give_the_same_frames(root):
    """Not the same bytes: x264's first encoding in a process comes out a few bytes different."""

    def shown() -> dict[str, list[int]]:
        return {path.name: [number_of(i) for i in frames_of(path)[0]] for path in (root / "out").glob("*.mp4")}

    for n in range(3):
        make_video(root / "in" / f"{n}.mp4", 30 + 15 * n)
    assert compress(root, "--num_workers", "2") == 0
    parallel = shown()
    assert [len(numbers) for _, numbers in sorted(parallel.items())] == [3, 5, 6]
    for name in parallel:
        (root / "out" / name).unlink()
    assert compress(root) == 0
    assert shown() == parallel


def test_two_inputs_for_one_output_are_refused(root, capsys):
    make_video(root / "in" / "a.mp4", 3)
    make_video(root / "in" / "a.mkv", 3)
    assert compress(root) == 2
    assert "a.mkv and " in capsys.readouterr().err
    assert not list((root / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--output_root", "in"], "--output_root must not be --input_root"),
        (["--output_root", "in/movie"], "neither of --input_root and --output_root may lie inside the other"),
        (["--output_root", "."], "neither of --input_root and --output_root may lie inside the other"),
        (["--input_root", "nowhere"], "--input_root nowhere is not a folder"),
        (["--size", "225"], "--size must be even"),
        (["--fps", "0"], "--fps must be >= 1, got 0"),
        (["--backend", "pyav"], "unrecognized arguments: --backend"),
        (["--num_workers", "0"], "--num_workers must be >= 1, got 0"),
    ],
)
def test_bad_usage_exits_with_2(root, capsys, monkeypatch, change, message):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as stopped:
        main(["--input_root", "in", "--output_root", "out", *change])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_exits_with_2(root, capsys):
    assert compress(root) == 2
    assert "holds no video (0 other files)" in capsys.readouterr().err


def test_why_unfit_tells_size_rate_and_duration(tmp_path):
    video = make_video(tmp_path / "a.mp4", 9, fps=3, size=(336, 224))
    look = Look(width=96, height=64, turns=(), duration=3.0)
    assert why_unfit(look, video, 3, 224) is None
    assert why_unfit(look, video, 3, 112) == "is 336x224, not 168x112"
    assert why_unfit(look, video, 2, 224) == "has 3 frames a second, not 2"
    assert "lasts 3.00 s, the original 9.00 s" in why_unfit(Look(96, 64, (), 9.0), video, 3, 224)
    mpeg4 = make_video(tmp_path / "b.mp4", 9, fps=3, size=(336, 224), codec="mpeg4")
    assert why_unfit(look, mpeg4, 3, 224) == "is mpeg4, not H.264"
    look = look_at(probe_video(make_video(tmp_path / "c.mp4", 30, rotation=90)))
    assert look == Look(64, 96, ("transpose=cclock_flip", "vflip"), 1.0)


def die_on_three(number: int) -> int:
    if number == 3:
        os._exit(1)  # as a crashing decoder ends its process
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_a_crashing_worker_costs_only_its_own_task(workers):
    results = run_parallel(die_on_three, range(6), workers, "squares", on_crash=lambda number: -number)
    assert dict(results) == {0: 0, 1: 1, 2: 4, 3: -3, 4: 16, 5: 25}
    assert not list(run_parallel(die_on_three, [], workers, "nothing", on_crash=abs))


def test_workers_that_all_crash_are_all_replaced():
    results = run_parallel(os._exit, range(1, 21), 3, "exits", on_crash=lambda number: -number)
    assert dict(results) == {number: -number for number in range(1, 21)}


MPEG4 = {"codec": "mpeg4", "codec_options": {"qscale": "3"}}
FRAGMENTED = {"format_options": {"movflags": "frag_keyframe+empty_moov"}}
# A file name, how it is made, and the shares of it that are damaged, or where it is cut.
DAMAGED = {
    "flipped.mp4": ({}, [(0.3, 0.6)]),
    "flipped_fragmented.mp4": (FRAGMENTED, [(0.4, 0.6)]),
    "flipped_mpeg4.avi": (MPEG4, [(0.3, 0.6)]),
    "flipped.mkv": ({}, [(0.3, 0.6)]),
    "flipped.mpg": ({"codec": "mpeg2video"}, [(0.3, 0.6)]),
    "cut70_mpeg4.avi": (MPEG4, 0.7),
    "cut90_mpeg4.avi": (MPEG4, 0.9),
    "cut70_h264.avi": ({}, 0.7),
    "cut90_h264.avi": ({"b_frames": 0}, 0.9),
    "cut80.mpg": ({"codec": "mpeg2video"}, 0.8),
    "cut95.mkv": ({}, 0.95),
    "cut95.webm": ({"codec": "libvpx-vp9"}, 0.95),
    "cut95.wmv": ({"codec": "wmv2"}, 0.95),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_not_hidden_in_a_clean_file(root, name):
    made, damage = DAMAGED[name]
    whole = make_video(root / name, 90, **made)
    source = root / "in" / "movie" / name
    if isinstance(damage, float):
        cut_bytes(whole, source, damage)
    else:
        flip_bits(whole, source, damage)
    with pytest.raises(VideoReadError) as refused:  # as every reader of the data set refuses it
        decode_frames(source, range(probe_video(source).frame_count))
    stale = root / "out" / "movie" / (source.stem + ".mp4")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run")
    assert compress(root) == 1
    line = (root / "out" / "compress_failures.txt").read_text()
    assert line.startswith(f"{source}\t")
    assert refused.value.cause.split("(")[0][:10] in line
    (copy,) = (root / "out" / "movie").iterdir()
    assert copy.name == name
    assert copy.read_bytes() == source.read_bytes()


def processes_of(group: int) -> list[int]:
    """Ids of the running processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(entry.name))
    return found


def wait_for(condition, seconds: float) -> bool:
    stop = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > stop:
            return False
        time.sleep(0.05)
    return True


def test_workers_end_when_the_command_is_killed(root):
    first = make_video(root / "in" / "0.mp4", 300)
    for n in range(1, 400):
        (root / "in" / f"{n}.mp4").symlink_to(first)
    command = [sys.executable, "-m", "preprocess.compress_video", "--input_root", str(root / "in")]
    command += ["--output_root", str(root / "out"), "--num_workers", "3"]
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        assert wait_for(lambda: list((root / "out").glob("*.mp4")), LIMIT)
        assert running.poll() is None
        assert len(processes_of(running.pid)) == 4
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert wait_for(lambda: not processes_of(running.pid), LIMIT), f"still running: {processes_of(running.pid)}"

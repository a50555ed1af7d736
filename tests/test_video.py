"""Reading video files: every frame returned is the one asked for, or VideoReadError says why there is none."""

import contextlib
import pickle
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import torch

from dataloaders.video import FrameSampling, VideoReadError, counting, decode_frames, probe_video, read_frames
from dataloaders.video import decode as video
from dataloaders.video.decode import plan_runs
from dataloaders.video.opening import NotAsPlanned
from tests.video_files import (
    copy_stream,
    cut_bytes,
    flip_bits,
    make_audio,
    make_video,
    number_of,
    picture,
)

FRAMES = 90
FAST = {"preset": "veryfast"}
OPEN_GOP = {"preset": "veryfast", "x264-params": "scenecut=0:b-adapt=0:bframes=3:b-pyramid=normal:open-gop=1:keyint=15"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20:bframes=3:open-gop=1"}
VP8 = {"cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"}
VP9 = {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}
ODD = {"size": (101, 67)}

# name -> how it is made. Where frames are rotated or hidden at the beginning, the tests below say so.
GOOD_FILES = {
    "b_frames.mp4": {"codec_options": FAST, "b_frames": 3},
    "faststart.mp4": {"codec_options": FAST, "format_options": {"movflags": "faststart"}},
    "fragmented.mp4": {"codec_options": FAST, "format_options": {"movflags": "frag_keyframe+empty_moov"}},
    "open_gop.mp4": {"codec_options": OPEN_GOP},
    "open_gop.mkv": {"codec_options": OPEN_GOP},
    "ntsc.mp4": {"codec_options": FAST, "fps": Fraction(30000, 1001)},
    "variable.mp4": {"codec_options": FAST, "pts_of": lambda number: number * 33 + number // 10 * 40},
    "variable.mkv": {"codec_options": FAST, "pts_of": lambda number: number * 33 + number // 10 * 40},
    "h264.mov": {"codec_options": FAST},
    "h264.3gp": {"codec_options": FAST},
    "h264.avi": {"codec_options": FAST, "b_frames": 2},
    "h264_two_ticks.avi": {"codec_options": FAST, "time_base": Fraction(1, 60)},
    "h264.ts": {"codec_options": FAST},
    "h264.flv": {"codec_options": FAST},
    "no_times.h264": {"codec_options": FAST},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4_b.mp4": {"codec": "mpeg4", "b_frames": 2},
    "mpeg1.mpg": {"codec": "mpeg1video", "b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2, "container_format": "vob"},
    "mpeg2.ts": {"codec": "mpeg2video", "b_frames": 2},
    "wmv2.wmv": {"codec": "wmv2"},
    "h263.3gp": {"codec": "h263", "size": (176, 144)},
    "vp8.webm": {"codec": "libvpx", "codec_options": VP8},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": VP9},
    "hevc.mp4": {"codec": "libx265", "codec_options": X265},
    "av1.mp4": {"codec": "libsvtav1", "codec_options": {"preset": "11"}},
    "av1.webm": {"codec": "libsvtav1", "codec_options": {"preset": "11"}},
    "odd_444.mp4": {"codec_options": FAST, "pix_fmt": "yuv444p", **ODD},
    "odd_vp9.webm": {"codec": "libvpx-vp9", "codec_options": VP9, **ODD},
    "odd_mpeg4.avi": {"codec": "mpeg4", **ODD},
    "ten_bit.mp4": {"codec_options": FAST, "pix_fmt": "yuv420p10le"},
    "full_range.mp4": {"codec_options": FAST, "pix_fmt": "yuvj420p"},
    "bt709.mp4": {"codec_options": FAST, "colour": (1, 1, 1)},
    "bt601.mp4": {"codec_options": FAST, "colour": (5, 6, 5)},
    "one_frame.mp4": {"codec_options": FAST, "frames": 1},
}
ROTATED = {"turned_90.mp4": 90, "turned_180.mp4": 180, "turned_270.mov": 270}
# Streams copied from the middle of a film: name -> (source, first packet to keep, shift in seconds). In the open group
# file, packet 28 is the keyframe shown as frame 30, and packets 29 and 30 are frames 28 and 29.
CUT = {
    "edit_list.mp4": ("b_frames.mp4", None, -0.7),
    "edit_list_open_gop.mp4": ("open_gop.mp4", None, -0.85),
    "starts_open.mkv": ("open_gop.mp4", 28, 0.0),
    "starts_open.mp4": ("open_gop.mp4", 28, 0.0),
    "starts_mid_group.mkv": ("open_gop.mp4", 31, 0.0),
    "starts_open_hevc.mkv": ("hevc.mp4", 37, 0.0),
}
TIMED = [name for name in [*GOOD_FILES, *ROTATED, *CUT] if name.endswith((".mp4", ".mkv", ".mov", ".webm", ".3gp"))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name, how in GOOD_FILES.items():
        make_video(root / name, **{"frames": FRAMES, **how})
    for name, degrees in ROTATED.items():
        make_video(root / name, frames=FRAMES, codec_options=FAST, rotation=degrees)
    for name, (source, first, shift) in CUT.items():
        copy_stream(root / source, root / name, lambda position, _, first=first: position >= (first or 0), shift)
    return root


@pytest.fixture(scope="session")
def references(folder):
    """Every frame of every file by plain sequential decoding, without any of the code under test."""
    frames = {}
    for name in [*GOOD_FILES, *ROTATED, *CUT]:
        with av.open(str(folder / name)) as container:
            frames[name] = [_plain(frame) for frame in container.decode(video=0)]
    return frames


def _plain(frame):
    deep = "10le" in frame.format.name
    image = frame.to_ndarray(format="bgr24" if deep else "rgb24", interpolation="BICUBIC")
    return np.rot90(image[..., ::-1] if deep else image, frame.rotation // 90)


def index_sets(count, how_many=6):
    generator = np.random.default_rng(count)
    sizes = generator.choice([1, 2, 5, 12, 40], how_many)
    some = [sorted(generator.choice(count, min(count, size), replace=False).tolist()) for size in sizes]
    return [list(range(count)), [0], [count - 1], *some]


@pytest.mark.parametrize("name", [*GOOD_FILES, *ROTATED, *CUT])
def test_equal_to_plain_sequential_decoding(folder, references, name):
    info = probe_video(folder / name)
    assert info.frame_count == len(references[name])
    for indices in index_sets(info.frame_count):
        got = decode_frames(folder / name, indices, info=info)
        assert got.dtype == np.uint8
        assert np.array_equal(got, np.stack([references[name][index] for index in indices])), indices


@pytest.mark.parametrize("name", GOOD_FILES)
def test_frames_show_their_own_numbers(folder, name):
    indices = list(range(0, probe_video(folder / name).frame_count, 7))
    assert [number_of(image) for image in decode_frames(folder / name, indices)] == indices


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("edit_list.mp4", 21, 69),
        ("edit_list_open_gop.mp4", 26, 64),
        ("starts_open.mkv", 30, 60),
        ("starts_open.mp4", 30, 60),
        ("starts_mid_group.mkv", 45, 45),
        ("starts_open_hevc.mkv", 40, 50),
    ],
)
def test_frame_0_of_a_cut_stream_is_the_first_one_shown(folder, name, first, count):
    info = probe_video(folder / name)
    assert info.frame_count == count
    numbers = [number_of(image) for image in decode_frames(folder / name, [0, 5, count - 1])]
    assert numbers == [first, first + 5, first + count - 1]


def _short_way(info, indices):
    for strict in counting.strictness(info):
        with contextlib.suppress(NotAsPlanned):
            return video._collect(info, indices, video._selected(info, indices, strict), None)
    return np.empty(0)


@pytest.mark.parametrize("name", TIMED)
def test_the_selective_way_needs_no_help_where_times_can_be_trusted(folder, references, name):
    info = probe_video(folder / name)
    assert info.trusted
    for indices in index_sets(info.frame_count, 3):
        got = _short_way(info, indices)
        assert np.array_equal(got, np.stack([references[name][index] for index in indices]))


@pytest.mark.parametrize("name", [name for name in GOOD_FILES if name not in TIMED])
def test_other_containers_are_counted(folder, name):
    assert not probe_video(folder / name).trusted


def test_the_plan_follows_keyframes_and_open_groups(folder):
    # Frames 15, 30, 45 ... are keyframes, stored at packets 13, 28, 43 ..., each before the two frames shown before it.
    info = probe_video(folder / "open_gop.mp4")
    assert np.flatnonzero(info.packet_key).tolist() == [0, 13, 28, 43, 58, 73]
    runs = plan_runs(info, [30])
    assert [(run.first, run.last, run.wanted) for run in runs] == [(28, 28, {28: 30})]
    # Frame 29 follows keyframe 30 in the file but leans on the group before: decoding starts at keyframe 15.
    runs = plan_runs(info, [29])
    assert [(run.first, run.last) for run in runs] in ([(13, 29)], [(13, 30)])
    # Two groups apart are two runs, the frame between two keyframes and its neighbour are one.
    assert [run.first for run in plan_runs(info, [1, 80])] == [0, 73]
    assert [run.first for run in plan_runs(info, [29, 30])] == [13]


@pytest.mark.parametrize("name", [*GOOD_FILES, *ROTATED, *CUT])
def test_frame_rate_is_what_opencv_reports(folder, name):
    capture = cv2.VideoCapture(str(folder / name))
    reported = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    # The header of this one counts two ticks a frame; its 90 frames last three seconds.
    expected = reported / 2 if name == "h264_two_ticks.avi" else reported
    # And OpenCV takes a rate for this one that no header states: 90 frames in 3.29 s.
    expected = pytest.approx(90 / 3.29, 1e-3) if name == "variable.mkv" else expected
    assert probe_video(folder / name).fps == expected


def test_wide_gamut_is_mapped_as_opencv_does(tmp_path):
    how = {"codec_options": FAST, "pix_fmt": "yuv420p10le", "colour": (9, 16, 9)}  # BT.2020 with the PQ curve
    path = make_video(tmp_path / "bt2020.mkv", 5, **how)
    read, image = cv2.VideoCapture(str(path)).read()
    assert read
    assert np.array_equal(decode_frames(path, [0])[0], image[..., ::-1])


def test_rotation_is_applied(folder):
    upright = decode_frames(folder / "turned_90.mp4", [77])[0]
    assert upright.shape == (96, 64, 3)
    # The film is turned back 90 degrees counter-clockwise; turned on by another 270 it is as it was drawn.
    assert number_of(np.rot90(upright, 3)) == 77
    assert decode_frames(folder / "turned_180.mp4", [77])[0].shape == (64, 96, 3)
    assert number_of(np.rot90(decode_frames(folder / "turned_180.mp4", [77])[0], 2)) == 77


def test_clips_are_cut_by_time(folder):
    sampling = FrameSampling("second", framerate=2, max_frames=12)
    frames = read_frames(folder / "b_frames.mp4", sampling, start=1, end=2)
    assert [number_of(frame) for frame in frames] == [30, 45, 60, 75]
    frames = read_frames(folder / "h264_two_ticks.avi", FrameSampling("stride", max_frames=2))
    assert [number_of(frame) for frame in frames] == [0, 60]


def test_a_span_past_the_end_is_an_error_of_the_video(folder):
    with pytest.raises(VideoReadError, match=r"b_frames\.mp4: cannot choose frames: start 9 s is past the end"):
        read_frames(folder / "b_frames.mp4", FrameSampling(), start=9, end=12)


def test_a_frame_past_the_end(folder):
    with pytest.raises(VideoReadError, match="frame 90 is wanted, it has 90 frames"):
        decode_frames(folder / "b_frames.mp4", [0, 90])


@pytest.mark.parametrize("indices", [[], [3, 3], [4, 3], [-1, 2]])
def test_indices_must_make_sense(folder, indices):
    with pytest.raises(ValueError, match="frame indices must be ascending, unique and not negative"):
        decode_frames(folder / "b_frames.mp4", indices)


def test_unknown_decoder(folder):
    with pytest.raises(VideoReadError, match="decoder must be one of pyav, got 'opencv'"):
        decode_frames(folder / "b_frames.mp4", [0], "opencv")


def test_sound_that_outlasts_the_pictures_is_no_damage(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        film, sound = container.add_stream("libx264", rate=30), container.add_stream("aac", rate=16000)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        for number in range(30):
            container.mux(film.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(film.encode(None))
        for chunk in range(60):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * chunk, Fraction(1, 16000)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert [number_of(image) for image in decode_frames(path, [0, 29])] == [0, 29]


def _bad_file(name, folder, root):
    path = root / name
    if name == "missing.mp4":
        return path
    if name == "empty.mp4":
        path.write_bytes(b"")
    elif name == "text.mp4":
        path.write_text("this is not a film\n" * 100)
    elif name == "audio.mp4":
        make_audio(path)
    elif name == "no_rate.mkv":
        make_video(path, frames=1, codec="mjpeg", pix_fmt="yuvj420p")
        # Matroska's default duration (23 E3 83), under a number that means nothing.
        path.write_bytes(path.read_bytes().replace(b"\x23\xe3\x83", b"\x23\xe3\x8f"))
    elif name == "no_durations.mp4":
        data = bytearray(make_video(path, frames=10, codec_options={"preset": "ultrafast"}).read_bytes())
        table = data.index(b"stts")  # one entry: 10 frames of equal length
        assert data[table + 8 : table + 16] == (1).to_bytes(4, "big") + (10).to_bytes(4, "big")
        data[table + 16 : table + 20] = bytes(4)
        path.write_bytes(data)
    elif name == "no_moov.mp4":
        cut_bytes(folder / "b_frames.mp4", path, 0.5)
    else:
        cut_bytes(folder / name.removeprefix("half_"), path, 0.499)  # 0.5 is between two packets of a stream of them
    return path


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing.mp4", "there is no such file"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "cannot be opened as a video"),
        ("audio.mp4", "holds no video stream"),
        ("no_rate.mkv", "no frame rate"),
        ("no_durations.mp4", "no frame rate"),
        ("no_moov.mp4", "cannot be opened as a video"),
        ("half_faststart.mp4", "cut off"),
        ("half_fragmented.mp4", "cut off"),
        ("half_open_gop.mkv", "cut off"),
        ("half_vp9.webm", "cut off"),
        ("half_mpeg4.avi", "cut off"),
        ("half_h264_two_ticks.avi", "cut off"),
        ("half_mpeg2.mpg", "cut off"),
        ("half_h264.ts", "cut off"),
        ("half_h264.flv", "cut off"),
        ("half_wmv2.wmv", "cut off"),
    ],
)
def test_bad_files_raise_with_a_cause(folder, tmp_path, name, cause):
    path = _bad_file(name, folder, tmp_path)
    with pytest.raises(VideoReadError, match=cause) as caught:
        read_frames(path, FrameSampling())
    assert caught.value.path == str(path)
    assert cause in caught.value.cause
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["faststart.mp4", "edit_list.mp4", "open_gop.mkv", "vp8.webm", "mpeg4_b.avi", "h264.avi"]
)
def test_wherever_a_file_is_cut_it_raises_or_nothing_is_missing(folder, tmp_path, name):
    whole = read_frames(folder / name, FrameSampling())
    raised = 0
    for share in np.linspace(0.02, 0.998, 25):
        path = cut_bytes(folder / name, tmp_path / name, share)
        try:
            assert np.array_equal(read_frames(path, FrameSampling()), whole), share
        except VideoReadError:
            raised += 1
    assert raised >= 22


@pytest.mark.parametrize("name", ["faststart.mp4", "mpeg4.avi", "mpeg2.ts", "av1.mp4", "h263.3gp"])
def test_bit_errors_raise(folder, tmp_path, name):
    path = flip_bits(folder / name, tmp_path / name, [(0.4, 0.8)])
    with pytest.raises(VideoReadError):
        decode_frames(path, list(range(0, 90, 9)))


def test_damage_after_the_last_wanted_frame_does_not_matter(folder, references, tmp_path):
    path = flip_bits(folder / "faststart.mp4", tmp_path / "late.mp4", [(0.8, 1.0)])
    assert np.array_equal(decode_frames(path, [0, 31]), np.stack([references["faststart.mp4"][i] for i in (0, 31)]))
    with pytest.raises(VideoReadError, match=r"decoded [1-9]\d* of 3 wanted frames") as caught:
        decode_frames(path, [0, 31, 89])
    assert caught.value.wanted == 3


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoReadError("film.mp4", "it is cut off", 3, 12)))
    assert (error.path, error.cause, error.decoded, error.wanted) == ("film.mp4", "it is cut off", 3, 12)
    assert "cannot read film.mp4: it is cut off (decoded 3 of 12 wanted frames)" in str(error)


class _Clips(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        return read_frames(self.paths[item], FrameSampling())


def test_the_error_comes_out_of_a_loader_worker_as_itself(folder, tmp_path):
    missing = tmp_path / "missing.mp4"
    loader = torch.utils.data.DataLoader(_Clips([folder / "ntsc.mp4", missing]), num_workers=1, batch_size=None)
    batches = iter(loader)
    assert next(batches).shape == (3, 64, 96, 3)
    with pytest.raises(VideoReadError, match=r"missing\.mp4: there is no such file"):
        next(batches)

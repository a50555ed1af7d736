"""Videos as phones, cameras and streaming sites make them: what their packets say is not what the decoder shows."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import field_coded
import numpy as np
import pytest
from video_files import copy_stream, cut_bytes, flip_bits, make_video, number_of, picture

from dataloaders.video import FrameSampling, FrameTransform, VideoReadError, decode_frames, probe_video, read_frames
from dataloaders.video import packets as packets_module
from preprocess.compress_video import main as compress_video

OPEN_GOP = {"preset": "veryfast", "x264-params": "scenecut=0:b-adapt=0:bframes=3:b-pyramid=normal:open-gop=1:keyint=15"}
RADL = {"x265-params": "log-level=none:radl=2:open-gop=0:bframes=3:b-adapt=0:keyint=25:min-keyint=25:scenecut=0"}
X265 = {"x265-params": "log-level=none:scenecut=0:bframes=0:keyint=25:min-keyint=25"}
CIF = {"size": (176, 144)}


def plainly_decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24", interpolation="BICUBIC") for frame in container.decode(video=0)]


def assert_plain(path: Path) -> list[int]:
    """The reader gives what a plain decode gives, whole and in parts; the numbers that the frames show."""
    expected = plainly_decoded(path)
    count = probe_video(path).frame_count
    some = sorted(np.random.default_rng(0).choice(count, 5, replace=False).tolist())
    for indices in ([count - 1], some, list(range(count))):
        assert np.array_equal(decode_frames(path, indices), np.stack([expected[index] for index in indices]))
    assert probe_video(path).frame_count == len(expected)
    return [number_of(image) for image in expected]


def remux(source: Path, target: Path, times=None, edit=lambda position, packet: packet) -> Path:
    """Copy packets; times: of the packets, in ms."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for position, packet in enumerate(p for p in reader.demux(stream) if p.size):
            packet = edit(position, packet)
            if times is not None:
                packet.pts = packet.dts = times[position]
                packet.duration, packet.time_base = 0, Fraction(1, 1000)
            packet.stream = copy
            writer.mux(packet)
    return target


@pytest.mark.parametrize(("name", "codec"), [("a.3gp", "h263"), ("b.mp4", "mpeg4"), ("c.mkv", "msmpeg4")])
def test_false_keyframe_flags_do_not_give_grey_pictures(tmp_path, name, codec):
    source = make_video(tmp_path / f"source{name[1:]}", 60, codec=codec, gop=1000, **CIF)

    def every_twentieth(position, packet):
        packet.is_keyframe = position % 20 == 0
        return packet

    path = copy_stream(source, tmp_path / name, edit=every_twentieth)
    # Asked first for what lies behind a false keyframe, then for all.
    assert [number_of(image) for image in decode_frames(path, [5, 30, 55])] == [5, 30, 55]
    assert assert_plain(path) == list(range(60))


@pytest.mark.parametrize(
    ("name", "how"),
    [("a.mp4", {"codec": "mpeg4", "gop": 25}), ("b.mp4", {"codec": "libx265", "codec_options": X265})],
)
def test_a_first_keyframe_that_is_not_marked(tmp_path, name, how):
    def unmarked(position, packet):
        packet.is_keyframe = packet.is_keyframe and position > 0
        return packet

    path = copy_stream(make_video(tmp_path / f"source_{name}", 60, **how), tmp_path / name, edit=unmarked)
    assert probe_video(path).frame_count == 60
    assert assert_plain(path) == list(range(60))


def test_a_first_packet_that_is_no_keyframe_though_marked(tmp_path):
    source = make_video(tmp_path / "source.mkv", 60, codec="libx265", codec_options=X265)

    def marked(position, packet):
        packet.is_keyframe = packet.is_keyframe or position == 5
        return packet

    path = copy_stream(source, tmp_path / "cut.mkv", lambda position, _: position >= 5, edit=marked)
    frames = read_frames(path, FrameSampling("stride", 1, 12))
    assert probe_video(path).frame_count == 35  # from the keyframe of picture 25 on
    assert number_of(frames[0]) == 25


def test_leading_pictures_that_can_be_decoded_are_shown(tmp_path):
    source = make_video(tmp_path / "source.mkv", 100, codec="libx265", codec_options=RADL, **CIF)
    with av.open(str(source)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    path = copy_stream(source, tmp_path / "cut.mkv", lambda position, _: position >= keys[1])
    numbers = assert_plain(path)
    assert numbers == list(range(100 - len(numbers), 100))
    assert len(numbers) > 75  # more than from the keyframe on


@pytest.mark.parametrize("extension", ["mkv", "mp4"])
def test_warnings_of_a_cut_open_group_are_no_damage(tmp_path, extension):
    source = make_video(tmp_path / "source.mkv", 90, codec_options=OPEN_GOP)
    with av.open(str(source)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    path = copy_stream(source, tmp_path / f"cut.{extension}", lambda position, _: position >= keys[1])
    assert assert_plain(path) == list(range(15, 90))


def test_a_missing_reference_is_damage_though_the_decoder_guesses(tmp_path):
    source = make_video(tmp_path / "source.mkv", 90, codec_options=OPEN_GOP)
    originals = plainly_decoded(source)
    with av.open(str(source)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    refused = 0
    for lost in range(keys[3] + 4, keys[3] + 12):
        name = tmp_path / f"without_{lost}.mkv"
        path = copy_stream(source, name, lambda position, _, lost=lost: position >= keys[1] and position != lost)
        try:
            frames = decode_frames(path, list(range(74)))
        except VideoReadError as error:
            assert "missing" in error.cause  # noqa: PT017 - some are read, some are not
            refused += 1
        else:  # nothing leans on what was lost
            assert all(np.array_equal(image, originals[number_of(image)]) for image in frames)
        assert len(plainly_decoded(path)) == 74  # FFmpeg makes something up
    assert refused >= 3


@pytest.mark.parametrize("own_time", [True, False])
def test_hidden_pictures_are_not_counted(tmp_path, own_time):
    source = make_video(tmp_path / "source.webm", 60, codec="libvpx", codec_options={"auto-alt-ref": "0"})

    def hide(position, packet):
        if position % 10 != 5:
            return packet
        data = bytearray(bytes(packet))
        data[0] &= ~0x10  # the bit "show" of VP8's frame tag
        hidden = av.Packet(bytes(data))
        hidden.pts = hidden.dts = packet.pts if own_time else packet.pts + packet.duration
        hidden.time_base = packet.time_base
        return hidden

    path = copy_stream(source, tmp_path / "hidden.webm", edit=hide)
    assert assert_plain(path) == [number for number in range(60) if number % 10 != 5]


@pytest.mark.parametrize("name", ["camcorder.mts", "camcorder.m2ts", "camcorder.mkv", "camcorder.mp4"])
def test_two_fields_are_one_picture(tmp_path, name):
    path = field_coded.write(tmp_path / name)
    info = probe_video(path)
    assert (info.fps, info.frame_count) == (25, 48)
    image = read_frames(path, FrameSampling("stride", 1, 2))[1]
    luma = (image[..., 1].astype(float).mean(1) - 16 * 255 / 219) * 219 / 255 + 16  # grey: all colours alike
    assert FrameSampling().choose(info.fps, info.frame_count) == [0, 25]
    upper, lower = luma[::2].mean(), luma[1::2].mean()
    assert upper < lower
    expected = plainly_decoded(path)
    assert len(expected) == 48
    assert np.array_equal(image, expected[25])


def test_rates_come_from_the_pictures_where_the_header_contradicts_them(tmp_path):
    stamps = [round(number * 1000 / 30) for number in range(300)]
    source = make_video(tmp_path / "source.mkv", 300, fps=30, b_frames=0, codec_options={"preset": "ultrafast"})
    thousand = remux(source, tmp_path / "thousand.mkv", stamps)
    data = bytearray(thousand.read_bytes())
    at = data.find(b"\x23\xe3\x83")  # DefaultDuration: 1 ms a picture
    size = data[at + 3] & 0x7F
    data[at + 4 : at + 4 + size] = (1_000_000).to_bytes(size, "big")
    thousand.write_bytes(data)
    ten = list(range(0, 300, 30))
    info = probe_video(thousand)
    assert info.fps == pytest.approx(30, rel=1e-3)
    assert FrameSampling("stride").choose(info.fps, info.frame_count) == ten
    assert "its header says" in info.notes[0]
    # A screen recording: busy for a second, then five pictures a second; 75 pictures in ten seconds.
    kept = [number for number in range(300) if number < 30 or number % 6 == 0]
    for name, codec in (("screen.webm", "libvpx"), ("screen.mkv", "libx264"), ("screen.mp4", "libx264")):
        path = make_video(tmp_path / name, 75, codec=codec, b_frames=0, pts_of=lambda number: stamps[kept[number]])
        info = probe_video(path)
        assert info.frame_count == 75
        assert len(FrameSampling("stride", max_frames=100).choose(info.fps, 75)) == 10


def null_frames(path: Path, gone: set[int]) -> Path:
    """Empty the chunks of an AVI's frames: players show the frame before again, as capture programs write it."""
    data = path.read_bytes()
    movi = data.find(b"movi")
    index = data.find(b"idx1", movi)
    count = struct.unpack("<I", data[index + 4 : index + 8])[0] // 16
    chunks, entries = bytearray(), b""
    for number in range(count):
        name, flags, offset, size = struct.unpack_from("<4sIII", data, index + 8 + 16 * number)
        body = b"" if number in gone else data[movi + offset + 8 : movi + offset + 8 + size]
        entries += struct.pack("<4sIII", name, 0 if number in gone else flags, 4 + len(chunks), len(body))
        chunks += name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    head = bytearray(data[: movi + 4])
    head[movi - 4 : movi] = struct.pack("<I", 4 + len(chunks))
    whole = head + chunks + b"idx1" + struct.pack("<I", len(entries)) + entries
    whole[4:8] = struct.pack("<I", len(whole) - 8)
    path.write_bytes(whole)
    return path


def test_repeated_pictures_of_an_avi_file(tmp_path):
    how = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "fps": 30}
    path = null_frames(make_video(tmp_path / "some.avi", 300, **how), {n for n in range(30, 299) if n % 6})
    info = probe_video(path)
    assert (info.frame_count, round(info.fps, 1)) == (76, 7.5)
    # 7.5 pictures a second: every eighth of the 76, whose 30th and later show 30, 36, 42 and so on.
    assert [number_of(image) for image in decode_frames(path, [0, 29, 30, 31])] == [0, 29, 30, 36]
    ending = null_frames(make_video(tmp_path / "ending.avi", 90, **how), {87, 88, 89})
    assert (probe_video(ending).frame_count, probe_video(ending).fps) == (87, 29)
    with pytest.raises(VideoReadError, match="cut off"):
        probe_video(cut_bytes(ending, tmp_path / "cut.avi", 0.9))


def test_a_fragmented_file_with_index_sound_and_b_frames_is_whole(tmp_path):
    path = tmp_path / "fragmented.mp4"
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"}
    with av.open(str(path), "w", options=options) as out:
        film, sound = out.add_stream("libx264", rate=25), out.add_stream("aac", rate=44100)
        film.width, film.height, film.pix_fmt, film.gop_size = 96, 64, "yuv420p", 25
        film.codec_context.max_b_frames = 3
        for number in range(100):
            out.mux(film.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        out.mux(film.encode(None))
        for n in range(4 * 44100 // 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, n * 1024, Fraction(1, 44100)
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    assert (probe_video(path).fps, probe_video(path).frame_count) == (25, 100)
    with pytest.raises(VideoReadError, match="cut off"):
        probe_video(cut_bytes(path, tmp_path / "half.mp4", 0.5))


def test_a_mirrored_picture_is_mirrored_back(tmp_path):
    path = make_video(tmp_path / "selfie.mp4", 20)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(data)
    assert number_of(decode_frames(path, [5])[0][:, ::-1]) == 5
    (tmp_path / "in").mkdir()
    path.rename(tmp_path / "in" / "selfie.mp4")
    folders = ["--input_root", str(tmp_path / "in"), "--output_root", str(tmp_path / "out"), "--num_workers", "1"]
    assert compress_video([*folders, "--size", "64"]) == 0
    assert number_of(plainly_decoded(tmp_path / "out" / "selfie.mp4")[0][:, ::-1]) < 10


def test_wide_gamut_is_as_bright_after_compression(tmp_path):
    (tmp_path / "in").mkdir()
    path = make_video(tmp_path / "in" / "hlg.mp4", 30, colour=(9, 18, 9))  # BT.2020 with the HLG curve
    folders = ["--input_root", str(tmp_path / "in"), "--output_root", str(tmp_path / "out"), "--num_workers", "1"]
    assert compress_video([*folders, "--size", "64", "--fps", "30"]) == 0
    before, after = decode_frames(path, [10])[0], decode_frames(tmp_path / "out" / "hlg.mp4", [10])[0]
    assert number_of(after) == 10
    assert abs(before.astype(int) - after).mean() < 6


def test_sound_before_the_picture_is_no_fault(tmp_path):
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "late.webm"), "w") as out:
        film, sound = out.add_stream("libvpx", rate=30), out.add_stream("libopus", rate=48000)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        sound.layout = "mono"
        for n in range(6 * 50):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, n * 960, Fraction(1, 48000)
            out.mux(sound.encode(frame))
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number + 90, Fraction(1, 30)
            out.mux(film.encode(frame))
        out.mux(film.encode(None))
    folders = ["--input_root", str(tmp_path / "in"), "--output_root", str(tmp_path / "out"), "--num_workers", "1"]
    assert compress_video(folders) == 0
    assert len(plainly_decoded(tmp_path / "out" / "late.mp4")) == 6  # 2 s at 3 a second


def test_a_still_picture_before_the_film_is_passed_over(tmp_path):
    for extension in ("mkv", "mp4"):
        path = tmp_path / f"film.{extension}"
        with av.open(str(path), "w") as out:
            still, film = out.add_stream("mjpeg", rate=1), out.add_stream("mpeg4", rate=30)
            for stream, pix_fmt in ((still, "yuvj420p"), (film, "yuv420p")):
                stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
            out.mux(still.encode(av.VideoFrame.from_ndarray(picture(999), format="rgb24")))
            for number in range(30):
                out.mux(film.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
            out.mux(still.encode(None))
            out.mux(film.encode(None))
        assert probe_video(path).frame_count == 30
        assert [number_of(image) for image in decode_frames(path, [0, 20])] == [0, 20]


def test_less_than_a_frame_a_second(tmp_path):
    path = make_video(tmp_path / "slides.mp4", 20, fps=Fraction(1, 5))
    assert probe_video(path).fps == 0.2
    for rule in ("stride", "second"):
        frames = read_frames(path, FrameSampling(rule, 1, 30))
        assert [number_of(image) for image in frames] == list(range(20))
        frames = read_frames(path, FrameSampling(rule, 1, 30), start=10, end=25)
        assert [number_of(image) for image in frames] == [2, 3, 4, 5]
        assert [number_of(image) for image in read_frames(path, FrameSampling(rule, 1, 2))] == [0, 19]
    with pytest.raises(ValueError, match="cannot choose frames"):
        FrameSampling("second").choose(0.2, 20)


def test_a_relative_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "plain.mp4", 10).rename("a:b.mp4")
    assert number_of(decode_frames("a:b.mp4", [7])[0]) == 7


def test_frames_are_resized_as_they_come_to_the_same_pixels(tmp_path):
    path = make_video(tmp_path / "large.mp4", 60, size=(320, 240))
    sampling, transform = FrameSampling("stride", 5, 12), FrameTransform(64)
    whole = transform(read_frames(path, sampling))
    single = read_frames(path, sampling, transform=transform)
    assert len(single) == len(whole) == 10
    assert all(np.array_equal(one[0], other) for one, other in zip(single, whole))


def test_a_random_rule_draws_the_same_whether_or_not_a_file_had_to_be_counted(tmp_path):
    source = make_video(tmp_path / "source.mp4", 60, codec="mpeg4", gop=1000)

    def marked(position, packet):
        packet.is_keyframe = position % 20 == 0
        return packet

    path = copy_stream(source, tmp_path / "lies.mp4", edit=marked)

    class Drawn(FrameSampling):
        def choose(self, fps, frame_count, start=None, end=None, generator=None):
            return [40 + int(generator.integers(0, 20))]

    packets_module._seen.clear()
    first, second = (read_frames(path, Drawn(), generator=np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    make_video(tmp_path / "clip.mp4", 90)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "videos.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert (names["info"].fps, names["info"].frame_count, names["frames"].shape) == (30, 90, (3, 64, 96, 3))


def test_damage_stays_refused_in_files_that_are_odd(tmp_path):
    source = make_video(tmp_path / "source.mkv", 90, codec_options=OPEN_GOP)
    cut = copy_stream(source, tmp_path / "cut.mkv", lambda position, _: position >= 28)
    whole = decode_frames(cut, list(range(60)))
    refused = 0
    for seed in range(12):
        path = flip_bits(cut, tmp_path / "damaged.mkv", [(0.3, 0.9)], seed, every=400)
        try:
            assert np.array_equal(decode_frames(path, list(range(60))), whole)
        except VideoReadError:
            refused += 1
    assert refused >= 10


def test_a_lost_reference_is_noticed_where_numbers_begin_anew(tmp_path):
    how = {"codec_options": {"x264-params": "scenecut=0:bframes=0:keyint=1000:ref=4"}}
    source = make_video(tmp_path / "source.mkv", 60, **how)
    for lost in (15, 16, 17, 31, 32):  # numbers count modulo 16
        path = copy_stream(source, tmp_path / f"{lost}.mkv", lambda position, _, lost=lost: position != lost)
        with pytest.raises(VideoReadError):
            decode_frames(path, list(range(59)))


def test_of_two_films_the_first_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        films = [out.add_stream("mpeg4", rate=rate) for rate in (15, 30)]
        for film in films:
            film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        for number in range(60):
            for film, step in zip(films, (2, 1)):
                if number % step == 0:
                    frame = av.VideoFrame.from_ndarray(picture(number if step == 1 else 500 + number), format="rgb24")
                    frame.pts, frame.time_base = number // step, Fraction(step, 30)
                    out.mux(film.encode(frame))
        for film in films:
            out.mux(film.encode(None))
    assert (probe_video(path).fps, probe_video(path).frame_count) == (15, 30)
    assert [number_of(image) for image in decode_frames(path, [0, 10])] == [500, 520]


def test_a_still_scene_whose_packets_are_small_is_not_taken_for_placeholders(tmp_path):
    source = make_video(
        tmp_path / "source.avi", 60, codec="mpeg4", gop=30, draw=lambda number, *size: picture(7, *size)
    )

    def cut(position, packet):
        if position != 10:
            return packet
        short = av.Packet(bytes(packet)[:4])
        short.pts, short.dts, short.time_base = packet.pts, packet.dts, packet.time_base
        return short

    with av.open(str(source)) as container:
        assert next(p.size for n, p in enumerate(container.demux(video=0)) if n == 10) < 20
    for extension in ("avi", "mkv"):
        path = remux(source, tmp_path / f"short.{extension}", edit=cut)
        with pytest.raises(VideoReadError):
            decode_frames(path, list(range(60)))

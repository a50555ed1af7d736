"""Folders of extracted frames in place of videos: the same choice of frames, the same errors as for videos."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from video_files import make_video, number_of, picture

from dataloaders.video import FrameSampling, FrameTransform, VideoReadError, decode_frames, probe_video
from dataloaders.video.decode import VideoFiles
from dataloaders.video.folders import FrameFolders, index_folders
from main_task_retrieval import main

TRANSFORM = FrameTransform(64, "squash")


def write_pictures(folder: Path, images, name: str = "{:06d}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=1):
        assert cv2.imwrite(str(folder / name.format(number)), np.ascontiguousarray(image[..., ::-1]))
    return folder


@pytest.mark.parametrize("sampling", [FrameSampling("stride", 2, 5), FrameSampling("second", 1, 12)])
@pytest.mark.parametrize("span", [(None, None), (1.0, 2.5)])
def test_all_frames_of_a_video_give_what_the_video_gives(tmp_path, sampling, span):
    """Every frame, without loss, at the video's own rate: the rule chooses the same ones."""
    video = make_video(tmp_path / "v.mp4", 100, fps=25)
    frames = decode_frames(video, range(100))
    folder = write_pictures(tmp_path / "v", frames)
    assert probe_video(video).fps == 25
    given = sampling, *span, None, TRANSFORM
    assert torch.equal(FrameFolders(25.0).read(folder, *given, []), VideoFiles().read(video, *given, []))


def test_pictures_come_in_natural_order_whatever_their_kind(tmp_path):
    folder = write_pictures(tmp_path / "v", [picture(n) for n in range(12)], "frame{}.png")
    for number, kind in ((3, "jpg"), (11, "webp")):
        old = folder / f"frame{number}.png"
        cv2.imwrite(str(folder / f"frame{number}.{kind}"), cv2.imread(str(old)))
        old.unlink()
    (folder / "notes.txt").write_text("no picture")
    (folder / ".frame0.png").write_bytes(b"hidden")
    read = FrameFolders(1.0).read(folder, FrameSampling("stride", 1, 12), None, None, None, FrameTransform(64), [])
    whole = [number_of(image) for image in decode_like(folder)]
    assert len(read) == 12
    assert whole == list(range(12))


def decode_like(folder: Path) -> list[np.ndarray]:
    """The pictures that a reader takes, in its order, at their own size."""
    from dataloaders.video.folders import picture as read_picture

    held = FrameFolders(1.0).probe(folder)
    return [read_picture(held, name) for name in held.pictures]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_picture_that_is_cut_off_or_no_picture_is_an_error(tmp_path, kind):
    folder = write_pictures(tmp_path / "v", [picture(n, 320, 240) for n in range(3)], "{}." + kind)
    bad, read = folder / f"2.{kind}", FrameFolders(1.0).read
    whole = bad.read_bytes()
    given = FrameSampling("stride", 1, 12), None, None, None, TRANSFORM
    for content in (b"", b"rubbish", whole[: len(whole) // 10], whole[: len(whole) // 2], whole[:-20]):
        bad.write_bytes(content)
        with pytest.raises(VideoReadError, match=rf"cannot read {folder}: 2.{kind} is (cut off|no picture)"):
            read(folder, *given, [])
    bad.write_bytes(whole)
    assert len(read(folder, *given, [])) == 3


def test_empty_folders_are_as_missing_ones(tmp_path):
    write_pictures(tmp_path / "full", [picture(0)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    (tmp_path / "file.jpg").write_bytes(b"a")
    assert index_folders(tmp_path) == {"full": tmp_path / "full"}
    with pytest.raises(VideoReadError, match="it holds no picture"):
        FrameFolders(1.0).probe(tmp_path / "empty")
    with pytest.raises(VideoReadError, match="it cannot be listed"):
        FrameFolders(1.0).probe(tmp_path / "gone")


def test_a_picture_written_over_changes_the_version(tmp_path):
    folder, reader = write_pictures(tmp_path / "v", [picture(0), picture(1)]), FrameFolders(1.0)
    before = reader.version(folder)
    assert reader.version(folder) == before
    write_pictures(folder, [picture(2)])
    assert reader.version(folder) != before


@pytest.fixture
def frames_flags(msrvtt_flags, tmp_path) -> list[str]:
    """Flags of a run on the sample's frames, three a second, in place of its videos."""
    flags = list(msrvtt_flags)
    at = flags.index("--features_path")
    for video in Path(flags[at + 1]).glob("*"):
        info = probe_video(video)
        numbers = range(0, info.frame_count, round(info.fps / 3))
        write_pictures(tmp_path / "frames" / video.stem, decode_frames(video, numbers), "{:06d}.jpg")
    flags[at : at + 2] = ["--frames_path", str(tmp_path / "frames"), "--frames_fps", "3"]
    return [*flags, "--batch_size", "12"]


def test_a_run_reads_frames(frames_flags, tmp_path, capsys):
    """Trains and evaluates; a missing folder and a bad picture are what a missing and a bad video are."""
    assert main(["--do_train", "--epochs", "1", *frames_flags]) == 0
    assert "folders of frames, 3 a second" in capsys.readouterr().out
    listed = sorted((tmp_path / "frames").glob("*"))
    tested = (Path(frames_flags[frames_flags.index("--val_csv") + 1])).read_text()
    first, second = [folder for folder in listed if f"{folder.name}," in tested][:2]
    shutil.rmtree(first)
    for name in list(second.iterdir()):
        name.write_bytes(name.read_bytes()[:200])
    assert main(["--do_eval", *frames_flags]) == 1
    assert f"1 of 12 videos of msrvtt test are missing on disk: '{first.name}'" in capsys.readouterr().err
    assert main(["--do_eval", "--allow_missing", *frames_flags]) == 0
    shown = capsys.readouterr().out
    assert second.name in shown
    assert "10 captions x 10 videos" in shown


def test_what_does_not_go_together_is_refused(frames_flags, msrvtt_flags, tmp_path, capsys):
    def refused(*flags: str) -> str:
        with pytest.raises(SystemExit):
            main(["--do_eval", *flags])
        return capsys.readouterr().err

    at = frames_flags.index("--frames_fps")
    assert "--frames_path needs --frames_fps" in refused(*frames_flags[:at], *frames_flags[at + 2 :])
    assert "exclude each other" in refused(*frames_flags, "--features_path", str(tmp_path))
    assert "with --frames_path leave it out" in refused(*frames_flags, "--frame_cache", str(tmp_path / "c"))
    assert "--frames_fps belongs to --frames_path" in refused(*msrvtt_flags, "--frames_fps", "3")
    assert "--frame_cache_format belongs to --frame_cache" in refused(*msrvtt_flags, "--frame_cache_format", "jpeg")
    assert "--frame_cache_gb belongs to --frame_cache" in refused(*msrvtt_flags, "--frame_cache_gb", "3")
    at = msrvtt_flags.index("--features_path")
    assert "--frames_path for frames" in refused(*msrvtt_flags[:at], *msrvtt_flags[at + 2 :])


def test_frames_given_as_videos_are_told_where_they_belong(frames_flags, msrvtt_flags, tmp_path, capsys):
    flags = list(msrvtt_flags)
    flags[flags.index("--features_path") + 1] = str(tmp_path / "frames")
    assert main(["--do_eval", *flags]) == 1
    assert "give the folder above them as --frames_path, with --frames_fps" in capsys.readouterr().err
    wrong = list(frames_flags)
    wrong[wrong.index("--frames_path") + 1] = str(tmp_path)
    assert main(["--do_eval", *wrong]) == 1
    assert f"--frames_path {tmp_path}: none of the 12 videos of msrvtt test found" in capsys.readouterr().err

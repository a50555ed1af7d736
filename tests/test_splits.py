"""RetrievalSplit, and finding its videos on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.dataset import Dataset
from dataloaders.registry import index_videos, locate_videos
from dataloaders.split import AnnotationError, Expected, RetrievalSplit, VideoClip, VideoFolderError, build_split

NONE_EXPECTED = Expected(None, None)
TOY = Dataset("toy", load=build_split, splits=("test",), extensions=(".mp4",), recursive=False)


def make(ids=("a", "b", "c"), captions=("a1", "a2", "b1", "c1"), index=(0, 0, 1, 2), **more) -> RetrievalSplit:
    clips = tuple(VideoClip(video_id) for video_id in ids)
    return RetrievalSplit("toy", "test", clips, tuple(captions), np.array(index), NONE_EXPECTED, **more)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_a_split_counts_captions_per_video():
    split = make()
    assert split.captions_per_video.tolist() == [2, 1, 1]
    assert split.caption_to_video.dtype == np.int64


def test_a_split_does_not_share_its_index_with_the_caller():
    index = np.array([0, 0, 1, 2])
    split = RetrievalSplit("toy", "test", make().videos, make().captions, index, NONE_EXPECTED)
    index[0] = 2
    assert split.caption_to_video.tolist() == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        split.caption_to_video[0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": (0, 0, 1, 3)}, r"toy test: caption 3 \('c1'\) points at video 3, there are 3"),
        ({"index": (0, 0, 1, -1)}, r"points at video -1"),
        ({"index": (0, 0, 1, 1)}, r"toy test: videos without a caption: 'c'"),
        ({"captions": ("a1", " \t", "b1", "c1")}, r"toy test: caption 1 of video 'a' is empty"),
        ({"captions": ("a1", "a2", "&amp;nbsp; ", "c1")}, r"toy test: caption 2 of video 'b' is empty"),
        ({"ids": ("a", "b", "a")}, r"toy test: video id 'a' occurs twice"),
        ({"index": (0, 0, 1)}, r"toy test: 4 captions but 3 entries"),
        ({"index": (0.0, 0.0, 1.0, 2.0)}, r"must be integers"),
        ({"ids": (), "captions": (), "index": ()}, r"toy test: no video is left"),
        ({"missing_videos": ("b",)}, r"both present and missing: 'b'"),
    ],
)
def test_an_inconsistent_split_is_refused(change, message):
    with pytest.raises(AnnotationError, match=message):
        make(**change)


def test_drop_takes_the_captions_along_and_reindexes():
    split = make().drop(["a"])
    assert [clip.video_id for clip in split.videos] == ["b", "c"]
    assert split.captions == ("b1", "c1")
    assert split.caption_to_video.tolist() == [0, 1]
    assert split.missing_videos == ("a",)
    assert split.drop(["c"]).missing_videos == ("a", "c")


def test_drop_of_nothing_all_or_unknown():
    split = make()
    assert split.drop([]) is split
    with pytest.raises(AnnotationError, match=r"no video is left \(3 missing: 'a', 'b', 'c'\)"):
        split.drop(["a", "b", "c"])
    with pytest.raises(AnnotationError, match="does not hold: 'z'"):
        split.drop(["z"])


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=8), st.data())
def test_drop_keeps_every_remaining_pair(captions_per_video, data):
    clips = {VideoClip(f"v{v}"): [f"v{v} c{c}" for c in range(n)] for v, n in enumerate(captions_per_video)}
    split = build_split("toy", "test", clips, NONE_EXPECTED)
    gone = data.draw(st.sets(st.sampled_from([clip.video_id for clip in split.videos]), max_size=len(clips) - 1))
    left = split.drop(gone)
    pairs = [(left.videos[v].video_id, text) for text, v in zip(left.captions, left.caption_to_video)]
    kept = {clip.video_id: texts for clip, texts in clips.items() if clip.video_id not in gone}
    assert pairs == [(video_id, text) for video_id, texts in kept.items() for text in texts]


def test_the_order_of_extensions_decides(tmp_path):
    touch(tmp_path, "a.webm", "a.mp4", "b.webm", "C.MP4", ".hidden.mp4", ".mp4", "notes.txt")
    assert index_videos(tmp_path, (".mp4", ".webm")) == {
        "a": tmp_path / "a.mp4",
        "b": tmp_path / "b.webm",
        "C": tmp_path / "C.MP4",
    }
    assert index_videos(tmp_path, (".webm", ".mp4"))["a"] == tmp_path / "a.webm"


def test_the_longest_extension_is_taken_off(tmp_path):
    touch(tmp_path, "a.m2.ts", "b.m2ts", "c.", "d.00.51-00.54.avi")
    assert set(index_videos(tmp_path, (".ts", ".m2ts", ".", ".avi"))) == {"a.m2", "b", "c", "d.00.51-00.54"}


def test_sub_folders_only_when_asked(tmp_path):
    touch(tmp_path, "train/a.mp4", "b.mp4", ".cache/c.mp4")
    assert set(index_videos(tmp_path, (".mp4",))) == {"b"}
    assert index_videos(tmp_path, (".mp4",), recursive=True) == {
        "a": tmp_path / "train" / "a.mp4",
        "b": tmp_path / "b.mp4",
    }


def test_two_files_for_one_video_are_an_error_naming_both(tmp_path):
    touch(tmp_path, "one/a.mp4", "two/a.mp4")
    with pytest.raises(VideoFolderError, match=r"one/a\.mp4 and .*two/a\.mp4"):
        index_videos(tmp_path, (".mp4",), recursive=True)


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "real/a.mp4")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(root)
    assert index_videos(root, (".mp4",), recursive=True) == {"a": root / "link" / "a.mp4"}


def test_missing_videos_are_dropped_and_listed(tmp_path):
    split = locate_videos(make(), touch(tmp_path, "a.mp4", "c.mp4"), TOY)
    assert [clip.path for clip in split.videos] == [tmp_path / "a.mp4", tmp_path / "c.mp4"]
    assert split.missing_videos == ("b",)
    assert split.captions == ("a1", "a2", "c1")


def test_candidates_are_tried_in_order(tmp_path):
    touch(tmp_path, "v_a.mp4", "a.mp4", "b.mp4", "v_c.mp4")
    split = locate_videos(make(), tmp_path, replace(TOY, candidates=lambda i: [f"v_{i}", i]))
    assert [clip.path.name for clip in split.videos] == ["v_a.mp4", "b.mp4", "v_c.mp4"]


def test_a_folder_without_the_videos_says_what_was_looked_for(tmp_path):
    with pytest.raises(VideoFolderError, match=r"--features_path .*nowhere does not exist"):
        locate_videos(make(), tmp_path / "nowhere", TOY)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(VideoFolderError, match=r"--features_path .*file is a file"):
        locate_videos(make(), file, TOY)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VideoFolderError, match=r"'a\.mp4' \(\.mp4\) directly in it; it holds no video \(no file"):
        locate_videos(make(), empty, TOY)
    touch(empty, "x.txt", "y.txt")
    with pytest.raises(VideoFolderError, match=r"holds no video \(2 \.txt"):
        locate_videos(make(), empty, TOY)
    touch(empty, "all/a.mp4")
    with pytest.raises(VideoFolderError, match=r"holds no video .*; is it one of its folders 'all'\?"):
        locate_videos(make(), empty, TOY)
    touch(empty, "frames/a/0001.jpg", "frames/b/0001.jpg")
    with pytest.raises(VideoFolderError, match=r"; is it one of its folders 'all', 'frames'\?"):
        locate_videos(make(), empty, TOY)  # videos come first
    (empty / "all" / "a.mp4").unlink()
    for recursive in (False, True):
        with pytest.raises(
            VideoFolderError, match=r"it holds extracted frames, such as those in .*/frames/a, and no v"
        ):
            locate_videos(make(), empty, replace(TOY, recursive=recursive))
    touch(empty, "other.mp4")
    with pytest.raises(VideoFolderError, match=r"none of the 3 videos of toy test .* such as 'other'"):
        locate_videos(make(), empty, TOY)

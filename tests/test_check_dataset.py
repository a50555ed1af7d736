"""The offline data check on small real videos: what it reports, in words, in JSON and as exit status."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from video_files import cut_bytes, make_video

from dataloaders.annotation_files import AnnotationFiles
from dataloaders.msrvtt import Options, load
from dataloaders.split import Expected, VideoClip, build_split
from preprocess.check_dataset import main, t2v_r1_ceiling

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "v.mp4", 60)


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("video_id", "sentence"), *rows])
    return path


@pytest.fixture
def sample(tmp_path, video) -> Path:
    """An MSR-VTT tree with videos v0..v3: v0, v1 to train with two captions each, v2, v3 to test."""
    (tmp_path / "videos").mkdir()
    for n in range(4):
        shutil.copy(video, tmp_path / "videos" / f"v{n}.mp4")
    write_list(tmp_path / "test.csv", [("v2", "a cat"), ("v3", "a dog")])
    write_list(tmp_path / "train.csv", [("v0", ""), ("v1", "")])
    sentences = [{"video_id": f"v{n // 2}", "caption": f"caption {n}"} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps({"sentences": sentences}))
    counts = {"train": {"videos": 2, "captions": 4}, "test": {"videos": 2, "captions": 2}}
    (tmp_path / "expected.json").write_text(json.dumps(counts))
    return tmp_path


def check(root: Path, *more: str) -> tuple[int, dict]:
    out = root / "report.json"
    arguments = ["--datatype", "msrvtt", "--data_path", root / "data.json", "--features_path", root / "videos"]
    arguments += ["--train_csv", root / "train.csv", "--val_csv", root / "test.csv", "--json", out, *more]
    status = main([str(argument) for argument in arguments])
    return status, json.loads(out.read_text())


def test_a_clean_set_passes_in_one_line_a_split(sample, capsys):
    status, report = check(sample)
    assert status == 0
    assert capsys.readouterr().out.splitlines() == [
        "msrvtt train: ok: 2 of 2 videos, 4 of 4 captions",
        "msrvtt test: ok: 2 of 2 videos, 2 of 2 captions",
    ]
    assert report["problems"] == 0
    assert report["decoded"] is True
    assert report["splits"]["train"]["found"] == {"videos": 2, "captions": 4}
    assert report["splits"]["train"]["t2v_r1_ceiling"] == 100


def test_missing_videos_are_counted_and_named(sample, capsys):
    (sample / "videos" / "v3.mp4").unlink()
    status, report = check(sample)
    assert status == 1
    assert report["splits"]["test"]["missing_videos"] == ["v3"]
    assert report["splits"]["test"]["found"] == {"videos": 1, "captions": 1}
    out = capsys.readouterr().out
    assert "msrvtt test: 1 problems: 1 of 2 videos, 1 of 2 captions" in out
    assert "  - 1 of 2 videos of msrvtt test are missing on disk: 'v3'\n" in out
    assert "msrvtt train: ok" in out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_unreadable_videos_are_named_with_the_cause(sample, video, capsys, workers):
    cut_bytes(video, sample / "videos" / "v2.mp4", 0.5)
    (sample / "videos" / "v0.mp4").write_bytes(b"")
    status, report = check(sample, "--num_workers", workers)
    assert status == 1
    (bad,) = report["splits"]["test"]["unreadable"]
    assert (bad["video_id"], bad["path"]) == ("v2", str(sample / "videos" / "v2.mp4"))
    assert bad["error"]
    assert [entry["video_id"] for entry in report["splits"]["train"]["unreadable"]] == ["v0"]
    assert report["splits"]["train"]["found"] == {"videos": 1, "captions": 2}
    assert "1 videos cannot be read: 'v2'; first: " in capsys.readouterr().out


def test_damage_inside_a_file_shows_only_when_decoding(sample, video):
    whole = video.read_bytes()
    start = whole.index(b"mdat") + 4
    (sample / "videos" / "v2.mp4").write_bytes(whole[:start] + bytes(len(whole) - start))
    if whole.index(b"moov") > start:  # the index of the file follows the pictures: put it back
        tail = whole[whole.index(b"moov") - 4 :]
        blank = whole[:start] + bytes(len(whole) - start - len(tail)) + tail
        (sample / "videos" / "v2.mp4").write_bytes(blank)
    assert check(sample, "--no_decode")[0] == 0
    status, report = check(sample)
    assert status == 1
    assert [entry["video_id"] for entry in report["splits"]["test"]["unreadable"]] == ["v2"]


def test_videos_in_train_and_test_are_a_leak_shared_captions_are_counted(sample, capsys):
    write_list(sample / "test.csv", [("v1", "caption 0"), ("v2", "a cat")])
    status, report = check(sample)
    assert status == 1
    assert report["overlap"] == {"train/test": {"videos": ["v1"], "captions": 1}}
    out = capsys.readouterr().out
    assert "msrvtt test: ok: 2 of 2 videos, 2 of 2 captions; 1 captions also in train" in out
    assert "train/test: 1 videos are in both splits: 'v1'" in out


def test_duplicate_captions_are_told_and_no_problem(sample, capsys):
    write_list(sample / "test.csv", [("v2", "a cat"), ("v3", "a cat")])
    status, report = check(sample, "--splits", "test")
    assert status == 0
    assert list(report["splits"]) == ["test"]
    expected = "; 1 distinct captions, some on several videos: t2v R@1 cannot exceed 50.00 %"
    assert capsys.readouterr().out == f"msrvtt test: ok: 2 of 2 videos, 2 of 2 captions{expected}\n"


def test_captions_that_differ_in_case_alone_are_one(sample):
    write_list(sample / "test.csv", [("v2", "a cat"), ("v3", "A  Cat")])
    test = check(sample, "--no_decode", "--splits", "test")[1]["splits"]["test"]
    assert (test["distinct_captions"], test["t2v_r1_ceiling"]) == (1, 50)


@pytest.mark.parametrize(("words", "needed"), [(40, "--max_words 42 would suffice"), (90, "the longest has 92 tokens")])
def test_captions_that_are_cut_or_none_are_told_and_no_problem(sample, capsys, words, needed):
    write_list(sample / "test.csv", [("v2", "word " * words), ("v3", "nan")])
    status, report = check(sample, "--no_decode")
    assert status == 0
    test = report["splits"]["test"]
    assert (test["captions_cut"], test["longest_caption"]) == (1, words + 2)
    assert report["splits"]["train"]["captions_cut"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"msrvtt test: ok: 2 of 2 videos, 2 of 2 captions; 1 captions are cut at --max_words 32: {needed}" in lines[1]
    )
    none = "1 captions of msrvtt test are texts which programs write where there is none: 'v3: nan'"
    assert lines[2] == f"  - warning: {none}; are they meant so?"
    assert check(sample, "--no_decode", "--max_words", str(words + 2))[1]["splits"]["test"]["captions_cut"] == 0


def test_the_ceiling_counts_the_most_frequent_video_of_each_text():
    # "x" stands three times on a and once on b: its 4 copies all retrieve a, 3 are right. "y" is one of two.
    clips = {VideoClip("a"): ["x", "x", "x", "y"], VideoClip("b"): ["x", "y", "z", "z"]}
    split = build_split("toy", "test", clips, Expected(None, None))
    assert t2v_r1_ceiling(split) == pytest.approx(100 * (3 + 1 + 2) / 8)


def test_the_ceiling_of_msrvtt_1k_a():
    split = load("test", AnnotationFiles(options=Options(val_csv=DATA / "MSRVTT_JSFUSION_test.csv")))
    assert t2v_r1_ceiling(split) == pytest.approx(99.5)
    assert sum(copies - 1 for copies in Counter(split.captions).values()) == 5


def test_counts_that_differ_from_the_published_ones(tmp_path, video, capsys):
    data = tmp_path / "lists"
    data.mkdir()
    row = "m_{0}\t0\t1\t0\t1\tsentence {0}\n"
    (data / "LSMDC16_challenge_1000_publictect.csv").write_text("".join(row.format(n) for n in range(2)))
    (tmp_path / "videos" / "movie").mkdir(parents=True)
    for n in range(2):
        shutil.copy(video, tmp_path / "videos" / "movie" / f"m_{n}.mp4")
    arguments = ["--datatype", "lsmdc", "--data_path", str(data), "--features_path", str(tmp_path / "videos")]
    assert main([*arguments, "--splits", "test"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "lsmdc test: 1 problems: 2 of 1,000 videos, 2 of 1,000 captions",
        "  - lists 2 videos where 1,000 are expected; is it the right list? Counts of your own go into expected.json "
        "beside it",
    ]
    assert main([*arguments, "--splits", "val", "test"]) == 1
    assert "lsmdc val: cannot be loaded\n  - " in capsys.readouterr().out


def test_an_msrvtt_list_of_no_published_length_is_a_problem(sample, capsys):
    """As 990 of the 1,000 rows of 1k-A, every one of them on disk."""
    (sample / "expected.json").unlink()
    rows = (DATA / "MSRVTT_JSFUSION_test.csv").read_text().splitlines(keepends=True)[:991]
    (sample / "test.csv").write_text("".join(rows))
    for row in csv.DictReader(rows):
        (sample / "videos" / f"{row['video_id']}.mp4").symlink_to(sample / "videos" / "v0.mp4")
    status, report = check(sample, "--no_decode")
    assert status == 1
    wanted = "of the published lists ({}); if it is your own, put its counts into expected.json beside the annotations"
    assert report["splits"]["test"]["problems"] == [f"lists 990 videos, which is none {wanted.format('1,000')}"]
    lists = "9,000, 7,010, 6,513"
    assert report["splits"]["train"]["problems"] == [f"lists 2 videos, which is none {wanted.format(lists)}"]
    assert "msrvtt test: 1 problems: 990 of 1,000 videos, 990 of 1,000 captions" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_told_before_the_decoding(sample, capsys):
    for target, cause in ((sample / "videos", "Is a directory"), (sample / "no" / "r.json", "No such file")):
        with pytest.raises(SystemExit) as stopped:
            check(sample, "--json", str(target))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"--json {target} cannot be written ({cause}" in error
        assert "video/s" not in error  # no file was looked at


def test_broken_annotations_are_a_problem_of_their_split(sample, capsys):
    (sample / "data.json").write_text('{"sentences": [,]}')
    status, report = check(sample)
    assert status == 1
    assert "data.json: line 1, column 16" in report["splits"]["train"]["problems"][0]
    assert "msrvtt test: ok" in capsys.readouterr().out


def test_a_folder_without_the_videos_is_a_problem(sample):
    shutil.rmtree(sample / "videos")
    (sample / "videos").mkdir()
    status, report = check(sample)
    assert status == 1
    assert report["splits"]["test"]["missing_videos"] == ["v2", "v3"]
    assert "it holds no video" in report["splits"]["test"]["problems"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--splits", "val"], "--splits val: msrvtt has train, test"),
        (["--features_path", "nowhere"], "--features_path nowhere is not a folder"),
        (["--val_csv", "nowhere.csv"], "--val_csv nowhere.csv does not exist"),
        (["--num_workers", "0"], "--num_workers must be >= 1, got 0"),
        (["--datatype", "msvd", "--data_path", "nowhere"], "--data_path nowhere does not exist"),
        (["--max_words", "1"], "--max_words must be >= 2, got 1"),
        (["--feat", "x"], "unrecognized arguments: --feat x"),
    ],
)
def test_bad_usage_exits_with_2(sample, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        check(sample, *change)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_check_exits_with_2(tmp_path, capsys):
    for datatype, message in (("msrvtt", "give --train_csv or --val_csv"), ("msvd", "--data_path is needed")):
        with pytest.raises(SystemExit) as stopped:
            main(["--datatype", datatype, "--features_path", str(tmp_path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

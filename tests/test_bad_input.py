"""Bad input to ``main_task_retrieval.py``: one clear line naming file or flag, status 1 or 2, nothing left behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from main_task_retrieval import main

ROOT = Path(__file__).parent.parent


def with_value(flags: list[str], name: str, value: object) -> list[str]:
    flags = list(flags)
    flags[flags.index(f"--{name}") + 1] = str(value)
    return flags


def refused(capsys, flags: list[str], action: str = "--do_eval") -> str:
    assert main([action, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("flag", "content", "expected"),
    [
        ("val_csv", None, ["--val_csv", "bad.csv"]),
        ("val_csv", "key,vid_key,sentence\nret0,msr1,a dog\n", ["bad.csv", "video_id", "sentence"]),
        ("val_csv", "key,vid_key,video_id,sentence\nret0,msr1,video1,a dog\nret1,msr2,video2\n", ["bad.csv", "line 3"]),
        ("val_csv", "key,vid_key,video_id,sentence\nret0,msr1,video7010,\n", ["bad.csv", "line 2"]),
        ("val_csv", "", ["bad.csv", "no row in the file"]),
        ("val_csv", "key,vid_key,video_id,Sentence\nret0,msr1,video7010,a dog\n", ["bad.csv", "line 1", "'sentence'"]),
    ],
)
def test_a_bad_list(msrvtt_flags, tmp_path, capsys, flag, content, expected):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_text(content)
    error = refused(capsys, with_value(msrvtt_flags, flag, path))
    for word in expected:
        assert word in error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["--data_path", "bad.json"]),
        ('{"videos": [],\n "sentences": [}', ["bad.json", "line 2"]),
        ('{"videos": []}', ["bad.json", "sentences"]),
        ('{"sentences": [{"video_id": "video0"}]}', ["bad.json", "caption"]),
    ],
)
def test_bad_annotations(sample, msrvtt_flags, tmp_path, capsys, content, expected):
    path = tmp_path / "bad.json"
    shutil.copy(sample / "msrvtt" / "expected.json", tmp_path)
    if content is not None:
        path.write_text(content)
    flags = [*with_value(msrvtt_flags, "data_path", path), "--epochs", "1", "--batch_size", "8"]
    error = refused(capsys, flags, "--do_train")
    for word in expected:
        assert word in error


def test_no_such_video_folder(msrvtt_flags, tmp_path, capsys):
    error = refused(capsys, with_value(msrvtt_flags, "features_path", tmp_path / "nowhere"))
    assert "--features_path" in error
    assert "nowhere" in error


def test_an_output_folder_that_cannot_be(msrvtt_flags, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, with_value(msrvtt_flags, "output_dir", tmp_path / "file" / "out"))
    assert f"--output_dir {tmp_path}/file/out cannot be written to" in error


def test_cuda_asked_for_by_name_where_there_is_none(msrvtt_flags):
    flags = with_value(msrvtt_flags, "device", "cuda")
    done = subprocess.run(
        [sys.executable, "main_task_retrieval.py", "--do_eval", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "--device cuda: no CUDA device is visible to torch" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.pt", None, ["absent.pt", "no such file", "ViT-B/32"]),
        ("page.pt", b"<!DOCTYPE html><html>404</html>", ["page.pt", "web page"]),
        ("cut.pt", b"PK\x03\x04 and no more", ["cut.pt"]),
    ],
)
def test_weights_that_are_none(msrvtt_flags, tmp_path, capsys, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    error = refused(capsys, with_value(msrvtt_flags, "pretrained_clip_name", path))
    for word in expected:
        assert word in error


def test_more_words_than_the_model_has(msrvtt_flags, capsys):
    error = refused(capsys, [*msrvtt_flags, "--max_words", "78"])
    assert "--max_words must be at most 77 for this CLIP, got 78" in error


def test_a_batch_larger_than_the_data(msrvtt_flags, capsys):
    error = refused(capsys, [*msrvtt_flags, "--batch_size", "64"], "--do_train")
    assert "--batch_size 64 exceeds the 48 training items" in error


def test_freezing_more_layers_than_there_are(msrvtt_flags, capsys):
    error = refused(capsys, [*msrvtt_flags, "--batch_size", "8", "--freeze_layer_num", "4"], "--do_train")
    assert "--freeze_layer_num must be in -1..3 for this CLIP, got 4" in error


@pytest.mark.parametrize(
    "command", ["tools.sample_data", "preprocess.check_dataset", "preprocess.compress_video", "tools.demo"]
)
def test_unknown_flags_of_the_other_commands(command):
    done = subprocess.run([sys.executable, "-m", command, "--no_such_flag"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "usage:" in done.stderr

"""The command tools.sample_data: folders made once, never lost, never half-made; options that cannot be."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.sample_data.__main__ import main

ROOT = Path(__file__).parent.parent
ONE = [
    "--datatype",
    "msrvtt",
    "--n_train",
    "1",
    "--n_test",
    "1",
    "--min_seconds",
    "0.5",
    "--max_seconds",
    "0.5",
    "--resolution",
    "32",
]
ONE += ["--num_workers", "0", "--clip_vision_layers", "1", "--clip_text_layers", "1"]


def read_json(path):
    return json.loads(path.read_text())


def tree(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_folder_is_made_once_and_never_lost(tmp_path, capsys):
    command = ["--output_dir", str(tmp_path), *ONE]
    record = tmp_path / "msrvtt/sample.json"
    assert main(command) == 0
    before = record.stat().st_mtime_ns
    assert main(command) == 0
    assert record.stat().st_mtime_ns == before
    assert f"{tmp_path / 'msrvtt'} is up to date" in capsys.readouterr().out
    assert main([*command, "--n_train", "2"]) == 1
    assert "made with other parameters: choose another --output_dir or pass --force" in capsys.readouterr().err
    (tmp_path / "msrvtt/notes.txt").write_text("mine")
    assert main([*command, "--n_train", "2", "--force"]) == 0
    assert (tmp_path / "msrvtt/notes.txt").read_text() == "mine"
    assert read_json(tmp_path / "msrvtt/expected.json")["train"] == {"videos": 2, "captions": 40}
    (tmp_path / "msrvtt/videos/all/video1.mp4").unlink()
    assert main([*command, "--n_train", "2"]) == 1  # no longer complete, and not silently made anew over notes.txt


def test_a_killed_run_is_made_again(tmp_path):
    command = ["--output_dir", str(tmp_path), *ONE, "--n_train", "40"]
    assert main(command) == 0
    whole = tree(tmp_path)
    assert main([*command, "--force"]) == 0
    assert tree(tmp_path) == whole
    run = subprocess.Popen([sys.executable, "-m", "tools.sample_data", *command, "--force"], cwd=ROOT)
    video = tmp_path / "msrvtt/videos/all/video39.mp4"
    while video.exists():  # until the former files are gone
        time.sleep(0.001)
    run.kill()
    run.wait()
    assert tree(tmp_path) != whole
    assert main(command) == 0
    assert tree(tmp_path) == whole


def test_files_of_somebody_else_are_refused(tmp_path, capsys):
    (tmp_path / "msrvtt").mkdir()
    (tmp_path / "msrvtt/MSRVTT_data.json").write_text("real")
    assert main(["--output_dir", str(tmp_path), *ONE]) == 1
    assert "holds files that this command did not make" in capsys.readouterr().err
    assert (tmp_path / "msrvtt/MSRVTT_data.json").read_text() == "real"


def test_an_output_dir_that_cannot_be_written_is_named(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["--output_dir", str(blocked), *ONE]) == 1
    assert f"cannot write below --output_dir {blocked}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_train", "0"], "--n_train must be >= 1, got 0"),
        (["--n_val", "2"], "--n_val 2: msrvtt has no validation split"),
        (["--resolution", "8"], "--resolution must be 32 to 2160 pixels, got 8"),
        (["--min_seconds", "3", "--max_seconds", "2"], "--max_seconds must be >= --min_seconds 3.0, got 2.0"),
        (["--datatype", "vatex", "--order_pairs", "2"], "--order_pairs 2: only msrvtt has them"),
        (["--clip_patch", "7"], "--clip_resolution must be a multiple of --clip_patch 7, got 64"),
        (["--clip_text_width", "96"], "--clip_text_width must be a multiple of the head width 64, got 96"),
        (["--n_tr", "3"], "unrecognized arguments: --n_tr 3"),
    ],
)
def test_impossible_options_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), *ONE, *flags])
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())

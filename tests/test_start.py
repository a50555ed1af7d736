"""Known at the start: an earlier run is not replaced unasked, and nothing that lies there stands in the way later."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import LIMIT, ROOT

from checkpoints.read import read_checkpoint
from engine.resume import ON_RESUME, load_last
from main_task_retrieval import main

TRAIN = ["--do_train", "--epochs", "2", "--batch_size", "12", "--lr", "1e-3", "--coef_lr", "1", "--keep_epochs"]
ANEW = [*TRAIN, "--seed", "7", "--epochs", "1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}


def test_an_earlier_run_is_replaced_only_when_asked(msrvtt_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*TRAIN, *msrvtt_flags]) == 0
    before = contents(out)
    assert {"pytorch_model.bin.0", "pytorch_model.bin.1"} < before.keys()
    for more in ([], ["--dry_run"]):
        assert main([*ANEW, *msrvtt_flags, *more]) == 1
        error = capsys.readouterr().err
        assert (
            f"--output_dir {out} holds a training run (checkpoint_last.pt, pytorch_model.bin, history.jsonl," in error
        )
        assert "go on with it by --resume_model auto; start anew in its place with --overwrite; or give" in error
    assert main(["--do_eval", *msrvtt_flags, "--dry_run"]) == 0  # which replaces no training
    own = ["--overwrite", "--init_model", str(out / "pytorch_model.bin")]
    assert main([*ANEW, *msrvtt_flags, *own]) == 1
    assert "--overwrite would remove" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*ANEW, *msrvtt_flags, "--overwrite"]) == 0
    after = contents(out)
    assert "pytorch_model.bin.1" not in after  # of the longer run that was there
    assert after["pytorch_model.bin"] != before["pytorch_model.bin"]
    assert len(after["history.jsonl"].splitlines()) == 1
    (out / "checkpoint_last.pt").unlink()  # `auto` finds nothing to go on from, and still the weights stay
    assert main([*ANEW, *msrvtt_flags, "--resume_model", "auto"]) == 1
    assert "without checkpoint_last.pt it cannot go on" in capsys.readouterr().err


def test_more_epochs_after_the_end(msrvtt_flags, tmp_path, capsys):
    """4 steps an epoch: of 8 steps the cosine ends at 0; of 12, step 8 has 1e-3 x (1 + cos(2 pi / 3)) / 2 = 2.5e-4.

    Other evaluation, reading and post-processing do not matter; fewer epochs do, in a dry run, too.
    """
    assert main([*TRAIN, *msrvtt_flags]) == 0
    out, resumed = tmp_path / "out", [*msrvtt_flags, "--resume_model", "auto"]
    before = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    free = (
        "--allow_missing --allow_overlap --similarity_memory_mb 9 --qb_norm --qb_size 4 --n_display 1 --save_similarity"
    )
    capsys.readouterr()
    assert main([*TRAIN, *resumed, "--epochs", "3", *free.split(), "--num_thread_reader", "1"]) == 0
    told = (
        "12 steps in all in place of 8: after the 8 that are done, the learning rate follows the schedule of 12 steps"
    )
    shown = capsys.readouterr().out
    assert f"{told}; the next step's is 0.00025, by the former schedule 0" in shown
    assert "epoch 3/3: loss" in shown
    assert "epoch 2/3: loss" not in shown
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert history[:2] == before
    assert [line["epoch"] for line in history] == [0, 1, 2]
    last = load_last(out / "checkpoint_last.pt")
    assert {state["step"] for state in last["optimizer"]["state"].values()} == {12}
    assert {group["t_total"] for group in last["optimizer"]["param_groups"]} == {12}
    for more in ([], ["--dry_run"]):
        assert main([*TRAIN, *resumed, *more]) == 1
        assert "made with other options: --epochs 3 -> 2. Give those of the interrupted run" in capsys.readouterr().err
    assert main([*TRAIN, *resumed, "--epochs", "3", "--dry_run"]) == 0


def test_the_page_on_training_lists_what_a_resumed_run_may_change():
    page, other = (
        (ROOT / "docs" / "training.md").read_text(),
        "resume_model do_train dry_run overwrite fp16 finetuned_path",
    )
    changeable = {name for name, kind in ON_RESUME.items() if kind} - set(other.split())
    listed = page[page.index("These may differ") : page.index("With a higher `--epochs`")]
    assert set(re.findall(r"`(\w+)`", listed)) - {"on_resume"} == changeable


def test_a_batch_of_one_pair_is_refused(msrvtt_flags, capsys):
    for more in ([], ["--cdcr", "1"]):
        with pytest.raises(SystemExit):
            main(["--do_train", *msrvtt_flags, "--batch_size", "1", *more])
        error = capsys.readouterr().err
        assert f"--batch_size 1: nothing to tell apart, so that --loss {'cdcr' if more else 'contrastive'}" in error
        assert "give at least 2" in error


@pytest.mark.parametrize("name", ["results.json", "checkpoint_last.pt"])
def test_a_folder_in_the_place_of_a_file(name, msrvtt_flags, tmp_path, capsys):
    (tmp_path / "out" / name).mkdir(parents=True)
    assert main(["--do_eval", *msrvtt_flags]) == 1
    assert f"{tmp_path}/out/{name} is a folder, and the run writes a file of this name" in capsys.readouterr().err


def test_the_disk_is_tried_before_anything_is_read(msrvtt_flags, tmp_path, capsys):
    """A limit of 0 bytes a file lets a file be made, as a full disk does, and nothing be written to it."""
    code = (
        "import resource, signal, sys; from main_task_retrieval import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--do_eval", *msrvtt_flags], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert f"error: --output_dir {tmp_path}/out cannot be written to: cannot write" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_frame_limit_is_known_before_a_download(msrvtt_flags, tmp_path, capsys):
    flags = ["--pretrained_clip_name", "ViT-L/14", "--cache_dir", str(tmp_path / "cache"), "--max_frames", "78"]
    assert main(["--do_eval", "--dry_run", *msrvtt_flags, *flags, "--sim_header", "seqTransf"]) == 1
    assert "--sim_header seqTransf takes at most 77 frames, got 78; lower --max_frames" in capsys.readouterr().err
    assert main(["--do_eval", "--dry_run", *msrvtt_flags, *flags, "--sim_header", "xpool", "--num_mha_heads", "5"]) == 1
    assert "--num_mha_heads 5 does not divide the width 768" in capsys.readouterr().err


def test_numbers_that_are_none_are_named_with_their_file(sample, msrvtt_flags, tmp_path, capsys):
    """Of the two files that --mergeclip averages, the one that they are in."""
    tensors = read_checkpoint(sample / "clip" / "tiny_clip.pt").tensors
    tensors["clip.text_projection"][3, 4] = torch.inf
    torch.save(tensors, tmp_path / "inf.bin")
    own = msrvtt_flags[msrvtt_flags.index("--pretrained_clip_name") + 1]
    flags = ["--clip_evl", "--mergeclip", "--pretrained_path", own, "--pretrained_clip_name", str(tmp_path / "inf.bin")]
    assert main(["--do_eval", "--dry_run", *msrvtt_flags, *flags]) == 1
    assert "inf.bin: 1 tensors hold NaN or infinity, such as clip.text_projection" in capsys.readouterr().err


def test_where_a_run_was_started_may_be_gone_at_its_end(msrvtt_flags, tmp_path):
    place = tmp_path / "started_here"
    place.mkdir()
    command = [sys.executable, str(ROOT / "main_task_retrieval.py"), *TRAIN, *msrvtt_flags]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "out" / "log.txt", time.monotonic() + LIMIT
    while not (log.exists() and "training: 48 videos" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    place.rmdir()
    assert process.wait(LIMIT) == 0, process.stderr.read()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["folder"] == str(place)

"""--dry_run: the run itself up to its first step: the plan in figures, and every error that comes before."""

import json
import re

import pytest
import torch

from checkpoints.read import read_checkpoint
from main_task_retrieval import main

TRAIN = ["--do_train", "--epochs", "3", "--batch_size", "20", "--dry_run"]


def test_the_plan_of_a_training_run(sample, msrvtt_flags, tmp_path, capsys):
    """48 clips in batches of 20: 2 whole steps an epoch."""
    pieces = ["--gradient_accumulation_steps", "2", "--freeze_layer_num", "-1"]
    assert main([*TRAIN, *pieces, "--save_similarity", *msrvtt_flags]) == 0
    out = capsys.readouterr().out
    for text in (
        "--lr 0.0001\n",
        "train: 48 videos, 48 items; --batch_size 20 = 1 process(es) x 20, in 2 piece(s); "
        "3 epochs x 2 steps = 6 steps\n",
        "selects the epoch on: test (12 videos)\n",
        "on: cpu, 1 process(es), fp32\n",
        "evaluate: msrvtt test: 12 videos, 12 captions, 16 clips a batch and process\n",
        "tiny_clip.pt (of --pretrained_clip_name)\n",
        f"{tmp_path}/out/similarity.npz, ",
        "/out/pytorch_model.bin, ",
    ):
        assert text in out
    standing, step = map(int, re.search(r"memory, estimated: (\d+) MiB for .*, (\d+) MiB more", out).groups())
    # 16 bytes a parameter. A block keeps 80 bytes a token and channel: 10 clips x 3 frames x 17 tokens x 64 x 2 layers.
    parameters = sum(x.numel() for x in read_checkpoint(sample / "clip" / "tiny_clip.pt").tensors.values())
    assert standing == pytest.approx(16 * parameters / 2**20, abs=1)
    assert 5 < step < 12
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*TRAIN, "--batch_size", "49"], "--batch_size 49 exceeds the 48 training items"),
        ([*TRAIN, "--resume_model", "gone.pt"], "--resume_model gone.pt: no such file"),
        ([*TRAIN, "--init_model", "gone.bin"], "--init_model gone.bin: no such file"),
        (["--do_eval", "--dry_run", "--features_path", "gone"], "gone"),
        (
            ["--do_eval", "--dry_run", "--pretrained_clip_name", "gone.pt"],
            "--pretrained_clip_name gone.pt: no such file",
        ),
        (
            ["--do_eval", "--dry_run", "--pretrained_clip_name", "ViT-B/32", "--max_words", "78"],
            "--max_words must be at most 77 for this CLIP, got 78",
        ),
        (["--do_eval", "--dry_run", "--max_words", "78"], "--max_words must be at most 77 for this CLIP, got 78"),
        ([*TRAIN, "--freeze_layer_num", "4"], "--freeze_layer_num must be in -1..3 for this CLIP, got 4"),
        (
            [*TRAIN, "--sim_header", "seqTransf", "--max_frames", "80"],
            "--sim_header seqTransf takes at most 77 frames, got 80; lower --max_frames",
        ),
    ],
)
def test_what_would_fail_later_fails_now(flags, message, msrvtt_flags, capsys):
    assert main([*msrvtt_flags, *flags]) == 1
    assert message in capsys.readouterr().err


def test_weights_that_are_no_numbers(sample, msrvtt_flags, tmp_path, capsys):
    tensors = read_checkpoint(sample / "clip" / "tiny_clip.pt").tensors
    tensors["clip.visual.proj"][0, 0] = torch.nan
    torch.save(tensors, tmp_path / "nan.bin")
    assert main([*msrvtt_flags, *TRAIN, "--pretrained_clip_name", str(tmp_path / "nan.bin")]) == 1
    assert "nan.bin: 1 tensors hold NaN or infinity, such as clip.visual.proj" in capsys.readouterr().err


def test_a_folder_of_weights(sample, msrvtt_flags, tmp_path):
    """Of a whole run: the file in it is read, hashed and named."""
    (tmp_path / "weights").mkdir()
    torch.save(read_checkpoint(sample / "clip" / "tiny_clip.pt").tensors, tmp_path / "weights" / "pytorch_model.bin")
    assert main([*msrvtt_flags, "--do_eval", "--pretrained_clip_name", str(tmp_path / "weights")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["weights"] == str(tmp_path / "weights" / "pytorch_model.bin")


@pytest.mark.parametrize("content", [b"<html>", b"PK\x03\x04 cut off"])
def test_a_weight_file_that_cannot_be_read(content, msrvtt_flags, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(content)
    assert main([*msrvtt_flags, *TRAIN, "--pretrained_clip_name", str(tmp_path / "bad.pt")]) == 1
    assert "bad.pt cannot be read as weights" in capsys.readouterr().err


@pytest.mark.parametrize("merged", [False, True])
def test_a_clip_to_download_is_only_named(merged, msrvtt_flags, tmp_path, capsys):
    """Also the one that --mergeclip averages with a file that is there."""
    flags = ["--pretrained_clip_name", "ViT-B/16", "--cache_dir", str(tmp_path / "cache")]
    if merged:
        own = msrvtt_flags[msrvtt_flags.index("--pretrained_clip_name") + 1]
        flags += ["--clip_evl", "--mergeclip", "--pretrained_path", own]
    assert main(["--do_eval", "--dry_run", *msrvtt_flags, *flags]) == 0
    assert f"weights: {tmp_path}/cache/ViT-B-16.pt (will be downloaded)\n" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()

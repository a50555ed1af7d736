"""--dry_run: the plan in figures, and the errors of a run before its weights are read."""

import pytest

import engine.plan
from main_task_retrieval import main

TRAIN = ["--do_train", "--epochs", "3", "--batch_size", "20", "--dry_run"]


def test_the_plan_of_a_training_run(msrvtt_flags, tmp_path, capsys, monkeypatch):
    """48 clips in batches of 20: 2 whole steps an epoch."""
    monkeypatch.setattr("main_task_retrieval.build_model", None)  # would fail if called
    assert main([*TRAIN, "--gradient_accumulation_steps", "2", "--save_similarity", *msrvtt_flags]) == 0
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
    ],
)
def test_what_would_fail_later_fails_now(flags, message, msrvtt_flags, capsys):
    assert main([*msrvtt_flags, *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_clip_to_download_is_only_named(msrvtt_flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine.plan, "weights_path", None)
    flags = ["--pretrained_clip_name", "ViT-B/16", "--cache_dir", str(tmp_path / "cache")]
    assert main(["--do_eval", "--dry_run", *msrvtt_flags, *flags]) == 0
    assert f"weights: {tmp_path}/cache/ViT-B-16.pt (will be downloaded)\n" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "fixed", "activations"),
    [
        # 151.3 M parameters x 16 bytes; 20 clips x 3 frames x 50 tokens x 768 channels x 12 layers x 17 x 4 bytes
        ([], "2.3 for weights and optimiser", "1.8 for 20 clips at a time of 3 frames"),
        (
            ["--gradient_accumulation_steps", "4"],
            "2.3 for weights and optimiser",
            "0.4 for 5 clips at a time of 3 frames",
        ),
    ],
)
def test_memory_of_a_known_clip(more, fixed, activations, msrvtt_flags, capsys):
    assert main([*msrvtt_flags, *TRAIN, "--pretrained_clip_name", "ViT-B/32", *more]) == 0
    assert f"GiB a process: {fixed}, {activations}\n" in capsys.readouterr().out


def test_memory_of_a_file_is_not_guessed(msrvtt_flags, capsys):
    assert main([*msrvtt_flags, *TRAIN]) == 0
    assert "memory: no estimate, the sizes of the model are in its file\n" in capsys.readouterr().out

"""``main_task_retrieval.py`` from the command line to the files it leaves, on real video files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import LIMIT, ROOT, run_tasks

from engine.evaluate import DataError
from main_task_retrieval import main

TRAIN = [
    "--do_train",
    "--epochs",
    "2",
    "--batch_size",
    "16",
    "--lr",
    "1e-3",
    "--coef_lr",
    "1",
    "--freeze_layer_num",
    "-1",
]


def replaced(flags: list[str], **values: object) -> list[str]:
    """`flags` with other values for some of them."""
    flags = list(flags)
    for name, value in values.items():
        if f"--{name}" in flags:
            flags[flags.index(f"--{name}") + 1] = str(value)
        else:
            flags += [f"--{name}", str(value)]
    return flags


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """Output folder of a CLIP4Clip MSR-VTT command, flags as in its README, with only paths and sizes replaced."""
    data, out = sample / "msrvtt", tmp_path_factory.mktemp("trained")
    command = (
        f"--do_train --num_thread_reader=1 --epochs=2 --batch_size=64 --n_display=50 "
        f"--train_csv {data}/MSRVTT_train.9k.csv --val_csv {data}/MSRVTT_JSFUSION_test.csv "
        f"--data_path {data}/MSRVTT_data.json --features_path {data}/videos/all --output_dir {out} "
        f"--lr 1e-3 --max_words 32 --max_frames 12 --batch_size_val 16 --datatype msrvtt --expand_msrvtt_sentences "
        f"--feature_framerate 1 --coef_lr 1e-1 --freeze_layer_num 0 --slice_framepos 2 --loose_type --linear_patch 2d "
        f"--sim_header meanP --pretrained_clip_name {sample}/clip/tiny_clip.pt"
    )
    assert main(command.split()) == 0
    return out


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "log.txt",
        "results.json",
        "history.jsonl",
        "pytorch_model.bin",
        "pytorch_model.bin.json",
        "checkpoint_last.pt",
    }
    found = read_results(trained)
    assert (found["dataset"], found["split"], found["n_videos"], found["n_captions"]) == ("msrvtt", "test", 12, 12)
    assert found["missing_videos"] == []
    assert found["protocol"] == {"v2t": "caption_groups", "ties": "pessimistic", "selected_on": "test"}
    for kind in ("raw", "dsl"):
        for direction in ("t2v", "v2t"):
            assert set(found["metrics"][kind][direction]) == {"R@1", "R@5", "R@10", "MedR", "MeanR"}
    assert found["options"]["batch_size"] == 64
    assert found["weights"] == str(trained / "pytorch_model.bin")
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [0, 1]
    assert history[0]["steps"] == 48 * 20 // 64
    assert "frame_rule" in (trained / "log.txt").read_text()


def test_the_best_epoch_is_the_one_kept(trained):
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    scores = [line["metrics"]["raw"]["t2v"]["R@1"] for line in history]
    best = max(range(2), key=lambda epoch: (scores[epoch], epoch))
    assert json.loads((trained / "pytorch_model.bin.json").read_text())["epoch"] == best
    assert read_results(trained)["metrics"] == history[best]["metrics"]


def test_weights_are_a_plain_state_dict_under_clip4clips_names(trained):
    tensors = torch.load(trained / "pytorch_model.bin", weights_only=True)
    assert {"clip.visual.conv1.weight", "clip.transformer.resblocks.0.attn.in_proj_weight", "clip.logit_scale"} <= set(
        tensors
    )
    assert all(name.startswith("clip.") for name in tensors)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_saved_checkpoint_gives_the_same_numbers_whatever_the_workers(trained, msrvtt_flags, tmp_path):
    matrices = []
    for workers in (0, 1, 4):
        out = tmp_path / f"workers{workers}"
        flags = replaced(
            msrvtt_flags,
            num_thread_reader=workers,
            output_dir=out,
            max_frames=12,
            finetuned_path=trained / "pytorch_model.bin",
        )
        assert main(["--do_eval", "--save_similarity", *flags]) == 0
        assert read_results(out)["metrics"] == read_results(trained)["metrics"]
        with np.load(out / "similarity.npz", allow_pickle=False) as saved:
            assert saved["similarity"].dtype == np.float32
            assert saved["similarity"].shape == (12, 12)
            assert saved["caption_to_video"].tolist() == list(range(12))
            assert saved["video_ids"][0].startswith("video")
            matrices.append(saved["similarity"])
    assert np.array_equal(matrices[0], matrices[1])
    assert np.array_equal(matrices[0], matrices[2])


def test_four_processes_score_the_same_matrix_as_one(trained, msrvtt_flags, tmp_path):
    """gloo, one thread each: the ranks share the batches of one process, so even the last bits agree."""
    flags = replaced(msrvtt_flags, finetuned_path=trained / "pytorch_model.bin", batch_size_val=2)
    runs = run_tasks(tmp_path, {"one": {"tasks": 1}, "four": {"tasks": 4}}, ["--do_eval", "--save_similarity", *flags])
    for out, tasks in runs.values():
        assert all(status == 0 for status, _ in tasks), tasks
        assert read_results(out)["processes"] == len(tasks)
    one, four = (np.load(out / "similarity.npz")["similarity"] for out, _ in runs.values())
    assert np.array_equal(one, four)


def test_zero_shot_leaves_results_only(msrvtt_flags, tmp_path):
    assert main(["--do_eval", *msrvtt_flags]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt", "results.json"}
    assert read_results(tmp_path / "out")["protocol"]["selected_on"] is None


def test_a_killed_run_continues_to_the_same_weights(msrvtt_flags, tmp_path):
    """kill -9 after the first epoch, then --resume_model: weights and history as without the interruption.

    In half precision; test_resume.py has float32.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out: Path, *more: str) -> list[str]:
        flags = replaced(msrvtt_flags, output_dir=out, compat="clip4clip")
        return [sys.executable, "main_task_retrieval.py", *replaced(TRAIN, epochs=3), *flags, *more]

    subprocess.run(command(whole), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=LIMIT)
    process = subprocess.Popen(command(broken), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT
    while not (broken / "checkpoint_last.pt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "results.json").exists()
    again = command(broken, "--resume_model", str(broken / "checkpoint_last.pt"))
    subprocess.run(again, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=LIMIT)
    ours, theirs = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (broken, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_results(broken)["metrics"] == read_results(whole)["metrics"]
    losses = [
        [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (broken, whole)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_resume_with_other_options_is_refused(msrvtt_flags, trained, tmp_path, capsys):
    flags = [*TRAIN, *msrvtt_flags, "--resume_model", str(trained / "checkpoint_last.pt")]
    assert main(flags) == 1
    message = capsys.readouterr().err
    assert "--resume_model: the run was made with other options" in message
    assert "--max_frames 12 -> 3" in message
    assert main([*TRAIN, *msrvtt_flags, "--resume_model", str(trained / "pytorch_model.bin")]) == 1
    assert "is not a checkpoint_last.pt" in capsys.readouterr().err


def test_continuing_from_a_checkpoint_with_another_head(trained, msrvtt_flags, tmp_path):
    """--init_model takes a meanP checkpoint into seqTransf, whose transformer starts from the text tower."""
    flags = replaced(TRAIN, epochs=1) + replaced(
        msrvtt_flags, init_model=trained / "pytorch_model.bin", sim_header="seqTransf", cross_num_hidden_layers=1
    )
    assert main(flags) == 0
    tensors = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert "transformerClip.resblocks.0.attn.in_proj_weight" in tensors
    assert "frame_position_embeddings.weight" in tensors


def test_the_wrong_head_for_a_checkpoint_is_refused(trained, msrvtt_flags, capsys):
    flags = replaced(
        msrvtt_flags, finetuned_path=trained / "pytorch_model.bin", sim_header="seqTransf", cross_num_hidden_layers=1
    )
    assert main(["--do_eval", *flags]) == 1
    assert "holds no weights for --sim_header seqTransf" in capsys.readouterr().err


def test_unreadable_videos_stop_an_evaluation_and_are_stamped_when_allowed(sample, msrvtt_flags, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    source = sample / "msrvtt" / "videos" / "all"
    for path in source.iterdir():
        (videos / path.name).symlink_to(path)
    ids = sorted(p.stem for p in source.iterdir() if int(p.stem[5:]) >= 7010)
    (videos / f"{ids[0]}.mp4").unlink()
    (videos / f"{ids[1]}.mp4").unlink()
    (videos / f"{ids[1]}.mp4").write_bytes(b"not a video at all")
    flags = replaced(msrvtt_flags, features_path=videos)
    assert main(["--do_eval", *flags]) == 1
    assert f"1 of 12 videos of msrvtt test are missing on disk: '{ids[0]}'" in capsys.readouterr().err
    os.symlink(source / f"{ids[0]}.mp4", videos / f"{ids[0]}.mp4")
    assert main(["--do_eval", *flags]) == 1
    message = capsys.readouterr().err
    assert "1 of 12 videos of msrvtt test cannot be read" in message
    assert f"{ids[1]}.mp4" in message
    assert not (tmp_path / "out" / "results.json").exists()
    (videos / f"{ids[0]}.mp4").unlink()
    assert main(["--do_eval", "--allow_missing", *flags]) == 0
    found = read_results(tmp_path / "out")
    assert (found["n_videos"], found["n_captions"]) == (10, 10)
    assert sorted(found["missing_videos"]) == ids[:2]


def test_training_drops_and_counts_what_it_cannot_read(sample, msrvtt_flags, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    source = sample / "msrvtt" / "videos" / "all"
    for path in source.iterdir():
        (videos / path.name).symlink_to(path)
    (videos / "video3.mp4").unlink()
    (videos / "video4.mp4").unlink()
    (videos / "video4.mp4").write_bytes((source / "video4.mp4").read_bytes()[:900])
    assert main([*replaced(TRAIN, epochs=1), *replaced(msrvtt_flags, features_path=videos, batch_size=47)]) == 0
    line = json.loads((tmp_path / "out" / "history.jsonl").read_text())
    assert line["dropped_videos"] == ["video4"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "training without 1 missing videos, such as video3" in log
    assert "video4.mp4" in log


def test_data_error_is_a_user_error():
    assert issubclass(DataError, ValueError)

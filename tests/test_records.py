"""What stands beside and in our checkpoints keeps its meaning when files are moved, disks fill up, and runs go on."""

import hashlib
import json
import resource
import shutil

import pytest
import torch

import engine.train
from checkpoints.read import CheckpointError, read_checkpoint, save_checkpoint
from checkpoints.whole import file_sha256
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


def clip_tensors(sample) -> dict[str, torch.Tensor]:
    clip = torch.load(sample / "clip" / "tiny_clip.pt", weights_only=True)
    return {f"clip.{k}": v for k, v in clip.items() if v.is_floating_point()}


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """A short run, and the flags to repeat it."""
    data, out = sample / "msrvtt", tmp_path_factory.mktemp("records")
    flags = [
        "--train_csv",
        f"{data}/MSRVTT_train.9k.csv",
        "--val_csv",
        f"{data}/MSRVTT_JSFUSION_test.csv",
        "--data_path",
        f"{data}/MSRVTT_data.json",
        "--features_path",
        f"{data}/videos/all",
        "--max_frames",
        "3",
        "--num_thread_reader",
        "0",
        "--device",
        "cpu",
        "--pretrained_clip_name",
        f"{sample}/clip/tiny_clip.pt",
    ]
    assert main([*TRAIN, *flags, "--output_dir", str(out)]) == 0
    return out, flags


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_activation_travels_with_the_weights_alone(sample, tmp_path, activation):
    path, copy = tmp_path / "pytorch_model.bin", tmp_path / "elsewhere.bin"
    save_checkpoint(path, clip_tensors(sample), {"activation": activation})
    shutil.copy(path, copy)
    found = read_checkpoint(copy)
    assert found.activation == activation
    assert found.tensors.keys() == clip_tensors(sample).keys()


def test_a_full_disk_leaves_the_former_pair(sample, tmp_path):
    """Neither new weights with an old record nor an old record with new weights."""
    path = tmp_path / "pytorch_model.bin"
    save_checkpoint(path, {"clip.a": torch.zeros(3)}, {"activation": "gelu", "epoch": 0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write .*pytorch_model.bin"):
            save_checkpoint(path, clip_tensors(sample), {"activation": "quick_gelu", "epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_state_of_a_run_is_not_weights(trained, tmp_path, capsys):
    out, flags = trained
    with pytest.raises(CheckpointError, match="is the state of a training run: give it as --resume_model"):
        read_checkpoint(out / "checkpoint_last.pt")


def test_an_evaluation_says_how_its_checkpoint_was_selected_and_trained(trained, tmp_path, capsys):
    out, flags = trained
    again = [*flags, "--finetuned_path", str(out / "pytorch_model.bin"), "--output_dir", str(tmp_path)]
    (tmp_path / "similarity.npz").write_bytes(b"of an earlier run")
    assert main(["--do_eval", *again, "--compat", "internvideo"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["protocol"]["selected_on"] == "test"
    assert found["activation"] == "quick_gelu"
    assert found["overlap_with_training"] == {"videos": [], "captions": None}
    assert "trained with other settings: --compat none -> internvideo" in capsys.readouterr().out
    assert not (tmp_path / "similarity.npz").exists()


def test_a_checkpoint_given_for_evaluation_must_hold_the_head(trained, tmp_path, capsys):
    """--init_model without --do_train, as CLIP4Clip's evaluation commands have it, is no leave to start a head anew."""
    out, flags = trained
    flags = [
        *flags,
        "--init_model",
        str(out / "pytorch_model.bin"),
        "--output_dir",
        str(tmp_path),
        "--sim_header",
        "seqTransf",
        "--cross_num_hidden_layers",
        "1",
    ]
    assert main(["--do_eval", *flags]) == 1
    assert "holds no weights for --sim_header seqTransf" in capsys.readouterr().err


def test_resuming_into_a_folder_of_another_run_keeps_the_right_weights(trained, sample, tmp_path):
    """The selected weights come from the resumed run, whatever lies in the new folder."""
    out, flags = trained
    shutil.copytree(out, tmp_path / "new")
    save_checkpoint(tmp_path / "new" / "pytorch_model.bin", clip_tensors(sample), {"activation": "quick_gelu"})
    command = [*TRAIN, *flags, "--output_dir", str(tmp_path / "new"), "--resume_model", str(out / "checkpoint_last.pt")]
    assert main(command) == 0
    ours, theirs = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (tmp_path / "new", out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (tmp_path / "new", out)]
    assert results[0] == results[1]


def test_the_record_of_training_videos_survives_a_resume(trained, tmp_path):
    out, flags = trained
    state = torch.load(out / "checkpoint_last.pt", weights_only=True)
    sidecar = json.loads((out / "pytorch_model.bin.json").read_text())
    assert state["trained_on"] == sidecar["trained_on"]
    assert len(sidecar["trained_on"]["msrvtt"]) == 48


def test_files_may_go_once_they_were_read(sample, tmp_path, monkeypatch):
    """The end of a run needs none of them: their hashes are those of what was read."""
    data = tmp_path / "data"
    shutil.copytree(sample / "msrvtt", data)
    shutil.copy(sample / "clip" / "tiny_clip.pt", data / "weights.pt")
    lists = ["MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv", "MSRVTT_data.json", "expected.json", "weights.pt"]
    before = {str(data / name): hashlib.sha256((data / name).read_bytes()).hexdigest() for name in lists}
    measure = engine.train.evaluate

    def evaluate_without_files(*args, **more):
        for name in lists:
            (data / name).unlink(missing_ok=True)
        return measure(*args, **more)

    monkeypatch.setattr(engine.train, "evaluate", evaluate_without_files)
    flags = ["--train_csv", data / lists[0], "--val_csv", data / lists[1], "--data_path", data / lists[2]]
    flags += ["--features_path", data / "videos" / "all", "--pretrained_clip_name", data / "weights.pt"]
    flags += ["--max_frames", 2, "--num_thread_reader", 0, "--epochs", 1, "--output_dir", tmp_path / "out"]
    assert main([*map(str, [*TRAIN[:1], "--batch_size", 16, "--device", "cpu", *flags])]) == 0
    assert not (data / "weights.pt").exists()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sha256"]
    weights = tmp_path / "out" / "pytorch_model.bin"
    assert found["annotations"] | found["weights"] == {**before, str(weights): file_sha256(weights)}


def test_annotations_that_are_not_there(trained, tmp_path, capsys):
    _, flags = trained
    flags = list(flags)
    flags[flags.index("--data_path") + 1] = str(tmp_path / "typo.json")
    assert main(["--do_eval", *flags, "--output_dir", str(tmp_path / "out")]) == 1
    assert "typo.json: no such file or folder" in capsys.readouterr().err


def test_when_no_video_at_all_can_be_read_the_files_are_named(trained, sample, tmp_path, capsys):
    _, flags = trained
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (sample / "msrvtt" / "videos" / "all").iterdir():
        (videos / path.name).write_bytes(b"no video")
    flags = list(flags)
    flags[flags.index("--features_path") + 1] = str(videos)
    for more in ([], ["--allow_missing"]):
        assert main(["--do_eval", *flags, *more, "--output_dir", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert "none of the 12 videos can be read" in error
        assert f"{videos}/video7010.mp4" in error
    assert not (tmp_path / "out" / "results.json").exists()

"""A run made before engine/ existed: its interrupted half goes on, its weights are evaluated.

data/before_engine.tar.xz holds the data, a tiny CLIP, the whole run and the same run as it was interrupted.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from main_task_retrieval import main

FLAGS = (
    "--datatype msrvtt --train_csv data/msrvtt/MSRVTT_train.9k.csv --val_csv data/msrvtt/MSRVTT_JSFUSION_test.csv "
    "--data_path data/msrvtt/MSRVTT_data.json --features_path data/msrvtt/videos/all --max_frames 3 --max_words 12 "
    "--num_thread_reader 0 --pretrained_clip_name clip.pt --device cpu --sim_header meanP --interaction wti "
    "--wti_arch 1 --cdcr 1"
)
TRAIN = "--do_train --epochs 3 --batch_size 4 --lr 1e-3 --coef_lr 0.1 --save_steps 1"


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    with tarfile.open(Path(__file__).parent / "data" / "before_engine.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["metrics"]


def test_an_interrupted_run_goes_on_to_the_same_weights(before):
    part, whole = before / "part", before / "whole"
    assert not (part / "results.json").exists()
    assert main([*TRAIN.split(), *FLAGS.split(), "--output_dir", "part", "--resume_model", "auto"]) == 0
    assert "resumed from part/checkpoint_last.pt: epoch" in (part / "log.txt").read_text()
    ours, theirs = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (part, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (part, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert metrics(part) == metrics(whole)


def test_its_weights_give_the_same_metrics(before):
    weights = ["--finetuned_path", "whole/pytorch_model.bin", "--output_dir", "again"]
    assert main(["--do_eval", *FLAGS.split(), *weights]) == 0
    assert metrics(before / "again") == metrics(before / "whole")

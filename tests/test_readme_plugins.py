"""The plug-ins that README shows are put into a copy of the repository: one file each, no other change.

Each gives its flags, trains, saves what it should under its names, and evaluates to the same numbers.
"""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from repository_copy import ROOT, copy_repository, run_in
from test_main import TRAIN, replaced

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"\(`(?P<path>[\w/]+\.py)`;\s`(?P<flags>--[^`]+)`\):\n\n```python\n(?P<source>.*?)```", re.DOTALL)
FLAGS = {match["path"]: match["flags"].split() for match in EXAMPLE.finditer(README)}
HEAD, LOSS, ENCODER, RULE, DATASET = FLAGS.values()
TRAINED = [*replaced(TRAIN, epochs=1), "--save_similarity"]

# Run in the copy, each as a process of its own.
RUNS = """
import json, sys
from main_task_retrieval import main

sys.exit(any(main(flags) for flags in json.loads(sys.argv[1])))
"""
REFUSALS = """
import contextlib, io, sys
from engine.options import parse_options

for flag in sys.argv[1].split(","):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        options = parse_options([*sys.argv[2:], *flag.split("=")])
        said.write("without effect: " + "; ".join(options.without_effect))
    print(said.getvalue().splitlines()[-1])
"""
DRAWS = """
import sys, torch
from engine.data import Loaders, load_data
from engine.distributed import World
from engine.options import parse_options
from modules.encoders.base import ImageInput
from modules.losses import LOSSES
from modules.losses.base import Pairs
from modules.losses.contrastive import contrastive_loss

options = parse_options(sys.argv[1:])
loaders = Loaders(options, World(0, 1, torch.device("cpu")), list, ImageInput(16))
pairs = loaders.training_pairs(load_data(options, "train")).dataset
videos = loaders.videos(load_data(options, "test")).dataset
same = [torch.equal(pairs[0, i].frames, pairs[1, i].frames) for i in range(len(pairs))]
assert all(torch.equal(pairs[0, i].frames, pairs[0, i].frames) for i in range(4))
assert all(torch.equal(videos[i].frames, videos[i].frames) for i in range(len(videos)))
assert all(clip.frames.shape[0] == 3 for clip in (pairs[0, 0], videos[0]))
print(sum(same), len(same))

logits, loss = torch.randn(4, 4), LOSSES["smoothed"]
plain = loss(loss.Options(label_smoothing=0.0))(Pairs(logits, None, None, None))
assert torch.allclose(plain, contrastive_loss(logits))
uniform = loss(loss.Options(label_smoothing=1.0))(Pairs(logits, None, None, None))
assert torch.allclose(uniform, -(logits.log_softmax(0).mean() + logits.log_softmax(1).mean()) / 2)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = copy_repository(tmp_path_factory.mktemp("tree") / "repository")
    for match in EXAMPLE.finditer(README):
        (folder / match["path"]).write_text(match["source"], encoding="utf-8")
    return folder


@pytest.fixture
def pairs_flags(sample, msrvtt_flags, tmp_path) -> list[str]:
    """The sample as the lists that the example of a dataset reads: two captions a training video, one a test video."""
    captions = json.loads((sample / "msrvtt" / "MSRVTT_data.json").read_text())["sentences"]
    lists = {"train": "MSRVTT_train.9k.csv", "test": "MSRVTT_JSFUSION_test.csv"}
    for split, name in lists.items():
        with (sample / "msrvtt" / name).open(newline="") as file:
            videos = {row["video_id"] for row in csv.DictReader(file)}
        rows = [(one["video_id"], one["caption"]) for one in captions if one["video_id"] in videos]
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("video", "caption"), *rows])
    (tmp_path / "val.csv").write_text((tmp_path / "test.csv").read_text())
    flags = replaced(msrvtt_flags, data_path=tmp_path)
    for name in ("--train_csv", "--val_csv", "--datatype"):
        at = flags.index(name)
        del flags[at : at + 2]
    return flags


def read_run(folder: Path) -> tuple[dict, np.ndarray]:
    return json.loads((folder / "results.json").read_text()), np.load(folder / "similarity.npz")["similarity"]


def main(tree: Path, *runs: list[str]) -> None:
    """One run after another, in one process."""
    run_in(tree, sys.executable, "-c", RUNS, json.dumps(runs))


def test_there_is_one_of_each_kind():
    assert [Path(path).parent.as_posix() for path in FLAGS] == [
        "modules/heads",
        "modules/losses",
        "modules/encoders",
        "dataloaders/video/rules",
        "dataloaders",
    ]


def test_help_lists_their_flags_under_their_names(tree):
    text = run_in(tree, sys.executable, "main_task_retrieval.py", "--help", COLUMNS="200")
    sections = dict(re.findall(r"^(--?[\w ,-]+):\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE))
    for chooses, name, own in ((flags[0], flags[1], flags[2]) for flags in (HEAD, LOSS, ENCODER, DATASET)):
        assert own in sections[f"{chooses} {name}"]
    assert "--linear_patch" in sections["--encoder clip, clip_mix"]
    assert "segment_random" in text


def test_their_flags_are_refused_where_they_are_not_chosen(tree, msrvtt_flags):
    foreign = [HEAD[2:], LOSS[2:], ENCODER[2:], DATASET[2:]]
    given = ",".join("=".join(flag) for flag in foreign)
    lines = run_in(tree, sys.executable, "-c", REFUSALS, given, "--do_eval", *msrvtt_flags).splitlines()
    expected = [
        ("error: ", "--sim_header attnP, got --sim_header meanP"),
        ("error: ", "--loss smoothed, got --loss contrastive"),
        ("error: ", "--encoder clip_mix, got --encoder clip"),
        ("without effect: ", "--datatype pairs, got --datatype msrvtt"),
    ]
    assert len(lines) == 4
    for line, (flag, value), (start, end) in zip(lines, foreign, expected):
        assert line.endswith(f"{start}{flag} {value} belongs to {end}")


def test_head_loss_and_encoder_train_and_evaluate(tree, msrvtt_flags, tmp_path):
    weights = tmp_path / "out" / "pytorch_model.bin"
    again = replaced(msrvtt_flags, finetuned_path=weights, output_dir=tmp_path / "again")
    evaluation = ["--do_eval", "--save_similarity", *HEAD[:2], *ENCODER[:2], *again]  # the sidecar knows the rest
    main(tree, [*TRAINED, *HEAD, *LOSS, *ENCODER, *msrvtt_flags], evaluation)
    tensors = torch.load(weights, weights_only=True)
    assert {name for name in tensors if not name.startswith("clip.")} == {"frame_score.weight"}
    assert tensors["frame_score.weight"].any()  # it starts at zero
    mix = tensors["clip.frame_mix.weight"]
    assert mix.shape == (64, 1, 5)
    assert mix[:, 0, [0, 1, 3, 4]].any()  # it starts as the identity
    (trained, similarity), (evaluated, same) = read_run(tmp_path / "out"), read_run(tmp_path / "again")
    assert trained["metrics"] == evaluated["metrics"]
    np.testing.assert_array_equal(similarity, same)
    assert trained["tower"].startswith("CLIP with mixed frames")


def test_frame_rule_and_dataset_train_and_evaluate(tree, pairs_flags, tmp_path):
    weights = tmp_path / "out" / "pytorch_model.bin"
    again = replaced(pairs_flags, finetuned_path=weights, output_dir=tmp_path / "again")
    evaluation = ["--do_eval", "--save_similarity", *RULE, *DATASET, *again]
    main(tree, [*TRAINED, *RULE, *DATASET, *pairs_flags], evaluation)
    results, similarity = read_run(tmp_path / "out")
    assert results["dataset"] == "pairs"
    assert (results["n_videos"], results["n_captions"]) == (12, len(similarity))
    assert "training: 48 videos, 96 items, 6 steps" in (tmp_path / "out" / "log.txt").read_text()
    evaluated, same = read_run(tmp_path / "again")
    assert results["metrics"] == evaluated["metrics"]
    np.testing.assert_array_equal(similarity, same)


def test_frames_are_drawn_anew_in_every_epoch(tree, pairs_flags):
    """Of what the example of a frame rule draws, and of the loss's numbers at both ends of its option."""
    flags = ("--do_train", "--batch_size", "16", *RULE, *DATASET, *pairs_flags)
    same, pairs = map(int, run_in(tree, sys.executable, "-c", DRAWS, *flags).split()[-2:])
    assert pairs == 96
    assert same < pairs / 4


def test_the_head_passes_the_tests_of_heads(tree):
    command = ("-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "tests/test_heads.py", "-k", "attnP-no")
    assert "passed" in run_in(tree, sys.executable, *command)

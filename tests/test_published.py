"""Published rows: true to their tables, compared only with what measures the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.encoders.internvideo import VideoCLIP, VideoClipSizes
from tools.published import ROWS, compare, protocol_of, tower_of

ROOT = Path(__file__).parent.parent

ROW = {"R@1": 41.0, "R@5": 66.0, "R@10": 75.0, "MedR": 2.0, "MeanR": 22.9}
OPTIONS = {
    "compat": "internvideo",
    "sim_header": "meanP",
    "interaction": "no",
    "do_train": False,
    "finetuned_path": None,
    "init_model": None,
    "max_frames": 12,
    "frame_rule": "stride",
    "feature_framerate": 1,
    "max_words": 77,
}
FOUND = {
    "dataset": "msrvtt",
    "split": "test",
    "n_videos": 1000,
    "n_captions": 1000,
    "options": OPTIONS,
    "metrics": {"raw": {"t2v": ROW | {"R@1": 35.0}}, "dsl": {"t2v": ROW, "v2t": ROW}},
}
TOWER = "InternVideo ViT-L/14"


def test_rows_are_whole():
    assert len(ROWS) == 6 + 6 + 8 + 1
    for row in ROWS:
        assert {"source", "dataset", "postprocessing", "metrics", *protocol_of(FOUND, TOWER)} == set(row)
        assert all(value > 0 for both in row["metrics"].values() for value in both.values())


def test_names_of_towers():
    sizes = VideoClipSizes(
        embed_dim=768,
        image_resolution=224,
        vision_layers=24,
        vision_width=1024,
        patch_size=14,
        context_length=77,
        vocab_size=49408,
        text_width=768,
        text_heads=12,
        text_layers=12,
        vision_heads=16,
        read_after=(23,),
    )
    with torch.device("meta"):
        assert VideoCLIP(sizes, "quick_gelu").tower == TOWER


def test_the_same_protocol_is_compared_with_its_own_post_processing():
    """InternVideo's zero-shot row includes DSL: 40.0 there, 41.0 here, and not the raw 35.0."""
    lines = compare(FOUND, TOWER)
    assert lines[0] == "beside InternVideo (arXiv 2212.03191), zero-shot, InternVideo ViT-L/14, meanP, dsl;"
    assert lines[1] == "here at most 12 frames by the stride rule, 1 a second, 77 words:"
    assert [line.split() for line in lines[2:6]] == [
        ["text-to-video", "R@1", "R@5", "R@10", "MedR", "MeanR"],
        ["published", "40.0", "65.3", "74.1", "2.0", "23.9"],
        ["here", "41.0", "66.0", "75.0", "2.0", "22.9"],
        ["difference", "+1.0", "+0.7", "+0.9", "+0.0", "-1.0"],
    ]
    assert len(lines) == 10


def test_another_protocol_is_named_instead():
    (line,) = compare(FOUND | {"n_videos": 998}, TOWER)
    assert line == "not compared with InternVideo (arXiv 2212.03191), zero-shot: videos 998 here, 1000 there"
    (line,) = compare(FOUND | {"options": OPTIONS | {"compat": "none"}}, "CLIP ViT-B/16")
    assert line == "not compared with CLIP with mean pooling, zero-shot: tower CLIP ViT-B/16 here, CLIP ViT-B/32 there"
    assert compare(FOUND | {"dataset": "other"}, TOWER) == ["no published row for other"]


def test_a_finished_run_is_read_without_torch(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(FOUND | {"tower": TOWER}))
    code = "import sys, tools.published as p; s = p.main(sys.argv[1:]); sys.exit(s or 'torch' in sys.modules)"
    for command in (["-m", "tools.published"], ["-c", code]):
        done = subprocess.run([sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == compare(FOUND, TOWER)
    missing = tmp_path / "none"
    done = subprocess.run([sys.executable, *command, str(missing)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{missing} is not the results.json of a finished run" in done.stderr


@pytest.mark.parametrize(
    ("options", "tower"),
    [
        ({"pretrained_clip_name": "ViT-B/16"}, "CLIP ViT-B/16"),
        ({"pretrained_clip_name": "/weights/own.pt"}, "CLIP"),
        ({"pretrained_clip_name": "ViT-B/32", "finetuned_path": "of_unknown_size.bin"}, "CLIP"),
        (
            {"clip_evl": True, "pretrained_path": "a.ckpt", "mergeclip": True, "pretrained_clip_name": "ViT-L/14"},
            "InternVideo ViT-L/14",
        ),
        ({"clip_evl": True, "pretrained_path": "a.ckpt", "pretrained_clip_name": "ViT-B/32"}, "InternVideo"),
    ],
)
def test_older_results_tell_the_tower_by_their_options(options, tower):
    assert tower_of({"options": options}) == tower

"""Weights by the name of a repository of Hugging Face, from a cache as its library leaves it, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from test_wide_clip import reduced, save, theirs_of

from checkpoints.download import DownloadError, fetch_from_hub
from main_task_retrieval import main

RUNS = """
import sys
from main_task_retrieval import main

mine, flags = sys.argv[1], sys.argv[2:]
found = [main([*flags, "--pretrained_clip_name", mine]), main([*flags, "--pretrained_clip_name", mine, "--dry_run"])]
found.append(main([*flags, "--pretrained_clip_name", "hf-hub:nobody/nothing", "--dry_run"]))
sys.exit(found != [0, 0, 0] or main([*flags, "--pretrained_clip_name", "hf-hub:nobody/nothing"]) != 1)
"""


def cached(home: Path, name: str) -> Path:
    """The folder of a repository's only revision in a cache under `home`."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


def test_a_repository_in_the_cache(msrvtt_flags, tmp_path):
    """Two runs as a user starts them, with HF_HOME and HF_HUB_OFFLINE: the heads are those of its configuration."""
    config = reduced("ViT-H-14")
    config["text_cfg"]["vocab_size"] = 49408
    folder = cached(tmp_path / "home", "laion/wide")
    save(folder, config, theirs_of(config))
    flags = ["--do_eval", *msrvtt_flags]
    command = [sys.executable, "-c", RUNS, "hf-hub:laion/wide", *flags]
    clean = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "error: --pretrained_clip_name hf-hub:nobody/nothing: none of open_clip_model.safetensors" in ended.stderr
    assert "run `hf download nobody/nothing` on another machine" in ended.stderr
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "vision_width 1280" in log
    assert "vision_heads 16" in log
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["tower"], results["n_videos"]) == ("CLIP ViT-H/14", 12)
    assert results["weights"] == str(folder / "open_clip_model.safetensors")


def test_one_file_of_a_repository_and_its_revision(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = cached(tmp_path, "someone/model")
    torch.save({}, folder / "special.pt")
    assert fetch_from_hub("hf-hub:someone/model/special.pt", download=False) == folder / "special.pt"
    assert fetch_from_hub("hf-hub:someone/model/special.pt@main", download=False) == folder / "special.pt"
    assert not fetch_from_hub("hf-hub:someone/model@other", download=False).exists()
    with pytest.raises(DownloadError, match="hf-hub:not a name"):
        fetch_from_hub("hf-hub:not a name", download=False)


def test_the_flags_for_size_and_heads(msrvtt_flags, sample, tmp_path, capsys):
    """Another resolution and longer captions from the command line; a number of heads that cannot be is refused."""
    more = ["--image_size", "48", "--context_length", "120", "--max_words", "100", "--image_heads", "2"]
    assert main(["--do_eval", *msrvtt_flags, *more]) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "clip.visual.positional_embedding: [17, 64] in the file, [37, 64] here: interpolated" in log
    assert "clip.positional_embedding: [77, 64] in the file, [120, 64] here: interpolated" in log
    assert "vision_heads 2" in log
    assert main(["--do_eval", *msrvtt_flags, "--image_heads", "5"]) == 1
    assert "the image tower is 64 wide, 5 heads do not divide it; give --image_heads" in capsys.readouterr().err

"""Sample data, made once per test session by the project's own command; byte code, compiled once for all processes."""

import os
import sys
from pathlib import Path

import pytest

# Tests start some 150 processes; where Python keeps no byte code, each compiles all of torch anew: 1.7 s of CPU.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from tools.sample_data.__main__ import main as make_sample_data  # noqa: E402


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A folder with a small msrvtt sample (48 training clips, 12 test clips) and a tiny untrained CLIP."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample_data(
        [
            "--output_dir",
            str(folder),
            "--datatype",
            "msrvtt",
            "--seed",
            "5",
            "--n_train",
            "48",
            "--n_test",
            "12",
            "--resolution",
            "64",
            "--max_seconds",
            "3",
            "--clip_vision_layers",
            "2",
            "--clip_text_layers",
            "1",
            "--clip_vision_width",
            "64",
            "--clip_text_width",
            "64",
            "--clip_embed_dim",
            "64",
            "--clip_resolution",
            "32",
            "--clip_patch",
            "8",
        ]
    )
    return folder


@pytest.fixture
def msrvtt_flags(sample, tmp_path) -> list[str]:
    """Flags of every run on the sample, writing to a folder of the test's own."""
    data = sample / "msrvtt"
    return [
        "--datatype",
        "msrvtt",
        "--train_csv",
        f"{data}/MSRVTT_train.9k.csv",
        "--val_csv",
        f"{data}/MSRVTT_JSFUSION_test.csv",
        "--data_path",
        f"{data}/MSRVTT_data.json",
        "--features_path",
        f"{data}/videos/all",
        "--output_dir",
        f"{tmp_path}/out",
        "--max_frames",
        "3",
        "--num_thread_reader",
        "0",
        "--pretrained_clip_name",
        f"{sample}/clip/tiny_clip.pt",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="session")
def sample_all(tmp_path_factory) -> Path:
    """A folder with a small sample of each of the six datasets (24 / 8 / 12 clips) and a tiny untrained CLIP."""
    folder = tmp_path_factory.mktemp("sample_all")
    make_sample_data(
        [
            "--output_dir",
            str(folder),
            "--datatype",
            "all",
            "--seed",
            "3",
            "--n_train",
            "24",
            "--n_test",
            "12",
            "--resolution",
            "64",
            "--max_seconds",
            "3",
            "--clip_vision_layers",
            "1",
            "--clip_text_layers",
            "1",
            "--clip_vision_width",
            "64",
            "--clip_text_width",
            "64",
            "--clip_embed_dim",
            "64",
            "--clip_resolution",
            "32",
            "--clip_patch",
            "8",
        ]
    )
    return folder


# The slowest first: files run side by side, and one that starts last would keep one core waiting for the other.
SLOW = "test_scripts test_readme test_launch test_main_heads test_resume test_readme_plugins test_main".split()


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))

"""The README's commands: each is run, on sample data in place of the datasets it names."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools import flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The shell commands of a block, continuation lines joined, comments dropped."""
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def test_make_targets_do_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    assert [commands(block) for block in BLOCKS[:2]] == [[["make", "demo"]], [["make", "test"]]]
    for line in ("$(BIN)/python -m tools.demo", "$(BIN)/python -m pytest", "$(BIN)/ruff check ."):
        assert line in makefile


def test_the_demo(tmp_path):
    """The whole demo with fewer clips and one epoch: it ends by comparing the saved checkpoint's numbers itself."""
    out = tmp_path / "demo"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.demo",
            "--output_dir",
            str(out),
            "--epochs",
            "1",
            "--n_train",
            "64",
            "--n_test",
            "16",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("zero-shot, untrained CLIP", "fine-tuned, meanP", "its checkpoint, evaluated again"):
        assert title in done.stdout
        assert title in README
    for run in ("zero_shot", "fine_tune", "evaluate"):
        assert json.loads((out / run / "results.json").read_text())["n_videos"] == 16


@pytest.fixture(scope="module")
def msrvtt_home(sample, tmp_path_factory):
    """A folder laid out as the README's MSR-VTT section has it, holding the sample and a tiny CLIP."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    (home / "data" / "msrvtt").symlink_to(sample / "msrvtt")
    return home


def test_msrvtt_commands(msrvtt_home, sample):
    """Run from the README's text; only the interpreter, the weights and the batch size are replaced."""
    assignment, *rest = commands(next(block for block in BLOCKS if "MSRVTT" in block))
    variables = dict(item.split("=", 1) for item in assignment)
    replace = {
        ".venv/bin/python": sys.executable,
        "ViT-B/32": str(sample / "clip" / "tiny_clip.pt"),
        "main_task_retrieval.py": str(ROOT / "main_task_retrieval.py"),
        "--batch_size=128": "--batch_size=320",
        "--num_thread_reader=4": "--num_thread_reader=1",
        "--epochs=5": "--epochs=1",
    }
    assert len(rest) == 4
    for command in rest:
        words = [replace.get(word, word) for word in command]
        for name, value in variables.items():
            words = [word.replace(f"${name}", value) for word in words]
        done = subprocess.run(
            words,
            cwd=msrvtt_home,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    trained, scored = (
        json.loads((msrvtt_home / "runs" / name / "results.json").read_text())["metrics"]
        for name in ("msrvtt_meanP", "msrvtt_meanP_eval")
    )
    assert trained == scored


def test_other_datasets_command(sample_all, tmp_path):
    (words,) = commands(next(block for block in BLOCKS if "msvd" in block))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "msvd").symlink_to(sample_all / "msvd")
    weights = str(sample_all / "clip" / "tiny_clip.pt")
    words = [sys.executable, str(ROOT / words[1]), *(weights if word == "ViT-B/32" else word for word in words[2:])]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs" / "msvd_zero_shot" / "results.json").read_text())["n_videos"] == 12


def test_the_tree_is_true():
    """Every file the README's tree names exists, and every source file is named or covered by its folder."""
    tree = README[README.index("```text\nmain_task_retrieval.py") :]
    for folder in ("modules", "dataloaders"):
        part = tree[tree.index(f"\n{folder}/") + 1 :]
        named = set(re.findall(r"\b(\w+\.py)\b", part))
        missing = {path.name for path in (ROOT / folder).glob("*.py")} - named - {"__init__.py"}
        covered = {f"{name}.py" for name in ("msvd", "lsmdc", "activitynet", "didemo", "vatex", "registry")}
        assert missing <= covered, missing
    for name in re.findall(r"^([\w/]+\.py)", tree, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_commands_of_the_data_page(sample_all, tmp_path):
    """data/README.md: every check passes on the sample of its dataset; the copies and the sample are made."""
    (tmp_path / "data").mkdir()
    for folder in sample_all.iterdir():
        (tmp_path / "data" / folder.name).symlink_to(folder)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "data" / "README.md").read_text(), flags=re.DOTALL)
    lines = [words for block in blocks for words in commands(block)]
    assert [words[2] for words in lines].count("preprocess.check_dataset") == 6
    for words in lines:
        assert words[0] == ".venv/bin/python"
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "sample" / "didemo" / "test_data.json").exists()
    small = tmp_path / "data" / "msrvtt" / "videos" / "small"
    assert len(list(small.glob("*.mp4"))) == 36


def test_the_page_of_flags_is_what_the_parser_knows():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags.page()

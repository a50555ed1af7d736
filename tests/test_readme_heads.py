"""The head that the README shows is put into a copy of the tree, trained and evaluated: one file, no other change."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from test_main import TRAIN, replaced

ROOT = Path(__file__).parent.parent
TITLE = "### Add your own head in one file"


def example() -> tuple[str, str]:
    """(path in the tree, source) of the example."""
    section = next(
        text.split(TITLE)[1]
        for path in sorted(ROOT.glob("README*.md"))
        if TITLE in (text := path.read_text(encoding="utf-8"))
    )
    path = re.search(r"`(modules/heads/\w+\.py)`, in full:", section)[1]
    return path, re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_the_example_trains_and_evaluates_and_passes_the_tests_of_heads(msrvtt_flags, tmp_path):
    tree = tmp_path / "tree"
    for folder in ("engine", "modules", "checkpoints", "dataloaders", "tools", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("main_task_retrieval.py", "engine.data.py", "engine.plan.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    path, source = example()
    (tree / path).write_text(source, encoding="utf-8")
    name = re.search(r'@register\("(\w+)"\)', source)[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    flags = replaced(msrvtt_flags, sim_header=name)
    run("main_task_retrieval.py", *replaced(TRAIN, epochs=1), *flags)
    weights = tmp_path / "out" / "pytorch_model.bin"
    head = {k for k in torch.load(weights, weights_only=True) if not k.startswith("clip.")}
    assert head == {"frame_score.weight"}
    run("main_task_retrieval.py", "--do_eval", *replaced(flags, finetuned_path=weights, output_dir=tmp_path / "again"))
    results = [json.loads((tmp_path / out / "results.json").read_text())["metrics"] for out in ("out", "again")]
    assert results[0] == results[1]
    run("-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "tests/test_heads.py", "-k", f"{name}-no")

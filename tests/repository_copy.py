"""A copy of the repository to change and to run commands in; a helper of the README's tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".*", "__pycache__", "data", "golden", "runs", "weights")


def copy_repository(folder: Path) -> Path:
    """The files of the repository in `folder`, without data; its `.venv/bin` starts this interpreter."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copytree(ROOT / "data", folder / "data", ignore=lambda at, names: [n for n in names if n != "README.md"])
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, command in (("python", sys.executable), ("torchrun", f"{sys.executable} -m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


def run_in(folder: Path, *command: str, **variables: str) -> str:
    """Run a command in the copy with one thread; returns what it printed, and fails with that unless it succeeds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k != "PYTHON"}
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout

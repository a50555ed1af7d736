"""What else it takes to repeat a run: command line, code revision, device, and SHA-256 of the files it read."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.build import clip_path, weights_path
from engine.distributed import World
from engine.options import DataOptions, ModelOptions

ROOT = Path(__file__).resolve().parent.parent
ANNOTATION_SUFFIXES = (".json", ".csv", ".txt", ".pkl")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def annotation_paths(data: DataOptions) -> list[Path]:
    """The annotation files of a run; of a folder all that could be some, as they lie at its top."""
    found = []
    for path in (data.data_path, data.train_csv, data.val_csv):
        if path and path.is_dir():
            found += sorted(p for p in path.iterdir() if p.is_file() and p.suffix in ANNOTATION_SUFFIXES)
        elif path and path.is_file():
            found.append(path)
    return found


def starting_weights(model: ModelOptions) -> list[Path]:
    """The weight files that a run starts from: the one that decides, and the CLIP that --mergeclip averages it with."""
    decides = weights_path(model)
    merges = model.mergeclip and model.pretrained_path and decides == model.pretrained_path.expanduser()
    return [decides, clip_path(model)] if merges else [decides]


def git_revision(root: Path = ROOT) -> dict[str, Any] | None:
    """The commit of the code and whether tracked files differ from it; None when `root` is no git checkout."""
    if not (root / ".git").exists():
        return None
    try:
        revision, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision.strip(), "modified": bool(changes.strip())}


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def provenance(
    argv: Sequence[str], data: DataOptions, weights: Iterable[Path], world: World, seconds: float
) -> dict[str, Any]:
    """Keys of results.json. `argv`: the flags as given; `weights`: files read; `seconds`: of the whole run."""
    return {
        "command": ["main_task_retrieval.py", *argv],
        "folder": str(Path.cwd()),
        "git": git_revision(),
        "device": device_name(world),
        "processes": world.size,
        "run_seconds": round(seconds, 1),
        "sha256": {
            "annotations": {str(path): sha256_of(path) for path in annotation_paths(data)},
            "weights": {str(path): sha256_of(path) for path in weights},
        },
    }

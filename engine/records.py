"""The files a run leaves: results.json, similarity.npz, history.jsonl. Written whole or not at all."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.whole import write_whole
from engine.evaluate import Evaluation
from modules.metrics import LOOKS_AT


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"))


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "av", "opencv-python-headless", "ftfy", "regex"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def results(evaluation: Evaluation, options: dict[str, Any], weights: Path, selected_on: str | None) -> dict[str, Any]:
    """The content of results.json: what was measured, on what, how, with which weights."""
    split = evaluation.split
    return {
        "dataset": split.dataset,
        "split": split.name,
        "n_videos": len(split.videos),
        "n_captions": len(split.captions),
        "expected": {"videos": split.expected.videos, "captions": split.expected.captions},
        "missing_videos": list(split.missing_videos),
        "protocol": {"v2t": "caption_groups", "ties": "pessimistic", "selected_on": selected_on},
        "metrics": evaluation.metrics,
        "postprocessing": {kind: LOOKS_AT[kind] for kind in evaluation.metrics},
        "seconds": round(evaluation.seconds, 2),
        "options": options,
        "weights": str(weights),
        "versions": versions(),
    }


def write_similarity(path: Path, evaluation: Evaluation) -> None:
    """similarity.npz: `similarity` float32 [N, V], `caption_to_video`, `captions`, `video_ids`, `logit_scale` (the
    factor in the similarities), `same_dsl_axis`, and with ``--qb_norm`` `bank_similarity` float32 [B, V].
    """
    split = evaluation.split
    arrays = {
        "similarity": evaluation.similarity.numpy(),
        "caption_to_video": np.asarray(split.caption_to_video),
        "captions": np.array(split.captions),
        "video_ids": np.array([video.video_id for video in split.videos]),
        "logit_scale": np.float64(evaluation.scale),
        "same_dsl_axis": np.bool_(evaluation.same_dsl_axis),
    }
    if evaluation.bank is not None:
        arrays["bank_similarity"] = evaluation.bank.numpy()
    write_whole(path, lambda file: np.savez(file, **arrays))


def write_history(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(path, lambda file: file.write(text.encode()))

"""The files a run leaves, each written whole or not at all, and all that it takes to repeat the run."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.files import READ
from checkpoints.whole import write_whole
from engine.build import Weights
from engine.data import RunData
from engine.distributed import World
from engine.evaluate import Evaluation
from engine.memory import estimate_mb
from engine.options import Options
from engine.progress import log
from engine.scores import write_npz
from modules.encoders import Encoder
from modules.metrics import LOOKS_AT
from modules.model import VideoTextModel

ROOT = Path(__file__).resolve().parent.parent
# What changes the numbers of a checkpoint when evaluation differs from training.
SETTINGS = ("compat", "frame_rule", "feature_framerate", "max_frames", "max_words")
LAST, SELECTED, HISTORY = "checkpoint_last.pt", "pytorch_model.bin", "history.jsonl"
RESULTS, SIMILARITY = "results.json", "similarity.npz"
WRITTEN = ("log.txt", RESULTS, SIMILARITY, HISTORY, SELECTED, f"{SELECTED}.json", LAST)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"))


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "av", "opencv-python-headless", "ftfy", "regex"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def surroundings() -> dict[str, Any]:
    """Of results.json: what a run finds at its start and may be gone or another at its end."""
    return {"versions": versions(), "folder": str(Path.cwd()), "git": git_revision()}


def results(
    evaluation: Evaluation,
    options: Options,
    encoder: Encoder,
    world: World,
    data: RunData,
    read: list[Path],
    beside: Mapping[str, Any],
) -> dict[str, Any]:
    """Of results.json: what was measured, on what, how, with which weights: the last of the weight files `read`, and
    what stands beside it. Nothing is read here: a file may be gone by now."""
    split = evaluation.split
    return {
        "dataset": split.dataset,
        "split": split.name,
        "n_videos": len(split.videos),
        "n_captions": len(split.captions),
        "expected": {"videos": split.expected.videos, "captions": split.expected.captions},
        "missing_videos": list(split.missing_videos),
        "protocol": {"v2t": "caption_groups", "ties": "pessimistic", "selected_on": beside.get("selected_on")},
        "metrics": evaluation.metrics,
        "postprocessing": {kind: LOOKS_AT[kind] for kind in evaluation.metrics},
        "seconds": round(evaluation.seconds, 2),
        "options": options.as_dict(),
        "weights": str(read[-1]),
        "tower": encoder.tower,
        "activation": encoder.activation,
        "trained_in": beside.get("precision"),
        "training": beside.get("training"),
        "image": asdict(encoder.image),
        "evaluated_in": options.evaluation_precision,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "processes": world.size,
        "sha256": {
            "annotations": data.read,
            "weights": {str(path): READ[path] for path in read},
        },
    }


def write_results(found: Mapping[str, Any], evaluation: Evaluation, options: Options) -> None:
    """results.json with `found`, and with --save_similarity similarity.npz.

    That holds `similarity` float32 [N, V], `caption_to_video`, `captions`, `video_ids`, `logit_scale` (the factor in
    the similarities), `same_dsl_axis`, and with --qb_norm `bank_similarity` float32 [B, V].
    """
    folder, split = options.run.output_dir, evaluation.split
    (folder / SIMILARITY).unlink(missing_ok=True)  # one of an earlier run would belong to other results
    write_json(folder / RESULTS, found)
    if options.run.save_similarity:
        arrays: dict[str, Any] = {
            "similarity": evaluation.similarity,
            "caption_to_video": np.asarray(split.caption_to_video),
            "captions": np.array(split.captions),
            "video_ids": np.array([video.video_id for video in split.videos]),
            "logit_scale": np.float64(evaluation.scale),
            "same_dsl_axis": np.bool_(evaluation.same_dsl_axis),
        }
        if evaluation.bank is not None:
            arrays["bank_similarity"] = evaluation.bank
        write_whole(folder / SIMILARITY, lambda file: write_npz(file, arrays))
    log.info("wrote %s", folder / RESULTS)


def write_history(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(path, lambda file: file.write(text.encode()))


def trained_with(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much training was: the sums of the lines of history.jsonl, and the videos that could not be read."""
    amounts = ("steps", "dropped_steps", "clips", "dropped_clips")
    found: dict[str, Any] = {"epochs": len(history)}
    found |= {name: sum(line.get(name, 0) for line in history) for name in amounts}
    return found | {"dropped_videos": sorted({video for line in history for video in line["dropped_videos"]})}


def read_history(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def sidecar(model: VideoTextModel, options: Options, data: RunData) -> dict[str, Any]:
    """What stands beside weights that a run saves: how to build the model, and on what it was trained."""
    flags = options.as_dict()
    head: Any = model.head
    temporal = asdict(head.temporal.options) if hasattr(head, "temporal") else {}
    return {
        "activation": model.clip.activation,
        "encoder": model.clip.spec,
        "sim_header": options.model.sim_header,
        "interaction": options.model.interaction,
        "head_options": temporal | asdict(head.options),
        "loss": options.model.loss,
        "precision": options.run.precision,
        "selected_on": options.train.select_on,
        "trained_on": data.trained_on,
        "settings": {name: flags[name] for name in (*SETTINGS, *vars(options.own["frame_rule"]))},
    }


def warn_of_other_settings(trained: Mapping[str, Any], options: Options) -> None:
    """Say where a checkpoint of ours is evaluated with other settings than it was trained with."""
    now = options.as_dict()
    changed = [name for name, value in trained.items() if now.get(name, value) != value]
    differing = [f"--{name} {trained[name]} -> {now[name]}" for name in changed]
    if differing and not options.run.do_train:
        log.warning("the checkpoint was trained with other settings: %s", ", ".join(differing))


def plan(
    options: Options, world: World, data: RunData, weights: Weights, pairs: Any, model: VideoTextModel | None
) -> list[str]:
    """What a run would do, in lines. pairs: the loader of training; model: None where weights are to be downloaded."""
    run, training, scored = options.run, options.train, data.scored
    lines: list[str] = []
    for source in (weights, *([weights.clip] if weights.clip else [])):
        told = f"of --{source.flag}" if source.path.exists() else "will be downloaded"
        lines.append(f"weights: {source.path} ({told})")
    lines.append(f"on: {world.device}, {world.size} process(es), {run.precision}")
    files = [RESULTS, *([SIMILARITY] if run.save_similarity else [])]
    if data.train is not None:
        size, pieces, epochs = training.batch_size, training.gradient_accumulation_steps, training.epochs
        lines += [
            f"train: {len(data.train.videos)} videos, {len(pairs.dataset)} items; --batch_size {size} = {world.size} "
            f"process(es) x {size // world.size}, in {pieces} piece(s); {epochs} epochs x {len(pairs)} steps = "
            f"{epochs * len(pairs)} steps",
            f"selects the epoch on: {training.select_on} ({len(data.selection.videos)} videos)",
        ]
        if model is not None:
            standing, step = estimate_mb(model, options, size // world.size)
            lines.append(
                f"memory, estimated: {standing:.0f} MiB for weights, gradients and moments, {step:.0f} MiB more at the "
                "peak of a step, for each process"
            )
        files += [HISTORY, SELECTED, f"{SELECTED}.json", LAST]
    paths = [run.output_dir / name for name in files]
    written = (f"{path}{' (overwritten)' if path.exists() else ''}" for path in paths)
    left = "" if all(path.exists() for path in weights.files()) else "; the weights are yet to be downloaded"
    return [
        *lines,
        f"evaluate: {scored.dataset} {scored.name}: {len(scored.videos)} videos, {len(scored.captions)} captions, "
        f"{run.batch_size_val} clips a batch and process",
        f"writes: {', '.join(written)}",
        f"dry run: nothing is wrong up to the first step{left}",
    ]

"""Peak memory and time of training steps on one batch: in one piece, and in 8 pieces with cached features.

    python -m benchmarks.bench_memory [--batch 64] [--pieces 8] [--rounds 3] [--frames 12] [--device auto]

Both sides train the same model on the same batch, each in a process of its own, in random order within every round.
A step is whole: two passes where there are pieces, clipping, BertAdam. Peak: allocated on the CUDA device, or resident
in the process on the CPU. Printed: the peak of the process; the part of it that the step adds to model, gradients and
optimiser state ("step"); its seconds; and the ratios of the medians. The losses of both must agree.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

from checkpoints.read import ClipSizes
from engine.distributed import World
from engine.step import Trainer
from engine.watch import peak_memory_mb
from modules.encoders.clip import CLIP
from modules.heads import HEADS
from modules.heads.base import HeadOptions
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups

# ViT-B/32's patches at half its width and a third of its layers, a small vocabulary: the CPU is done in minutes.
SIZES = ClipSizes(
    embed_dim=512,
    image_resolution=224,
    vision_layers=4,
    vision_width=384,
    patch_size=32,
    context_length=77,
    vocab_size=1000,
    text_width=256,
    text_heads=4,
    text_layers=2,
    vision_heads=6,
)


def resident_mb(device: torch.device) -> float:
    """MiB in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 2**10


def make_batch(pairs: int, frames: int, seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 990, (pairs, 32), generator=generator)
    ids[:, -1] = 999
    pixels = torch.randint(0, 256, (pairs, frames, 3, 224, 224), generator=generator, dtype=torch.uint8)
    return SimpleNamespace(
        token_ids=ids,
        token_mask=torch.ones_like(ids, dtype=torch.bool),
        frames=pixels,
        frame_mask=torch.ones(pairs, frames, dtype=torch.bool),
        video_ids=(),
    )


def measure(pairs: int, frames: int, pieces: int, device: torch.device) -> dict[str, float]:
    """One side, in this process: MiB at the peak, MiB of it that the step adds, seconds of the step, its loss."""
    torch.manual_seed(0)
    model = VideoTextModel(CLIP(SIZES, "quick_gelu"), HEADS["meanP"](SIZES, HeadOptions())).to(device)
    optimizer = BertAdam(parameter_groups(model, 1e-4, 1.0, 0.2, "none"), lr=1e-4)
    trainer = Trainer(model, optimizer, World(0, 1, device), "fp32", 1.0, pieces)
    trainer.step(make_batch(8, 1, seed=0))  # the optimiser's state exists from here on
    batch = make_batch(pairs, frames, seed=1)
    standing, began = resident_mb(device), time.perf_counter()
    loss, _ = trainer.step(batch)
    seconds = time.perf_counter() - began
    peak = peak_memory_mb(device)
    return {"peak": peak, "step": peak - standing, "seconds": seconds, "loss": loss}


def measured_apart(options: argparse.Namespace, pieces: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_memory",
        "--side",
        str(pieces),
        "--batch",
        str(options.batch),
        "--frames",
        str(options.frames),
        "--device",
        options.device,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--side", type=int, default=0, help=argparse.SUPPRESS)  # pieces to measure in this process
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.side:
        device = torch.device(options.device, 0 if options.device == "cuda" else None)
        print(json.dumps(measure(options.batch, options.frames, options.side, device)))
        return
    found: dict[int, list[dict[str, float]]] = {1: [], options.pieces: []}
    for _ in range(options.rounds):
        for pieces in random.sample(sorted(found), 2):
            found[pieces].append(measured_apart(options, pieces))
    medians = {
        pieces: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for pieces, runs in found.items()
    }
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}; torch {torch.__version__}; batch {options.batch} x {options.frames} frames; {options.rounds} rounds"
    )
    for pieces, values in medians.items():
        print(
            f"{pieces:3} piece(s): peak {values['peak']:7.0f} MiB, step {values['step']:7.0f} MiB, "
            f"{values['seconds']:6.2f} s, loss {values['loss']:.6f}"
        )
    one, many = medians.values()
    print(
        f"ratio: peak {one['peak'] / many['peak']:.2f}x, step {one['step'] / many['step']:.2f}x smaller; "
        f"time {many['seconds'] / one['seconds']:.2f}x longer"
    )
    if abs(one["loss"] - many["loss"]) > 1e-4 * abs(one["loss"]):
        raise SystemExit("the losses differ: the sides did not do the same work")


if __name__ == "__main__":
    main()

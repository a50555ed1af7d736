"""Peak memory and time of training steps on one batch: in one piece, and in 8 pieces with cached features.

Both sides train the same model on the same batch, each in a process of its own, in random order within every round.
A step is whole: two passes where there are pieces, clipping, BertAdam. It is taken twice and the second is timed: the
first also chooses kernels and fills pools. Peak: allocated on the CUDA device, or resident in the process on the CPU.
Printed: the medians of the peak, of the part of it that the step adds to model, gradients and optimiser state
("step"), both in MiB, and of the step's seconds; and their ratios. The losses of both must agree.
"""

import argparse
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch

from engine.distributed import setup
from engine.progress import peak_memory_mb
from engine.step import Trainer
from modules.encoders.clip import CLIP, ClipSizes
from modules.heads import HEADS
from modules.model import VideoTextModel
from modules.optim import BertAdam, parameter_groups

# ViT-B/32's patches at half its width and a third of its layers, a small vocabulary: the CPU is done in minutes.
SIZES = {"embed_dim": 512, "image_resolution": 224, "patch_size": 32, "context_length": 77, "vocab_size": 1000}
SIZES |= {"vision_layers": 4, "vision_width": 384, "vision_heads": 6}
SIZES |= {"text_layers": 2, "text_width": 256, "text_heads": 4}


def make_batch(pairs: int, frames: int, seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 990, (pairs, 32), generator=generator)
    ids[:, -1] = 999
    pixels = torch.randint(0, 256, (pairs, frames, 3, 224, 224), generator=generator, dtype=torch.uint8)
    masks = {"token_mask": torch.ones(pairs, 32) > 0, "frame_mask": torch.ones(pairs, frames) > 0}
    return SimpleNamespace(token_ids=ids, frames=pixels, video_ids=(), **masks)


def measure(pairs: int, frames: int, pieces: int, device: str) -> dict[str, float]:
    """One side, in this process: MiB at the peak, MiB of it that the step adds, seconds of the step, its loss."""
    world = setup(device)
    torch.manual_seed(0)
    encoder = CLIP(ClipSizes(**SIZES), "quick_gelu")
    model = VideoTextModel(encoder, HEADS["meanP"](encoder.head_sizes)).to(world.device)
    optimizer = BertAdam(parameter_groups(model.named_parameters(), 1e-4, 1.0, 0.2), lr=1e-4)
    trainer = Trainer(model, optimizer, world, "fp32", 1.0, pieces)
    trainer.step(make_batch(8, 1, seed=0))  # the optimiser's state exists from here on
    batch, losses, on_cuda = make_batch(pairs, frames, seed=1), [], world.device.type == "cuda"
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    standing = torch.cuda.memory_allocated(world.device) if on_cuda else resident
    for _ in range(2):
        began = time.perf_counter()
        losses.append(trainer.step(batch)[0])
        if on_cuda:
            torch.cuda.synchronize(world.device)
    seconds, peak = time.perf_counter() - began, peak_memory_mb(world.device)
    return {"pieces": pieces, "peak": peak, "step": peak - standing / 2**20, "seconds": seconds, "loss": losses[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 64, "pieces": 8, "rounds": 3, "frames": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args()
    sides, runs = (1, options.pieces), []
    for pieces in [side for _ in range(options.rounds) for side in random.sample(sides, 2)]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            runs.append(process.submit(measure, options.batch, options.frames, pieces, options.device).result())
    medians = pd.DataFrame(runs).groupby("pieces").median()
    on_cuda = setup(options.device).device.type == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    batch = f"batch {options.batch} x {options.frames} frames, {options.rounds} rounds"
    print(f"{name}; torch {torch.__version__}; {batch}")
    print(medians.to_string(float_format="{:.3f}".format))
    one, many = (medians.loc[pieces] for pieces in sides)
    smaller, longer = one / many, many["seconds"] / one["seconds"]
    print(f"peak {smaller['peak']:.2f} times, step {smaller['step']:.2f} times smaller; time {longer:.2f} times longer")
    if abs(one["loss"] - many["loss"]) > 1e-4 * abs(one["loss"]):
        raise SystemExit("the losses differ: the sides did not do the same work")


if __name__ == "__main__":
    main()
